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
    "contained": "contained (greedy)",
    "chat": "chat (in the reply)",
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
        if family not in result:
            continue
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
    drift = result["kl"]["neighborhood"]
    if drift is not None:
        lines += ["", f"KL of the token after a neighbourhood prompt: {drift:.4g} nats"]
    for name, describe in (("language", _language), ("fluency", _fluency), ("cache", _cache)):
        if name in result:
            lines += ["", *describe(result[name])]
    return "\n".join(lines)


def _language(found: dict[str, Any]) -> list[str]:
    perplexity, intervals = found["perplexity"], found["intervals"]
    fired = "" if found["fired"] is None else f", a hook fired on {percent(found['fired'])}"
    return [
        f"unrelated text, {found['tokens']} tokens in {found['texts']} texts:",
        (
            f"  perplexity {perplexity['before']:.4g} -> {perplexity['after']:.4g}, "
            f"ratio {perplexity['ratio']:.5f}{_within(intervals['ratio'], '.5f')}"
        ),
        f"  KL {found['kl']:.4g} nats per token{_within(intervals['kl'], '.3g')}",
        f"  next token unchanged on {percent(found['unchanged'])}{fired}",
    ]


def _fluency(found: dict[str, Any]) -> list[str]:
    return [
        (
            f"n-gram entropy of texts of {found['tokens']} tokens: "
            f"{found['before']:.3f} -> {found['after']:.3f} bits ({found['prompts']} prompts)"
        )
    ]


def _cache(found: dict[str, Any]) -> list[str]:
    causes = ", ".join(f"{count} by {cause}" for cause, count in found["causes"].items())
    return [
        f"same greedy continuation with and without KV cache: {percent(found['same'])} of "
        f"{found['prompts']} prompts" + (f" (differences: {causes})" if causes else "")
    ]


def _within(interval: list[float] | None, form: str) -> str:
    return "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"


def percent(share: float | None) -> str:
    """A share as per cent; "-" where it is undefined."""
    return "-" if share is None else f"{100 * share:.1f} %"
