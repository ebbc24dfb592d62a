"""The whole decoding path except the GPU: the op calls the kernels, built for the host, on CPU
tensors; pointers, strides, layouts and the choice of the path are the ones a GPU build gets."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coachhook.hooks import layer as hooks
from coachhook.hooks.layer import HookedLinear
from coachhook.ops import (
    Membership,
    Population,
    Prefix,
    Scope,
    Sequence,
    Ungated,
    _backends,
    fuses_products,
    hooked_linear,
)
from coachhook.ops.hooked_linear import cuda, decode, products
from tests.ops.gate_oracle import arming, oracle, threshold
from tests.ops.test_cues import make_edits, make_gaps, make_reaches, random_state
from tests.tolerances import tol

# The package, which the function of the same name hides.
op = importlib.import_module("coachhook.ops.hooked_linear")
TYPES = [torch.float32, torch.float16, torch.bfloat16]
GROUPS = torch.tensor([3, 3, 1, 0, 0, 6, 1])


@pytest.fixture(autouse=True)
def native(extension: ModuleType, monkeypatch: pytest.MonkeyPatch, nan_filled_memory: None) -> None:
    monkeypatch.setattr(_backends, "native", lambda: extension)


def layer(
    *tokens: int, dtype: torch.dtype = torch.float32, n: int = 72, m: int = 21, rank: int = 7
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    x = torch.randn(*tokens, n)
    x.view(-1, n)[::3] *= 3
    weight, bias = torch.randn(m, n) / math.sqrt(n), torch.randn(m)
    q = torch.linalg.qr(torch.randn(m, max(m, rank)))[0][:, :rank]
    return x.to(dtype), weight.to(dtype), bias.to(dtype), (q, torch.randn(rank, n))


def fresh(scope: Scope) -> Scope:
    """The same scope: a call changes its state, which has strides of its own."""
    if isinstance(scope, Prefix) and scope.state is not None:
        return Prefix(scope.state.clone())
    if isinstance(scope, Membership) and scope.state is not None:
        wide = scope.state.repeat_interleave(2, dim=1)
        return replace(scope, state=wide[:, ::2])
    return scope


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    delta: Tensor | tuple[Tensor, Tensor],
    scope: Scope,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Both ways to the frozen product, and the scores alone, against float64."""
    n = x.shape[-1]
    for fused in (False, True):
        base = F.linear(x, weight, bias)
        exact = F.linear(x.double(), weight.double(), bias.double()) if fused else base.double()
        alpha = threshold(oracle(exact, x, delta, 0.0, mask, cu_seqlens, scope).z)
        want = oracle(exact, x, delta, alpha, mask, cu_seqlens, scope)
        mine = fresh(scope)
        if fused:
            assert cuda.fuses(x, weight, bias, delta, cu_seqlens, mine)
            y, z = cuda.hooked_linear(x, weight, bias, delta, alpha, mask, cu_seqlens, mine)
        else:
            assert decode.takes(x, delta, cu_seqlens, mine, x.dtype)
            y, z = cuda.hook_output(base, x, delta, alpha, mask, cu_seqlens, mine)
            assert torch.equal(y[~want.taken], base[~want.taken])
        scores = tol("score", x.dtype, reduction=n, scale=want.ratio)
        torch.testing.assert_close(z.double(), want.z, equal_nan=True, **scores)
        outputs = tol("output", x.dtype, reduction=n, scale=float(want.y.abs().max()))
        torch.testing.assert_close(y.double(), want.y, **outputs)
        other = fresh(scope)
        alone = cuda.gate_scores(x, delta, mask, cu_seqlens, other)
        assert torch.equal(alone.nan_to_num(-9.0), z.nan_to_num(-9.0))
        if isinstance(scope, Membership) and scope.state is not None:
            _, after = arming(x, mask, cu_seqlens, scope)
            for used in (mine, other):
                assert torch.equal(used.state, after)


SCOPES = {
    "sequence": lambda rows: Sequence(),
    "sequence_state32": lambda rows: Sequence(torch.zeros(rows, 3)),
    "prefix": lambda rows: Prefix(torch.zeros(rows, 3, dtype=torch.float64)),
    "population": lambda rows: Population(22.0, 7.0),
    # A column of the kept moments, and a buffer of the hook.
    "population_strided": lambda rows: Population(
        torch.linspace(18, 26, 3 * rows).view(rows, 3)[:, 1], torch.tensor(7.0)
    ),
    "population_half": lambda rows: Population(22.0, torch.full((rows,), 7.0).half()),
    "membership": lambda rows: Membership(),
    "membership_groups": lambda rows: Membership(GROUPS),
    "membership_groups_own": lambda rows: Membership(GROUPS, "own"),
    "ungated": lambda rows: Ungated(),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SCOPES)
def test_equals_float64(name: str, dtype: torch.dtype) -> None:
    check(*layer(5, 1, dtype=dtype), SCOPES[name](5))
    mask = torch.arange(6) > torch.tensor([[-1], [2], [6]])
    check(*layer(3, 6, dtype=dtype), SCOPES[name](3), mask=mask)


# One with more edits than a block of threads takes at a time, twice.
@pytest.mark.parametrize("edits, dtype", [*((7, dtype) for dtype in TYPES), (600, torch.bfloat16)])
def test_edits_that_add_their_own_after_a_cue(edits: int, dtype: torch.dtype) -> None:
    x, weight, bias, _ = layer(3, 6, dtype=dtype)
    mask = torch.arange(6) > torch.tensor([[-1], [2], [6]])
    for stored in {dtype, torch.float32}:
        delta, cues, limits = make_edits(x, 21, edits, stored)
        some, apart = make_reaches(edits), make_gaps(edits)
        told = {"reaches": some, "limits": limits}
        # Every other element of a longer tensor.
        strided = [t.repeat_interleave(2)[::2] for t in (some, apart)]
        for state, reaches, gaps in (
            (None, None, None),
            (random_state(3, edits), None, None),
            (None, some, apart),
            (random_state(3, edits, **told), some, None),
            (random_state(3, edits, **told, gaps=apart), *strided),
        ):
            scope = Membership(None, "own", cues, limits, state, reaches, gaps)
            check(x, weight, bias, delta, scope, mask=mask)
    other = Membership(None, "own", cues.to(torch.float64), limits)
    assert not decode.takes(x, delta, None, other, x.dtype)


def test_what_belongs_to_cues_is_refused_without_them() -> None:
    x, _, _, _ = layer(3, 6)
    delta, cues, limits = make_edits(x, 21, 7, torch.float32)
    apart = Membership(None, "own", cues, limits, gaps=make_gaps(7))
    with pytest.raises(ValueError, match="gaps must be null without reaches, got 1"):
        decode.run(x, delta, 0.0, None, None, apart)


def test_every_number_of_tokens() -> None:
    for tokens in (1, 2, 7, 8, 9, 16, 17, 33, 63, 64):
        check(*layer(tokens, 1, dtype=torch.bfloat16), Population(22.0, 7.0))


def test_packed_rows() -> None:
    for integer in (torch.int32, torch.int64):
        edges = torch.tensor([0, 13, 13, 14, 30], dtype=integer)
        for name in ("sequence", "prefix", "membership"):
            check(*layer(33), SCOPES[name](4), cu_seqlens=edges)


@pytest.mark.parametrize("dtype", TYPES)
def test_dense_and_stored_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    x, weight, bias, (q, s) = layer(4, 2, dtype=dtype)
    for delta in (q @ s, (q @ s).to(dtype), (q.to(dtype), s.to(dtype)), (q.to(dtype), s)):
        check(x, weight, bias, delta, Population(22.0, 7.0))


def test_views_of_reserved_buffers_and_strided_tokens() -> None:
    x, weight, bias, (q, s) = layer(3, 4)
    left, right = torch.full((21, 16), math.nan), torch.full((16, 72), math.nan)
    left[:, :7], right[:7] = q, s
    wide = torch.full((4, 3, 144), math.nan)
    wide[..., :72] = x.transpose(0, 1)
    x = wide[..., :72].transpose(0, 1)
    check(x, weight, bias, (left[:, :7], right[:7]), Sequence())


def test_alpha_in_every_form() -> None:
    x, weight, bias, delta = layer(2, 9)
    base = F.linear(x, weight, bias)
    want = cuda.hook_output(base, x, delta, 1.0, None, None, Sequence())
    for alpha in (torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64)):
        got = cuda.hook_output(base, x, delta, alpha, None, None, Sequence())
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(want[0], base)


def test_output_is_fresh_unless_owned() -> None:
    x, weight, bias, delta = layer(2, 9)
    base = F.linear(x, weight, bias)
    before = base.clone()
    y, _ = cuda.hook_output(base, x, delta, 1.0, None, None, Sequence())
    assert torch.equal(base, before) and y.data_ptr() != base.data_ptr()
    owned, _ = cuda.hook_output(base, x, delta, 1.0, None, None, Sequence(), owned=True)
    assert owned.data_ptr() == base.data_ptr() and torch.equal(owned, y)


def test_what_the_kernels_do_not_take_runs_elsewhere() -> None:
    x, weight, bias, (q, s) = layer(2, 1, rank=520)
    base = F.linear(x, weight, bias)
    pair = torch.randn(21, 520), s
    for delta, scope in (
        (pair, Membership()),
        ((pair[0].double(), s.double()), Sequence()),
        ((pair[0][:, :0], s[:0]), Sequence()),
    ):
        assert not decode.takes(x, delta, None, scope, x.dtype)
        y, _ = cuda.hook_output(base, x, delta, 0.0, None, None, scope)
        want = oracle(base.double(), x, delta, 0.0, None, None, scope)
        torch.testing.assert_close(y.double(), want.y, rtol=1e-4, atol=1e-3)
    assert not decode.takes(layer(65)[0], pair, None, Sequence(), x.dtype)
    assert not cuda.fuses(x, weight.requires_grad_(), bias, pair, None, Sequence())


def test_switch_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products.way() == "exact"
    monkeypatch.setenv("COACHHOOK_PRODUCTS", "fused")
    assert products.way() == "fused" and not fuses_products(torch.randn(1, 4, device="meta"))
    monkeypatch.setenv("COACHHOOK_PRODUCTS", "fast")
    with pytest.raises(ValueError, match="must be one of exact, fused, library, got 'fast'"):
        products.way()


def test_overlap_switch_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(decode, "_can_overlap", lambda device: True)
    assert not decode._overlaps(device)
    monkeypatch.setenv(decode.OVERLAP_SWITCH, "1")
    assert decode._overlaps(device)
    monkeypatch.setenv(decode.OVERLAP_SWITCH, "yes")
    with pytest.raises(ValueError, match="COACHHOOK_DECODING_OVERLAP must be 0 or 1, got 'yes'"):
        decode._overlaps(device)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device with COACHHOOK_PRODUCTS=fused."""
    for module in (op, hooks):
        monkeypatch.setattr(module, "fuses_products", lambda x: True)
    monkeypatch.setattr(_backends, "resolve", lambda *a, **k: cuda.hook_output)


def test_the_op_takes_the_frozen_product_where_it_may(fused: None) -> None:
    x, weight, bias, delta = layer(3, 4)
    y, z = hooked_linear(x, weight, bias, delta, 1.0)
    want = cuda.hooked_linear(x, weight, bias, delta, 1.0, None, None, Sequence())
    assert torch.equal(y, want[0]) and torch.equal(z, want[1])
    # Not under autograd: y must be differentiable.
    leaf = x.clone().requires_grad_()
    y, _ = hooked_linear(leaf, weight, bias, delta, 1.0)
    assert y.requires_grad


def test_a_hook_layer_leaves_the_frozen_product_to_autocast(fused: None) -> None:
    x, weight, bias, (q, s) = layer(3, 4)
    base = nn.Linear(72, 21).requires_grad_(False)
    base.weight.copy_(weight)
    hooked = HookedLinear(base, in_features=72, out_features=21, index=0)
    hooked.set_factored(q, s)
    hooked.set_alpha(1.0)
    hooked.state = "validated"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = base(x.bfloat16())
        y = hooked(x.bfloat16())
    untouched = (y == plain).all(-1)
    assert untouched.any() and not untouched.all()


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_hook_layer_takes_the_frozen_product_of_a_bare_linear_alone(fused: None) -> None:
    x, weight, bias, (q, s) = layer(3, 4)
    calls = []
    for kind in (nn.Linear, Doubled, "with a hook"):
        base = (nn.Linear if isinstance(kind, str) else kind)(72, 21).requires_grad_(False)
        base.weight.copy_(weight)
        base.bias.copy_(bias)
        if isinstance(kind, str):
            base.register_forward_hook(
                lambda module, inputs, output: calls.append(output) or output
            )
        hooked = HookedLinear(base, in_features=72, out_features=21, index=0)
        hooked.set_factored(q, s)
        hooked.set_alpha(1.0)
        assert torch.equal(hooked(x), base(x))  # off
        hooked.state = "validated"
        y = hooked(x)
        want = oracle(base(x).double(), x, (q, s), 1.0)
        torch.testing.assert_close(y.double(), want.y, rtol=1e-4, atol=1e-4)
        same_bits = torch.equal(y[~want.taken], base(x)[~want.taken])
        assert same_bits == (kind is not nn.Linear)
    assert calls
