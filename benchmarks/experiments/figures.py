"""Figures: curves over the number of edits, bars of one round, distributions of the score."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.scores import GROUPS
from benchmarks.experiments.systems import TITLES
from benchmarks.experiments.tables import Row

# One colour and marker for a system in every figure (Okabe and Ito's palette, safe for
# colour-blind readers); ours is dark and thick.
_STYLE = {
    "ours": ("#0b3c5d", "o"),
    "ours-mlp": ("#0072b2", "p"),
    "no-gate": ("#56b4e9", "s"),
    "paper": ("#d55e00", "D"),
    "memit": ("#009e73", "^"),
    "accumulated": ("#cc79a7", "v"),
    "alphaedit": ("#e69f00", "P"),
    "fine-tuning": ("#7f7f7f", "x"),
    "lora": ("#b0a000", "+"),
    "grace": ("#8c564b", "*"),
    "mend": ("#9467bd", "<"),
    "serac": ("#17becf", ">"),
    "retrieval": ("#444444", "d"),
}
# Batch sizes of one system, the smallest first.
_LINES = ("-", "--", ":", "-.", (0, (7, 2, 1, 2, 1, 2)), (0, (1, 4)))
# Lines of a legend that the height of a figure is made for, and the inches of another one.
_LEGEND_LINES, _LEGEND_LINE = 3, 0.22
_GROUP_COLOURS = {
    "edited": "#d55e00",
    "paraphrase": "#e69f00",
    "same prompt": "#56b4e9",
    "neighbour": "#009e73",
    "unrelated": "#999999",
}
_RC = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "coachhook",
}


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, path: Path) -> str:
    """Writes the figure as PNG; returns it as SVG text that stands in a page."""
    figure.savefig(path, dpi=150)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    svg: str = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    # Ids must differ between the figures of one page.
    tag = re.sub(r"\W", "", path.stem)
    svg = re.sub(r'id="([^"]+)"', rf'id="{tag}-\1"', svg)
    return re.sub(r"(url\(|xlink:href=\")#", rf"\1#{tag}-", svg)


def _name(row: Row, several: bool) -> str:
    system: str = row["system"]
    title = TITLES.get(system, system)
    return f"{title}, batches of {row['batch_size']}" if several else title


def _panel(system: str, size: int, layer: int, sizes: Any) -> str:
    """The title of a panel about one layer; in two lines where it names the batch size too."""
    title = TITLES.get(system, system)
    return (
        f"{title}\nbatches of {size}, layer {layer}"
        if len(sizes) > 1
        else f"{title}, layer {layer}"
    )


def _legend(figure: Any, axis: Any, most: int) -> None:
    """A legend below the panels, in as many columns up to ``most`` as the figure is wide."""
    handles, labels = axis.get_legend_handles_labels()
    for columns in range(min(most, len(labels)), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            more = -(-len(labels) // columns) - _LEGEND_LINES
            figure.set_figheight(figure.get_figheight() + _LEGEND_LINE * max(0, more))
            return
        legend.remove()


def _has_band(system: str, runs: Any) -> bool:
    """Bands of more than three systems hide each other; then only ours has one."""
    return len(runs) <= 3 or system == "ours"


def bands_note(rows: Sequence[Row]) -> str:
    """What the bands of :func:`curves` are."""
    runs = {(row["system"], row["batch_size"]) for row in rows}
    whose = "" if len(runs) <= 3 else f" of {TITLES['ours']}; those of the others are as wide"
    return f"Bands are 95 % intervals{whose}."


def curves(rows: Sequence[Row], columns: Sequence[tuple[str, str]]) -> Any:
    """Metrics over the number of edits, one panel each, 95 % intervals as bands.

    Args:
        rows: of :func:`benchmarks.experiments.tables.checkpoint_rows`.
        columns: (column, title of its panel).
    """
    import matplotlib

    with matplotlib.rc_context(_RC):
        figure, axes = _figure(3.7 * len(columns), 3.9, 1, len(columns))
        several = len({row["batch_size"] for row in rows}) > 1
        groups: dict[tuple[str, int], list[Row]] = {}
        for row in rows:
            groups.setdefault((row["system"], row["batch_size"]), []).append(row)
        most = max(row["edits"] for row in rows)
        sizes = sorted({row["batch_size"] for row in rows})
        for axis, (column, title) in zip(axes[0], columns, strict=True):
            for (system, size), points in groups.items():
                known = [p for p in points if p.get(column) is not None]
                colour, marker = _STYLE.get(system, ("#000000", "."))
                x = [p["edits"] for p in known]
                axis.plot(
                    x,
                    [p[column] for p in known],
                    color=colour,
                    marker=marker,
                    markersize=5,
                    linestyle=_LINES[sizes.index(size) % len(_LINES)],
                    linewidth=2.4 if system == "ours" else 1.5,
                    zorder=3 if system == "ours" else 2,
                    label=_name(points[0], several),
                )
                if known and f"{column}_low" in known[0] and _has_band(system, groups):
                    low = [p[f"{column}_low"] for p in known]
                    high = [p[f"{column}_high"] for p in known]
                    axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            axis.set_title(title, loc="left")
            axis.set_ylim(-0.03, 1.03)
            axis.set_xlabel("facts edited")
            if most > 200:
                axis.set_xscale("log")
                from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

                axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.xaxis.set_major_formatter(ScalarFormatter())
                # On short axes it would write 2 x 10^2 beside our 100.
                axis.xaxis.set_minor_formatter(NullFormatter())
        _legend(figure, axes[0][0], 4)
    return figure


def bars(rows: Sequence[Row], columns: Sequence[tuple[str, str]]) -> Any:
    """Systems beside each other, one panel per metric, 95 % intervals as whiskers."""
    import matplotlib

    with matplotlib.rc_context({**_RC, "axes.grid": False}):
        height = 1.1 + 0.34 * len(rows)
        figure, axes = _figure(3.6 * len(columns), height, 1, len(columns))
        several = len({row["batch_size"] for row in rows}) > 1
        names = [_name(row, several) for row in rows]
        for number, (axis, (column, title)) in enumerate(zip(axes[0], columns, strict=True)):
            for y, row in enumerate(rows):
                value = row.get(column)
                if value is None:
                    continue
                low = row.get(f"{column}_low", value)
                high = row.get(f"{column}_high", value)
                colour = _STYLE.get(row["system"], ("#000000", "."))[0]
                axis.barh(y, value, color=colour, height=0.62)
                axis.plot([low, high], [y, y], color="white", linewidth=3.2, alpha=0.85)
                axis.plot([low, high], [y, y], color="#222222", linewidth=1.2)
                axis.text(
                    1.03,
                    y,
                    f"{value:.2f}",
                    va="center",
                    fontsize=9,
                    transform=axis.get_yaxis_transform(),
                )
            axis.set_title(title, loc="left")
            axis.set_xlim(0, 1)
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.set_yticks(range(len(rows)), names if number == 0 else [""] * len(rows))
            axis.tick_params(axis="y", length=0)
    return figure


def score_distributions(runs: Sequence[dict[str, Any]]) -> Any:
    """Histograms of the gate's score at the end, one panel per system and layer."""
    import matplotlib
    import numpy as np

    panels = []
    sizes = {run["spec"]["batch_size"] for run in runs}
    for run in runs:
        values: dict[int, dict[str, list[float]]] = {}
        for row in run["final"]["values"]:
            values.setdefault(row["layer"], {})[row["group"]] = row["values"]
        alphas = run["edits"][-1]["alphas"]
        panels += [(run, layer, groups, alphas[str(layer)]) for layer, groups in values.items()]
    with matplotlib.rc_context(_RC):
        figure, axes = _figure(8.6, 0.5 + 2.3 * len(panels), len(panels), 1)
        for axis, (run, layer, groups, alpha) in zip(axes[:, 0], panels, strict=True):
            everything = np.concatenate([np.asarray(v) for v in groups.values() if v])
            low, high = np.quantile(everything, [0.001, 0.999])
            edges = np.linspace(min(low, 0), max(high, alpha * 1.1), 70)
            for group in GROUPS:
                if groups.get(group):
                    counts, _ = np.histogram(np.clip(groups[group], edges[0], edges[-1]), edges)
                    axis.stairs(
                        counts / counts.sum(),
                        edges,
                        fill=group in ("edited", "unrelated"),
                        alpha=0.55 if group in ("edited", "unrelated") else 1.0,
                        linewidth=1.6,
                        color=_GROUP_COLOURS[group],
                        label=group,
                    )
            axis.axvline(alpha, color="#b00020", linestyle="--", linewidth=1.4)
            axis.annotate(
                f"alpha {alpha:.2f}",
                (alpha, 0.93),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
                color="#b00020",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
            axis.set_yscale("log")
            axis.set_ylabel("share of tokens")
            spec = run["spec"]
            axis.set_title(_panel(spec["system"], spec["batch_size"], layer, sizes), loc="left")
        axes[-1, 0].set_xlabel("score of the gate")
        _legend(figure, axes[0, 0], len(_GROUP_COLOURS))
    return figure


def score_bands(rows: Sequence[Row]) -> Any:
    """Score over the number of edits: medians with their 5 to 95 % bands, and alpha."""
    import matplotlib

    sizes = {row["batch_size"] for row in rows}
    panels: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        panels.setdefault((row["system"], row["batch_size"], row["layer"]), []).append(row)
    with matplotlib.rc_context(_RC):
        columns = min(3, len(panels))
        lines = -(-len(panels) // columns)
        figure, axes = _figure(3.7 * columns + 0.4, 3.0 * lines + 0.5, lines, columns)
        flat = list(axes.flat)
        for axis in flat[len(panels) :]:
            axis.set_visible(False)
        for row_of_axes in axes:
            row_of_axes[0].set_ylabel("score of the gate")
        for axis, ((system, size, layer), found) in zip(flat, panels.items(), strict=False):
            for group in GROUPS:
                points = [r for r in found if r["group"] == group]
                if not points:
                    continue
                x = [r["edits"] for r in points]
                colour = _GROUP_COLOURS[group]
                axis.plot(x, [r["q50"] for r in points], color=colour, marker=".", label=group)
                axis.fill_between(
                    x,
                    [r["q05"] for r in points],
                    [r["q95"] for r in points],
                    color=colour,
                    alpha=0.12,
                    linewidth=0,
                )
            alphas = sorted({(r["edits"], r["alpha"]) for r in found})
            axis.plot(*zip(*alphas, strict=True), color="#b00020", linestyle="--", label="alpha")
            axis.set_title(_panel(system, size, layer, sizes), loc="left")
            axis.set_xlabel("facts edited")
        _legend(figure, flat[0], len(_GROUP_COLOURS) + 1)
    return figure
