"""The script behind the table of docs/quality.md."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import quality


def test_the_seconds_are_those_of_the_commands(tmp_path, monkeypatch, capsys):
    shares = dict.fromkeys(("reliability", "generality", "locality"), 0.5)
    found = {
        "edit": {"edits": 1, "batches": 1, "seconds": 1.0, "alphas": {}, "not_converged": []},
        "eval": {
            **{family: {"after": shares} for family in ("teacher_forced", "generated")},
            "oracle": shares,
            "gate": {"fired_unrelated": 0.0},
        },
    }

    def command(*words):
        time.sleep(0.1)
        return json.dumps(found.get(words[0]))

    monkeypatch.setattr(quality, "coachhook", command)
    facts = tmp_path / "facts.json"
    facts.write_text("[{}]")
    argv = ["quality", "model", facts, "--text", "text.txt", "--work", tmp_path / "work"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    quality.main()
    assert "0.500" in capsys.readouterr().out
    written = json.loads((tmp_path / "work" / "model-default-float32-0-100.json").read_text())
    assert written["seconds"] >= 0.2


def test_other_facts_have_other_edits_and_other_text_other_statistics(tmp_path, monkeypatch):
    facts, asked = tmp_path / "facts.json", []
    facts.write_text(json.dumps([{"n": n} for n in range(4)]))

    def command(*words):
        asked.append((words[0], words[words.index("--out") + 1]))
        Path(asked[-1][1]).mkdir(parents=True, exist_ok=True)
        return "null" if words[0] == "stats" else sys.exit(2)

    monkeypatch.setattr(quality, "coachhook", command)
    for start, tokens, text in (
        ("0", "9", "a"),
        ("2", "9", "a"),
        ("2", "10", "a"),
        ("2", "9", "b"),
    ):
        argv = ["quality", "m", facts, "--start", start, "--count", "2", "--tokens", tokens]
        argv += ["--text", text, "--work", tmp_path / "work"]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        with pytest.raises(SystemExit):
            quality.main()
    assert [name for name, _ in asked] == [
        "stats",
        "edit",
        "edit",
        "stats",
        "edit",
        "stats",
        "edit",
    ]
    assert len({out for name, out in asked if name == "stats"}) == 3
    assert len({out for name, out in asked if name == "edit"}) == 2


def test_a_command_that_fails_ends_the_script_with_its_status(capfd):
    with pytest.raises(SystemExit) as caught:
        quality.coachhook("eval", "no-such-model", "--edits", "none")
    assert caught.value.code == 2
    assert "Traceback" not in capfd.readouterr().err
