"""The worst that happened, with its text: what a table of shares does not show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from coachhook.evaluation.observations import begins_with, contains

SHOWN = 8
_WORDS = 14


def failures_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Failures by kind, the worst first, a few of each.

    Args:
        records: of :func:`coachhook.evaluation.evaluate`, with continuations.

    Returns:
        Per kind ``title``, ``count`` (all failures), ``asked`` (all prompts) and ``rows`` with
        ``prompt``, ``wanted``, ``before``, ``after``.
    """
    return [
        _kind(
            "Edited facts that are not answered as wanted",
            records,
            "edit",
            lambda record, answer: not begins_with(answer["after"], record["target_new"]),
            # A near miss is the least of the failures.
            lambda record, answer: (
                contains(answer["after"], record["target_new"]),
                _forced(record, "reliability"),
            ),
            lambda record: record["target_new"],
        ),
        _kind(
            "Paraphrases not answered as wanted, though the edited prompt is",
            records,
            "paraphrase",
            lambda record, answer: (
                not begins_with(answer["after"], record["target_new"])
                and begins_with(record["answers"]["edit"][0]["after"], record["target_new"])
            ),
            lambda record, answer: (
                contains(answer["after"], record["target_new"]),
                _forced(record, "generality"),
            ),
            lambda record: record["target_new"],
        ),
        _kind(
            "Neighbours that answer otherwise than before",
            records,
            "neighborhood",
            lambda record, answer: answer["before"].split()[:4] != answer["after"].split()[:4],
            # The new target given for another subject is the worst.
            lambda record, answer: (
                not begins_with(answer["after"], record["target_new"]),
                -(record["kl"] or 0.0),
            ),
            lambda record: "as before",
        ),
    ]


def _forced(record: dict[str, Any], name: str) -> float:
    value: float = record["values"]["after"]["teacher_forced"].get(name, 1.0)
    return value


def _kind(
    title: str,
    records: Sequence[dict[str, Any]],
    kind: str,
    failed: Callable[[dict[str, Any], dict[str, str]], bool],
    order: Callable[[dict[str, Any], dict[str, str]], Any],
    wanted: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    asked = [(record, answer) for record in records for answer in record["answers"][kind]]
    found = sorted(
        (pair for pair in asked if failed(*pair)),
        key=lambda pair: order(*pair),
    )
    rows = [
        {
            "prompt": answer["prompt"],
            "wanted": wanted(record),
            "before": _short(answer["before"]),
            "after": _short(answer["after"]),
        }
        for record, answer in found[:SHOWN]
    ]
    return {"title": title, "count": len(found), "asked": len(asked), "rows": rows}


def _short(text: str) -> str:
    words = text.split()
    return " ".join(words[:_WORDS]) + (" …" if len(words) > _WORDS else "")
