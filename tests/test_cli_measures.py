"""What `coachhook eval` measures on request, beside the pinned object, on the bundled model."""

from __future__ import annotations

import json

import pytest

from coachhook import bundled
from coachhook.cli import main

MODEL = str(bundled.model_path())


def call(*argv):
    return main([str(a) for a in argv])


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    root = tmp_path_factory.mktemp("measures")
    (root / "text.txt").write_text("\n".join(bundled.texts()[:120]), encoding="utf-8")
    (root / "facts.json").write_text(json.dumps(bundled.facts()[:2]), encoding="utf-8")
    stats = ["--layers", "0", "--out", root / "stats"]
    assert call("stats", MODEL, "--text", root / "text.txt", *stats) == 0
    argv = [root / "facts.json", "--stats", root / "stats", "--out", root / "edits"]
    assert call("edit", MODEL, *argv) == 0
    return root


def argv_of(root):
    return ["eval", MODEL, root / "facts.json", "--edits", root / "edits"]


def test_what_is_asked_for_is_added(edits, capsys):
    more = ["--text", edits / "text.txt", "--text-tokens", 300, "--fluency", 30]
    assert call(*argv_of(edits), "--json", *more, "--cache-check", 4, "--details") == 0
    found = json.loads(capsys.readouterr().out)
    pinned = {"edits", "teacher_forced", "probability", "generated", "gate"}
    assert pinned < set(found)
    assert set(found["generated"]["after"]) == {"reliability", "generality", "locality"}
    assert set(found["contained"]["after"]) == {"reliability", "generality"}
    for state in ("before", "after"):
        exact, anywhere = found["generated"][state], found["contained"][state]
        assert anywhere["reliability"] >= exact["reliability"]
    language = found["language"]
    assert 200 < language["tokens"] <= 300
    assert 0.9 < language["perplexity"]["ratio"] < 1.1
    low, high = language["intervals"]["ratio"]
    assert low <= language["perplexity"]["ratio"] <= high
    assert found["fluency"]["prompts"] == 2 and found["fluency"]["after"] > 0
    assert found["cache"]["prompts"] == 4 and found["cache"]["same"] == 1.0
    records = found["records"]
    assert [r["subject"] for r in records] == [f["subject"] for f in bundled.facts()[:2]]
    assert len(records[0]["answers"]["neighborhood"]) == len(bundled.facts()[0]["neighborhood"])


def test_people_get_it_as_text(edits, capsys):
    more = ["--text", edits / "text.txt", "--text-tokens", 200, "--max-new-tokens", 3]
    assert call(*argv_of(edits), *more) == 0
    shown = capsys.readouterr().out
    for part in ("contained (greedy)", "unrelated text, ", "perplexity ", "nats per token"):
        assert part in shown
    assert "n-gram entropy" not in shown and "KV cache:" not in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n \n", "must hold text"),
        ("a\nb\n", "at least two tokens in a row, got none within 20000 tokens"),
        (None, "no-such.txt"),
    ],
)
def test_text_that_is_none_is_refused(edits, tmp_path, capsys, content, message):
    path = tmp_path / "no-such.txt"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert call(*argv_of(edits), "--text", path) == 2
    assert message in capsys.readouterr().err
