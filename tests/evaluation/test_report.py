"""Tables in plain text."""

from __future__ import annotations

from coachhook.evaluation import evaluate, render_evaluation, table
from coachhook.evaluation.report import percent


def test_table_aligns_text_left_and_numbers_right():
    text = table(["name", "value", "n"], [["a", 0.5, 1], ["long name", None, 100]])
    assert text.splitlines() == [
        "name       value    n",
        "---------  -----  ---",
        "a          0.500    1",
        "long name      -  100",
    ]
    assert table(["a"], []).splitlines() == ["a", "-"]


def test_percent():
    assert percent(0.5) == "50.0 %" and percent(None) == "-"


def test_the_table_of_an_evaluation_holds_every_number(model, tokenizer, requests):
    result = evaluate(model, tokenizer, requests, progress=False, max_new_tokens=2)
    text = render_evaluation(result)
    assert text.startswith("3 facts, 3 paraphrases, 4 neighbourhood prompts")
    lines = [line.split() for line in text.splitlines()]
    for family in ("teacher_forced", "probability", "generated"):
        for name, value in result[family]["after"].items():
            assert any(name in line and f"{value:.3f}" in line for line in lines)
