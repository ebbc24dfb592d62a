"""Pictures of the gate."""

from __future__ import annotations

import math
import re
import sys

import pytest

from coachhook.hooks import attach_hooks
from coachhook.inspecting import GatePicture, GateRow, gate_pictures, save_pictures, to_text
from tests.evaluation.tiny import tiny_model, tiny_tokenizer

PICTURE = GatePicture(
    "a <b> $c",
    ("a", " <b>", " $c"),
    (
        GateRow(0, 0.65, (math.nan, 0.2, 0.9), (False, False, True)),
        GateRow(2, -1.0, (math.nan, math.nan, math.nan), (False, False, False)),
    ),
)


def test_text_marks_fired_tokens():
    first, second = to_text(PICTURE).splitlines()
    assert first == "layer 0, alpha 0.65, largest z 0.90: 'a <b>[ $c]'"
    assert "largest z -" in second and "[" not in second


def test_texts_without_tokens_are_refused():
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    with (
        attach_hooks(model, [1]) as hooks,
        pytest.raises(ValueError, match="texts must give at least one token each, got ''"),
    ):
        gate_pictures(model, tokenizer, hooks, ["Bob", ""])


def test_json_has_no_nan():
    layers = PICTURE.to_dict()["layers"]
    assert layers[0]["z"] == [None, 0.2, 0.9]
    assert layers[0]["fired"] == [False, False, True]


def test_html_is_self_contained_and_escaped(tmp_path):
    path = tmp_path / "gates.html"
    save_pictures([PICTURE, PICTURE], path)
    page = path.read_text(encoding="utf-8")
    assert page.count("<table>") == 2
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert len(re.findall("class=fired", page)) == 2
    assert "http" not in page and "<script" not in page
    assert "z undefined" in page


def test_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "gates.png"
    save_pictures([PICTURE], path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_png_without_matplotlib_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'coachhook\[plot\]'"):
        save_pictures([PICTURE], tmp_path / "gates.png")


def test_other_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.html or \.png"):
        save_pictures([PICTURE], tmp_path / "gates.svg")
    assert not list(tmp_path.iterdir())
