from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch

from coachhook.errors import FormatError
from coachhook.store import check_fields, files, load_folder, read_manifest, save_folder


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "edits"
    tensors = {"layer.0.V": torch.randn(3, 70_000), "layer.0.At": torch.randn(4, 5)}
    save_folder(path, kind="edits", manifest={"alphas": {"0": 1.5}}, tensors=tensors)
    return path


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    value = (torch.randn(7, 5) * 3).to(dtype)
    tensors = {"a": value, "transposed": value.T, "scalar": value[0, 0], "empty": value[:0]}
    save_folder(tmp_path / "x", kind="edits", manifest={}, tensors=tensors)
    _, loaded = load_folder(tmp_path / "x", "edits")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)


def test_manifest_comes_back_and_can_be_saved_again(folder, tmp_path):
    manifest, tensors = load_folder(folder, "edits")
    assert manifest["alphas"] == {"0": 1.5}
    save_folder(tmp_path / "copy", kind="edits", manifest=manifest, tensors=tensors)
    assert read_manifest(tmp_path / "copy", "edits") == manifest


def test_equal_content_makes_equal_files(folder, tmp_path):
    manifest, tensors = load_folder(folder, "edits")
    save_folder(tmp_path / "copy", kind="edits", manifest=manifest, tensors=tensors)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()


def test_tensors_are_made_one_by_one_and_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SHARD_BYTES", 1000)
    made = []

    def make(i):
        def source():
            made.append(i)
            return torch.full((200,), float(i))

        return source

    save_folder(
        tmp_path / "x", kind="edits", manifest={}, tensors={f"t{i}": make(i) for i in range(5)}
    )
    assert made == [0, 1, 2, 3, 4]
    manifest, tensors = load_folder(tmp_path / "x", "edits")
    assert len(manifest["files"]) == 5
    assert [float(tensors[f"t{i}"][0]) for i in range(5)] == [0, 1, 2, 3, 4]


def test_tensors_that_share_memory_are_saved(tmp_path):
    base = torch.randn(4, 4)
    save_folder(
        tmp_path / "x", kind="edits", manifest={}, tensors={"a": base, "b": base, "c": base[1]}
    )
    _, tensors = load_folder(tmp_path / "x", "edits")
    assert torch.equal(tensors["a"], tensors["b"]) and torch.equal(tensors["c"], base[1])


def test_loaded_tensors_survive_a_replacement(folder):
    _, tensors = load_folder(folder, "edits")
    expected = tensors["layer.0.At"].clone()
    save_folder(folder, kind="edits", manifest={}, tensors={"other": torch.zeros(2)})
    assert torch.equal(tensors["layer.0.At"], expected)
    assert list(load_folder(folder, "edits")[1]) == ["other"]


@pytest.fixture
def kept_folder(tmp_path):
    """A folder with a set of its own, and a function that writes it again, unchanged or not."""
    path, last = tmp_path / "kept", []

    def write(factor, unchanged=(), replaces=None, **tensors):
        replaces = last[-1] if last and replaces is None else replaces
        version = save_folder(
            path,
            kind="edits",
            manifest={},
            tensors=tensors,
            sets=[{"a.factor": lambda: factor, "a.more": torch.ones(3)}],
            unchanged=unchanged,
            replaces=replaces,
        )
        last.append(version)
        entries = read_manifest(path, "edits")["files"]
        return next(path / f for f, entry in entries.items() if "a.factor" in entry["tensors"])

    return write


_SET = ("a.factor", "a.more")


def _identity(file):
    return file.stat().st_ino, file.stat().st_mtime_ns


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8])
def test_what_is_unchanged_keeps_its_file(kept_folder, dtype):
    factor = torch.randn(300).to(dtype)
    before = _identity(kept_folder(factor, x=torch.zeros(3)))
    file = kept_folder(factor, _SET, x=torch.ones(3), y=torch.ones(5))
    assert _identity(file) == before
    _, tensors = load_folder(file.parent, "edits")
    assert torch.equal(tensors["a.factor"], factor) and float(tensors["x"].sum()) == 3
    assert torch.equal(tensors["a.more"], torch.ones(3))
    assert file.stat().st_nlink == 1  # the old folder is gone


@pytest.mark.parametrize("unchanged", [(), ("a.factor",), ("a.more", "x")])
def test_a_file_with_anything_that_changed_is_written(kept_folder, unchanged):
    first = kept_folder(torch.zeros(300))
    _, held = load_folder(first.parent, "edits")
    before = _identity(first)
    file = kept_folder(torch.ones(300), unchanged)
    assert _identity(file) != before
    _, tensors = load_folder(file.parent, "edits")
    assert torch.equal(tensors["a.factor"], torch.ones(300))
    assert torch.equal(held["a.factor"], torch.zeros(300))  # readers of the old one go on


def test_nothing_is_taken_over_from_another_write(kept_folder, tmp_path):
    first = kept_folder(torch.zeros(300))
    save_folder(first.parent, kind="edits", manifest={}, tensors={"a.factor": torch.ones(300)})
    with pytest.raises(ValueError, match="something else has written meanwhile"):
        kept_folder(torch.zeros(300), _SET)
    assert torch.equal(load_folder(first.parent, "edits")[1]["a.factor"], torch.ones(300))
    version = save_folder(tmp_path / "other", kind="edits", manifest={"n": 2}, tensors={})
    found = save_folder(
        tmp_path / "new",
        kind="edits",
        manifest={},
        tensors={},
        sets=[{"a.factor": torch.zeros(3)}],
        unchanged=_SET,
        replaces=version,
    )
    manifest, tensors = load_folder(tmp_path / "new", "edits")
    assert files.version_of(manifest) == found and len(tensors["a.factor"]) == 3


def test_without_hard_links_what_is_unchanged_is_written_again(kept_folder, monkeypatch):
    factor = torch.randn(300)
    before = _identity(kept_folder(factor))

    def refuse(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(files.os, "link", refuse)
    file = kept_folder(factor, _SET)
    assert _identity(file) != before
    assert torch.equal(load_folder(file.parent, "edits")[1]["a.factor"], factor)


def test_a_damaged_file_is_not_taken_over(kept_folder):
    factor = torch.randn(300)
    file = kept_folder(factor)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    file = kept_folder(factor, _SET)
    assert torch.equal(load_folder(file.parent, "edits")[1]["a.factor"], factor)


def test_numbers_that_are_not_finite_come_back_and_are_strict_json(tmp_path):
    values = {"list": [1.5, math.nan, (math.inf,)], "deep": {"x": -math.inf, "name": "NaN"}}
    for _ in range(2):  # what was loaded can be saved
        save_folder(tmp_path / "x", kind="edits", manifest=values, tensors={})

        def bare(name):
            raise AssertionError(f"{name} is not JSON")

        json.loads((tmp_path / "x" / "manifest.json").read_text(), parse_constant=bare)
        values, _ = load_folder(tmp_path / "x", "edits")
        assert values["list"][0] == 1.5 and math.isnan(values["list"][1])
        assert values["list"][2] == [math.inf]
        assert values["deep"] == {"x": -math.inf, "name": "NaN"}


def test_bare_nan_of_older_folders_is_read(folder):
    file = folder / "manifest.json"
    content = json.loads(file.read_text().replace("1.5", "NaN"))
    del content["checksum"]
    file.write_text(json.dumps(content))
    assert math.isnan(load_folder(folder, "edits")[0]["alphas"]["0"])


def test_files_are_as_readable_as_the_manifest(folder):
    modes = {file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_tensor_file_is_named(folder, keep):
    file = folder / "tensors-00001.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"tensors-00001.*truncated") as caught:
        load_folder(folder, "edits")
    assert "make the folder again" in str(caught.value)


def test_garbage_of_the_right_size_is_noticed(folder):
    file = folder / "tensors-00001.safetensors"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(FormatError, match=r"tensors-00001.*damaged"):
        load_folder(folder, "edits")


def test_one_flipped_bit_in_a_small_file_is_noticed(folder):
    file = folder / "tensors-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(FormatError, match="damaged"):
        load_folder(folder, "edits")


def test_files_of_two_writes_are_told_apart(folder, tmp_path):
    other = tmp_path / "other"
    tensors = {"layer.0.V": torch.randn(3, 70_000), "layer.0.At": torch.randn(4, 5)}
    save_folder(other, kind="edits", manifest={"alphas": {"0": 1.5}}, tensors=tensors)
    shutil.copy(other / "tensors-00001.safetensors", folder)
    with pytest.raises(FormatError, match="another write"):
        load_folder(folder, "edits")


def test_a_file_that_is_no_safetensors_is_named(folder):
    file = folder / "tensors-00001.safetensors"
    file.write_bytes(b"x" * 50)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file.name].update(bytes=50, checksum=files._checksum(file))
    del manifest["checksum"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="must be safetensors"):
        load_folder(folder, "edits")


def test_a_missing_file_is_named(folder):
    (folder / "tensors-00001.safetensors").unlink()
    with pytest.raises(FormatError, match=r"tensors-00001.*No such file"):
        load_folder(folder, "edits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("files"), "files must be dict, got nothing"),
        (lambda m: m.update(format="coachhook-statistics"), "must hold coachhook edits"),
        (lambda m: m.update(format_version=99), "format version 3 or older, got 99"),
        (lambda m: m.update(format_version="1"), "format_version must be int, got '1'"),
        (lambda m: m.update(format_version=True), "format_version must be int, got True"),
        (lambda m: m["files"].update({"../x": {}}), "plain names"),
        (lambda m: m["files"].update({"x": {"bytes": 1}}), "checksum must be str"),
    ],
)
def test_a_wrong_manifest_is_refused(folder, change, message):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=message):
        load_folder(folder, "edits")


@pytest.mark.parametrize("content", [b"", b'{"format": "coach', b"[1]", b"\xff\xfe{}"])
def test_a_damaged_manifest_is_named(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"manifest\.json must be"):
        load_folder(folder, "edits")


def test_any_flipped_bit_in_a_manifest_is_noticed_or_changes_nothing(folder):
    file = folder / "manifest.json"
    whole, expected = file.read_bytes(), load_folder(folder, "edits")[0]
    accepted = []
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            found = load_folder(folder, "edits")[0]
        except FormatError:
            continue
        accepted.append(found)
    # Of the space between fields, and of the name of the checksum itself.
    del expected["checksum"]
    assert all(all(found[k] == v for k, v in expected.items()) for found in accepted)


def test_what_is_not_a_folder_of_ours_is_refused(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        load_folder(tmp_path / "nothing", "edits")
    with pytest.raises(FormatError, match=r"with a manifest\.json"):
        load_folder(tmp_path, "edits")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match=r"with a manifest\.json"):
        load_folder(tmp_path / "file", "edits")


def test_another_kind_is_neither_replaced_nor_loaded(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match="hold coachhook statistics"):
        save_folder(folder, kind="statistics", manifest={}, tensors={})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    with pytest.raises(FormatError, match="must hold coachhook statistics"):
        load_folder(folder, "statistics")


def test_a_value_that_is_not_json_changes_nothing(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(TypeError, match="JSON serializable"):
        save_folder(folder, kind="edits", manifest={"bad": object()}, tensors={})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of a file's size there")
def test_a_disk_without_room_is_said_and_changes_nothing(folder):
    import resource

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
    try:
        with pytest.raises(OSError, match=r"must have room for what is written, got: "):
            save_folder(folder, kind="edits", manifest={}, tensors={"a": torch.ones(2_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_check_fields():
    check_fields({"a": 1, "b": None, "c": 2}, {"a": int, "b": (str, type(None)), "c": float}, "f")
    with pytest.raises(FormatError, match=r"f: b must be str or null, got 3"):
        check_fields({"b": 3}, {"b": (str, type(None))}, "f")
    with pytest.raises(FormatError, match="must be a JSON object, got list"):
        check_fields([], {}, "f")
