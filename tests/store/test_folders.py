from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

from coachhook.errors import FormatError
from coachhook.store import (
    check_writable,
    files,
    folders,
    load_folder,
    save_folder,
    write_folder_atomically,
)
from coachhook.store.folders import current_folder
from tests import processes


def _write(text):
    def writer(folder: Path) -> None:
        (folder / "manifest.json").write_text(text)

    return writer


def _leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_writes_a_new_folder_and_its_parents(tmp_path):
    write_folder_atomically(tmp_path / "a" / "b" / "out", _write("1"))
    assert (tmp_path / "a" / "b" / "out" / "manifest.json").read_text() == "1"
    assert _leftovers(tmp_path / "a" / "b") == []


def test_replaces_and_keeps_what_others_put_there(tmp_path):
    out = tmp_path / "out"
    write_folder_atomically(out, _write("1"))
    (out / "notes.txt").write_text("mine")
    (out / "plots").mkdir()
    (out / "plots" / "a.svg").write_text("<svg/>")
    write_folder_atomically(out, _write("2"), owned=lambda folder: {"manifest.json"})
    assert (out / "manifest.json").read_text() == "2"
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "plots" / "a.svg").read_text() == "<svg/>"
    assert _leftovers(tmp_path) == []


def test_a_failing_writer_changes_nothing(tmp_path):
    out = tmp_path / "out"
    write_folder_atomically(out, _write("1"))

    def fail(folder: Path) -> None:
        _write("2")(folder)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_folder_atomically(out, fail)
    assert (out / "manifest.json").read_text() == "1"
    assert _leftovers(tmp_path) == []


def test_a_second_writer_is_refused_and_the_first_one_unharmed(tmp_path):
    out = tmp_path / "out"

    def nested(folder: Path) -> None:
        with pytest.raises(ValueError, match="one process at a time"):
            write_folder_atomically(out, _write("second"))
        _write("first")(folder)

    write_folder_atomically(out, nested)
    assert (out / "manifest.json").read_text() == "first"


def test_follows_a_link_to_the_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_folder_atomically(tmp_path / "link", _write("1"))
    assert (tmp_path / "real" / "manifest.json").read_text() == "1"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("make", ["file", "foreign", "below_file", "mount"])
def test_unusable_places_are_refused_before_work(tmp_path, make):
    target, message = tmp_path / "out", "save: path must be"
    if make == "file":
        target.write_text("x")
    elif make == "foreign":
        target.mkdir()
        (target / "thesis.tex").write_text("x")
    elif make == "below_file":
        (tmp_path / "f").write_text("x")
        target = tmp_path / "f" / "sub" / "out"
    else:
        target = Path("/proc")
        if not os.path.ismount(target):
            pytest.skip("no /proc mount here")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        check_writable(target)
    with pytest.raises(ValueError, match=message):
        write_folder_atomically(target, _write("1"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    with pytest.raises(ValueError, match="Permission denied"):
        check_writable(locked / "out")


_AS_NOBODY = """
import os, sys
from pathlib import Path
from coachhook.store import check_writable, write_folder_atomically
os.setgid(65534)
os.setuid(65534)
for act in (check_writable, lambda path: write_folder_atomically(path, lambda folder: None)):
    try:
        act(Path(sys.argv[1]))
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="there chmod does not protect a folder")
def test_a_folder_that_is_read_only_is_refused(tmp_path):
    """It was replaced, and what could not be deleted of it was in the way of every later write."""
    if os.geteuid() == 0:  # root may write anywhere; who is nobody may where everybody may
        parent = Path(tempfile.mkdtemp())
        parent.chmod(0o777)
    else:
        parent = tmp_path
    out = parent / "out"
    try:
        write_folder_atomically(out, _write("1"))
        out.chmod(0o555)
        if os.geteuid() == 0:
            said = tmp_path / "said"
            assert processes.run(_AS_NOBODY, out, out=said) == 0
            assert said.read_text().count("which is read-only; give write permission") == 2
        else:
            for act in (check_writable, lambda path: write_folder_atomically(path, _write("2"))):
                with pytest.raises(ValueError, match="which is read-only; give write permission"):
                    act(out)
        assert [entry.name for entry in parent.iterdir()] == ["out"]
        assert (out / "manifest.json").read_text() == "1"
    finally:
        out.chmod(0o755)
        if parent != tmp_path:
            shutil.rmtree(parent)


def test_a_name_too_long_for_what_is_beside_it_is_refused_before_work(tmp_path):
    with pytest.raises(ValueError, match="File name too long"):
        check_writable(tmp_path / ("e" * 252))
    write_folder_atomically(tmp_path / ("e" * 246), _write("1"))


def test_check_writable_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


_DIES_BETWEEN_RENAMES = """
import os, signal, sys
from pathlib import Path
import torch
from coachhook.store import save_folder
rename = os.rename
def die(source, target):
    if str(source).endswith(".tmp"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = die
save_folder(sys.argv[1], kind="edits", manifest={"n": 2}, tensors={"t": torch.full((5,), 2.0)})
"""


def test_death_between_the_renames_loses_nothing(tmp_path):
    out = tmp_path / "out"
    save_folder(out, kind="edits", manifest={"n": 1}, tensors={"t": torch.full((5,), 1.0)})
    assert processes.run(_DIES_BETWEEN_RENAMES, out) == -signal.SIGKILL
    assert not out.exists()

    assert current_folder(out) == tmp_path / ".out.old"
    manifest, tensors = load_folder(out, "edits")
    assert manifest["n"] == 1 and tensors["t"][0] == 1.0

    save_folder(out, kind="edits", manifest={"n": 3}, tensors={"t": torch.full((5,), 3.0)})
    assert load_folder(out, "edits")[0]["n"] == 3
    assert _leftovers(tmp_path) == []


_WRITES_FOREVER = """
import sys, torch
from coachhook.store import save_folder
n, last = 0, None
while True:
    n += 1
    unchanged = {"same", "often"} if n % 3 else {"same"}
    last = save_folder(sys.argv[1], kind="edits", manifest={"n": n}, replaces=last,
                       unchanged=unchanged if last else (),
                       tensors={"t": torch.full((50_000,), float(n))},
                       sets=[{"same": torch.ones(9_000)},
                             {"often": torch.full((9_000,), float(n // 3))}])
    print(n, flush=True)
"""


def check(manifest, tensors):
    assert bool((tensors["t"] == manifest["n"]).all())
    assert bool((tensors["same"] == 1).all())
    assert bool((tensors["often"] == manifest["n"] // 3).all())


def test_readers_and_kills_at_any_moment_meet_whole_folders(tmp_path):
    out = tmp_path / "out"
    first = {"t": torch.zeros(50_000), "same": torch.ones(9_000), "often": torch.zeros(9_000)}
    save_folder(out, kind="edits", manifest={"n": 0}, tensors=first)
    seen = set()
    for round_ in range(4):
        said = tmp_path / f"said-{round_}"
        process = processes.start(_WRITES_FOREVER, out, out=said)
        try:
            while process.exitcode is None and not (said.exists() and said.stat().st_size):
                time.sleep(0.005)
            until = time.monotonic() + 0.5 + 0.037 * round_
            while time.monotonic() < until:
                manifest, tensors = load_folder(out, "edits")
                check(manifest, tensors)
                seen.add((round_, manifest["n"]))
            assert process.exitcode is None
        finally:
            process.kill()
            process.join()
        manifest, tensors = load_folder(out, "edits")
        check(manifest, tensors)
    assert len(seen) > 4
    save_folder(out, kind="edits", manifest={"n": -1}, tensors={"t": torch.zeros(1)})
    assert _leftovers(tmp_path) == []


def test_a_folder_that_is_moved_aside_while_it_is_read_is_read_there(tmp_path, monkeypatch):
    """Between the two renames of a writer that is then killed: the manifest is as it was."""
    out = tmp_path / "out"
    save_folder(out, kind="edits", manifest={"n": 3}, tensors={"t": torch.ones(5)})
    opens, moved = files._open_checked, []

    def at_the_wrong_moment(file, entry):
        if not moved:
            moved.append(out.rename(folders._aside(out.resolve())))
        return opens(file, entry)

    monkeypatch.setattr(files, "_open_checked", at_the_wrong_moment)
    manifest, tensors = load_folder(out, "edits")
    assert moved and manifest["n"] == 3 and torch.equal(tensors["t"], torch.ones(5))
    (moved[0] / next(iter(manifest["files"]))).unlink()
    with pytest.raises(FormatError, match="must be readable"):
        load_folder(out, "edits")


def test_an_empty_folder_that_is_there_already_is_filled(tmp_path):
    target = tmp_path / "edits"
    target.mkdir()
    save_folder(target, kind="edits", manifest={"a": 1}, tensors={"x": torch.ones(2)})
    manifest, tensors = load_folder(target, "edits")
    assert manifest["a"] == 1
    assert torch.equal(tensors["x"], torch.ones(2))
