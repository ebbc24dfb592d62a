"""The benchmark engine: its rows, its turns, its refusals. Nothing here looks at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch

from coachhook import bench
from coachhook.bench import runner

KEYS = [
    "op",
    "shape",
    "dtype",
    "device",
    "backend",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "floor_ms",
    "peer",
    "peer_ms",
    "ratio",
]


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    monkeypatch.setattr(runner, "_QUICK_SECONDS", 0.0)


def test_rows_have_the_pinned_form():
    rows = bench.run("hooked_linear", quick=True, dtype=torch.float32)
    assert rows
    for row in json.loads(json.dumps(rows)):
        assert list(row) == KEYS
        assert row["op"] == "hooked_linear"
        assert row["dtype"] == "float32"
        assert row["device"] == "cpu"
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert math.isclose(row["ratio"], row["peer_ms"] / row["median_ms"])


@pytest.mark.parametrize("name", bench.benchmarked_ops())
def test_every_quick_case_runs(name):
    rows = bench.run(name, quick=True)
    assert rows
    assert all(list(row) == KEYS and row["median_ms"] > 0 for row in rows)


def test_unknown_op():
    with pytest.raises(ValueError, match="bench: op must be one of .*hooked_linear.*got 'conv'"):
        bench.run("conv")


def test_functions_take_turns():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = bench.time_alternately(functions, torch.device("cpu"), seconds=0.0)
    warm_up, measured = calls[:6], calls[6:]
    assert warm_up == list("aabbcc")
    rounds = [measured[i : i + 3] for i in range(0, len(measured), 3)]
    assert all(sorted(turn) == list("abc") for turn in rounds)
    assert rounds[0] != rounds[1]  # nobody always runs in another one's wake
    assert {len(samples) for samples in times.values()} == {len(rounds)}


def test_op_and_peer_answer_alike():
    """A benchmark of two things that differ would compare nothing."""
    from coachhook.bench.hooked_linear import ALPHA, Layer
    from coachhook.bench.peers import published_hook
    from coachhook.ops import hooked_linear

    layer = Layer(64, 256, 8, torch.float32, torch.device("cpu"))
    x = torch.randn(4, 32, 256)
    peer, _ = published_hook(x, layer.weight, layer.bias, layer.hook, layer.bias, ALPHA)
    for storage in ("dense", "factored"):
        y, z = hooked_linear(x, layer.weight, layer.bias, layer.delta(storage), ALPHA)
        assert (z >= ALPHA).any()
        torch.testing.assert_close(y, peer, rtol=1e-4, atol=1e-4)  # the peer subtracts outputs
