"""The decoding kernels on a GPU: right, repeatable, the same alone and in a batch, in graphs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coachhook.hooks.layer import HookedLinear
from coachhook.ops import (
    Membership,
    Population,
    Prefix,
    Scope,
    Sequence,
    Ungated,
    available_backends,
    gate_scores,
    hook_output,
    hooked_linear,
)
from coachhook.ops.hooked_linear import decode, products
from tests.ops.gate_oracle import arming, oracle, threshold
from tests.ops.test_cues import make_edits, make_gaps, make_reaches, random_state
from tests.tolerances import tol

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
M, N, RANK = 400, 1600, 100


@pytest.fixture(autouse=True)
def _cuda(nan_filled_memory: None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    available, reason = available_backends("hooked_linear")["cuda"]
    if not available:
        pytest.skip(str(reason))


@pytest.fixture(params=["exact", "fused"])
def frozen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes the frozen product: torch, or the hook's own pass."""
    monkeypatch.setenv(products.ENVIRONMENT_SWITCH, request.param)
    return str(request.param)


def layer(dtype: torch.dtype, *tokens: int, n: int = N, m: int = M, rank: int = RANK):
    """x, weight, bias and a factored hook on the CPU, the sizes of a small real layer."""
    x = torch.randn(*tokens, n)
    x.view(-1, n)[::3] *= 3
    weight, bias = torch.randn(m, n) / math.sqrt(n), torch.randn(m)
    q = torch.linalg.qr(torch.randn(m, rank))[0]
    s = torch.randn(rank, n) / math.sqrt(n)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), (q, s)


def to_gpu(value):
    if isinstance(value, tuple):
        return tuple(to_gpu(part) for part in value)
    if isinstance(value, Population):
        return Population(to_gpu(value.mean), to_gpu(value.std))
    if isinstance(value, Membership):
        given = value.cues, value.limits, value.state, value.reaches, value.gaps
        return Membership(to_gpu(value.groups), value.correction, *map(to_gpu, given))
    if isinstance(value, (Sequence, Prefix)) and value.state is not None:
        return type(value)(value.state.cuda())
    return value.cuda() if isinstance(value, Tensor) else value


def check(x, weight, bias, delta, scope, mask=None, cu_seqlens=None, fused=False) -> None:
    """Both outputs against float64, with no token near the threshold."""
    n = x.shape[-1]
    on_gpu = to_gpu((x, weight, bias))
    frozen = F.linear(*on_gpu).cpu()
    base = F.linear(*(t.double() for t in (x, weight, bias))) if fused else frozen.double()
    alpha = threshold(oracle(base, x, delta, 0.0, mask, cu_seqlens, scope).z)
    want = oracle(base, x, delta, alpha, mask, cu_seqlens, scope)
    where = {"mask": to_gpu(mask), "cu_seqlens": to_gpu(cu_seqlens), "scope": to_gpu(scope)}
    y, z = hooked_linear(*on_gpu, to_gpu(delta), alpha, backend="cuda", **where)
    scores = tol("score", x.dtype, reduction=n, scale=want.ratio)
    torch.testing.assert_close(z.cpu().double(), want.z, equal_nan=True, **scores)
    outputs = tol("output", x.dtype, reduction=n, scale=float(want.y.abs().max()))
    torch.testing.assert_close(y.cpu().double(), want.y, **outputs)
    if not fused:
        assert torch.equal(y.cpu()[~want.taken], frozen[~want.taken])  # bit for bit


def groups() -> Tensor:
    return torch.arange(RANK) * 7 % 40


SCOPES = {
    "sequence": lambda rows: Sequence(),
    "prefix": lambda rows: Prefix(),
    "population": lambda rows: Population(14.0, 5.0),
    "population_rows": lambda rows: Population(torch.linspace(10, 18, rows), torch.tensor(5.0)),
    "membership": lambda rows: Membership(),
    "membership_own": lambda rows: Membership(correction="own"),
    "membership_groups": lambda rows: Membership(groups()),
    "membership_groups_own": lambda rows: Membership(groups(), "own"),
    "ungated": lambda rows: Ungated(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCOPES)
def test_scopes_and_layouts(name: str, dtype: torch.dtype, frozen: str) -> None:
    fused = frozen == "fused"
    for tokens in ((1, 1), (8, 1), (64, 1), (3, 20)):
        check(*layer(dtype, *tokens), SCOPES[name](tokens[0]), fused=fused)
    mask = torch.arange(20) > torch.tensor([[-1], [4], [19]])
    check(*layer(dtype, 3, 20), SCOPES[name](3), mask=mask, fused=fused)
    edges = torch.tensor([0, 13, 13, 14, 30], dtype=torch.int32)
    check(*layer(dtype, 33), SCOPES[name](4), cu_seqlens=edges, fused=fused)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edits", [40, 700])
def test_edits_wait_for_their_cues(edits: int, dtype: torch.dtype, frozen: str) -> None:
    fused = frozen == "fused"
    masked = torch.arange(20) > torch.tensor([[-1], [4], [19]])
    for tokens, mask in (((1, 1), None), ((64, 1), None), ((3, 20), None), ((3, 20), masked)):
        x, weight, bias, _ = layer(dtype, *tokens)
        for stored in {dtype, torch.float32}:
            delta, cues, limits = make_edits(x, M, edits, stored)
            some, apart = make_reaches(edits), make_gaps(edits)
            told = {"reaches": some, "limits": limits}
            for state, reaches, gaps in (
                (None, some, apart),
                (random_state(tokens[0], edits), None, None),
                (random_state(tokens[0], edits, **told), some, None),
                (random_state(tokens[0], edits, **told, gaps=apart), some, apart),
            ):
                scope = Membership(None, "own", cues, limits, state, reaches, gaps)
                check(x, weight, bias, delta, scope, mask=mask, fused=fused)
                if state is None:
                    continue
                kept = to_gpu(scope)
                gate_scores(x.cuda(), to_gpu(delta), mask=to_gpu(mask), scope=kept, backend="cuda")
                assert torch.equal(kept.state.cpu(), arming(x, mask, None, scope)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_tokens(dtype: torch.dtype, frozen: str) -> None:
    x, *rest = layer(dtype, 64, 1)
    for tokens in range(1, 65):
        check(x[:tokens], *rest, Population(14.0, 5.0), fused=frozen == "fused")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, m, rank", [(37, 61, 19), (72, 2100, 33), (4104, 40, 5), (640, 1300, 600)]
)
def test_sizes_and_storage(dtype: torch.dtype, n: int, m: int, rank: int, frozen: str) -> None:
    x, weight, bias, (q, s) = layer(dtype, 11, 1, n=n, m=m, rank=rank)
    norms = (x.double() @ s.double().T).norm(dim=-1)
    scope = Population(float(norms.mean()), float(norms.std()))
    dense = q @ s
    for delta in ((q, s), (q.to(dtype), s.to(dtype)), dense, dense.to(dtype)):
        check(x, weight, bias, delta, scope, fused=frozen == "fused")


def test_strided_and_unaligned_tokens() -> None:
    wide = torch.randn(5, 4, 403, device="cuda")
    _, _, _, delta = layer(torch.float32, 1, n=201, m=61, rank=19)
    base = torch.randn(5, 4, 61, device="cuda")
    for x in (wide[..., :201], wide[..., 1:202], wide[..., ::2][..., :201]):
        want = hook_output(base, x, to_gpu(delta), 0.5, backend="reference")
        got = hook_output(base, x, to_gpu(delta), 0.5, backend="cuda")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(-9.0), b.nan_to_num(-9.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [N, N + 3])
def test_equal_bits_on_every_run_and_in_every_batch(
    dtype: torch.dtype, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether a library GEMM depends on the batch is not the kernels' doing: theirs is the product.
    monkeypatch.setenv(products.ENVIRONMENT_SWITCH, "fused")
    x, weight, bias, delta = to_gpu(layer(dtype, 64, 1, n=n))
    for scope in (Population(14.0, 5.0), Prefix(), Membership(correction="own")):

        def call(x: Tensor, scope: Scope = scope) -> tuple[Tensor, Tensor]:
            return hooked_linear(x, weight, bias, delta, 0.5, scope=scope, backend="cuda")

        y, z = call(x)
        for _ in range(20):
            again = call(x)
            assert torch.equal(again[0], y) and same(again[1], z)
        for rows in (slice(0, 1), slice(63, 64), slice(5, 13), slice(7, 40)):
            part = call(x[rows].contiguous())
            assert torch.equal(part[0], y[rows]) and same(part[1], z[rows])
            alone = gate_scores(x[rows].contiguous(), delta, scope=scope, backend="cuda")
            assert same(alone, z[rows])


@pytest.mark.parametrize("kind", ["sequence", "prefix", "population", "membership_own", "cued"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_follows_what_changes_in_place(kind: str, dtype: torch.dtype, frozen: str) -> None:
    tokens = (2, 9) if kind == "sequence" else (9, 1)
    x, weight, bias, (q, s) = to_gpu(layer(dtype, *tokens))
    rows = tokens[0]
    alpha = torch.tensor(0.5, device="cuda")
    state = torch.zeros(rows, 3, device="cuda", dtype=torch.float64)
    mean, std = torch.full((rows,), 14.0, device="cuda"), torch.full((rows,), 5.0, device="cuda")
    before = torch.tensor([5.0, 14.0, 90.0], device="cuda", dtype=torch.float64)
    reaches = gaps = None
    if kind == "cued":
        reaches, gaps = make_reaches(RANK), make_gaps(RANK)
        before = random_state(rows, RANK, reaches=reaches, gaps=gaps).cuda()
        state, reaches, gaps = before.clone(), reaches.cuda(), gaps.cuda()
    limits = torch.full((RANK,), 0.5, device="cuda")
    scope = {
        "sequence": Sequence(state),
        "prefix": Prefix(state),
        "population": Population(mean, std),
        "membership_own": Membership(correction="own"),
        "cued": Membership(None, "own", s.flip(0).contiguous(), limits, state, reaches, gaps),
    }[kind]

    def call() -> tuple[Tensor, Tensor]:
        return hooked_linear(x, weight, bias, (q, s), alpha, scope=scope, backend="cuda")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = call()
    fired = False
    for step in range(4):
        new = to_gpu(layer(dtype, *tokens))
        for old, fresh in zip((x, weight, bias, q, s), (*new[:3], *new[3]), strict=True):
            old.copy_(fresh)
        alpha.fill_(-0.5 + step / 2)
        mean.fill_(12.0 + step)
        limits.fill_(0.2 * step)
        state.copy_(before)
        graph.replay()
        after, state_after = (y.clone(), z.clone()), state.clone()
        state.copy_(before)
        eager = call()
        assert torch.equal(after[0], eager[0]) and same(after[1], eager[1])
        assert same(state_after, state)
        fired |= bool((eager[1] >= alpha).any())
    assert fired


def test_nothing_waits_for_the_device(frozen: str) -> None:
    x, weight, bias, delta = to_gpu(layer(torch.bfloat16, 4, 2))
    alpha = torch.tensor(1.0, device="cuda")
    state = torch.zeros(4, 3, device="cuda")
    limits, seen = torch.zeros(RANK, device="cuda"), random_state(4, RANK).cuda()
    asked = make_reaches(RANK).cuda(), make_gaps(RANK).cuda()
    cued = Membership(None, "own", delta[1], limits, seen, *asked)
    scopes = (Sequence(), Sequence(state), Prefix(state), Population(3.0, 1.0), Membership(), cued)
    calls = [(scope, a) for scope in scopes for a in (alpha, 1.0)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for scope, a in calls:
            hooked_linear(x, weight, bias, delta, a, scope=scope, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hook_layer_decodes(dtype: torch.dtype, frozen: str) -> None:
    x, weight, bias, (q, s) = layer(dtype, 5, 1)
    base = nn.Linear(N, M).requires_grad_(False).to("cuda", dtype)
    base.weight.copy_(weight)
    base.bias.copy_(bias)
    hooked = HookedLinear(base, in_features=N, out_features=M, index=0, device="cuda")
    hooked.set_factored(q.cuda(), s.cuda())
    hooked.set_scope("population", population=(14.0, 5.0))
    product = F.linear(x.double(), weight.double(), bias.double())
    scope = Population(14.0, 5.0)
    hooked.set_alpha(threshold(oracle(product, x, (q, s), 0.0, scope=scope).z))
    hooked.state = "validated"
    want = oracle(product, x, (q, s), hooked.alpha, scope=scope)
    with torch.inference_mode():
        y = hooked(x.cuda()).cpu()
        plain = base(x.cuda()).cpu()
    outputs = tol("output", dtype, reduction=N, scale=float(want.y.abs().max()))
    torch.testing.assert_close(y.double(), want.y, **outputs)
    assert want.taken.any() and not want.taken.all()
    if frozen == "exact":
        assert torch.equal(y[~want.taken], plain[~want.taken])


def test_a_captured_hook_layer_follows_new_edits(frozen: str) -> None:
    x, weight, bias, _ = to_gpu(layer(torch.bfloat16, 5, 1))
    base = nn.Linear(N, M).requires_grad_(False).to("cuda", torch.bfloat16)
    base.weight.copy_(weight)
    base.bias.copy_(bias)
    hooked = HookedLinear(base, in_features=N, out_features=M, index=0, device="cuda")
    hooked.reserve(RANK)
    hooked.set_scope("population", population=(14.0, 5.0))
    hooked.state = "validated"

    def edit(rank: int) -> None:
        _, _, _, (q, s) = to_gpu(layer(torch.bfloat16, 1, rank=rank))
        hooked.set_factored(q, s)

    edit(RANK)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(stream):
            hooked(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = hooked(x)
        for rank, alpha in ((RANK, -9.0), (RANK // 2, -9.0), (3, -9.0), (RANK, 9.0)):
            edit(rank)
            hooked.set_alpha(alpha)
            x.copy_(to_gpu(layer(torch.bfloat16, 5, 1))[0])
            graph.replay()
            assert torch.equal(y, hooked(x))
            if frozen == "exact":
                assert torch.equal(y, base(x)) == (alpha > 0)


@pytest.mark.parametrize("rank", [RANK, 600])  # sums of their own launch above 512
def test_overlapped_kernels_give_the_same_bits(
    rank: int, frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias, delta = to_gpu(layer(torch.bfloat16, 40, 1, m=1300, rank=rank))
    state = torch.zeros(40, 3, device="cuda", dtype=torch.float64)
    before = torch.tensor([5.0, 14.0, 90.0], device="cuda", dtype=torch.float64)

    def steps() -> list[Tensor]:
        """Layers one after another, each reading what the one before wrote."""
        state.copy_(before)
        tokens, seen = x, []
        for _ in range(20):
            y, z = hooked_linear(
                tokens, weight, bias, delta, 0.5, scope=Prefix(state), backend="cuda"
            )
            seen += [y, z]
            tokens = torch.nn.functional.pad(y.tanh(), (0, N - y.shape[-1]))
        return [*seen, state.clone()]

    want = steps()
    monkeypatch.setenv(decode.OVERLAP_SWITCH, "1")
    for _ in range(10):
        assert all(same(a, b) for a, b in zip(steps(), want, strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        steps()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps()
    for _ in range(10):
        graph.replay()
        assert all(same(a, b) for a, b in zip(captured, want, strict=True))


def test_second_device_is_used_and_current_device_kept() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, weight, bias, delta = layer(torch.float32, 4, 2)
    there = [t.to("cuda:1") for t in (x, weight, bias, *delta)]
    y, _ = hooked_linear(*there[:3], (there[3], there[4]), 0.5, backend="cuda")
    here = to_gpu((x, weight, bias, delta))
    want, _ = hooked_linear(*here, 0.5, backend="cuda")
    torch.testing.assert_close(y.to("cuda:0"), want, rtol=1e-5, atol=1e-4)
    assert torch.cuda.current_device() == 0
