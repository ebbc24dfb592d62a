"""Requests that stay in a run while others leave it; and what may be captured in a CUDA graph."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from coachhook.editing.encoding import encode_requests
from coachhook.editing.held import Held
from coachhook.editing.replay import Replayed, Watch
from coachhook.editing.suffix import Captured
from coachhook.editing.targets import optimise_targets
from coachhook.models import describe

TWO = ("{}", "Some say that {}")


def hold(monkeypatch) -> list[int]:
    """Hold requests on a processor too; collects the number of those in each run that is made."""
    made: list[int] = []
    start = Held.__init__

    def noted(self, suffix, problem, there, requests):
        made.append(len(requests))
        start(self, suffix, problem, there, requests)

    monkeypatch.setattr(Held, "suits", staticmethod(lambda suffix, _: suffix.replays is not False))
    monkeypatch.setattr(Held, "__init__", noted)
    return made


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_targets_are_those_of_runs_without_the_others(make_editor, requests, monkeypatch, kl):
    """With tied requests, rewordings that join, places that differ and longer targets."""
    editor, model, tokenizer = make_editor(rewordings=0, dtype=torch.float64)
    batch = encode_requests(tokenizer, requests[:7], editor.config.contexts, None)
    unknown = replace(requests[5], target_new="Marie Antoinette Fontaine")
    batch += encode_requests(tokenizer, [unknown], editor.config.contexts, None)
    others = [request.contexts[0] for request in batch[2:5]]
    batch = [replace(r, rewordings=others) if i % 2 else r for i, r in enumerate(batch)]
    config = editor.config.with_(target_steps=9, target_kl=kl)

    def found():
        ties = [0, 1, 2, 0, 4, 5, 6, 7]
        return optimise_targets(model, describe(model), batch, config, pad_id=0, ties=ties)

    alone = found()
    made = hold(monkeypatch)
    together = found()
    assert made[0] == len(batch) and len(made) > 1 and made == sorted(made, reverse=True)
    assert together.steps == alone.steps and together.converged == alone.converged
    torch.testing.assert_close(together.deltas, alone.deltas, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together.losses, alone.losses, rtol=1e-9, atol=1e-9)


def test_without_graphs_nobody_is_held(make_editor, requests, monkeypatch):
    """What cannot be captured is seen in the first run, which goes on without the others then."""
    editor, model, tokenizer = make_editor(rewordings=0, contexts=TWO, dtype=torch.float64)
    batch = encode_requests(tokenizer, requests[:4], editor.config.contexts, None)
    alone = optimise_targets(model, describe(model), batch, editor.config, pad_id=0)
    made = hold(monkeypatch)
    block = model.get_submodule(describe(model).layers[-1].block_path)
    handle = block.register_forward_pre_hook(lambda *_: torch.ones(1).item() and None)
    try:
        together = optimise_targets(model, describe(model), batch, editor.config, pad_id=0)
    finally:
        handle.remove()
    assert made == [4]
    torch.testing.assert_close(together.deltas, alone.deltas, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("short", [False, True])
def test_what_was_captured_is_gone_with_its_chunk(make_editor, requests, monkeypatch, short):
    """Without a collection; also where the memory has run out."""
    editor, model, tokenizer = make_editor(rewordings=0, contexts=TWO)
    batch = encode_requests(tokenizer, requests[:3], editor.config.contexts, None)
    hold(monkeypatch)
    graphs, alive, start = [], [], Replayed.__init__

    class Graph:
        pass

    def noted(self, live, **options):
        start(self, live, **options)
        alive.append([graph() is not None for graph in graphs])
        self.captured = Graph()
        graphs.append(weakref.ref(self.captured))

    run = Replayed.run

    def running(self, *args):
        if short and len(graphs) == 1 and self.refused is not None:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return run(self, *args)

    monkeypatch.setattr(Replayed, "__init__", noted)
    monkeypatch.setattr(Replayed, "run", running)
    most = 10_000 if short else 1
    gc.disable()
    try:
        optimise_targets(model, describe(model), batch, editor.config, pad_id=0, max_tokens=most)
    finally:
        gc.enable()
    assert len(graphs) >= 3 and not any(graph() is not None for graph in graphs)
    assert not any(alive[1])


@pytest.mark.parametrize(
    ("call", "refused"),
    [
        (lambda x: (x @ x).relu().sum(), False),
        (lambda x: x[torch.tensor([0, 1])], False),
        (lambda x: x.sum().item(), True),
        (lambda x: x[x > 0], True),
        (lambda x: x.to("meta"), True),
        (lambda x: bool(torch.equal(x, x)), True),
        (lambda x: torch.allclose(x, x), True),
        (lambda x: x.unique(), True),
        (lambda x: x.unique(dim=0), True),
        (lambda x: x.flatten().unique_consecutive(), True),
        (lambda x: x.flatten().int().bincount(), True),
        (lambda x: x.repeat_interleave(torch.tensor([1, 0, 2]), 0), True),
        (lambda x: x.repeat_interleave(torch.tensor([1, 0, 2]), 0, output_size=3), False),
    ],
)
def test_what_the_host_must_know_is_seen(call, refused):
    with Watch() as watch:
        call(torch.eye(3))
    assert bool(watch.refused) is refused


@pytest.mark.parametrize(
    ("call", "refused"),
    [
        (lambda x: x * torch.tensor(2.0), False),
        (lambda x: torch.where(x > 0, x, torch.tensor(0.0)), True),
        (lambda x: torch.where(x > 0, x, 0.0), False),
        (lambda x: x[torch.tensor([0, 1])], True),
        (lambda x: x[:, torch.tensor([0, 1])], True),
        (lambda x: x.index_put((torch.zeros(1, dtype=int, device="meta"),), torch.ones(())), True),
    ],
)
def test_what_lies_on_the_host_is_seen(call, refused):
    """Numbers and indices that an operation takes to the GPU by itself."""
    with Watch() as watch:
        call(torch.empty(3, 3, device="meta"))
    assert bool(watch.refused) is refused


def test_a_run_is_watched_once(make_editor):
    class Run:
        hidden = torch.ones(2, 3)
        calls = 0

        def run(self, hidden, loss_index):
            self.calls += 1
            return hidden + loss_index, hidden

    run = Run()
    replayed = Replayed(run)
    assert replayed.refused is None and replayed.hidden is run.hidden
    for _ in range(3):
        at_loss, last = replayed.run(run.hidden, 1)
        assert torch.equal(at_loss, last + 1)
    assert replayed.refused == set() and not replayed.replays and run.calls == 3


def test_graphs_are_freed_with_their_run(monkeypatch):
    """In the form that this version of torch keeps them in."""
    graphs = []

    class Graph:
        def __init__(self, *_, **__):
            graphs.append(weakref.ref(self))

        def replay(self):
            pass

    @contextmanager
    def nothing(*_, **__):
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda.graphs, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    nothing.default_capture_stream = None
    for name in ("graph", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    for name in ("synchronize", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)

    class Run:
        hidden = torch.ones(2, 3)

        def run(self, hidden, loss_index):
            return 2 * hidden, 3 * hidden

    class OnGpu(torch.Tensor):
        is_cuda = True

    replayed = Replayed(Run(), watched=True)
    hidden = Run.hidden.as_subclass(OnGpu).requires_grad_()
    gc.disable()
    try:
        outputs = replayed.run(hidden, 0)
        torch.autograd.grad(outputs, hidden, [torch.ones(2, 3)] * 2)
        assert len(graphs) == 2 and all(graph() is not None for graph in graphs)
        del outputs, replayed
        assert not any(graph() is not None for graph in graphs)
    finally:
        gc.enable()


def test_nothing_is_captured_under_autocast():
    class OnGpu(torch.Tensor):
        is_cuda = True

    hidden = torch.ones(1, 2, 3).as_subclass(OnGpu)
    problem = SimpleNamespace(captured=Captured(hidden, [], SimpleNamespace()))
    suffix = SimpleNamespace(replays=None)
    assert Held.suits(suffix, problem)
    torch.set_autocast_enabled("cuda", True)  # torch.autocast() does nothing without a GPU
    try:
        sample = torch.ones(2, requires_grad=True)
        with pytest.raises(RuntimeError, match="autocast"):
            torch.cuda.make_graphed_callables(lambda x: 2 * x, (sample,))
        assert not Held.suits(suffix, problem)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert Held.suits(suffix, problem)


def test_a_run_is_captured_on_its_own_device(monkeypatch):
    """The present one may be another: a graph of its stream would hold nothing."""
    present, captured = [], []

    class Stream:
        device = torch.device("cuda:1")

    first = Stream()
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", first)

    @contextmanager
    def device(wanted):
        present.append(wanted)
        yield
        present.pop()

    def capture(call, samples, **_):
        # torch makes one on the present device where there is none.
        assert torch.cuda.graph.default_capture_stream is None
        torch.cuda.graph.default_capture_stream = Stream()
        captured.append((list(present), samples[0].device))
        return call

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)

    class Run:
        hidden = torch.ones(2, 3, device="meta")

        def run(self, hidden, loss_index):
            return hidden, hidden

    replayed = Replayed(Run(), watched=True)
    replayed._captured(Run.hidden, 0)
    assert captured == [([Run.hidden.device], Run.hidden.device)]
    assert torch.cuda.graph.default_capture_stream is first
