"""What the fast CPU form does differently: scores of a few tokens, products through oneDNN."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from coachhook.ops import Population, Sequence, gate_scores, hook_output, hooked_linear
from coachhook.ops.hooked_linear import cpu
from tests.tolerances import tol

M, N, RANK = 19, 48, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(dtype, *shape):
    q = torch.linalg.qr(torch.randn(M, RANK))[0]
    x = torch.randn(*shape, N).to(dtype)
    return x, torch.randn(*shape, M).to(dtype), (q, torch.randn(RANK, N))


def both(base, x, delta, alpha, scope, **more):
    given = base.clone()
    fast = hook_output(base, x, delta, alpha, scope=scope, backend="cpu", **more)
    assert torch.equal(base, given)
    z = gate_scores(x, delta, scope=scope, backend="cpu", **more)
    torch.testing.assert_close(z, fast[1], rtol=0, atol=0, equal_nan=True)
    return fast, hook_output(base, x, delta, alpha, scope=scope, backend="reference", **more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (8, 1), (4,), (1,), (3, 3)])
@pytest.mark.parametrize("kept", [float, torch.tensor, lambda v: torch.tensor(v).double()])
def test_a_few_tokens_of_a_population(shape, dtype, kept):
    x, base, delta = make(dtype, *shape)
    norms = F.linear(x.double(), delta[1].double()).norm(dim=-1)
    scope = Population(kept(float(norms.mean())), kept(1.5))
    want = (norms - norms.mean()) / 1.5
    for alpha in (-9.0, float(want.median()) + 1e-3, 9.0):
        (y, z), (want_y, _) = both(base, x, delta, torch.tensor(alpha), scope)
        assert z.shape == shape and z.dtype == torch.float32 and y.dtype == dtype
        torch.testing.assert_close(z.double(), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y, want_y, **tol("output", dtype, reduction=N, scale=30.0))
        assert torch.equal(y[want < alpha], base[want < alpha])


@pytest.mark.parametrize(
    ("mean", "std"), [(1, 0), (0, 0), (-1, 0), (1, math.nan), (math.nan, 1), (1e9, 1)]
)
def test_an_undefined_population_never_fires(mean, std):
    x, base, delta = make(torch.float32, 1, 2)
    y, z = hook_output(base, x, delta, -math.inf, scope=Population(mean, std), backend="cpu")
    assert z.isnan().all() and torch.equal(y, base)


@pytest.mark.parametrize("values", [[math.nan], [math.inf], [math.inf, -math.inf]], ids=str)
def test_a_token_that_is_not_a_number_stays_alone(values):
    x, base, delta = make(torch.float32, 1, 3)
    delta[1][:2, 4:6], delta[1][2:, 4:6] = 1.0, torch.tensor([1.0, 0.0])
    x[0, 1, 4 : 4 + len(values)] = torch.tensor(values)
    (y, z), (want_y, want_z) = both(base, x, delta, -9.0, Population(1.0, 1.0))
    assert z[0, 1].isnan() or values == [math.inf]
    assert torch.equal(y[0, 1], base[0, 1]) == bool(z[0, 1].isnan())
    torch.testing.assert_close((y, z), (want_y, want_z), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_scores_beyond_float32_are_infinite():
    x, base, delta = make(torch.float32, 1, 1)
    y, z = hook_output(base, x * 1e30, delta, 2.0, scope=Population(0.0, 1e-30), backend="cpu")
    assert z.isinf().all() and not torch.equal(y, base)


def test_the_threshold_is_compared_in_float32():
    x, base, delta = make(torch.float32, 1, 1)
    scope = Population(0.3, 0.7)
    z = gate_scores(x, delta, scope=scope, backend="cpu")
    up = torch.nextafter(z, torch.tensor(math.inf))
    near = (float(z) + (float(up) - float(z)) / 8, torch.tensor(float(z), dtype=torch.float64))
    for alpha in near:
        assert not torch.equal(hook_output(base, x, delta, alpha, scope=scope)[0], base)
    assert torch.equal(hook_output(base, x, delta, float(up), scope=scope)[0], base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", ["factored", "dense", "strided"])
def test_many_tokens_with_and_without_onednn(dtype, storage, monkeypatch):
    x, base, delta = make(dtype, 3, 50)
    if storage == "dense":
        delta = delta[0] @ delta[1]
    elif storage == "strided":
        delta = delta[0], torch.randn(RANK, 2 * N)[:, ::2]
    (y, z), (want_y, want_z) = both(base, x, delta, 0.7, Sequence())
    assert 0 < int((z >= 0.7).sum()) < 150
    torch.testing.assert_close(z, want_z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, want_y, **tol("output", dtype, reduction=N, scale=30.0))
    with torch.inference_mode():
        assert torch.equal(gate_scores(x, delta, backend="cpu"), z)
    monkeypatch.setattr(cpu, "_MANY_TOKENS", 151)
    torch.testing.assert_close(gate_scores(x, delta, backend="cpu"), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 30), (1,), (0, 3), (2, 0)])
@pytest.mark.parametrize(
    "scope", [Sequence(), Population(7.0, 1.0)], ids=["sequence", "population"]
)
@pytest.mark.parametrize("strided", [False, True])
def test_the_whole_layer_is_the_product_and_the_hook_on_it_bit_for_bit(
    dtype, shape, scope, strided
):
    x, _, delta = make(dtype, *shape)
    if strided:
        x = x.repeat_interleave(2, dim=-1)[..., ::2]
    weight, bias = torch.randn(M, N).to(dtype), torch.randn(M).to(dtype)
    for b in (bias, None):
        base = F.linear(x, weight, b)
        for alpha in (-9.0, 0.3, 9.0):
            want = hook_output(base.clone(), x, delta, alpha, scope=scope, backend="cpu")
            for _ in range(2):  # checked, then known
                got = hooked_linear(x, weight, b, delta, alpha, scope=scope, backend="cpu")
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_the_whole_layer_is_differentiable_once_it_is_known():
    x, _, delta = make(torch.float32, 2, 3)
    weight = torch.randn(M, N)
    for tensor in (x, weight):
        for wanted in (False, True, False):
            tensor.requires_grad_(wanted)
            y, z = hooked_linear(x, weight, None, delta, -9.0, scope=Population(1.0, 1.0))
            assert y.requires_grad == wanted and not z.requires_grad
    x.requires_grad_()
    y, _ = hooked_linear(x, weight, None, delta, -9.0, scope=Population(1.0, 1.0))
    y.sum().backward()
    want = (weight + delta[0] @ delta[1]).sum(dim=0)
    torch.testing.assert_close(x.grad[0, 0], want, rtol=1e-4, atol=1e-4)
