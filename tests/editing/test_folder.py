"""What of an EDITS folder is written, kept, and read again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from coachhook import attach
from coachhook.editing import Editor, EditRequest
from coachhook.editing.folder import load_payloads, load_state, revert_folder, save_state
from coachhook.editing.state import EditState
from coachhook.errors import FormatError
from coachhook.store import folder_sizes, load_folder, save_folder


def _factor_file(path):
    manifest, _ = load_folder(path, "edits")
    files = manifest["files"].items()
    return next(path / name for name, entry in files if entry["tensors"] == [_FACTOR])


_FACTOR = "layer.0.memory.factor"
# What is written is the matter here, not how well.
QUICK = {"rewordings": 0, "target_steps": 2}


def test_the_factor_is_packed_and_comes_back_bit_for_bit(make_editor, requests, tmp_path):
    editor, *_ = make_editor(**QUICK)
    editor.edit(requests[:2])
    editor.save(tmp_path / "edits")
    memory = editor._state.layers[0].memory
    n = memory.in_features
    found = load_state(tmp_path / "edits").layers[0].memory
    assert torch.equal(found._factor, memory._factor)
    groups = {g.name: g for g in folder_sizes(tmp_path / "edits", "edits").groups}
    assert groups["memory.factor"].bytes == n * (n + 1) // 2 * 8


def test_later_saves_take_the_factor_over_until_keys_are_folded(make_editor, requests, tmp_path):
    path = tmp_path / "edits"
    editor, model, tokenizer = make_editor(**QUICK)
    editor.edit(requests[:1])
    editor.save(path)
    first = _factor_file(path).stat()
    editor.edit(requests[1:2])
    editor.save(path)
    editor.revert(2)
    editor.save(path)
    editor.detach()
    loaded = Editor.load(model, tokenizer, path)
    loaded.save(path)
    now = _factor_file(path).stat()
    assert (now.st_ino, now.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    memory = loaded._state.layers[0].memory
    memory.fold(memory.num_keys)
    loaded.save(path)
    loaded.detach()
    assert _factor_file(path).stat().st_ino != first.st_ino
    assert torch.equal(load_state(path).layers[0].memory._factor, memory._factor)


@pytest.mark.parametrize("version", [1, 2])
def test_folders_of_earlier_format_versions_load_and_go_on(
    make_editor, requests, tmp_path, version
):
    """All was in one, the factor square at first, and Python's NaN stood in the manifest."""
    path = tmp_path / "old"
    editor, model, tokenizer = make_editor(**QUICK)
    for i in range(2):
        editor.edit(requests[i : i + 1])
    editor.save(tmp_path / "new")
    manifest, tensors = load_folder(tmp_path / "new", "edits")
    apart = {k: tensors[k].clone() for k in tensors if ".memory." not in k}
    memory, payload = editor._state.layers[0].memory, editor._state.payload(0)
    apart |= {f"layer.0.memory.{k}": v.clone() for k, v in memory.state_dict()[0].items()}
    apart |= {f"layer.0.hook.{k}": v for k, v in payload.tensors.items()}
    if version == 2:
        apart[_FACTOR] = tensors[_FACTOR].clone()
    del manifest["segments"], manifest["layers"]["0"]["out_features"]
    save_folder(path, kind="edits", manifest=manifest, tensors=apart)
    file = path / "manifest.json"
    content = json.loads(file.read_text()) | {"format_version": version}
    content["batches"]["1"]["losses"][0] = float("nan")
    del content["checksum"]
    file.write_text(json.dumps(content))
    state = load_state(path)
    assert state.batches[1].losses[0] != state.batches[1].losses[0]
    _same_memories(state, editor._state)
    _same_payloads(load_payloads(path)[1][0], payload)
    editor.detach()

    again = Editor.load(model, tokenizer, path)
    again.edit(requests[2:3])
    again.save(path)
    again.detach()
    _same_memories(load_state(path), again._state)
    _same_payloads(load_payloads(path)[1][0], again._state.payload(0))


def test_how_far_apart_the_tokens_of_a_cue_are_comes_back(make_editor, requests, tmp_path):
    """It lies with the batches alone, and in folders of before it nowhere."""
    path = tmp_path / "edits"
    editor, model, tokenizer = make_editor(**QUICK)
    editor.edit(requests[:2])
    editor.edit(requests[2:4])
    state = editor._state
    for record in state.batches.values():
        record.gaps = {0: [1 + i % 3 for i in range(len(record.slots))]}
    editor.save(path)
    editor.detach()
    gaps = state.cues(0)["gaps"]
    assert len(set(gaps.tolist())) > 2
    found = load_state(path)
    assert [b.gaps for b in found.batches.values()] == [b.gaps for b in state.batches.values()]
    assert torch.equal(found.cues(0)["gaps"], gaps)
    _same_payloads(load_payloads(path)[1][0], state.payload(0))
    again = Editor.load(model, tokenizer, path)
    assert torch.equal(again.hooks[0].cues()["gaps"].cpu(), gaps)
    again.save(path)
    again.detach()

    manifest, tensors = load_folder(path, "edits")
    assert not any(name.endswith("gaps") for name in tensors)
    assert [batch.pop("gaps") for batch in manifest["batches"].values()] == [
        {"0": record.gaps[0]} for record in state.batches.values()
    ]
    old, kept = tmp_path / "old", {name: tensors[name].clone() for name in tensors}
    save_folder(old, kind="edits", manifest=manifest, tensors=kept)
    assert all(record.gaps == {} for record in load_state(old).batches.values())
    tensors = load_payloads(old)[1][0].tensors
    assert not tensors["gaps"].any() and torch.equal(tensors["cues"], state.cues(0)["cues"])
    with attach(model, old) as handle:
        assert not handle.hooks[0].cues()["gaps"].any()


def _same_memories(one, other):
    assert one.layers.keys() == other.layers.keys()
    for layer in one.layers:
        found, values = one.layers[layer].memory.state_dict()
        expected, same = other.layers[layer].memory.state_dict()
        assert found.keys() == expected.keys() and values == same
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name


def _same_payloads(one, other):
    assert (one.kind, one.alpha, one.population) == (other.kind, other.alpha, other.population)
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


def _homes(path):
    """Tensors by the file that they lie in, which is known by its inode and time of writing."""
    manifest, _ = load_folder(path, "edits")
    found = {}
    for name, entry in manifest["files"].items():
        status = (path / name).stat()
        found[status.st_ino, status.st_mtime_ns] = frozenset(entry["tensors"])
    return found


def _kept(before, after):
    """Tensors whose files were taken over."""
    return set().union(*(names for file, names in after.items() if before.get(file) == names))


def _rows(number):
    parts = ("keys", "solved", "targets", "border", "corner")
    return {f"layer.0.memory.rows.{number}.{part}" for part in parts}


def test_a_save_writes_what_the_last_batch_brought(make_editor, requests, tmp_path):
    path, moved = tmp_path / "edits", tmp_path / "moved"
    editor, model, tokenizer = make_editor(**QUICK)
    editor.edit(requests[:1])
    editor.save(path)
    first = _homes(path)
    editor.edit(requests[1:2])
    editor.save(path)
    second = _homes(path)
    of_one = {_FACTOR, "layer.0.sample", "targets.1", "cues.1.0"} | _rows(1)
    assert _kept(first, second) == of_one
    _same_memories(load_state(path), editor._state)
    _same_payloads(load_payloads(path)[1][0], editor._state.payload(0))

    # Of what was taken back and edited otherwise nothing is left, though the rows are as many.
    before = editor._state.layers[0].memory.num_keys
    editor.revert(2)
    editor.edit(requests[1:2])
    assert editor._state.layers[0].memory.num_keys == before
    editor.save(path)
    assert _kept(second, _homes(path)) == of_one
    _same_memories(load_state(path), editor._state)
    editor.detach()

    # Also in a folder that was moved, and that another process goes on with.
    path.rename(moved)
    third, again = _homes(moved), Editor.load(model, tokenizer, moved)
    again.edit(requests[2:3])
    again.save(moved)
    again.detach()
    assert _kept(third, _homes(moved)) == of_one | _rows(3) | {"targets.3", "cues.3.0"}
    _same_memories(load_state(moved), again._state)


def test_a_batch_from_the_middle_is_taken_back_in_the_folder(make_editor, requests, tmp_path):
    path = tmp_path / "edits"
    editor, *_ = make_editor(**QUICK)
    for i in range(3):
        editor.edit(requests[i : i + 1])
        editor.save(path)
    before = _homes(path)
    revert_folder(path, 2)
    kept = _kept(before, _homes(path))
    assert kept > _rows(1) and not kept & _rows(2) and not kept & _rows(3)
    assert "targets.3" in kept
    editor.revert(2)
    state = load_state(path)
    _same_memories(state, editor._state)
    assert list(state.batches) == [1, 3]
    _same_payloads(load_payloads(path)[1][0], editor._state.payload(0))


def test_a_failed_batch_leaves_nothing_in_later_saves(make_editor, requests, tmp_path, monkeypatch):
    path = tmp_path / "edits"
    editor, *_ = make_editor(**QUICK)
    editor.edit(requests[:1])
    editor.save(path)

    def fail(*_):
        raise ArithmeticError("late")

    with monkeypatch.context() as patched:
        patched.setattr(editor, "_bounds", fail)
        with pytest.raises(ArithmeticError):
            editor.edit(requests[1:2])
    editor.edit(requests[1:2])
    editor.save(path)
    _same_memories(load_state(path), editor._state)


def test_folded_keys_are_written_once(make_editor, requests, tmp_path):
    path = tmp_path / "edits"
    editor, model, tokenizer = make_editor(
        scope="population", key_pooling="mean", max_keys=2, **QUICK
    )
    editor.edit(requests[:3])
    editor.save(path)
    editor.edit(requests[3:5])
    editor.save(path)
    before = _homes(path)
    assert editor._state.layers[0].memory.num_folded == 4
    editor.edit(requests[5:6])
    editor.save(path)
    folded = {f"layer.0.memory.folded.{i}.{x}" for i in (1, 2) for x in ("keys", "targets")}
    assert _kept(before, _homes(path)) >= folded | {_FACTOR, "layer.0.memory.base"}
    _same_memories(load_state(path), editor._state)
    editor.detach()
    again = Editor.load(model, tokenizer, path)
    again.revert(1)
    again.edit(requests[6:8])
    again.save(path)
    again.detach()
    _same_memories(load_state(path), again._state)


def test_published_edits_are_kept(make_editor, requests, tmp_path):
    path = tmp_path / "edits"
    editor, *_ = make_editor("paper", target_steps=2)
    editor.edit(requests[:2])
    editor.save(path)
    before = _homes(path)
    editor.edit(requests[2:3])
    editor.save(path)
    layers = editor.config.layers
    kept = {f"layer.{i}.memory.{part}" for i in layers for part in ("prior", "frozen")}
    assert _kept(before, _homes(path)) >= kept | {"targets.1"}
    _same_memories(load_state(path), editor._state)


@pytest.mark.parametrize("damage", ["fewer", "part", "missing"])
def test_segments_that_do_not_fit_are_refused(make_editor, requests, tmp_path, damage):
    editor, *_ = make_editor(**QUICK)
    for i in range(2):
        editor.edit(requests[i : i + 1])
        editor.save(tmp_path / "edits")
    manifest, tensors = load_folder(tmp_path / "edits", "edits")
    everything = {name: tensors[name].clone() for name in tensors}
    segments = manifest["segments"]["layer.0.memory.rows"]
    if damage == "fewer":
        segments.pop()
    elif damage == "part":
        segments[0][1] -= 1
    else:
        del everything["layer.0.memory.rows.2.border"]
    save_folder(tmp_path / "edits", kind="edits", manifest=manifest, tensors=everything)
    with pytest.raises(FormatError, match="must hold complete edits"):
        load_state(tmp_path / "edits")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_survive_in_strict_json(make_editor, requests, tmp_path, value):
    editor, *_ = make_editor(**QUICK)
    editor.edit(requests[:1])
    record = editor._state.batches[1]
    record.losses[0] = value
    record.bounds[0] = value
    editor.save(tmp_path / "edits")

    def bare(name):
        raise AssertionError(name)

    json.loads((tmp_path / "edits" / "manifest.json").read_text(), parse_constant=bare)
    found = load_state(tmp_path / "edits").batches[1]
    for kept in (found.losses[0], found.bounds[0]):
        assert kept == value or (kept != kept and value != value)


def test_a_damaged_triangle_is_refused(make_editor, requests, tmp_path):
    editor, *_ = make_editor(**QUICK)
    editor.edit(requests[:1])
    editor.save(tmp_path / "edits")
    manifest, tensors = load_folder(tmp_path / "edits", "edits")
    everything = {name: tensors[name].clone() for name in tensors}
    everything[_FACTOR] = everything[_FACTOR][:-1]
    save_folder(tmp_path / "edits", kind="edits", manifest=manifest, tensors=everything)
    with pytest.raises(FormatError, match="must hold complete edits"):
        load_state(tmp_path / "edits")


@pytest.mark.parametrize("name", [0, 7, "", "a", None])
def test_ids_come_back(name):
    request = EditRequest("{} is", "A", "new", id=name)
    assert EditRequest.from_dict(request.to_dict()) == request


@pytest.mark.parametrize("name", [np.int64(3), {1, 2}, "\ud800"], ids=["numpy", "set", "half"])
def test_ids_that_could_not_be_saved_are_refused(name):
    with pytest.raises((TypeError, ValueError), match="EditRequest: id must be"):
        EditRequest("{} is", "A", "new", id=name)


def test_memories_are_put_where_their_layers_are(make_editor, requests, tmp_path):
    """As those of a new Editor; keys in the prior stay on the CPU."""
    path = tmp_path / "edits"
    editor, model, _ = make_editor(scope="population", max_keys=4, **QUICK)
    editor.edit(requests[:2])
    editor.save(path)
    editor.detach()
    alone = load_state(path).layers[0].memory
    assert alone.num_folded and alone.device.type == "cpu"
    beside = load_state(path, model=model.to("meta")).layers[0].memory
    assert beside.device.type == "meta" and beside.num_keys == alone.num_keys
    for name, tensor in beside.state_dict()[0].items():
        assert tensor.device.type == ("cpu" if name.startswith("folded.") else "meta")


def test_what_something_else_wrote_meanwhile_is_not_lost(make_editor, requests, tmp_path):
    path, link = tmp_path / "edits", tmp_path / "link"
    link.symlink_to(path)
    editor, model, tokenizer = make_editor(**QUICK)
    editor.edit(requests[:1])
    editor.edit(requests[1:2])
    editor.save(path)
    one, other = load_state(path), load_state(link)
    revert_folder(path, 1)
    other.remove(2)
    for place in (path, link):
        with pytest.raises(ValueError, match="last read there, got .*edits, which something else"):
            save_state(place, other)
        with pytest.raises(ValueError, match="something else has written meanwhile"):
            editor.save(place)
    assert list(load_state(path).batches) == [2]
    with pytest.raises(ValueError, match="must hold nothing yet"):
        save_state(path, EditState(one.config, one.layers), model, replace=False)
    editor.save(tmp_path / "elsewhere")
    assert list(load_state(tmp_path / "elsewhere").batches) == [1, 2]

    # Read again, or taken away, it is written, and again after that.
    editor.detach()
    again = Editor.load(model, tokenizer, path)
    again.revert(2)
    again.save(link)
    again.save(path, replace=False)
    assert list(load_state(path).batches) == []
    shutil.rmtree(path)
    again.save(path)
    again.detach()
