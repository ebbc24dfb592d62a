"""Plain text tables of results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_NUMBER = re.compile(r"-?|-?[\d.]+(e[-+]\d+)?( %)?")
_TITLES = {
    "teacher_forced": "teacher-forced (EasyEdit)",
    "probability": "probability (CounterFact)",
    "generated": "generated (greedy)",
}


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in plain text: columns of text to the left, columns of numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[c]) for row in [list(headers), *cells]) for c in range(len(headers))]
    right = [all(_NUMBER.fullmatch(row[c]) for row in cells) for c in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        parts = [
            t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True)
        ]
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([line(headers), rule, *(line(row) for row in cells)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def render_evaluation(result: dict[str, Any]) -> str:
    """The object of :func:`coachhook.evaluation.evaluate` as a table."""
    rows: list[list[object]] = []
    for family, title in _TITLES.items():
        report = result[family]
        for name, after in report["after"].items():
            interval = report["intervals"]["after"][name]
            text = "-" if interval is None else f"{interval[0]:.3f} .. {interval[1]:.3f}"
            rows.append([title, name, report["before"][name], after, text])
            title = ""
        summary = "score" if "score" in report else "mean"
        rows.append(["", summary, report[summary]["before"], report[summary]["after"], ""])
    counts, gate = result["counts"], result["gate"]
    lines = [
        (
            f"{result['edits']} facts, {counts['paraphrases']} paraphrases, "
            f"{counts['neighborhood']} neighbourhood prompts"
        ),
        "",
        table(["family", "metric", "before", "after", "95 % interval (after)"], rows),
    ]
    if gate["fired_edited"] is not None:
        lines += [
            "",
            (
                f"a hook fired on {percent(gate['fired_edited'])} of the edited prompts and on "
                f"{percent(gate['fired_unrelated'])} of the tokens of neighbourhood prompts"
            ),
        ]
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """A share as per cent; "-" where it is undefined."""
    return "-" if share is None else f"{100 * share:.1f} %"
