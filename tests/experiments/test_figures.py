"""The figures as a reader gets them: nothing cut off, nothing mixed up."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.experiments import figures, report, scores
from benchmarks.experiments.scores import GROUPS

SHARE = ("tf_reliability", "reliability")


def curve_rows(systems, sizes, edits):
    return [
        {"system": system, "batch_size": size, "edits": n, "tf_reliability": 0.5}
        for system in systems
        for size in sizes
        for n in edits
    ]


def score_rows(sizes):
    """As of `tables.score_rows`; the median is the batch size."""
    scores = {"q05": 0.0, "q95": 100.0, "alpha": 0.7, "layer": 0}
    return [
        {"system": "ours", "batch_size": size, "edits": n, "group": group, "q50": size, **scores}
        for size in sizes
        for n in (8, 16)
        for group in GROUPS
    ]


def titles(figure):
    return [axis.get_title(loc="left") for axis in figure.axes if axis.get_visible()]


@pytest.mark.parametrize(
    "systems", [("ours", "memit"), ("ours", "no-gate", "paper", "accumulated")]
)
def test_the_legend_is_within_the_figure(tmp_path, systems):
    rows = curve_rows(systems, (1, 10, 30, 100), (30, 100))
    figure = figures.curves(rows, [SHARE] * 3)
    figures.save(figure, tmp_path / "curves.png")
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width
    assert 0 <= box.y0 and box.y1 <= figure.axes[0].get_window_extent().y0
    assert len(legend.get_texts()) == 4 * len(systems)


def test_the_axis_of_edits_is_labelled_in_one_way(tmp_path):
    figure = figures.curves(curve_rows(["ours"], [10], [100, 200, 300]), [SHARE])
    figures.save(figure, tmp_path / "curves.png")
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    ticks = [t for minor in (False, True) for t in axis.get_ticklabels(minor=minor)]
    labels = [t.get_text() for t in ticks if t.get_text() and low <= t.get_position()[0] <= high]
    assert labels == ["100", "200"]


def test_batch_sizes_have_panels_of_their_own(tmp_path):
    figure = figures.score_bands(score_rows([4, 8]))
    figures.save(figure, tmp_path / "scores.png")
    assert titles(figure) == [f"coachhook (default)\nbatches of {n}, layer 0" for n in (4, 8)]
    for axis, size in zip(figure.axes, (4, 8), strict=False):
        for line in axis.get_lines()[: len(GROUPS)]:
            assert list(line.get_xdata()) == [8, 16] and list(line.get_ydata()) == [size, size]
    assert titles(figures.score_bands(score_rows([4]))) == ["coachhook (default), layer 0"]


def test_distributions_name_their_batch_size():
    runs = [
        {
            "spec": {"system": "ours", "batch_size": size},
            "edits": [{"alphas": {"0": 0.7}}],
            "final": {"values": [{"layer": 0, "group": g, "values": [0.1, 0.9]} for g in GROUPS]},
        }
        for size in (4, 8)
    ]
    found = titles(figures.score_distributions(runs))
    assert found == [f"coachhook (default)\nbatches of {n}, layer 0" for n in (4, 8)]


def test_a_group_without_any_defined_score_is_shown_as_such(tmp_path):
    """In the published scope the score of a sequence of one token is undefined."""
    found = {
        (0, "edited"): (torch.tensor([2.0, 3.0]), torch.tensor([True, True])),
        (0, "neighbour"): (torch.tensor([math.nan]), torch.tensor([False])),
    }
    rows = scores.summary(found)
    assert [(row["group"], row["tokens"], row["defined"]) for row in rows] == [
        ("edited", 2, 2),
        ("neighbour", 1, 0),
    ]
    assert rows[1]["auc"] == 1.0 and math.isnan(rows[1]["q50"])
    run = {
        "spec": {"system": "paper", "batch_size": 10},
        "edits": [{"alphas": {"0": 2.2}}],
        "final": {"scores": rows, "values": scores.thinned(found, 0)},
    }
    (table,) = report._score_tables([run])
    assert [row["quantiles"] for row in table["rows"]] == [["2.01", "2.5", "2.99"], ["–"] * 3]
    figures.save(figures.score_distributions([run]), tmp_path / "scores.png")
    head = {"system": "paper", "batch_size": 10, "alpha": 2.2}
    points = [{**head, "edits": n, **row} for n in (10, 20) for row in rows]
    figures.save(figures.score_bands(points), tmp_path / "bands.png")
