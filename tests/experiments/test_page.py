"""The report as a reader gets it: one whole page that needs nothing else."""

from __future__ import annotations

import html.parser
import json

import pytest

from benchmarks.experiments import report
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.failures import failures_of
from tests.experiments.conftest import run

_VOID = {"meta", "br", "col", "wbr", "img", "link", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Checks that every element ends where it should and keeps text and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.problems, self.text, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        self.problems += [f"never closed: {tag}" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> within {self.open[-3:]}")
        else:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    more = ("--count", 3, "--batch-sizes", 2, "--checkpoints", 2, "--systems", "ours,memit")
    quick = ("--set", "memit.target_steps=2", "--set", "ours.target_steps=8")
    run(world, "consecutive", out, *more, *quick)
    (out / "command.txt").write_text("python -m benchmarks.experiments <again> & more\n")
    assert main(["report", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_stands_alone(page):
    assert page.problems == []
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), (tag, name, value)
    targets = {value for _, name, value in page.attributes if name == "id"}
    for _, name, value in page.attributes:
        if name in ("href", "xlink:href"):
            assert value[1:] in targets, value
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_it_says_what_a_reader_asks(page, folder):
    text = " ".join(" ".join(page.text).split())
    for part in (
        "Consecutive editing", "3 facts in batches of 2", "coachhook (default)", "MEMIT",
        "Teacher-forced", "Generated", "By probability", "Side effects", "Cost",
        "reliability / oracle", "perplexity ratio", "Where the gate fired", "Worst failures",
        "Settings", "How to reproduce", "python -m benchmarks.experiments <again> & more",
        "fingerprint", "torch", "edited facts", "The first 10 facts alone",
    ):  # fmt: skip
        assert part in text, part
    record = json.loads((folder / "runs" / "memit-2" / "final.json").read_text())["records"]
    wrong = [k for k in failures_of(record) if k["rows"]]
    # Two steps are not enough for MEMIT: its failures are shown with their text.
    assert wrong
    for row in wrong[0]["rows"]:
        assert " ".join(row["prompt"].split()) in text


def test_tokens_that_fired_are_marked(page, folder):
    fired = [1 for tag, name, value in page.attributes if (name, value) == ("class", "fired")]
    pictures = json.loads((folder / "runs" / "ours-2" / "final.json").read_text())["pictures"]
    assert pictures[0]["kind"] == "edited prompt"
    expected = sum(sum(layer["fired"]) for p in pictures for layer in p["layers"])
    assert len(fired) == expected >= 1
    titles = [v for tag, name, v in page.attributes if tag == "span" and name == "title"]
    assert len(titles) == sum(len(p["tokens"]) * len(p["layers"]) for p in pictures)
    assert all("score" in title and "alpha" in title for title in titles)


def test_figures_are_written_and_shown(page, folder):
    names = {"curves", "retention", "generated"}
    assert {p.stem for p in (folder / "figures").glob("*.png")} == names
    assert all(p.stat().st_size > 5000 for p in (folder / "figures").glob("*.png"))
    shown = {v for tag, name, v in page.attributes if (tag, name) == ("figure", "id")}
    assert shown == {f"figure-{name}" for name in names}


@pytest.mark.parametrize(("speed", "shown"), [(0.042, "0.042"), (4.62, "4.6"), (171.3, "171")])
def test_speeds_are_written_in_full(speed, shown):
    row = {"system": "ours", "edits_per_second": speed}
    assert report._glance([row]) == [{"value": shown, "title": "edits per second"}]


def record(prompt, wanted, after, neighbour=("a b c d", "a b c d")):
    return {
        "target_new": wanted,
        "kl": 0.1,
        "values": {"after": {"teacher_forced": {"reliability": 0.0, "generality": 0.0}}},
        "answers": {
            "edit": [{"prompt": prompt, "before": "x", "after": after}],
            "paraphrase": [{"prompt": f"{prompt}?", "before": "x", "after": "no"}],
            "neighborhood": [{"prompt": "near", "before": neighbour[0], "after": neighbour[1]}],
        },
    }


def test_failures_are_found_and_the_worst_come_first():
    records = [
        record("p0", "Rome", " Rome, Italy"),
        record("p1", "Rome", " the city of Rome", ("a b c d", "a b c e")),
        record("p2", "Rome", " Paris", ("a b c d", "Rome and so on")),
    ]
    edits, paraphrases, neighbours = failures_of(records)
    assert (edits["count"], edits["asked"]) == (2, 3)
    # A near miss is the lesser failure.
    assert [row["prompt"] for row in edits["rows"]] == ["p2", "p1"]
    # Only of facts whose own prompt is answered.
    assert [row["prompt"] for row in paraphrases["rows"]] == ["p0?"]
    assert [row["after"] for row in neighbours["rows"]] == ["Rome and so on", "a b c e"]
    assert neighbours["rows"][0]["wanted"] == "as before"
