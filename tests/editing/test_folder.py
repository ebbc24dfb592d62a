"""What of an EDITS folder is written, kept, and read again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from coachhook.editing import Editor, EditRequest
from coachhook.editing.folder import load_state, revert_folder, save_state
from coachhook.editing.state import EditState
from coachhook.store import folder_sizes, load_folder, save_folder


def _factor_file(path):
    manifest, _ = load_folder(path, "edits")
    files = manifest["files"].items()
    return next(path / name for name, entry in files if entry["tensors"] == [_FACTOR])


_FACTOR = "layer.0.memory.factor"


def test_the_factor_is_packed_and_comes_back_bit_for_bit(make_editor, requests, tmp_path):
    editor, *_ = make_editor()
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
    editor, model, tokenizer = make_editor()
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


def test_folders_of_format_version_1_load(make_editor, requests, tmp_path):
    """The factor was square then, and Python's NaN stood in the manifest."""
    editor, *_ = make_editor()
    editor.edit(requests[:2])
    editor.save(tmp_path / "new")
    manifest, tensors = load_folder(tmp_path / "new", "edits")
    everything = {name: tensors[name].clone() for name in tensors}
    everything[_FACTOR] = editor._state.layers[0].memory._factor
    save_folder(tmp_path / "old", kind="edits", manifest=manifest, tensors=everything)
    file = tmp_path / "old" / "manifest.json"
    content = json.loads(file.read_text()) | {"format_version": 1}
    content["batches"]["1"]["losses"][0] = float("nan")
    del content["checksum"]
    file.write_text(json.dumps(content))
    state = load_state(tmp_path / "old")
    assert state.batches[1].losses[0] != state.batches[1].losses[0]
    expected, _ = editor._state.layers[0].memory.state_dict()
    found, _ = state.layers[0].memory.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_survive_in_strict_json(make_editor, requests, tmp_path, value):
    editor, *_ = make_editor()
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
    from coachhook.errors import FormatError

    editor, *_ = make_editor()
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
    editor, model, _ = make_editor(scope="population", max_keys=4, rewordings=0, target_steps=2)
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
    editor, model, tokenizer = make_editor()
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
