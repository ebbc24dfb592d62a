"""The Triton backend on a GPU: right, repeatable, the same alone and in a batch, in graphs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from coachhook.ops import (
    Membership,
    Population,
    Prefix,
    Scope,
    Sequence,
    available_backends,
    gate_scores,
    hook_output,
    hooked_linear,
)
from coachhook.ops.hooked_linear import products
from tests.ops.gate_oracle import oracle, threshold
from tests.ops.triton_cases import DTYPES, LAYOUTS, SCOPES, make_layout, make_pair, pair_error
from tests.ops.triton_cue_cases import FORMS, check_features_and_states, check_many_sequences
from tests.tolerances import tol

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    available, reason = available_backends("hooked_linear")["triton"]
    if not available:
        pytest.skip(str(reason))


def to_gpu(value):
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, tuple):
        return tuple(to_gpu(part) for part in value)
    return value


def scope_to_gpu(scope: Scope) -> Scope:
    if isinstance(scope, Population):
        return Population(to_gpu(scope.mean), to_gpu(scope.std))
    if isinstance(scope, Membership):
        given = scope.cues, scope.limits, scope.state, scope.reaches, scope.gaps
        return Membership(to_gpu(scope.groups), scope.correction, *map(to_gpu, given))
    return scope


def check(x, delta, mask=None, cu_seqlens=None, scope=None) -> None:
    """Both outputs of the triton backend against float64, with no token near the threshold."""
    scope = Sequence() if scope is None else scope
    m = delta.shape[0] if isinstance(delta, Tensor) else delta[0].shape[0]
    n = x.shape[-1]
    base = torch.randn(*x.shape[:-1], m).to(x.dtype)
    alpha = threshold(oracle(base.double(), x, delta, 0.0, mask, cu_seqlens, scope).z)
    want = oracle(base.double(), x, delta, alpha, mask, cu_seqlens, scope)
    y, z = hook_output(
        base.cuda(),
        x.cuda(),
        to_gpu(delta),
        alpha,
        mask=to_gpu(mask),
        cu_seqlens=to_gpu(cu_seqlens),
        scope=scope_to_gpu(scope),
        backend="triton",
    )
    scores = tol("score", x.dtype, reduction=n, scale=want.ratio)
    scores["atol"] += pair_error(x, delta) * want.ratio
    torch.testing.assert_close(z.cpu().double(), want.z, equal_nan=True, **scores)
    outputs = tol("output", x.dtype, reduction=n, scale=float(want.y.abs().max()))
    torch.testing.assert_close(y.cpu().double(), want.y, **outputs)
    assert torch.equal(y.cpu()[~want.taken], base[~want.taken])  # bit for bit


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES.keys())
def test_scopes_and_layouts(scope, layout, nan_filled_memory) -> None:
    x, mask, cu_seqlens, rows = make_layout(layout, torch.float32)
    check(x, make_pair(), mask, cu_seqlens, scope(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [37, 64, 2120])
@pytest.mark.parametrize("stored", ["own", "float32", "dense_own", "dense_float32"])
def test_dtypes_sizes_and_storage(dtype, n, stored, nan_filled_memory) -> None:
    kept = torch.float32 if stored.endswith("float32") else dtype
    q, s = make_pair(m=300, n=n, rank=70, dtype=kept)
    delta = (q.float() @ s.float()).to(kept) if stored.startswith("dense") else (q, s)
    x, mask, _, rows = make_layout("left_padded", dtype, n)
    check(x, delta, mask)
    if isinstance(delta, tuple):
        for scope in SCOPES:
            # These name the groups, or the cues, of 7 keys.
            if not scope.startswith(("membership_groups", "membership_cues")):
                check(x, delta, mask, None, SCOPES[scope](rows))


def layer(dtype: torch.dtype, tokens: tuple[int, ...], n: int = 1600, m: int = 400, r: int = 100):
    """x, weight, bias and a factored hook on the GPU, the sizes of a small real layer."""
    x = torch.randn(*tokens, n, device="cuda", dtype=dtype)
    x[..., ::9, :] *= 3
    weight = torch.randn(m, n, device="cuda", dtype=dtype) / math.sqrt(n)
    bias = torch.randn(m, device="cuda", dtype=dtype)
    q = torch.linalg.qr(torch.randn(m, r, device="cuda"))[0]
    return x, weight, bias, (q, torch.randn(r, n, device="cuda") / math.sqrt(n))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_do_not_fire_are_those_of_the_frozen_layer(dtype) -> None:
    x, weight, bias, delta = layer(dtype, (4, 300))
    y, z = hooked_linear(x, weight, bias, delta, 1.5, backend="triton")
    frozen = F.linear(x, weight, bias)
    fired = z >= 1.5
    assert 0 < fired.sum() < fired.numel()
    assert torch.equal(y[~fired], frozen[~fired])
    assert not torch.equal(y[fired], frozen[fired])


@pytest.mark.parametrize("way", ["fused", "library"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m, n", [(37, 61), (400, 1600)])
@pytest.mark.parametrize("stored", ["own", "float32"])
def test_other_ways_to_the_products(
    way, dtype, m, n, stored, nan_filled_memory, monkeypatch
) -> None:
    monkeypatch.setenv(products.ENVIRONMENT_SWITCH, way)
    x, weight, bias, (q, s) = layer(dtype, (4, 70), n=n, m=m, r=20)
    delta = (q @ s).to(dtype if stored == "own" else torch.float32)
    mask = torch.arange(70, device="cuda") > torch.tensor([[-1], [9], [60], [30]], device="cuda")
    frozen = F.linear(x, weight, bias)
    host = [t.cpu() for t in (x, weight, bias, delta, mask, frozen)]
    base = F.linear(*(t.double() for t in host[:3])) if way == "fused" else host[5].double()
    for scope in (Sequence(), Prefix(), Population(1.0, 0.5)):
        alpha = threshold(oracle(base, host[0], host[3], 0.0, host[4], None, scope).z)
        want = oracle(base, host[0], host[3], alpha, host[4], None, scope)
        y, z = hooked_linear(
            x, weight, bias, delta, alpha, mask=mask, scope=scope, backend="triton"
        )
        scores = tol("score", dtype, reduction=n, scale=want.ratio)
        torch.testing.assert_close(z.cpu().double(), want.z, equal_nan=True, **scores)
        outputs = tol("output", dtype, reduction=n, scale=float(want.y.abs().max()))
        torch.testing.assert_close(y.cpu().double(), want.y, **outputs)
        if way == "library":
            assert torch.equal(y.cpu()[~want.taken], host[5][~want.taken])  # bit for bit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", ["own", "float32"])
def test_fused_bits_do_not_depend_on_the_batch(dtype, stored, monkeypatch) -> None:
    monkeypatch.setenv(products.ENVIRONMENT_SWITCH, "fused")
    x, weight, bias, (q, s) = layer(dtype, (40, 70))
    delta = (q @ s).to(dtype if stored == "own" else torch.float32)

    def call(x: Tensor) -> Tensor:
        return hooked_linear(x, weight, bias, delta, 1.0, backend="triton")[0]

    y = call(x)
    assert not torch.equal(y, F.linear(x, weight, bias))
    for _ in range(10):
        assert torch.equal(call(x), y)
    for rows in (slice(0, 1), slice(17, 19), slice(38, 40)):
        assert torch.equal(call(x[rows]), y[rows])


@pytest.mark.parametrize("form", FORMS)
def test_edits_are_armed_as_by_the_reference(form, nan_filled_memory) -> None:
    for length in (1, 32, 33, 97, 700):
        check_features_and_states(length, form, "cuda")
    check_many_sequences("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits_on_every_run_alone_in_a_batch_and_behind_padding(dtype) -> None:
    x, _, _, delta = layer(dtype, (40, 70))
    for scope in (Sequence(), Prefix(), Membership()):

        def scores(x: Tensor, mask: Tensor | None = None, scope: Scope = scope) -> Tensor:
            return gate_scores(x, delta, mask=mask, scope=scope, backend="triton")

        first = scores(x)
        for _ in range(20):
            assert torch.equal(scores(x).nan_to_num(-9.0), first.nan_to_num(-9.0))
        for row in (0, 1, 17, 39):
            alone = scores(x[row : row + 1])[0]
            assert torch.equal(alone.nan_to_num(-9.0), first[row].nan_to_num(-9.0))
        padded = torch.cat((torch.randn_like(x[:, :13]), x), dim=1)
        mask = (torch.arange(83, device="cuda") >= 13).expand(40, 83)
        behind = scores(padded, mask)[:, 13:]
        assert torch.equal(behind.nan_to_num(-9.0), first.nan_to_num(-9.0))


def test_nothing_waits_for_the_device() -> None:
    x, weight, bias, delta = layer(torch.bfloat16, (2, 80))
    alpha = torch.tensor(1.0, device="cuda")
    state = torch.zeros(2, 3, device="cuda")
    calls = [
        lambda scope=scope, threshold=threshold: hooked_linear(
            x, weight, bias, delta, threshold, scope=scope, backend="triton"
        )
        for scope in (Sequence(), Sequence(state), Prefix(state), Population(3.0, 1.0))
        for threshold in (alpha, 1.0)
    ]
    for call in calls:
        call()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", ["fused", "library"])
def test_a_graph_of_another_way_follows_what_changes_in_place(way, monkeypatch) -> None:
    monkeypatch.setenv(products.ENVIRONMENT_SWITCH, way)
    x, weight, bias, (q, s) = layer(torch.bfloat16, (3, 90))
    delta, alpha = (q @ s).bfloat16(), torch.tensor(1.0, device="cuda")

    def call() -> tuple[Tensor, Tensor]:
        return hooked_linear(x, weight, bias, delta, alpha, backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = call()
    for step in range(3):
        new = layer(torch.bfloat16, (3, 90))
        x.copy_(new[0])
        weight.copy_(new[1])
        delta.copy_(new[3][0] @ new[3][1])
        alpha.fill_(0.5 + step / 2)
        graph.replay()
        after = y.clone(), z.clone()
        eager = call()
        assert torch.equal(after[0], eager[0]) and torch.equal(after[1], eager[1])
        assert ((after[1] >= alpha).sum(-1) > 0).any()


@pytest.mark.parametrize("kind", ["sequence", "prefix", "population", "membership_own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_follows_what_changes_in_place(kind, dtype) -> None:
    x, weight, bias, (q, s) = layer(dtype, (3, 90))
    alpha = torch.tensor(1.0, device="cuda")
    state = torch.zeros(3, 3, device="cuda", dtype=torch.float64)
    mean, std = torch.full((3,), 3.0, device="cuda"), torch.full((3,), 1.0, device="cuda")
    scope = {
        "sequence": Sequence(state),
        "prefix": Prefix(state),
        "population": Population(mean, std),
        "membership_own": Membership(correction="own"),
    }[kind]

    def call() -> tuple[Tensor, Tensor]:
        return hooked_linear(x, weight, bias, (q, s), alpha, scope=scope, backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = call()
    for step in range(3):
        new = layer(dtype, (3, 90))
        x.copy_(new[0])
        q.copy_(new[3][0])
        s.copy_(new[3][1])
        alpha.fill_(0.5 + step / 2)
        mean.fill_(2.0 + step)
        state.zero_()
        graph.replay()
        after, state_after = (y.clone(), z.clone()), state.clone()
        state.zero_()
        eager = call()
        assert torch.equal(after[0], eager[0])
        assert torch.equal(after[1].nan_to_num(-9.0), eager[1].nan_to_num(-9.0))
        assert torch.equal(state_after, state)
        assert not torch.equal(after[0], F.linear(x, weight, bias))


def test_one_compiled_graph_for_every_batch_and_length() -> None:
    _, weight, bias, delta = layer(torch.bfloat16, (1, 1))
    torch._dynamo.reset()
    compiled = torch.compile(hooked_linear, fullgraph=True, dynamic=True)
    sizes = [(2, 33), (3, 50), (5, 17), (4, 128)]
    for step, size in enumerate(sizes):
        x = layer(torch.bfloat16, size)[0]
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            y, z = compiled(x, weight, bias, delta, 1.0, backend="triton")
        want_y, want_z = hooked_linear(x, weight, bias, delta, 1.0, backend="triton")
        torch.testing.assert_close(z, want_z, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(y, want_y, rtol=2**-7, atol=2**-6)


def test_gradients_are_those_of_the_reference() -> None:
    x, weight, bias, delta = layer(torch.float32, (2, 40))
    found = []
    for backend in ("reference", "triton"):
        leaf = x.clone().requires_grad_()
        y, _ = hooked_linear(leaf, weight, bias, delta, 1.0, backend=backend)
        y.square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-3)


def test_strided_tokens_and_rows_that_are_not_aligned() -> None:
    wide = torch.randn(3, 50, 403, device="cuda")
    delta = to_gpu(make_pair(m=61, n=201, rank=19))
    base = torch.randn(3, 50, 61, device="cuda")
    for x in (wide[..., :201], wide[..., 1:202], wide[..., ::2][..., :201]):
        want = hook_output(base, x, delta, 0.5, backend="reference")
        got = hook_output(base, x, delta, 0.5, backend="triton")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_second_device_is_used_and_current_device_kept() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, weight, bias, delta = layer(torch.float32, (2, 40))
    there = [t.to("cuda:1") for t in (x, weight, bias, *delta)]
    y, _ = hooked_linear(*there[:3], (there[3], there[4]), 1.0, backend="triton")
    want, _ = hooked_linear(x, weight, bias, delta, 1.0, backend="triton")
    torch.testing.assert_close(y.to("cuda:0"), want, rtol=1e-5, atol=1e-4)
    assert torch.cuda.current_device() == 0


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    tokens, m, n = 140_000, 16_384, 64
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.randn(1, tokens, n, device="cuda", dtype=torch.bfloat16)
    x[:, -3:] *= 30
    delta = to_gpu(make_pair(m=m, n=n, rank=16))
    base = torch.zeros(1, tokens, m, device="cuda", dtype=torch.bfloat16)
    y, z = hook_output(base, x, delta, 20.0, backend="triton")
    fired = (z >= 20.0).nonzero()[:, 1].tolist()
    assert set(fired) <= set(range(tokens - 3, tokens)) and fired
    want = F.linear(F.linear(x[:, -3:].float(), delta[1]), delta[0])
    taken = z[:, -3:] >= 20.0
    torch.testing.assert_close(y[:, -3:].float()[taken], want[taken], rtol=2**-7, atol=1e-2)
    assert not y[:, :-3].any()
