"""The script behind the table of docs/quality.md."""

from __future__ import annotations

import json
import sys
import time

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
    written = json.loads((tmp_path / "work" / "model-default-float32.json").read_text())
    assert written["seconds"] >= 0.2
