"""Flat rows of results: what the CSV files hold and the tables show."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.systems import key_site, statistics_names, uses_statistics

# Family of metrics -> prefix of its columns.
PREFIX = {
    "teacher_forced": "tf",
    "generated": "gen",
    "contained": "cont",
    "probability": "prob",
}
Row = dict[str, Any]


def family_columns(families: dict[str, Any], mark: str = "") -> Row:
    """``tf_reliability``, ``tf_reliability_low``, ...; ``tf_mean`` or ``prob_score``."""
    row: Row = {}
    for family, prefix in PREFIX.items():
        if family not in families:
            continue
        report = families[family]
        for name, value in report["after"].items():
            interval = report["intervals"]["after"][name] or (None, None)
            column = f"{mark}{prefix}_{name}"
            row |= {column: value, f"{column}_low": interval[0], f"{column}_high": interval[1]}
        summary = "score" if "score" in report else "mean"
        row[f"{mark}{prefix}_{summary}"] = report[summary]["after"]
    return row


def _head(run: dict[str, Any]) -> Row:
    spec = run["spec"]
    return {
        "experiment": spec["experiment"],
        "model": Path(spec["model"]).name,
        "system": spec["system"],
        "batch_size": spec["batch_size"],
    }


def result_row(run: dict[str, Any], plan: dict[str, Any]) -> Row:
    """The end of a run in one row; of a run that failed, why."""
    row = _head(run)
    if "final" not in run:
        return {**row, "error": run["error"]}
    final = run["final"]
    edits = run["edits"][-1]["edits"]
    row |= {"edits": edits, "error": None}
    if "all" in final:
        row["facts_measured"] = final["facts_measured"]
        row |= family_columns(final["all"])
        row["kl_neighborhood"] = final["kl"]["neighborhood"]
        row |= {f"gate_{name}": value for name, value in final["gate"].items()}
        found = final["oracle"] or {}
        for name in ("reliability", "generality"):
            value, best = row[f"tf_{name}"], found.get(name)
            row[f"oracle_{name}"] = best
            row[f"share_{name}"] = value / best if best and value is not None else None
        row |= _side_columns(final)
    spec = run["spec"]
    return row | cost_columns(final, edits, plan, spec["system"], spec["options"])


def _side_columns(final: dict[str, Any]) -> Row:
    language, fluency, cache = final["language"], final["fluency"], final["cache"]
    ratio = language["intervals"]["ratio"] or (None, None)
    kl = language["intervals"]["kl"] or (None, None)
    fired = language["intervals"]["fired"] or (None, None)
    return {
        "ppl_before": language["perplexity"]["before"],
        "ppl_after": language["perplexity"]["after"],
        "ppl_ratio": language["perplexity"]["ratio"],
        "ppl_ratio_low": ratio[0],
        "ppl_ratio_high": ratio[1],
        "kl_text": language["kl"],
        "kl_text_low": kl[0],
        "kl_text_high": kl[1],
        "text_unchanged": language["unchanged"],
        "text_fired": language["fired"],
        "text_fired_low": fired[0],
        "text_fired_high": fired[1],
        "entropy_before": fluency["before"],
        "entropy_after": fluency["after"],
        "cache_same": cache["same"],
        "cache_same_low": cache["interval"][0],
        "cache_same_high": cache["interval"][1],
    }


def cost_columns(
    final: dict[str, Any], edits: int, plan: dict[str, Any], system: str, options: dict[str, Any]
) -> Row:
    """Speed and memory; a system that needs no statistics is not charged with them."""
    seconds = final["edit_seconds"]
    _, spent = statistics_names(key_site(system, options))
    extra = plan[spent] if uses_statistics(system) else 0.0
    whole = None if extra is None else seconds + extra + final["training_seconds"]
    return {
        "converged": final["converged"],
        "edit_seconds": seconds,
        "edits_per_second": edits / seconds,
        "edits_per_cpu_second": edits / final["edit_cpu_seconds"],
        "statistics_seconds": extra,
        "training_seconds": final["training_seconds"],
        "edits_per_second_with_preparation": None if whole is None else edits / whole,
        "peak_mib": final["peak_mib"],
        "start_mib": final["start_mib"],
    }


def checkpoint_rows(run: dict[str, Any]) -> list[Row]:
    """One row per checkpoint, the end included; ``first_`` marks the facts edited first."""
    found = list(run["checkpoints"])
    last = run.get("final", {}).get("checkpoint")
    if last is not None:
        found.append({**last, "edits": run["edits"][-1]["edits"]})
    rows = []
    for point in found:
        if "all" not in point:
            continue
        rows.append(
            {
                **_head(run),
                "edits": point["edits"],
                **family_columns(point["all"]),
                "first_facts": min(run["spec"]["first"], point["edits"]),
                **family_columns(point["first"], "first_"),
                "kl_neighborhood": point["kl"]["neighborhood"],
                **{f"gate_{name}": value for name, value in point["gate"].items()},
            }
        )
    return rows


def score_rows(run: dict[str, Any]) -> list[Row]:
    """One row per checkpoint, layer and group of tokens."""
    points = [(p["edits"], p["scores"]) for p in run["checkpoints"] if "scores" in p]
    if "scores" in run.get("final", {}):
        points.append((run["edits"][-1]["edits"], run["final"]["scores"]))
    alphas = {line["edits"]: line["alphas"] for line in run["edits"]}
    return [
        {**_head(run), "edits": edits, "alpha": alphas[edits].get(str(row["layer"])), **row}
        for edits, rows in points
        for row in rows
    ]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Rows as CSV at ``path`` and as JSON Lines beside it; columns in order of appearance.

    What is not finite, as after an edit that diverged, is ``null`` in JSON, which has no such
    numbers.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        json.dumps({name: _finite(value) for name, value in row.items()}, ensure_ascii=False)
        for row in rows
    ]
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
