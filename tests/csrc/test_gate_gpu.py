"""The CUDA gate on a real GPU: right, repeatable, the same alone and in a batch, and in a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coachhook.ops import (
    Membership,
    Population,
    Scope,
    Sequence,
    available_backends,
    gate_scores,
    hook_output,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    available, reason = available_backends("hooked_linear")["cuda"]
    if not available:
        pytest.skip(str(reason))


def problem(
    dtype: torch.dtype, rows: int = 3, tokens: int = 70, n: int = 48, m: int = 37, r: int = 21
):
    x = torch.randn(rows, tokens, n, device="cuda")
    x[:, ::9] *= 6
    q = torch.linalg.qr(torch.randn(m, r, device="cuda"))[0]
    base = torch.randn(rows, tokens, m, device="cuda")
    return base.to(dtype), x.to(dtype), (q, torch.randn(r, n, device="cuda"))


SCOPES = {"sequence": Sequence(), "population": Population(12.0, 4.0), "membership": Membership()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES.keys())
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_reference(dtype: torch.dtype, scope: Scope, masked: bool) -> None:
    base, x, delta = problem(dtype)
    mask = torch.rand(x.shape[:2], device="cuda") < 0.7 if masked else None
    want_y, want_z = hook_output(base, x, delta, 1.2, mask=mask, scope=scope, backend="reference")
    y, z = hook_output(base, x, delta, 1.2, mask=mask, scope=scope, backend="cuda")
    # The same float32 norms, summed in another order.
    torch.testing.assert_close(z, want_z, rtol=1e-5, atol=1e-5, equal_nan=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, want_y, rtol=2 * eps, atol=4e-5)
    assert not torch.equal(y, base)


def test_equal_bits_on_every_run_and_in_every_batch() -> None:
    _, x, _ = problem(torch.float32, rows=8)

    def scores(x: Tensor) -> Tensor:
        # The identity as projection leaves the product out: whether a library GEMM depends on the
        # batch is not the kernels' doing.
        return gate_scores(x, (torch.eye(48, device="cuda"),) * 2, scope=Sequence(), backend="cuda")

    first = scores(x)
    for _ in range(20):
        assert torch.equal(scores(x), first)
    for row in range(8):
        assert torch.equal(scores(x[row : row + 1])[0], first[row])


def test_graph_replays_on_new_data_and_new_alpha() -> None:
    base, x, delta = problem(torch.float32)
    alpha = torch.tensor(1.2, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        hook_output(base, x, delta, alpha, backend="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = hook_output(base, x, delta, alpha, backend="cuda")
    new_base, new_x, _ = problem(torch.float32)
    base.copy_(new_base)
    x.copy_(new_x)
    alpha.fill_(2.0)
    graph.replay()
    want_y, want_z = hook_output(base, x, delta, 2.0, backend="reference")
    torch.testing.assert_close(z, want_z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, want_y, rtol=1e-5, atol=4e-5)


def test_second_device_is_used_and_current_device_kept() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    base, x, (q, s) = problem(torch.float32)
    there = [t.to("cuda:1") for t in (base, x, q, s)]
    y, _ = hook_output(there[0], there[1], (there[2], there[3]), 1.2, backend="cuda")
    want, _ = hook_output(base, x, (q, s), 1.2, backend="reference")
    torch.testing.assert_close(y.to("cuda:0"), want, rtol=1e-5, atol=4e-5)
    assert torch.cuda.current_device() == 0
