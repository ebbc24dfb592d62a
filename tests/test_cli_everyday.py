"""Beside the work itself: a full disk, a reader that leaves, what is refused early."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys

import pytest

from coachhook import bundled
from coachhook.cli import main

FACTS = 4
WIDTH = json.loads((bundled.model_path() / "config.json").read_text())["n_embd"] * 4


def call(*argv):
    return main([str(a) for a in argv])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Statistics of the bundled model, facts and edits of the first of them."""
    root = tmp_path_factory.mktemp("world")
    (root / "text.txt").write_text("\n".join(bundled.texts()[:300]), encoding="utf-8")
    (root / "the facts.json").write_text(json.dumps(bundled.facts()[:FACTS]), encoding="utf-8")
    stats = ["stats", bundled.model_path(), "--text", root / "text.txt", "--out", root / "stats"]
    assert call(*stats, "--layers", "0,1") == 0
    assert call(*edit(root, root / "edits", "--limit", 1)) == 0
    return root


def edit(world, out, *more):
    argv = ["edit", bundled.model_path(), world / "the facts.json", "--stats", world / "stats"]
    return [*argv, "--out", out, "--target-steps", 3, *more]


@contextlib.contextmanager
def largest_file(size):
    """A block in which no file may grow beyond a size, as on a disk that is nearly full."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("command", ["stats", "edit", "resume", "export", "revert"])
def test_a_full_disk_is_a_failure_in_words(world, tmp_path, capsys, command):
    out, model = tmp_path / "out", bundled.model_path()
    argv = {
        "stats": ["stats", model, "--text", world / "text.txt", "--out", out],
        "edit": edit(world, out),
        "resume": edit(world, out, "--resume"),
        "export": ["export", world / "edits", "--model", model, "--format", "merged", "--out", out],
        "revert": ["revert", out, "--batch", 1],
    }[command]
    if command == "export":
        argv += ["--measure", 0]
    if command in ("resume", "revert"):
        assert call(*edit(world, out, "--limit", 1)) == 0
    capsys.readouterr()
    with largest_file(100_000):
        assert call(*argv) == 1
    shown, err = capsys.readouterr()
    assert shown == "" and "failed: " in err and f"{out}" in err
    assert "must have room for what is written" in err
    if command in ("edit", "export"):
        assert "nothing was written" in err
    if command == "resume":
        assert f"what was written before it is in {out}; go on with --resume" in err
    if command in ("resume", "revert"):
        assert call("inspect", out) == 0 and "1 edits in 1 batches" in capsys.readouterr().out
    else:
        assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_ends_the_command_in_silence(world):
    argv = [sys.executable, "-m", "coachhook", "inspect", str(world / "edits"), "--json"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="pipes have no names here")
def test_a_text_from_a_pipe_too_short_to_measure_on_is_a_failure_in_words(world, capsys):
    model, facts = bundled.model_path(), world / "the facts.json"
    argv = ["eval", model, facts, "--edits", world / "edits", "--limit", 1]
    reading, writing = os.pipe()
    try:
        os.write(writing, b"a\n")
        os.close(writing)
        assert call(*argv, "--text", f"/dev/fd/{reading}") == 1
    finally:
        os.close(reading)
    assert "failed: measure_language: text must hold at least two" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="there are other rules for handles")
@pytest.mark.parametrize(
    ("closed", "words"),
    [
        ((1,), ["inspect", "EDITS", "--json"]),
        ((2,), ["inspect", "EDITS"]),
        ((1, 2), ["inspect", "--help"]),  # which is quick
    ],
    ids=str,
)
def test_what_is_said_to_a_closed_stream_goes_nowhere(world, closed, words):
    words = [str(world / "edits") if word == "EDITS" else word for word in words]
    argv = [sys.executable, "-m", "coachhook", *words]
    close = " ".join(f"{number}>&-" for number in closed)
    shell = ["sh", "-c", f'exec "$@" {close}', "sh", *argv]
    run = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert (run.stdout == "") == (1 in closed)


def test_messages_to_a_closed_stream_are_not_among_the_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it where it starts without one
    assert call("inspect", tmp_path / "none") == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", ["generate", "eval", "edit", "resume"])
def test_a_wrong_folder_is_refused_before_the_model_is_read(world, tmp_path, capsys, command):
    nowhere, facts = tmp_path / "model", world / "the facts.json"
    argv = {
        "generate": ["generate", nowhere, "Bob", "--edits", world / "stats"],
        "eval": ["eval", nowhere, facts, "--edits", world / "stats"],
        "edit": ["edit", nowhere, facts, "--stats", world / "edits", "--out", tmp_path / "new"],
        "resume": ["edit", nowhere, facts, "--out", world / "stats", "--resume"],
    }[command]
    assert call(*argv) == 2
    held = "statistics" if command == "edit" else "edits"
    assert f"must hold coachhook {held}" in capsys.readouterr().err


def test_too_little_text_is_refused_with_remedies_that_help(world, tmp_path, capsys):
    model = bundled.model_path()
    few = ["--text", world / "text.txt", "--tokens", 200, "--layers", "0,1"]
    assert call("stats", model, *few, "--out", tmp_path / "plain") == 0
    assert call("stats", model, *few, "--out", tmp_path / "shrunk", "--minimal") == 0
    plain, shrunk = (
        ["edit", model, world / "the facts.json", "--limit", 1, "--stats", tmp_path / name]
        for name in ("plain", "shrunk")
    )
    capsys.readouterr()
    assert call(*plain, "--out", tmp_path / "a") == 2
    err = capsys.readouterr().err
    assert f"more than {WIDTH} tokens" in err and "--minimal" in err and "--ridge" in err
    assert call(*shrunk, "--out", tmp_path / "a") == 0
    assert call(*plain, "--out", tmp_path / "b", "--ridge", 1e-4) == 0


def test_the_command_that_measures_asks_for_the_same_facts(world, tmp_path, capsys):
    out = tmp_path / "the edits"
    assert call(*edit(world, out, "--limit", 2, "--dtype", "float32", "--skip-bad")) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("measure: coachhook ")]
    assert call(*shlex.split(line)[2:], "--json") == 0
    assert json.loads(capsys.readouterr().out)["edits"] == 2
