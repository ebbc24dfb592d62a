"""Choice of implementations, and the registration helper: eager bypass and registered op."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coachhook.errors import BackendUnavailableError
from coachhook.ops import _backends, available_backends, hooked_linear, is_supported
from coachhook.ops._registry import is_plain_eager, register_op

X = torch.randn(2, 6, 8)
WEIGHT, DELTA = torch.randn(5, 8), torch.randn(5, 8)


def test_available_backends_say_why_not():
    report = available_backends("hooked_linear", "cpu")
    assert list(report) == ["reference", "cpu", "triton", "cuda"]
    assert report["reference"] == (True, None)
    assert report["cpu"] == (True, None)
    for name in ("triton", "cuda"):
        able, reason = report[name]
        assert not able
        assert "runs on CUDA tensors" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_without_a_device_gpu_backends_say_so():
    for name in ("triton", "cuda"):
        assert available_backends("hooked_linear")[name] == (False, "torch sees no CUDA device")


def test_every_op_runs_on_the_cpu_and_unknown_ones_are_refused():
    assert {"hooked_linear", "gate_scores"} <= set(_backends.ops())
    for op in _backends.ops():
        assert is_supported(op, "cpu")
        assert is_supported(op)
    with pytest.raises(ValueError, match="op must be one of .*got 'conv'"):
        is_supported("conv")
    with pytest.raises(ValueError, match="op must be one of"):
        available_backends("conv")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_unavailable_backend_names_what_why_and_what_else(backend):
    message = f"hooked_linear: backend '{backend}' is not available: .*CUDA.*available.*: .*cpu"
    with pytest.raises(BackendUnavailableError, match=message):
        hooked_linear(X, WEIGHT, None, DELTA, 1.0, backend=backend)
    with pytest.raises(RuntimeError):
        hooked_linear(X, WEIGHT, None, DELTA, 1.0, backend=backend)


def test_environment_chooses_for_auto_only(monkeypatch):
    table = _backends._IMPLEMENTATIONS["hooked_linear"]
    monkeypatch.delenv("COACHHOOK_BACKEND", raising=False)
    assert _backends.resolve("hooked_linear", "auto", X) is table["cpu"].function
    monkeypatch.setenv("COACHHOOK_BACKEND", "reference")
    assert _backends.resolve("hooked_linear", "auto", X) is table["reference"].function
    assert _backends.resolve("hooked_linear", "cpu", X) is table["cpu"].function
    monkeypatch.setenv("COACHHOOK_BACKEND", "auto")
    assert _backends.resolve("hooked_linear", "auto", X) is table["cpu"].function
    monkeypatch.setenv("COACHHOOK_BACKEND", "cuda")
    with pytest.raises(BackendUnavailableError, match="'cuda' is not available"):
        hooked_linear(X, WEIGHT, None, DELTA, 1.0)
    monkeypatch.setenv("COACHHOOK_BACKEND", "gpu")
    with pytest.raises(ValueError, match="COACHHOOK_BACKEND must be one of .*got 'gpu'"):
        hooked_linear(X, WEIGHT, None, DELTA, 1.0)


def test_an_implementation_may_refuse_tensors(monkeypatch):
    def only_wide(x):
        return None if x.shape[-1] >= 16 else "it needs n >= 16"

    monkeypatch.setitem(_backends._IMPLEMENTATIONS, "probe", {})
    _backends.register("probe", "reference", lambda x: "slow")
    _backends.register("probe", "cpu", lambda x: "fast", supports=only_wide)
    assert _backends.resolve("probe", "auto", torch.empty(16))(None) == "fast"
    assert _backends.resolve("probe", "auto", torch.empty(8))(None) == "slow"
    with pytest.raises(BackendUnavailableError, match="it needs n >= 16; available.*: reference"):
        _backends.resolve("probe", "cpu", torch.empty(8))


def test_a_refusal_is_said_once_for_each_reason(monkeypatch, caplog):
    monkeypatch.setitem(_backends._IMPLEMENTATIONS, "told", {})
    _backends.register("told", "reference", lambda x: "slow")
    _backends.register("told", "cpu", lambda x: "fast", supports=lambda x: f"not {x.dtype}")
    for dtype in (torch.float64, torch.float64, torch.float16, torch.float64):
        assert _backends.resolve("told", "auto", torch.empty(1, dtype=dtype))(None) == "slow"
    assert [record.getMessage() for record in caplog.records] == [
        f"told: cpu is passed over: not {dtype}; another backend runs"
        for dtype in (torch.float64, torch.float16)
    ]


def test_a_backend_that_is_not_there_is_not_talked_about(caplog):
    hooked_linear(X, WEIGHT, None, DELTA, 1.0)
    assert not caplog.records


def test_native_extension_is_optional():
    built = importlib.util.find_spec("coachhook._C") is not None
    module, error = _backends.native(), _backends.native_error()
    assert (module is None) == (error is not None)
    if not built:
        assert module is None
        assert "not built" in error
        assert "COACHHOOK_BUILD_CUDA=1" in error


def test_import_touches_neither_cuda_nor_triton():
    code = (
        "import sys, coachhook.ops as ops, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules, 'triton was imported'\n"
        "assert 'coachhook._C' not in sys.modules\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture(scope="module")
def probe_op():
    return register_op(
        "test_probe",
        "(Tensor x, int k) -> Tensor",
        lambda x, k: x * k,
        lambda x, k: x.new_empty(x.shape),
    )


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_eager_calls_skip_the_dispatcher(probe_op):
    x = torch.ones(3)
    with torch.profiler.profile() as trace:
        direct = probe_op(x, 3)
    assert torch.equal(direct, x * 3)
    names = {event.key for event in trace.key_averages()}
    assert "coachhook::test_probe" not in names
    with torch.profiler.profile() as trace:
        probe_op.registered(x, 3)
    assert "coachhook::test_probe" in {event.key for event in trace.key_averages()}


def test_compiled_calls_hold_the_registered_probe_op(probe_op):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: probe_op(x, 2) + 1, fullgraph=True, backend=keep)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    targets = {node.target for node in graphs[0].graph.nodes}
    assert probe_op.registered in targets


def test_watched_calls_use_the_registered_probe_op(probe_op):
    x = torch.ones(3)
    with Watching() as mode:
        probe_op(x, 2)
    assert probe_op.registered in mode.seen
    fake_mode = torch._subclasses.FakeTensorMode()
    fake = probe_op(fake_mode.from_tensor(x), 2)
    assert isinstance(fake, torch._subclasses.FakeTensor)
    assert fake.shape == x.shape
    assert is_plain_eager(x, torch.nn.Parameter(x), 3, None, "auto")
    assert not is_plain_eager(fake_mode.from_tensor(x))
    assert torch.func.vmap(lambda t: t * (1 if is_plain_eager(t) else 2))(x).sum() == 6


def test_eager_hooked_linear_skips_the_dispatcher_and_a_watched_one_does_not():
    with torch.profiler.profile() as trace:
        hooked_linear(X, WEIGHT, None, DELTA, 1.0)
    assert not any(event.key.startswith("coachhook::") for event in trace.key_averages())
    with Watching() as mode:
        hooked_linear(X, WEIGHT, None, DELTA, 1.0)
    assert torch.ops.coachhook.hook_output.default in mode.seen
