"""Gradients: the decision of the gate is a constant, everything else is differentiated."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from coachhook.ops import (
    Membership,
    Prefix,
    Sequence,
    Ungated,
    available_backends,
    hook_output,
    hooked_linear,
)
from tests.tolerances import tol

BACKENDS = [name for name, (able, _) in available_backends("hooked_linear", "cpu").items() if able]
M, N, RANK = 19, 13, 5
SCOPES = {
    "sequence": Sequence(),
    "prefix": Prefix(),
    "ungated": Ungated(),
    "membership": Membership(),
    "own": Membership(torch.tensor([0, 0, 1, 1, 2]), "own"),
}


def make(dtype=torch.float64):
    x = torch.randn(3, 8, N, dtype=dtype)
    weight, bias = torch.randn(M, N, dtype=dtype), torch.randn(M, dtype=dtype)
    return x, weight, bias, (torch.randn(M, RANK, dtype=dtype), torch.randn(RANK, N, dtype=dtype))


def plain_formula(x, weight, bias, delta, scope, taken):
    """The same function for fixed decisions, as one writes it down."""
    lift, projection = delta
    features = x @ projection.T
    weights = features
    if scope is SCOPES["own"]:
        sums = torch.stack([features[..., scope.groups == g].sum(-1) for g in range(3)], dim=-1)
        winner = sums.argmax(-1, keepdim=True)
        own = features * (scope.groups == winner)
        weights = own / own.sum(-1, keepdim=True)
    return x @ weight.T + bias + taken[..., None] * (weights @ lift.T)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_plain_formula(backend, scope):
    x, weight, bias, delta = make()
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    alpha = 0.8
    y, z = hooked_linear(*leaves, delta, alpha, scope=SCOPES[scope], backend=backend)
    assert not z.requires_grad
    taken = torch.ones_like(z) if scope == "ungated" else (z >= alpha)
    assert taken.any()
    cotangent = torch.randn_like(y)
    actual = torch.autograd.grad(y, leaves, cotangent)
    plain = [t.clone().requires_grad_() for t in (x, weight, bias)]
    expected_y = plain_formula(*plain, delta, SCOPES[scope], taken)
    expected = torch.autograd.grad(expected_y, plain, cotangent)
    bounds = tol("output", torch.float64, reduction=x.shape[0] * M, scale=100.0)
    torch.testing.assert_close(y, expected_y, **bounds)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, **bounds)


@pytest.mark.parametrize("needs", ["x", "base_output", "both"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hook_output_passes_every_gradient(backend, needs):
    x, weight, bias, delta = make()
    base = F.linear(x, weight, bias)
    x.requires_grad_(needs != "base_output")
    base.requires_grad_(needs != "x")
    leaves = [t for t in (x, base) if t.requires_grad]
    for alpha, scope in ((1.0, Sequence()), (1e9, Sequence()), (0.0, Ungated())):
        y, z = hook_output(base, x, delta, alpha, scope=scope, backend=backend)
        taken = torch.ones_like(z) if isinstance(scope, Ungated) else (z >= alpha)
        expected = base + taken[..., None] * (x @ delta[1].T @ delta[0].T)
        if not y.requires_grad:
            assert needs == "x"
            assert not taken.any()
            continue
        cotangent = torch.randn_like(y)
        actual = torch.autograd.grad(y, leaves, cotangent, allow_unused=True)
        wanted = torch.autograd.grad(expected, leaves, cotangent)
        for got, want in zip(actual, wanted, strict=True):
            got = torch.zeros_like(want) if got is None else got
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_reaches_the_layers_below(backend):
    """A parameter below the hook, in bfloat16 as models come."""
    x, weight, bias, delta = (
        t if isinstance(t, tuple) else t.bfloat16() for t in make(torch.float32)
    )
    below = torch.eye(N, dtype=torch.bfloat16, requires_grad=True)
    y, z = hooked_linear(x @ below, weight, bias, delta, 1.0, backend=backend)
    y.float().square().sum().backward()
    reference = torch.eye(N, dtype=torch.bfloat16, requires_grad=True)
    h = x @ reference
    taken = (z >= 1.0)[..., None]
    added = (h.float() @ delta[1].T @ delta[0].T) * taken
    frozen = F.linear(h, weight, bias)
    plain = torch.where(taken, (frozen.float() + added).bfloat16(), frozen)
    plain.float().square().sum().backward()
    bounds = tol("output", torch.bfloat16, reduction=M, scale=float(below.grad.abs().max()))
    torch.testing.assert_close(reference.grad, below.grad, **bounds)


@pytest.mark.parametrize("scope", SCOPES)
def test_compiled_gradient(scope):
    """A graph that is differentiated is traced from the reference, state and all."""
    torch._dynamo.reset()
    x, weight, bias, delta = make(torch.float32)

    def loss(x, state):
        chosen = type(SCOPES[scope])(state) if scope in ("sequence", "prefix") else SCOPES[scope]
        y, _ = hooked_linear(x, weight, bias, delta, 1.0, scope=chosen)
        return y.square().sum()

    expected, expected_state = x.clone().requires_grad_(), torch.zeros(3, 3)
    loss(expected, expected_state).backward()
    actual, state = x.clone().requires_grad_(), torch.zeros(3, 3)
    torch.compile(loss, fullgraph=True, backend="aot_eager")(actual, state).backward()
    bounds = tol("output", torch.float32, reduction=M, scale=float(expected.grad.abs().max()))
    torch.testing.assert_close(actual.grad, expected.grad, **bounds)
    assert torch.equal(state, expected_state)


def test_functorch_gradient():
    x, weight, bias, delta = make()

    def loss(x):
        return hooked_linear(x, weight, bias, delta, 1.0)[0].square().sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad)
