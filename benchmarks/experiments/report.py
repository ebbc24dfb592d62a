"""The report of an experiment: CSV, figures and one page that needs nothing else."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiments import figures, tables
from benchmarks.experiments.failures import failures_of
from benchmarks.experiments.plan import ExperimentError, read_all
from benchmarks.experiments.systems import TITLES
from benchmarks.experiments.tables import Row

HEADINGS = {
    "single": "Single-round editing",
    "consecutive": "Consecutive editing",
    "ablation": "What the gate is worth",
    "zscores": "Does the gate know its own keys?",
}
_SHARES = (
    ("tf_reliability", "reliability"),
    ("tf_generality", "generality"),
    ("tf_locality", "locality"),
)


@dataclass(frozen=True)
class Column:
    """A column of a table of the page.

    Args:
        name: column of the row.
        title: what is shown above it.
        kind: "share" (as per cent, with a bar), "number", "ratio", "small" or "count".
        best: "high", "low", "one" (nearest to 1) or "" for none.
    """

    name: str
    title: str
    kind: str = "share"
    best: str = "high"


_TABLES: tuple[tuple[str, str, tuple[Column, ...]], ...] = (
    (
        "Teacher-forced",
        (
            "EasyEdit's definitions: the model reads prompt and answer at once, so content and "
            "length of the answer leak. Comparable with papers, but not what a user sees."
        ),
        (
            Column("tf_reliability", "reliability"),
            Column("tf_generality", "generality"),
            Column("tf_locality", "locality"),
            Column("tf_mean", "mean"),
            Column("share_reliability", "reliability / oracle", "ratio", ""),
            Column("share_generality", "generality / oracle", "ratio", ""),
        ),
    ),
    (
        "Generated",
        (
            "Greedy decoding with a KV cache and a natural stop: what a user sees. Exact: the "
            "continuation begins with the target. Within 30 tokens: the target stands anywhere in "
            "it. Locality: the first ten tokens are those of the unedited model."
        ),
        (
            Column("gen_reliability", "reliability, exact"),
            Column("gen_generality", "generality, exact"),
            Column("gen_locality", "locality"),
            Column("gen_mean", "mean"),
            Column("cont_reliability", "reliability, within 30"),
            Column("cont_generality", "generality, within 30"),
        ),
    ),
    (
        "By probability",
        (
            "CounterFact's scores: the new answer is more likely than the true one (efficacy, "
            "paraphrases), or less (neighbours); S is their harmonic mean."
        ),
        (
            Column("prob_efficacy", "efficacy ES"),
            Column("prob_paraphrase", "paraphrase PS"),
            Column("prob_neighborhood", "neighbourhood NS"),
            Column("prob_score", "S"),
        ),
    ),
    (
        "Side effects",
        (
            "On text that names no edited subject: perplexity after over before, drift of the "
            "next-token distribution, share of tokens that took a hook. Neighbours: drift after "
            "their prompts. Cache: same greedy text with and without KV cache. Entropy: of bi- and "
            "trigrams of greedy texts of up to 100 tokens; it falls where text repeats itself."
        ),
        (
            Column("ppl_ratio", "perplexity ratio", "ratio", "one"),
            Column("kl_text", "KL, text (nats)", "small", "low"),
            Column("kl_neighborhood", "KL, neighbours (nats)", "small", "low"),
            Column("text_fired", "tokens gated", "small_share", "low"),
            Column("cache_same", "cache agrees", "share", "high"),
            Column("entropy_before", "entropy before", "number", ""),
            Column("entropy_after", "entropy after", "number", ""),
        ),
    ),
    (
        "Cost",
        (
            "Wall-clock time of the edits alone, and with what the system needs first: statistics, "
            "the training of its own networks. Memory: highest of the whole run, evaluation "
            "included, and after loading the model."
        ),
        (
            Column("edits_per_second", "edits / s", "number", "high"),
            Column("edits_per_second_with_preparation", "with preparation", "number", ""),
            Column("edits_per_cpu_second", "edits / CPU s", "number", ""),
            Column("converged", "objective met", "share", ""),
            Column("peak_mib", "peak MiB", "count", "low"),
            Column("start_mib", "start MiB", "count", ""),
        ),
    ),
)


def write_report(out: Path) -> Path:
    """Writes results.csv, checkpoints.csv, scores.csv, figures and report.html.

    Returns:
        The page.

    Raises:
        ExperimentError: the folder holds no experiment.
    """
    file = out / "plan.json"
    if not file.is_file():
        raise ExperimentError(
            f"DIR must hold an experiment, got {out} without plan.json; give the --out of one"
        )
    plan = json.loads(file.read_text())
    runs = read_all(out)
    results = [tables.result_row(run, plan) for run in runs]
    tables.write(out / "results.csv", results)
    points = [row for run in runs for row in tables.checkpoint_rows(run)]
    if points:
        tables.write(out / "checkpoints.csv", points)
    scores = [row for run in runs for row in tables.score_rows(run)]
    if scores:
        tables.write(out / "scores.csv", scores)
    page = _environment().get_template("page.html.j2")
    path = out / "report.html"
    text = page.render(_context(out, plan, runs, results, points, scores))
    path.write_text(text, encoding="utf-8")
    return path


def _context(
    out: Path,
    plan: dict[str, Any],
    runs: list[dict[str, Any]],
    results: list[Row],
    points: list[Row],
    scores: list[Row],
) -> dict[str, Any]:
    done = [run for run in runs if "final" in run]
    measured = [row for row in results if row.get("tf_reliability") is not None]
    command = out / "command.txt"
    return {
        "heading": HEADINGS[plan["experiment"]],
        "experiment": plan["experiment"],
        "plan": plan,
        "model": _model_name(plan["model"]),
        "sizes": sorted({run["spec"]["batch_size"] for run in runs}),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "glance": _glance(measured),
        "tables": _tables(measured),
        "figures": _figures(out, plan, done, measured, points, scores),
        "scores": _score_tables(done),
        "pictures": [
            {"title": _label(run, runs), "pictures": run["final"]["pictures"]}
            for run in done
            if run["final"].get("pictures")
        ],
        "failures": [
            {"title": _label(run, runs), "ours": run["spec"]["system"] == "ours",
             "kinds": failures_of(run["final"]["records"])}
            for run in done
            if "records" in run["final"]
        ],
        "failed": [{"title": _label(r, runs), "error": r["error"]} for r in runs if "error" in r],
        "settings": [
            {"title": _label(run, runs), "values": run["final"]["settings"]} for run in done
        ],
        "measured": sorted({row["facts_measured"] for row in measured}),
        "first": sorted({run["spec"]["first"] for run in runs}),
        "command": command.read_text().strip() if command.is_file() else None,
    }  # fmt: skip


def _model_name(model: str) -> str:
    """The last part of a folder or hub name, and the one before it where that says nothing."""
    parts = Path(model).parts
    return "/".join(parts[-2:]) if parts[-1] == "model" else parts[-1]


def _label(run: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    system, size = run["spec"]["system"], run["spec"]["batch_size"]
    title = TITLES.get(system, system)
    several = len({r["spec"]["batch_size"] for r in runs}) > 1
    return f"{title}, batches of {size}" if several else title


def _glance(rows: list[Row]) -> list[dict[str, str]]:
    """A sentence or two about the first system, and who has the best mean."""
    if not rows:
        return []
    first = next((row for row in rows if row["system"] == "ours"), rows[0])
    cards = []
    for column, title in (
        ("gen_reliability", "of the edited facts are answered as wanted, in free generation"),
        ("gen_generality", "of their paraphrases are"),
        ("gen_locality", "of the neighbours' continuations are word for word as before"),
        ("ppl_ratio", "times the perplexity on unrelated text"),
        ("edits_per_second", "edits per second"),
    ):
        value = first.get(column)
        if value is not None:
            share = column.startswith("gen")
            speed = f"{value:.2g}" if value < 100 else f"{value:,.0f}"
            ratio = f"{value:.4f}" if column == "ppl_ratio" else speed
            cards.append({"value": f"{100 * value:.1f} %" if share else ratio, "title": title})
    return cards


def _tables(rows: list[Row]) -> list[dict[str, Any]]:
    several = len({row["batch_size"] for row in rows}) > 1
    found = []
    for title, note, columns in _TABLES:
        used = [c for c in columns if any(row.get(c.name) is not None for row in rows)]
        best = {c.name: _best(c, rows) for c in used}
        lines = []
        for row in rows:
            cells = [_cell(c, row, best[c.name]) for c in used]
            name = TITLES.get(row["system"], row["system"])
            label = f"{name}, batches of {row['batch_size']}" if several else name
            lines.append({"name": label, "ours": row["system"] == "ours", "cells": cells})
        if used:
            heads = [c.title for c in used]
            found.append({"title": title, "note": note, "heads": heads, "rows": lines})
    return found


def _best(column: Column, rows: list[Row]) -> float | None:
    values = [row[column.name] for row in rows if row.get(column.name) is not None]
    # What has diverged is not the best, and NaN would be by its place in the list.
    values = [value for value in values if math.isfinite(value)]
    if not column.best or len(values) < 2:
        return None
    if column.best == "one":
        best: float = min(values, key=lambda value: abs(value - 1))
        return best
    return max(values) if column.best == "high" else min(values)


_FORMATS: dict[str, Callable[[float], str]] = {
    "share": lambda v: f"{100 * v:.1f}",
    "small_share": lambda v: f"{100 * v:.2f} %",
    "number": lambda v: f"{v:.2f}",
    "ratio": lambda v: f"{v:.4f}",
    "small": lambda v: f"{v:.2g}",
    "count": lambda v: f"{v:,.0f}",
}


def _cell(column: Column, row: Row, best: float | None) -> dict[str, Any]:
    value = row.get(column.name)
    if value is None:
        return {"text": "–", "within": "", "best": False, "bar": None}
    form = _FORMATS[column.kind]
    low, high = row.get(f"{column.name}_low"), row.get(f"{column.name}_high")
    within = "" if low is None or high is None else f"{form(low)} – {form(high)}"
    return {
        "text": form(value),
        "within": within,
        "best": best is not None and value == best,
        "bar": round(100 * value, 1) if column.kind == "share" else None,
    }


def _figures(
    out: Path,
    plan: dict[str, Any],
    done: list[dict[str, Any]],
    measured: list[Row],
    points: list[Row],
    scores: list[Row],
) -> list[dict[str, str]]:
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    found = []

    def add(name: str, caption: str, figure: Any) -> None:
        svg = figures.save(figure, folder / f"{name}.png")
        found.append({"name": name, "caption": caption, "svg": svg})

    if len({row["edits"] for row in points}) > 1:
        caption = f"Teacher-forced, all facts edited so far. {figures.bands_note(points)}"
        add("curves", caption, figures.curves(points, _SHARES))
        most = sorted({run["spec"]["first"] for run in done})
        caption = (
            f"The first {' or '.join(map(str, most))} facts alone, as many of them as are edited, "
            "measured again at every checkpoint: what later edits leave of early ones. "
            f"{figures.bands_note(points)}"
        )
        columns = [(f"first_{name}", f"first facts: {title}") for name, title in _SHARES]
        add("retention", caption, figures.curves(points, columns))
    elif measured:
        caption = "Teacher-forced. Whiskers are 95 % intervals."
        add("teacher-forced", caption, figures.bars(measured, _SHARES))
    generated = [row for row in measured if row.get("gen_reliability") is not None]
    if generated:
        caption = "In free generation, at the end. Whiskers are 95 % intervals."
        columns = [(name.replace("tf_", "gen_"), title) for name, title in _SHARES]
        add("generated", caption, figures.bars(generated, columns))
    scored = [run for run in done if "values" in run["final"]]
    if scored:
        caption = (
            "The gate's score at the end, token by token, and the threshold alpha. Good is an "
            "edited key to the right of the dashed line and everything else to its left. Note the "
            "logarithmic scale."
        )
        add("scores", caption, figures.score_distributions(scored))
        if len({row["edits"] for row in scores}) > 1:
            caption = "Median and 5 to 95 % band of the score over the number of edits, and alpha."
            add("scores-over-edits", caption, figures.score_bands(scores))
    return found


def _score_tables(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "title": _label(run, done),
            "rows": [
                {
                    **row,
                    "tokens": f"{row['tokens']:,}",
                    "fired": f"{100 * row['fired']:.2f} %",
                    "auc": "–" if row["group"] == "edited" else f"{row['auc']:.4f}",
                    "quantiles": [
                        f"{row[q]:.3g}" if row["defined"] else "–" for q in ("q01", "q50", "q99")
                    ],
                    "undefined": row["tokens"] - row["defined"],
                }
                for row in run["final"]["scores"]
            ],
        }
        for run in done
        if "scores" in run["final"]
    ]


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shade"] = _shade
    environment.filters["visible"] = _visible
    return environment


def _shade(z: float | None, alpha: float) -> str:
    """How dark a token is: its score as a share of the threshold."""
    share = 0.0 if z is None or alpha <= 0 else min(1.0, max(0.0, z / alpha))
    return f"rgba(213, 94, 0, {0.8 * share:.2f})"


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace(" ", "\u00a0")
