"""The benchmark engine: its rows, its turns, its refusals. Nothing here looks at a time."""

from __future__ import annotations

import json
import math
import os
from contextlib import contextmanager, nullcontext

import pytest
import torch

from coachhook import bench
from coachhook.bench import Case, runner

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
        assert list(row)[: len(KEYS)] == KEYS
        assert row["op"] == "hooked_linear"
        assert row["dtype"] == "float32"
        assert row["device"] == "cpu"
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert math.isclose(row["ratio"], row["peer_ms"] / row["median_ms"])


@pytest.fixture
def little_work(monkeypatch):
    """Cases of whole models with fewer tokens and facts than even a quick run has."""
    from coachhook.bench import editing, statistics

    collect, edit = statistics.statistics_cases, editing.edit_case
    monkeypatch.setattr(
        statistics,
        "statistics_cases",
        lambda shape, _tokens, _batch, *where: collect(shape, 512, 256, *where),
    )
    monkeypatch.setattr(
        editing, "edit_case", lambda shape, _batch, _rounds, *where: edit(shape, 2, 1, *where)
    )


@pytest.mark.parametrize("name", bench.benchmarked_ops())
def test_every_quick_case_runs(name, little_work):
    rows = bench.run(name, quick=True)
    assert rows
    for row in rows:
        assert list(row)[: len(KEYS)] == KEYS and row["error"] is None
        assert row["median_ms"] > 0


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


def test_op_and_peers_answer_alike():
    """A benchmark of things that differ would compare nothing."""
    from coachhook.bench.hooked_linear import ALPHA, Layer
    from coachhook.bench.peers import lora_layer, plain_hook, published_hook
    from coachhook.ops import hooked_linear

    layer = Layer(64, 256, 8, torch.float32, torch.device("cpu"))
    frozen = layer.weight, layer.bias
    x = torch.randn(4, 32, 256)
    peer, _ = published_hook(x, *frozen, layer.hook, layer.bias, ALPHA)
    for storage in ("dense", "factored"):
        y, z = hooked_linear(x, *frozen, layer.delta(storage), ALPHA)
        assert (z >= ALPHA).any()
        torch.testing.assert_close(y, peer, rtol=1e-4, atol=1e-4)  # the peer subtracts outputs
        lift, projection = (None, layer.dense) if storage == "dense" else (layer.q, layer.s)
        plain = plain_hook(x, *frozen, lift, projection, ALPHA)
        torch.testing.assert_close(plain, (y, z), rtol=1e-4, atol=1e-4)
    scope = layer.scope("population")
    want = hooked_linear(x, *frozen, layer.delta("factored"), ALPHA, scope=scope)
    plain = plain_hook(x, *frozen, layer.q, layer.s, ALPHA, scope.mean, scope.std)
    torch.testing.assert_close(plain[0], want[0], rtol=1e-4, atol=1e-4)
    # A fresh adapter adds nothing, but does its products.
    lora = lora_layer(*frozen, 8)
    assert lora is not None
    torch.testing.assert_close(lora(x), torch.nn.functional.linear(x, *frozen))


def test_cases_of_a_gpu_have_every_backend_and_way(monkeypatch):
    """Built and run on the CPU, with small sizes."""
    from coachhook.bench import hooked_linear as gated
    from coachhook.ops import hooked_linear
    from coachhook.ops.hooked_linear import decode, products

    monkeypatch.setattr(gated, "_GPU_SIZES", [(24, 40)])
    monkeypatch.setattr(gated, "_GPU_QUICK", ([(24, 40)], [8, 0], [1, 80]))
    monkeypatch.setattr(gated, "_MAIN_RANK", 8)
    monkeypatch.setattr(gated, "_GPU_EDITS", [8, 20])
    monkeypatch.setattr(gated, "_backends", lambda device: ["cuda", "triton"])
    monkeypatch.setattr(gated, "_more_peers", lambda *_: {})
    seen = []

    def hooked(x, weight, bias, delta, alpha, *, backend, scope):
        way = products.way() + " overlapped" * (decode.OVERLAP_SWITCH in os.environ)
        seen.append((x.shape[0] * x.shape[1], backend, way))
        return hooked_linear(x, weight, bias, delta, alpha, scope=scope)

    monkeypatch.setattr(gated, "hooked_linear", hooked)
    for case in gated._gpu_cases(torch.device("cpu"), torch.bfloat16, True):
        y, _ = case.run()
        assert y.shape == case.floor().shape
        assert case.shape.endswith(seen[-1][-1].replace("exact", "").strip())
    one = [(1, "cuda", "exact"), (1, "triton", "exact"), (1, "cuda", "fused")]
    one += [(1, "cuda", "exact overlapped"), (1, "cuda", "fused overlapped")]
    many = [(80, "cuda", "exact"), (80, "triton", "exact")]
    cued = [(1, "auto", "exact"), (80, "auto", "exact")] * 2
    assert seen == one + many + cued + one + many + [
        (80, "triton", "fused"),
        (80, "triton", "library"),
    ]
    assert products.way() == "exact" and decode.OVERLAP_SWITCH not in os.environ


def test_peers_are_silent_at_one_token(recwarn):
    from coachhook.bench.peers import plain_hook, published_hook

    x, weight = torch.randn(2, 1, 16), torch.randn(8, 16)
    for y, z in (
        published_hook(x, weight, None, 2 * weight, None, -9.0),
        plain_hook(x, weight, None, None, weight, -9.0),
    ):
        assert z.isnan().all() and torch.equal(y, x @ weight.T)
    assert not recwarn.list


def a_case(function, **more):
    return Case("op", "m=1", torch.float32, "cpu", function, **more)


def test_what_fails_is_reported_and_the_rest_measured(monkeypatch):
    def fail():
        raise RuntimeError("no kernel image")

    def unbuilt(*_):
        yield a_case(lambda: None)
        raise RuntimeError("out of memory")

    table = {
        "unbuilt": unbuilt,
        "good": lambda *_: [a_case(lambda: None, more_peers={"bad": fail, "fine": lambda: None})],
        "bad": lambda *_: [a_case(fail)],
    }
    monkeypatch.setattr(runner, "_load_factories", lambda: table)
    bad, good, built, unbuilt = bench.run(quick=True)
    assert built["error"] is None
    assert (unbuilt["shape"], unbuilt["error"]) == ("case 2", "RuntimeError: out of memory")
    assert bad["error"] == "RuntimeError: no kernel image" and bad["median_ms"] is None
    assert good["error"] is None and list(good["peers_ms"]) == ["fine"]
    assert good["left_out"] == {"bad": "RuntimeError: no kernel image"}


def test_an_interrupted_run_returns_what_it_has(monkeypatch):
    def stop():
        raise KeyboardInterrupt

    table = {"op": lambda *_: iter([a_case(lambda: None), a_case(stop), a_case(lambda: None)])}
    monkeypatch.setattr(runner, "_load_factories", lambda: table)
    assert [row["error"] for row in bench.run(quick=True)] == [None]


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_an_interrupted_case_has_a_row_of_its_rounds(monkeypatch, rounds):
    calls = []

    def stop():
        if len(calls) == 2 + rounds:  # two before the first that counts
            raise KeyboardInterrupt
        calls.append(None)

    monkeypatch.setattr(runner, "_load_factories", lambda: {"op": lambda *_: iter([a_case(stop)])})
    found = bench.run(quick=True)
    assert [row["rounds"] for row in found] == ([rounds] if rounds else [])
    assert all(row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in found)


def test_a_spent_budget_begins_no_case(monkeypatch, caplog):
    table = {"op": lambda *_: iter([a_case(lambda: None)] * 3)}
    monkeypatch.setattr(runner, "_load_factories", lambda: table)
    assert bench.run(quick=True, budget=-1.0) == []
    assert "no time left" in caplog.text
    assert len(bench.run(quick=True, budget=1e9)) == 3


@pytest.mark.parametrize("budget", [math.nan, math.inf])
def test_a_budget_that_never_ends_is_refused(budget):
    with pytest.raises(ValueError, match=f"bench: budget must be finite or None, got {budget}"):
        bench.run("gram", quick=True, budget=budget)


@pytest.mark.parametrize("device", ["nope", "meta"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=f"bench: device must be .*got '{device}'"):
        bench.run("gram", quick=True, device=device)


def test_hooks_of_the_model_benchmark_fire():
    from coachhook.bench import model as whole

    shape = whole._SMALL_LLAMA
    model = whole.random_model(shape, torch.float32, torch.device("cpu"))
    ids = torch.randint(256, (1, shape.prompt))
    hooks = whole.add_hooks(model, shape, ids)
    assert list(hooks) == shape.layers
    with torch.inference_mode(), hooks.record() as records:
        model(ids, use_cache=False)
    fired = [int(flags.sum()) for _, _, flags in records]
    assert 0 < sum(fired) < len(fired) * shape.prompt / 4
    # The cache is as it was: every call answers for the same position.
    step = whole._decoding(model, ids)
    with torch.inference_mode():
        first, again = step(), step()
        longer = model(torch.cat([ids, ids[:, -1:]], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(again, first)
    torch.testing.assert_close(first, longer, rtol=1e-3, atol=1e-3)


def test_the_device_measured_is_the_present_one(monkeypatch):
    """Events are recorded on its stream, not on that of the first GPU."""
    present, seen = [], []

    @contextmanager
    def device(wanted):
        present.append(wanted)
        yield
        present.pop()

    def cases(*_):
        seen.extend(present)
        return []

    second = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(runner, "usable_device", lambda *_: second)
    monkeypatch.setitem(runner._load_factories(), "gram", cases)
    assert bench.run("gram", device="cuda:1") == []
    assert seen == [second] and not present


def test_graphs_are_captured_on_the_present_device(monkeypatch):
    """By default torch takes a stream of the device that it has first captured on."""
    made, captured_on = [], []

    class Stream:
        def __init__(self):
            made.append(self)

        def wait_stream(self, _):
            pass

    class Graph:
        def replay(self):
            pass

    @contextmanager
    def capture(_, *, stream=None):
        captured_on.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    runner.captured(lambda: None)()
    assert captured_on == made[:1]
