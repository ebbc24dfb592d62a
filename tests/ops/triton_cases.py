"""The Triton kernels in the interpreter; ``test_hooked_linear_triton.py`` runs them as a process.

The interpreter is chosen when triton is imported, so these cases share a process with no others.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coachhook.bench import tune
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
)
from coachhook.ops.hooked_linear import policy as launch
from coachhook.ops.hooked_linear import products, reference, triton
from coachhook.ops.hooked_linear.cues import blank_state
from tests.ops.gate_oracle import oracle, threshold
from tests.ops.interpreter import language_patched_once
from tests.tolerances import tol

# The package, which the function of the same name hides.
op = importlib.import_module("coachhook.ops.hooked_linear")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
M, N, RANK = 53, 37, 7
SCOPES = {
    "sequence": lambda rows: Sequence(),
    "prefix": lambda rows: Prefix(),
    "population": lambda rows: Population(2.0, 0.5),
    "population_rows": lambda rows: Population(
        torch.linspace(1.5, 2.5, rows), torch.linspace(0.3, 0.7, rows)
    ),
    "membership": lambda rows: Membership(),
    "membership_own": lambda rows: Membership(correction="own"),
    "membership_groups": lambda rows: Membership(torch.tensor([0, 0, 2, 2, 2, 4, 5])),
    "membership_groups_own": lambda rows: Membership(torch.tensor([1, 3, 3, 0, 0, 0, 1]), "own"),
    "membership_cues": lambda rows: Membership(None, "own", *make_cues()),
    "membership_cues_reaches": lambda rows: Membership(
        None, "own", *make_cues(), None, make_reaches()
    ),
    "membership_cues_gaps": lambda rows: Membership(
        None, "own", *make_cues(), None, *make_reaches_and_gaps()
    ),
    "ungated": lambda rows: Ungated(),
}
DENSE_SCOPES = ["prefix", "sequence", "population", "sequence", "population_rows", "ungated"]
LAYOUTS = ["batch", "left_padded", "gaps", "packed", "packed_tail", "single"]
# Where the statistics of a gate are formed, every layout; of what the scopes of membership find in
# a token the layout matters to the cues alone, which a file of their own goes through.
CASES = [
    *((scope, layout) for scope in ("sequence", "prefix", "population_rows") for layout in LAYOUTS),
    ("population", "gaps"),
    ("population", "packed"),
    ("membership", "left_padded"),
    ("membership", "packed_tail"),
    ("membership_own", "gaps"),
    ("membership_own", "single"),
    ("membership_groups", "batch"),
    ("membership_groups_own", "left_padded"),
    ("membership_groups_own", "packed_tail"),
    ("membership_cues", "batch"),
    ("membership_cues", "packed_tail"),
    ("membership_cues_reaches", "gaps"),
    ("membership_cues_gaps", "left_padded"),
    ("membership_cues_gaps", "packed"),
    ("ungated", "gaps"),
    ("ungated", "packed_tail"),
]


@pytest.fixture(autouse=True)
def _nan_filled(nan_filled_memory):
    pass


@pytest.fixture(autouse=True, scope="module")
def _cheaper_launches():
    with language_patched_once(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "_REDUCE_TOKENS", 32)
        yield


def make_cues() -> tuple[Tensor, Tensor]:
    """Cues of which some are seen at once, some later and some never."""
    generator = torch.Generator().manual_seed(1)
    cues = torch.randn(RANK, N, generator=generator) / math.sqrt(N)
    return cues, torch.tensor([-math.inf, 0.3, 0.9, 1.3, math.inf, -0.5, math.nan])


def make_reaches() -> Tensor:
    """How far after their cues the edits stay armed: all of it, not at all, or some columns."""
    return torch.tensor([2**31 - 1, 0, 2, 63, 1, 62, 4], dtype=torch.int32)


def make_reaches_and_gaps() -> tuple[Tensor, Tensor]:
    """Cues of one token and of two; one is out of range, one with its reach more than 62."""
    reaches = torch.tensor([2**31 - 1, 5, 2, 60, 1, 30, 4], dtype=torch.int32)
    return reaches, torch.tensor([1, 3, -1, 3, 0, 9, 7], dtype=torch.int32)


def make_layout(name: str, dtype: torch.dtype, n: int = N):
    """x, mask, cu_seqlens and the number of sequences."""
    if name in ("packed", "packed_tail"):
        lengths = [5, 0, 1, 12, 2, 0]
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        total = sum(lengths) + (3 if name == "packed_tail" else 0)
        return torch.randn(total, n).to(dtype), None, cu_seqlens, len(lengths)
    if name == "single":
        return torch.randn(17, n).to(dtype), None, None, 1
    rows, length = 4, 11
    mask = None
    if name == "left_padded":
        mask = torch.arange(length) >= length - torch.tensor([11, 7, 1, 0])[:, None]
    elif name == "gaps":
        mask = torch.rand(rows, length) < 0.6
    return torch.randn(rows, length, n).to(dtype), mask, None, rows


def make_pair(m: int = M, n: int = N, rank: int = RANK, dtype: torch.dtype = torch.float32):
    q = torch.linalg.qr(torch.randn(m, rank, dtype=torch.float64))[0]
    return q.to(dtype), (torch.randn(rank, n) / math.sqrt(n)).to(dtype)


def pair_error(x: Tensor, delta: Tensor | tuple[Tensor, Tensor]) -> float:
    """Relative error of a coefficient that the kernels keep as a pair of x's dtype."""
    projection = delta if isinstance(delta, Tensor) else delta[1]
    if x.dtype == torch.float32 or projection.dtype == x.dtype:
        return 0.0
    return torch.finfo(x.dtype).eps ** 2


def check(
    x: Tensor,
    delta: Tensor | tuple[Tensor, Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scope: Scope,
    repeated: bool = False,
) -> None:
    """Both outputs against float64, with a threshold that no token is near."""
    m = delta.shape[0] if isinstance(delta, Tensor) else delta[0].shape[0]
    base = torch.randn(*x.shape[:-1], m).to(x.dtype)
    n = x.shape[-1]
    ignored = oracle(base.double(), x, delta, 0.0, mask, cu_seqlens, scope)
    alpha = threshold(ignored.z)
    want = oracle(base.double(), x, delta, alpha, mask, cu_seqlens, scope)
    scores = tol("score", x.dtype, reduction=n, scale=want.ratio)
    scores["atol"] += pair_error(x, delta) * want.ratio
    kept = base.clone()
    y, z = triton.hook_output(base, x, delta, alpha, mask, cu_seqlens, scope)
    assert z.dtype == torch.float32 and y.dtype == base.dtype
    torch.testing.assert_close(z.double(), want.z, equal_nan=True, **scores)
    outputs = tol("output", x.dtype, reduction=n, scale=float(want.y.abs().max()))
    torch.testing.assert_close(y.double(), want.y, **outputs)
    assert torch.equal(y[~want.taken], base[~want.taken])  # bit for bit
    assert torch.equal(base, kept)
    if repeated:
        again = triton.gate_scores(x, delta, mask, cu_seqlens, scope)
        assert torch.equal(again.nan_to_num(-9.0), z.nan_to_num(-9.0))


def check_fused(
    x: Tensor,
    delta: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scope: Scope | None = None,
    bias: Tensor | None = None,
) -> None:
    """Output and scores of the pass that computes the frozen product too, against float64."""
    scope = Sequence() if scope is None else scope
    m, n = delta.shape
    weight = (torch.randn(m, n) / math.sqrt(n)).to(x.dtype)
    base = x.double() @ weight.double().T
    base = base if bias is None else base + bias.double()
    alpha = threshold(oracle(base, x, delta, 0.0, mask, cu_seqlens, scope).z)
    want = oracle(base, x, delta, alpha, mask, cu_seqlens, scope)
    assert triton.fuses(x, weight, bias, delta, cu_seqlens, scope)
    y, z = triton.hooked_linear(x, weight, bias, delta, alpha, mask, cu_seqlens, scope)
    assert z.dtype == torch.float32 and y.dtype == x.dtype and y.shape == base.shape
    scores = tol("score", x.dtype, reduction=n, scale=want.ratio)
    scores["atol"] += pair_error(x, delta) * want.ratio
    torch.testing.assert_close(z.double(), want.z, equal_nan=True, **scores)
    outputs = tol("output", x.dtype, reduction=n, scale=float(want.y.abs().max()))
    torch.testing.assert_close(y.double(), want.y, **outputs)
    # The frozen product of the reference, rounded once: nothing of the hook is in these rows.
    frozen = base.to(x.dtype)[~want.taken]
    torch.testing.assert_close(y[~want.taken], frozen, rtol=torch.finfo(x.dtype).eps, atol=1e-4)


@pytest.mark.parametrize(("layout", "scope"), zip(LAYOUTS, DENSE_SCOPES, strict=True))
def test_fused_scopes_and_layouts(layout, scope) -> None:
    x, mask, cu_seqlens, rows = make_layout(layout, torch.bfloat16)
    q, s = make_pair()
    check_fused(x, q @ s, mask, cu_seqlens, SCOPES[scope](rows), torch.randn(M).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m, n", [(1, 1), (64, 16), (200, 67)])
def test_fused_sizes_and_storage(dtype, m, n) -> None:
    x, _, _, _ = make_layout("batch", dtype, n)
    delta = torch.randn(m, n) / math.sqrt(n)
    for stored in (delta, delta.to(dtype), delta.double()):
        check_fused(x, stored)
    wide = torch.randn(3, 9, 2 * n).to(dtype)
    check_fused(wide[..., ::2], delta, bias=torch.randn(m).to(dtype))


def test_what_is_not_fused() -> None:
    x, (q, s) = torch.randn(2, 9, N).bfloat16(), make_pair()
    weight, dense = torch.randn(M, N).bfloat16(), q @ s

    def fuses(x=x, weight=weight, bias=None, delta=dense) -> bool:
        return triton.fuses(x, weight, bias, delta, None, Sequence())

    assert fuses() and fuses(delta=dense.bfloat16()) and fuses(bias=torch.randn(M).bfloat16())
    assert not fuses(delta=(q, s))
    assert not fuses(x=x.float(), weight=weight.float())
    assert not fuses(weight=weight.float()) and not fuses(bias=torch.randn(M))
    assert not fuses(weight=torch.randn(N, M).bfloat16().T)
    assert not fuses(x=x[:, :0]) and not fuses(weight=weight[:0], delta=dense[:0])
    assert not fuses(x=x.clone().requires_grad_())
    with torch.autocast("cpu"):
        assert not fuses()


def test_the_op_and_a_hook_layer_take_the_fused_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (op, hooks):
        monkeypatch.setattr(module, "fuses_products", lambda x: True)
    monkeypatch.setattr(_backends, "resolve", lambda *a, **k: triton.hook_output)
    x, (q, s) = torch.randn(2, 9, N).bfloat16(), make_pair()
    base = nn.Linear(N, M).requires_grad_(False).to(torch.bfloat16)
    for delta in (q @ s, (q, s)):
        y, z = op.hooked_linear(x, base.weight, base.bias, delta, 0.5)
        want_y, want_z = reference.hook_output(base(x), x, delta, 0.5, None, None, Sequence())
        torch.testing.assert_close(z, want_z, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(y, want_y, rtol=2**-7, atol=2**-7)
    want = triton.hooked_linear(x, base.weight, base.bias, q @ s, 0.5, None, None, Sequence())
    hooked = HookedLinear(base, in_features=N, out_features=M, index=0)
    hooked.set_delta(q @ s)
    hooked.set_alpha(0.5)
    hooked.state = "validated"
    assert torch.equal(hooked(x), want[0])


def test_the_library_may_form_both_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.ENVIRONMENT_SWITCH, "library")
    monkeypatch.setattr(triton, "_WIDE_FEATURES", 32)
    taken = []
    whole = products.library_features
    monkeypatch.setattr(
        products, "library_features", lambda *pair: taken.append(pair) or whole(*pair)
    )
    q, s = make_pair()
    for layout in ("left_padded", "packed_tail"):
        x, mask, cu_seqlens, _ = make_layout(layout, torch.bfloat16)
        check(x, (q @ s).bfloat16(), mask, cu_seqlens, Sequence())
        check(x, (q, s.bfloat16()), mask, cu_seqlens, Membership(correction="own"))
        assert taken and all(projection.dtype == x.dtype for _, projection in taken)
        taken.clear()
        cues, limits = make_cues()
        cued = Membership(None, "own", cues.bfloat16(), limits)
        check(x, (q, s.bfloat16()), mask, cu_seqlens, cued)
        assert cued.cues.data_ptr() in {projection.data_ptr() for _, projection in taken}
        taken.clear()
        check(x, q @ s, mask, cu_seqlens, Sequence())  # more digits than the library's operands
        check(x.float(), q @ s, mask, cu_seqlens, Sequence())
        assert not taken


@pytest.mark.parametrize(("scope", "layout"), CASES)
def test_scopes_and_layouts(scope, layout) -> None:
    x, mask, cu_seqlens, rows = make_layout(layout, torch.float32)
    repeated = layout in ("left_padded", "packed_tail")  # every scope but population has one
    check(x, make_pair(), mask, cu_seqlens, SCOPES[scope](rows), repeated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["own", "float32", "dense_own", "dense_float32"])
def test_dtypes_and_storage(dtype, stored) -> None:
    kept = torch.float32 if stored.endswith("float32") else dtype
    q, s = make_pair(dtype=kept)
    delta = (q.float() @ s.float()).to(kept) if stored.startswith("dense") else (q, s)
    x, mask, _, _ = make_layout("left_padded", dtype)
    check(x, delta, mask, None, Sequence())


@pytest.mark.parametrize("rank", [1, 16, 65, 130])
def test_ranks(rank) -> None:
    x, _, cu_seqlens, _ = make_layout("packed", torch.float16)
    check(x, make_pair(m=140, rank=rank), None, cu_seqlens, Sequence())


def test_the_winner_may_be_in_any_block_of_keys() -> None:
    x = torch.randn(1, 20, N)
    q, s = make_pair(m=140, rank=130)
    s[triton._REDUCE_FEATURES :] *= 3
    check(x, (q, s), None, None, Membership(correction="own"))
    keys = 2 * triton._GROUP_FEATURES + 3
    groups = torch.randint(0, keys, (keys,))
    check(x, make_pair(m=80, rank=keys), None, None, Membership(groups, "own"))


def test_cues_of_any_number_and_storage() -> None:
    for count, dtype in ((1, torch.float64), (16, torch.bfloat16), (130, torch.float32)):
        x, _, cu_seqlens, _ = make_layout("packed", torch.bfloat16)
        cues = (torch.randn(count, N) / math.sqrt(N)).to(dtype)
        limits = torch.linspace(-0.5, 1.5, count, dtype=dtype)
        scope = Membership(None, "own", cues, limits)
        check(x, make_pair(m=140, rank=count), None, cu_seqlens, scope)


@pytest.mark.parametrize("asked", [(make_reaches(),), make_reaches_and_gaps()], ids=["one", "two"])
def test_cues_in_parts_and_at_once(asked) -> None:
    x, mask, _, rows = make_layout("gaps", torch.float32)
    delta, (cues, limits) = make_pair(), make_cues()
    base = torch.randn(rows, 11, M)
    never = blank_state(rows, RANK, base.device)
    want, whole, cut = (never.clone() for _ in range(3))

    def run(hook, state, a=0, b=11):
        scope = Membership(None, "own", cues, limits, state, *asked)
        return hook(base[:, a:b], x[:, a:b], delta, 0.4, mask[:, a:b], None, scope)

    want_y, want_z = run(reference.hook_output, want)
    y, z = run(triton.hook_output, whole)
    torch.testing.assert_close((y, z), (want_y, want_z), rtol=1e-4, atol=1e-4, equal_nan=True)
    parts = [run(triton.hook_output, cut, a, b) for a, b in ((0, 4), (4, 5), (5, 11))]
    z_parts = torch.cat([part[1] for part in parts], 1)
    torch.testing.assert_close(z_parts, z, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(whole, want) and torch.equal(cut, want)


def test_edits_that_wait_for_nothing_are_those_without_cues() -> None:
    x, mask, _, _ = make_layout("gaps", torch.bfloat16)
    x[1, 3, 5], x[2, 4, 5] = float("nan"), float("inf")
    base, delta = torch.randn(4, 11, M).bfloat16(), make_pair()
    always = Membership(None, "own", make_cues()[0], torch.full((RANK,), -math.inf))
    for alpha in (-math.inf, 0.4):
        want = triton.hook_output(base, x, delta, alpha, mask, None, Membership(None, "own"))
        got = triton.hook_output(base, x, delta, alpha, mask, None, always)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_nothing_armed_fires_nothing_and_gradients_are_those_of_the_reference() -> None:
    x, base, delta = torch.randn(2, 9, N), torch.randn(2, 9, M), make_pair()
    never = Membership(None, "own", make_cues()[0], torch.full((RANK,), math.inf))
    y, z = triton.hook_output(base, x, delta, -math.inf, None, None, never)
    assert torch.equal(y, base) and z.isneginf().all()
    scope, found = Membership(None, "own", *make_cues()), []
    for hook in (reference.hook_output, triton.hook_output):
        leaves = [x.clone().requires_grad_(), base.clone().requires_grad_()]
        y, _ = hook(leaves[1], leaves[0], delta, 0.5, None, None, scope)
        y.square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_norms_that_differ_by_rounding_are_equal() -> None:
    x = torch.randn(N).mul(3)[torch.stack([torch.randperm(N) for _ in range(12)])][None]
    identity = torch.eye(N), torch.eye(N)
    for scope in (Sequence(), Prefix()):
        assert triton.gate_scores(x, identity, None, None, scope).isnan().all()


def test_long_sums_are_cut_and_wide_dense_hooks_are_tiled() -> None:
    x, _, _, _ = make_layout("batch", torch.float32, n=2070)
    sizes = launch.policy(x.device)
    assert triton.projection_sizes(sizes, "full", 7, 2070)[2] > 1
    check(x, make_pair(n=2070), None, None, Sequence())
    check(x, make_pair(n=2070), None, None, Membership())
    cues = torch.randn(RANK, 2070) / math.sqrt(2070)
    check(x, make_pair(n=2070), None, None, Membership(None, "own", cues, make_cues()[1]))
    q, s = make_pair(m=300, n=70, rank=9)
    x, _, _, _ = make_layout("batch", torch.float32, n=70)
    check(x, q @ s, None, None, Sequence())


def test_sequences_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_GATE_TOKENS", 64)  # long sequences are slow to interpret
    tokens = 2 * triton._GATE_TOKENS + 5
    x = torch.randn(1, tokens, 8)
    mask = torch.arange(tokens)[None] > triton._GATE_TOKENS + 2
    for scope in (Sequence(), Prefix()):
        check(x, make_pair(n=8, m=9), mask, None, scope)
    x = torch.randn(tokens, 8)
    check(x, make_pair(n=8, m=9), None, torch.tensor([0, 3, tokens]), Prefix())


def test_state_is_kept_and_continued() -> None:
    x, mask, _, rows = make_layout("left_padded", torch.float32)
    delta = make_pair()
    norms = (x.double() @ delta[1].double().T).norm(dim=-1)
    for dtype in (torch.float32, torch.float64):
        state = torch.full((rows, 3), 7.0, dtype=dtype)
        triton.gate_scores(x, delta, mask, None, Sequence(state))
        assert state[:, 0].tolist() == [11.0, 7.0, 1.0, 0.0]
        rounding = tol("statistic", torch.float32, reduction=N, scale=float(norms.max()))
        for row in (0, 1):
            mean = norms[row][mask[row]].mean()
            torch.testing.assert_close(state[row, 1].double(), mean, **rounding)
        whole = torch.zeros(rows, 6, dtype=dtype)[:, ::2]
        z = triton.gate_scores(x, delta, mask, None, Prefix(whole))
        cut = torch.zeros(rows, 3, dtype=dtype)
        parts = [
            triton.gate_scores(x[:, a:b], delta, mask[:, a:b], None, Prefix(cut))
            for a, b in ((0, 4), (4, 5), (5, 11))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), z, rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-6)


def test_an_empty_packed_sequence_keeps_its_prefix_state() -> None:
    x, _, cu_seqlens, rows = make_layout("packed", torch.float32)
    state = torch.rand(rows, 3, dtype=torch.float64) + 1
    before = state.clone()
    triton.gate_scores(x, make_pair(), None, cu_seqlens, Prefix(state))
    torch.testing.assert_close(state[1], before[1], rtol=1e-15, atol=0)
    assert not torch.equal(state[0], before[0])


def test_equal_norms_and_single_tokens_are_undefined() -> None:
    x = torch.randn(1, 1, N).expand(2, 9, N)
    for scope in (Sequence(), Prefix()):
        y, z = triton.hook_output(torch.ones(2, 9, M), x, make_pair(), -9.0, None, None, scope)
        assert z.isnan().all() and torch.equal(y, torch.ones(2, 9, M))
    _, z = triton.hook_output(torch.ones(2, 1, M), x[:, :1], make_pair(), -9.0, None, None, scope)
    assert z.isnan().all()


def test_padding_enters_nothing_whatever_it_holds() -> None:
    x, mask, _, _ = make_layout("left_padded", torch.float32)
    delta = make_pair()
    for scope in (Sequence(), Prefix(), Population(2.0, 0.5), Membership(), Ungated()):
        want = triton.gate_scores(x, delta, mask, None, scope)
        for content in (float("nan"), float("inf"), 1e30):
            filled = torch.where(mask[..., None], x, content)
            z = triton.gate_scores(filled, delta, mask, None, scope)
            assert torch.equal(z.nan_to_num(-9.0), want.nan_to_num(-9.0))
    same = torch.where(mask[..., None], x[:1, :1], 5 * x)
    assert triton.gate_scores(same, delta, mask, None, Sequence()).isnan().all()


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES.keys())
def test_nan_stays_in_its_token_or_sequence(scope) -> None:
    x, _, _, rows = make_layout("batch", torch.float32)
    x[1, 3, 5] = float("nan")
    base = torch.randn(rows, 11, M)
    delta = make_pair()
    want_y, want_z = reference.hook_output(base, x, delta, 0.3, None, None, scope(rows))
    y, z = triton.hook_output(base, x, delta, 0.3, None, None, scope(rows))
    torch.testing.assert_close(z, want_z, rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(y, want_y, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_ties_go_to_the_first_and_values_beyond_float16_saturate() -> None:
    q, s = make_pair(rank=4)
    s[2] = s[1]
    x = torch.randn(1, 6, N)
    scope = Membership(correction="own")
    want, _ = reference.hook_output(torch.zeros(1, 6, M), x, (q, s), -9.0, None, None, scope)
    y, _ = triton.hook_output(torch.zeros(1, 6, M), x, (q, s), -9.0, None, None, scope)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    s = torch.full((1, N), 1e6)
    z = triton.gate_scores(x.half(), (q[:, :1], s), None, None, Membership())
    assert not z.isnan().any()


def test_small_coefficients_survive_float16() -> None:
    q, s = make_pair()
    x = torch.randn(2, 9, N).half()
    for scale in (1e-2, 1e-4):
        z = triton.gate_scores(x, (q, s * scale), None, None, Membership())
        want = (x.float() @ s.T).amax(-1) * scale
        torch.testing.assert_close(z, want, rtol=1e-4, atol=1e-5 * scale)


def test_views_owned_outputs_and_alpha_tensors() -> None:
    wide = torch.randn(3, 9, 2 * N)
    delta = make_pair()
    base = torch.randn(3, 9, M)
    for x in (wide[..., :N], wide[..., ::2], wide[..., :N].transpose(0, 1)):
        frozen = base if x.shape[:2] == base.shape[:2] else base.transpose(0, 1)
        want, _ = reference.hook_output(frozen, x, delta, 0.5, None, None, Sequence())
        y, _ = triton.hook_output(frozen, x, delta, torch.tensor(0.5), None, None, Sequence())
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    want, _ = reference.hook_output(base, wide[..., :N], delta, 0.5, None, None, Sequence())
    y, _ = triton.hook_output(base, wide[..., :N], delta, 0.5, None, None, Sequence(), True)
    assert y is base
    torch.testing.assert_close(base, want, rtol=1e-5, atol=1e-5)


def test_nothing_to_compute() -> None:
    for x, m, rank in (
        (torch.randn(2, 0, N), M, RANK),
        (torch.randn(0, 5, N), M, RANK),
        (torch.randn(2, 5, N), M, 0),
        (torch.randn(2, 5, N), 0, RANK),
    ):
        delta = torch.ones(m, rank), torch.ones(rank, x.shape[-1])
        base = torch.randn(*x.shape[:-1], m)
        y, z = triton.hook_output(base, x, delta, 0.5, None, None, Sequence())
        assert torch.equal(y, base) and z.shape == x.shape[:-1]


def test_gradients_are_those_of_the_reference() -> None:
    x, base = torch.randn(2, 9, N), torch.randn(2, 9, M)
    delta = make_pair()
    found = []
    for hook in (reference.hook_output, triton.hook_output):
        leaves = [x.clone().requires_grad_(), base.clone().requires_grad_()]
        y, _ = hook(leaves[1], leaves[0], delta, 0.5, None, None, Sequence())
        y.square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits_alone_in_a_batch_and_behind_padding(dtype) -> None:
    # Enough tokens for two tiles, so that a row changes its tile and its place in it. The products
    # of the interpreter are BLAS calls, whose rounding may depend on that place: with whole numbers
    # they are exact in any order, and every other sum still rounds.
    x = torch.randint(-200, 201, (15, 9, N)).to(dtype)
    q, s = make_pair()
    delta = q, (s * 300).round()
    z = triton.gate_scores(x, delta, None, None, Sequence())
    assert torch.equal(triton.gate_scores(x, delta, None, None, Sequence()), z)
    for row in (0, 7, 14):
        alone = triton.gate_scores(x[row], delta, None, None, Sequence())
        assert torch.equal(alone, z[row])
    padded = torch.cat((torch.randn(15, 4, N).to(dtype), x), dim=1)
    mask = (torch.arange(13) >= 4).expand(15, 13)
    assert torch.equal(triton.gate_scores(padded, delta, mask, None, Sequence())[:, 4:], z)
    if dtype == torch.float32:
        return
    dense, weight = (delta[0] @ delta[1]).round(), torch.randint(-9, 10, (M, N)).to(dtype)

    def fused(x: Tensor, mask: Tensor | None = None) -> Tensor:
        return triton.hooked_linear(x, weight, None, dense, 0.5, mask, None, Sequence())[0]

    y = fused(x)
    assert torch.equal(fused(x[7]), y[7]) and torch.equal(fused(padded, mask)[:, 4:], y)


def test_sizes_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"tokens": 16, "width": 16, "depth": 16, "warps": 4, "stages": 2}
    path = tmp_path / "sizes.json"
    values = {"full": small, "correct_full": small, "min_chunk": 16, "group": 2}
    path.write_text(json.dumps({"sm_90": values}))
    monkeypatch.setenv(launch.ENVIRONMENT_SWITCH, str(path))
    x, mask, _, _ = make_layout("gaps", torch.float32, n=100)
    assert triton.projection_sizes(launch.policy("cpu"), "full", 20, 100)[2] == 4
    check(x, make_pair(n=100, rank=20), mask, None, Sequence())
    check(x, make_pair(n=100, rank=20), mask, None, Membership(correction="own"))


def test_the_tuner_measures_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask, _, _ = make_layout("gaps", torch.float32)
    tried = []

    def measure(sizes: launch.LaunchPolicy, load: tune.Load) -> float:
        with tune.in_force(sizes):
            check(x, make_pair(), mask, None, Sequence())
            assert launch.policy("cpu") == sizes
        tried.append(sizes.full)
        return float(sizes.full.tokens)

    def choices(name: str, sizes: launch.LaunchPolicy) -> list[launch.Tile]:
        return [launch.Tile(t, 16, 16, 4, 2) for t in (16, 32)] if name == "full" else []

    start = launch.policy("cpu")
    found = tune.tune([tune.Load(M, N, RANK, 11, torch.float32)], start, measure, choices=choices)
    assert found.full.tokens == 16 and len(set(tried)) == 3
    tune.write(tmp_path / "sizes.json", found)
    monkeypatch.setenv(launch.ENVIRONMENT_SWITCH, str(tmp_path / "sizes.json"))
    assert launch.policy("cpu") == found
