"""Edits with a cue: armed from the first token on that reaches its limit, on every backend."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from coachhook.ops import (
    Membership,
    available_backends,
    gate_scores,
    hook_output,
    hooked_linear,
)
from coachhook.ops.hooked_linear import decode
from coachhook.ops.hooked_linear.cues import (
    NEVER,
    blank_state,
    firsts,
)
from tests.ops.gate_oracle import arming, oracle, threshold
from tests.tolerances import tol

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BACKENDS = [name for name, (able, _) in available_backends("hooked_linear", "cpu").items() if able]
LAYOUTS = ["batch", "left_padded", "gaps", "packed", "packed_tail", "packed_gaps", "single"]
INF, NAN = math.inf, math.nan


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def make_tokens(layout, dtype, n, seed):
    """x, mask, cu_seqlens and the number of sequences, of sizes that follow the seed."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, n, generator=generator).to(dtype)

    if layout.startswith("packed"):
        lengths = torch.tensor([3 + seed, 0, 1, 12, 2, 0])
        cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
        total = int(lengths.sum()) + (3 if layout == "packed_tail" else 0)
        mask = torch.rand(total, generator=generator) < 0.7 if layout == "packed_gaps" else None
        return randn(total), mask, cu_seqlens, len(lengths)
    rows, length = 1 + seed, 9 + 4 * seed
    if layout == "single":
        return randn(length), None, None, 1
    mask = None
    if layout == "left_padded":
        real = torch.randint(0, length + 1, (rows, 1), generator=generator)
        mask = torch.arange(length) >= length - real
    elif layout == "gaps":
        mask = torch.rand(rows, length, generator=generator) < 0.6
    return randn(rows, length), mask, None, rows


def make_edits(x, m, count, dtype):
    """A pair, and cues whose limits no token is near: some are met at once, some never."""
    n = x.shape[-1]
    delta = torch.randn(m, count).to(dtype), (torch.randn(count, n) / math.sqrt(n)).to(dtype)
    cues = (torch.randn(count, n) / math.sqrt(n)).to(dtype)
    seen = x.reshape(-1, n).double() @ cues.double().T
    limits = torch.tensor([threshold(column) for column in seen.T], dtype=torch.float64)
    limits[::4] = -INF
    limits[3::7] = INF
    return delta, cues, limits


def make_reaches(count):
    """Of every kind: none, some, the most that registers know, and all."""
    kinds = [2, 62, NEVER, 0, 63, 5]
    return torch.tensor([kinds[i % len(kinds)] for i in range(count)], dtype=torch.int32)


def make_gaps(count):
    """One token is the cue, two as far apart as may be, out of range, and between."""
    kinds = [1, 0, 3, 7, 2, -1, 9]
    return torch.tensor([kinds[i % len(kinds)] for i in range(count)], dtype=torch.int32)


def random_state(rows, count, read=20, reaches=None, limits=None, gaps=None):
    """As after ``read`` tokens: some cues were seen, at columns before, some were not."""
    if reaches is not None and limits is not None:
        reaches = torch.where(limits == -INF, NEVER, reaches)
    apart = torch.zeros(count, dtype=torch.int32) if gaps is None else gaps.clamp(0, 7)
    if reaches is not None:
        bounded = reaches.clamp(max=63) + apart < 63
        apart, reaches = torch.where(bounded, apart, 0), torch.where(bounded, reaches, NEVER)
    state = blank_state(rows, count, torch.device("cpu"))
    state[:, 0] = read
    for row in state:
        for edit in torch.arange(count)[torch.rand(count) < 0.3].tolist():
            columns = {int(column) for column in torch.randint(0, read, (3,))}
            gap = int(apart[edit])
            columns |= {column - gap for column in columns if column >= gap and column % 2}
            row[1 + edit] = min((c for c in columns if c - gap in columns), default=NEVER)
            if reaches is not None and reaches[edit] < 63:
                row[1 + count + edit] = sum(1 << read - 1 - column for column in columns)
    return state


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_loop(backend, dtype, layout, seed):
    m, n, count = (53, 31, 7), (37, 26, 130), (7, 5, 33)
    m, n, count = m[seed], n[seed], count[seed]
    x, mask, cu_seqlens, rows = make_tokens(layout, dtype, n, seed)
    weight, bias = (torch.randn(m, n) / math.sqrt(n)).to(dtype), torch.randn(m).to(dtype)
    delta, cues, limits = make_edits(x, m, count, dtype)
    base = x.double() @ weight.double().T + bias.double()
    some, apart = make_reaches(count), make_gaps(count)
    for state, reaches, gaps in (
        (None, None, None),
        (None, some, apart),
        (blank_state(rows, count, x.device), some, None),
        (random_state(rows, count), None, None),
        (random_state(rows, count, 20, some, limits), some, None),
        (random_state(rows, count, 20, some, limits, apart), some, apart),
    ):
        scope = Membership(None, "own", cues, limits, state, reaches, gaps)
        z = oracle(base, x, delta, INF, mask, cu_seqlens, scope).z
        alpha = threshold(z)
        want = oracle(base, x, delta, alpha, mask, cu_seqlens, scope)
        armed, after = arming(x, mask, cu_seqlens, scope)

        def run(function, *arguments, scope=scope, after=after):
            kept = scope.state
            if kept is not None:  # strides of any kind
                wide = torch.full((rows, 4 * count + 2), 7, dtype=torch.int64)
                wide[:, ::2] = kept
                scope = replace(scope, state=wide[:, ::2])
            found = function(
                *arguments, mask=mask, cu_seqlens=cu_seqlens, scope=scope, backend=backend
            )
            if kept is not None:
                assert torch.equal(wide[:, ::2], after)
                assert (wide[:, 1::2] == 7).all()
            return found

        y, z = run(hooked_linear, x, weight, bias, delta, alpha)
        bounds = tol("output", dtype, reduction=n + m, scale=float(want.y.abs().max()))
        torch.testing.assert_close(y.double(), want.y, **bounds)
        score = tol("score", dtype, reduction=n, scale=want.ratio)
        torch.testing.assert_close(z.double(), want.z, equal_nan=True, **score)
        frozen = F.linear(x, weight, bias)
        assert torch.equal(y[~want.taken], frozen[~want.taken])
        same(run(hook_output, frozen, x, delta, alpha), (y, z))
        same(run(gate_scores, x, delta), z)
        again = run(hooked_linear, x, weight, bias, delta, alpha)
        same(again, (y, z))
        flat = [edit for token in armed for edit in token]
        assert any(flat) and not all(flat)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 33)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_few_edits_wait_or_few_are_armed(backend, shape, dtype):
    """Products that no decision hangs on need not be formed."""
    m, n, count = 19, 23, 40
    x = torch.randn(*shape, n).to(dtype)
    delta, cues, limits = make_edits(x, m, count, dtype)
    base = torch.randn(*shape, m).to(dtype)
    for waiting, others in ((3, -INF), (3, INF), (0, INF), (40, INF), (9, -INF)):
        chosen = torch.full_like(limits, others)
        index = torch.randperm(count)[:waiting]
        chosen[index] = limits[index]
        some, apart = make_reaches(count), make_gaps(count)
        for state, reaches, gaps in (
            (None, None, None),
            (random_state(shape[0], count), None, None),
            (random_state(shape[0], count, 20, some, chosen, apart), some, apart),
        ):
            scope = Membership(None, "own", cues, chosen, state, reaches, gaps)
            _, after = arming(x, None, None, scope)
            z = oracle(base.double(), x, delta, INF, scope=scope).z
            alpha = threshold(z)
            want = oracle(base.double(), x, delta, alpha, scope=scope)
            kept = replace(scope, state=None if state is None else state.clone())
            y, z = hook_output(base, x, delta, alpha, scope=kept, backend=backend)
            bounds = tol("output", dtype, reduction=n + m, scale=float(want.y.abs().max()))
            torch.testing.assert_close(y.double(), want.y, **bounds)
            score = tol("score", dtype, reduction=n, scale=want.ratio)
            torch.testing.assert_close(z.double(), want.z, **score)
            assert state is None or torch.equal(kept.state, after)


@pytest.mark.parametrize("cuts", [[1] * 17, [5, 0, 12], [16, 1], [3, 3, 3, 8]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bounded", ["no", "yes", "apart"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_parts_and_at_once(backend, bounded, cuts, masked):
    m, n, count = 29, 23, 6
    reaches = make_reaches(count) if bounded != "no" else None
    gaps = make_gaps(count) if bounded == "apart" else None
    x = torch.randn(4, 17, n)
    mask = torch.rand(4, 17) < 0.6 if masked else torch.ones(4, 17, dtype=torch.bool)
    weight, bias = torch.randn(m, n), torch.randn(m)
    delta, cues, limits = make_edits(x, m, count, x.dtype)
    whole, state = blank_state(4, count, x.device), blank_state(4, count, x.device)

    def run(x, mask, state):
        scope = Membership(None, "own", cues, limits, state, reaches, gaps)
        return hooked_linear(x, weight, bias, delta, 0.4, mask=mask, scope=scope, backend=backend)

    y, z = run(x, mask, whole)
    same(run(x, mask, None), (y, z))
    parts = [run(*part, state) for part in zip(x.split(cuts, 1), mask.split(cuts, 1), strict=True)]
    z_parts = torch.cat([part[1] for part in parts], dim=1)
    y_parts = torch.cat([part[0] for part in parts], dim=1)
    score = tol("score", torch.float32, reduction=n, scale=5.0)
    torch.testing.assert_close(z_parts, z, equal_nan=True, **score)
    assert torch.equal(z_parts >= 0.4, z >= 0.4)
    bounds = tol("output", torch.float32, reduction=n, scale=float(y.abs().max()))
    torch.testing.assert_close(y_parts, y, **bounds)
    assert torch.equal(state, whole)
    # What the parts alone would not know: otherwise the test could not fail.
    alone = torch.cat(
        [run(*part, None)[1] for part in zip(x.split(cuts, 1), mask.split(cuts, 1), strict=True)], 1
    )
    assert not torch.equal(alone.nan_to_num(), z_parts.nan_to_num())


@pytest.mark.parametrize("bounded", ["no", "yes", "apart"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_parts_continue_their_sequences(backend, bounded):
    n, count = 23, 6
    reaches = make_reaches(count) if bounded != "no" else None
    gaps = make_gaps(count) if bounded == "apart" else None
    prompts = [torch.randn(4, n), torch.randn(0, n), torch.randn(7, n)]
    delta, cues, limits = make_edits(torch.cat(prompts), 5, count, torch.float32)
    state = blank_state(3, count, torch.device("cpu"))
    scope = Membership(None, "own", cues, limits, state, reaches, gaps)
    x1 = torch.cat([prompts[0][:3], prompts[2][:2]])
    x2 = torch.cat([prompts[0][3:], prompts[2][2:]])
    first, second = torch.tensor([0, 3, 3, 5]), torch.tensor([0, 1, 1, 6])
    z1 = gate_scores(x1, delta, cu_seqlens=first, scope=scope, backend=backend)
    z2 = gate_scores(x2, delta, cu_seqlens=second, scope=scope, backend=backend)
    for row, parts in ((0, (z1[:3], z2[:1])), (2, (z1[3:], z2[1:]))):
        alone = blank_state(1, count, torch.device("cpu"))
        once = Membership(None, "own", cues, limits, alone, reaches, gaps)
        z = gate_scores(prompts[row], delta, scope=once, backend=backend)
        score = tol("score", torch.float32, reduction=n, scale=5.0)
        torch.testing.assert_close(torch.cat(parts), z, equal_nan=True, **score)
        assert torch.equal(state[row], alone[0])
    assert torch.equal(state[1], blank_state(1, count, torch.device("cpu"))[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_edits_that_wait_for_nothing_are_those_without_cues_bit_for_bit(backend, dtype, layout):
    x, mask, cu_seqlens, rows = make_tokens(layout, dtype, 37, 2)
    x.view(-1, 37)[5] = NAN
    x.view(-1, 37)[7] = INF
    delta = torch.randn(19, 7).to(dtype), torch.randn(7, 37).to(dtype)
    delta[1][2] = 0.0
    layer = torch.randn(19, 37).to(dtype), torch.randn(19).to(dtype)
    options = {"mask": mask, "cu_seqlens": cu_seqlens, "backend": backend}
    for alpha in (-INF, 0.0, 0.9):
        want = hooked_linear(x, *layer, delta, alpha, scope=Membership(None, "own"), **options)
        for state in (None, random_state(rows, 7)):
            scope = Membership(None, "own", torch.randn(7, 37), torch.full((7,), -INF), state)
            same(hooked_linear(x, *layer, delta, alpha, scope=scope, **options), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unarmed_edit_never_wins(backend):
    """Edit 1 fits every token far better; only the token at 2 is its cue."""
    x = torch.zeros(1, 5, 3)
    x[0, :, 0], x[0, 2, 1] = 1.0, 1.0
    at = torch.tensor([[1.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    v = torch.tensor([[2.0, 5.0]])
    cues = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    for limits, wanted in (
        ([-INF, 1.0], [2.0, 2.0, 5.0, 5.0, 5.0]),
        ([-INF, INF], [2.0] * 5),
        ([-INF, NAN], [2.0] * 5),
        ([-INF, -INF], [5.0] * 5),
        ([INF, 1.0], [0.0, 0.0, 5.0, 5.0, 5.0]),
        ([0.0, 1.0], [2.0, 2.0, 5.0, 5.0, 5.0]),
        ([INF, INF], [0.0] * 5),
    ):
        scope = Membership(None, "own", cues, torch.tensor(limits))
        for alpha in (0.5, -INF):
            y, z = hook_output(torch.zeros(1, 5, 1), x, (v, at), alpha, scope=scope)
            assert y.flatten().tolist() == wanted
            fit = {2.0: 1.0, 5.0: 9.0, 0.0: -INF}
            assert z.flatten().tolist() == [fit[value] for value in wanted]


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_neither_arms_nor_fires(backend):
    x = torch.ones(1, 4, 2)
    delta = torch.ones(1, 1), torch.ones(1, 2)
    state = blank_state(1, 1, x.device)
    scope = Membership(None, "own", torch.ones(1, 2), torch.tensor([1.0]), state)
    mask = torch.tensor([[False, False, True, False]])
    y, z = hook_output(torch.zeros(1, 4, 1), x, delta, 1.0, mask=mask, scope=scope, backend=backend)
    assert y.flatten().tolist() == [0.0, 0.0, 1.0, 0.0]
    same(z, torch.tensor([[NAN, NAN, 2.0, NAN]]))
    assert state.tolist() == [[4, 2, 0]]


@pytest.mark.parametrize("content", [NAN, INF, 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_garbage_under_the_mask_changes_nothing(backend, content):
    x, mask, _, _ = make_tokens("gaps", torch.float32, 37, 3)
    delta, cues, limits = make_edits(x, 19, 7, x.dtype)
    scope = Membership(None, "own", cues, limits)
    base = torch.randn(*x.shape[:-1], 19)
    want = hook_output(base, x, delta, 0.4, mask=mask, scope=scope, backend=backend)
    dirty = torch.where(mask[..., None], x, content)
    got = hook_output(base, dirty, delta, 0.4, mask=mask, scope=scope, backend=backend)
    bounds = tol("output", torch.float32, reduction=37, scale=float(want[0].abs().max()))
    torch.testing.assert_close(got, want, equal_nan=True, **bounds)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_is_not_a_number_arms_nothing_and_stays_alone(backend):
    x = torch.zeros(1, 4, 3)
    x[0, :, 0], x[0, 2, 1] = 1.0, 1.0
    dirty = x.clone()
    dirty[0, 1] = NAN
    delta = torch.ones(2, 2), torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    cues = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    for limits, wanted in (
        ([1.0, INF], [-INF, -INF, 1.0, 1.0]),  # nothing is armed at the NaN
        ([-INF, 1.0], [1.0, NAN, 2.0, 2.0]),
    ):
        scope = Membership(None, "own", cues, torch.tensor(limits))
        y, z = hook_output(torch.zeros(1, 4, 2), dirty, delta, 0.5, scope=scope, backend=backend)
        same(z, torch.tensor([wanted]))
        assert y[0, 1].tolist() == [0.0, 0.0]
        assert torch.equal(y[0, 2:], torch.ones(2, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_reached_is_decided_in_the_compute_dtype(backend):
    """1 + 2^-40 reaches the limit 1 + 2^-41 in float64; in float32 both are 1, which reaches 1."""
    cues, delta = torch.ones(1, 1), (torch.ones(1, 1), torch.ones(1, 1))
    x = torch.tensor([[1.0], [1 + 2.0**-40]], dtype=torch.float64)
    scope = Membership(None, "own", cues, torch.tensor([1 + 2.0**-41], dtype=torch.float64))
    z = gate_scores(x, delta, scope=scope, backend=backend)
    assert z.tolist() == [-INF, 1.0]
    z = gate_scores(x.float(), delta, scope=scope, backend=backend)
    assert z.tolist() == [1.0, 1.0]
    # A sum that 16-bit numbers cannot hold.
    x = torch.ones(1, 257)
    scope = Membership(None, "own", torch.ones(1, 257), torch.tensor([257.0]))
    for dtype in (torch.bfloat16, torch.float16):
        z = gate_scores(x.to(dtype), (delta[0], torch.ones(1, 257)), scope=scope, backend=backend)
        assert z.tolist() == [257.0]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (4, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_tiny_inputs(backend, shape):
    x = torch.randn(*shape, 11)
    for count in (0, 3):
        state = blank_state(shape[0], count, x.device)
        delta = torch.randn(5, count), torch.randn(count, 11)
        scope = Membership(None, "own", torch.randn(count, 11), torch.zeros(count), state)
        layer = torch.randn(5, 11), torch.randn(5)
        _, after = arming(x, None, None, scope)
        y, z = hooked_linear(x, *layer, delta, -1e9, scope=scope, backend=backend)
        assert y.shape == (*shape, 5) and z.shape == shape
        assert torch.equal(state, after)
        if not count:
            assert z.isnan().all() and torch.equal(y, F.linear(x, *layer))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_without_tokens(backend):
    state = random_state(2, 3)
    before = state.clone()
    scope = Membership(None, "own", torch.randn(3, 11), torch.zeros(3), state)
    delta = torch.randn(5, 3), torch.randn(3, 11)
    cu_seqlens = torch.zeros(3, dtype=torch.int32)
    z = gate_scores(torch.empty(0, 11), delta, cu_seqlens=cu_seqlens, scope=scope, backend=backend)
    assert z.shape == (0,) and torch.equal(state, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_plain_formula(backend, dtype):
    x = torch.randn(3, 8, 13, dtype=dtype)
    weight, bias = torch.randn(19, 13, dtype=dtype), torch.randn(19, dtype=dtype)
    delta, cues, limits = make_edits(x, 19, 6, dtype)
    x[:, 0] /= 1000  # so that at some tokens nothing is armed
    limits[::4] = INF
    scope = Membership(None, "own", cues, limits)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y, z = hooked_linear(*leaves, delta, 0.3, scope=scope, backend=backend)
    assert not z.requires_grad
    with torch.no_grad():
        same(hooked_linear(x, weight, bias, delta, 0.3, scope=scope, backend=backend), (y, z))
    taken = z >= 0.3
    assert taken.any() and z.isneginf().any()
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, cotangent)
    plain = [t.clone().requires_grad_() for t in (x, weight, bias)]
    # The winner's column has the weight 1, whatever x is: nothing of the hook is differentiated.
    wanted = torch.autograd.grad(F.linear(*plain), plain, cotangent)
    bounds = tol("output", dtype, reduction=24 * 19, scale=100.0)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, **bounds)
    base = F.linear(x, weight, bias).requires_grad_()
    y, _ = hook_output(base, x, delta, -INF, scope=scope, backend=backend)
    (got,) = torch.autograd.grad(y, base, cotangent)
    assert torch.equal(got, cotangent)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_update_the_state_once(backend):
    x = torch.randn(3, 8, 13)
    delta, cues, limits = make_edits(x, 19, 6, x.dtype)
    weight = torch.randn(19, 13)
    states = []
    for learns in (False, True):
        states.append(blank_state(3, 6, x.device))
        scope = Membership(None, "own", cues, limits, states[-1])
        hooked_linear(
            x.clone().requires_grad_(learns), weight, None, delta, 0.3, scope=scope, backend=backend
        )
    assert torch.equal(*states)
    assert (states[0][:, 0] == 8).all()


def test_compiled_gradient():
    torch._dynamo.reset()
    x = torch.randn(3, 8, 13)
    delta, cues, limits = make_edits(x, 19, 6, x.dtype)
    weight = torch.randn(19, 13)

    def loss(x, state):
        scope = Membership(None, "own", cues, limits, state)
        return hooked_linear(x, weight, None, delta, 0.3, scope=scope)[0].square().sum()

    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf, state = x.clone().requires_grad_(), blank_state(3, 6, x.device)
        run(leaf, state).backward()
        found.append((leaf.grad, state))
    (want, want_state), (got, got_state) = found
    bounds = tol("output", torch.float32, reduction=19, scale=float(want.abs().max()))
    torch.testing.assert_close(got, want, **bounds)
    assert torch.equal(got_state, want_state) and (firsts(got_state) != NEVER).any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_modes(backend, mode):
    x = torch.randn(3, 8, 13)
    delta, cues, limits = make_edits(x, 19, 6, x.dtype)
    weight, bias = torch.randn(19, 13), torch.randn(19)
    want_state, state = blank_state(3, 6, x.device), blank_state(3, 6, x.device)
    scope = Membership(None, "own", cues, limits, want_state)
    want = hooked_linear(x, weight, bias, delta, 0.3, scope=scope, backend=backend)
    with mode():
        weight = torch.nn.Parameter(weight)
        scope = Membership(None, "own", cues, limits, state)
        got = hooked_linear(x, weight, bias, delta, 0.3, scope=scope, backend=backend)
    same(got, want)
    assert torch.equal(state, want_state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_lowers_neither_the_gate_nor_the_cues(backend):
    x = torch.randn(3, 9, 37)
    delta, cues, limits = make_edits(x, 19, 7, x.dtype)
    weight, bias = torch.randn(19, 37), torch.randn(19)
    scope = Membership(None, "own", cues, limits)
    z_plain = gate_scores(x, delta, scope=scope, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = hooked_linear(x, weight, bias, delta, 0.4, scope=scope, backend=backend)
        frozen = F.linear(x, weight, bias)
    assert y.dtype == frozen.dtype == torch.bfloat16
    assert torch.equal(z, z_plain)
    assert torch.equal(y[z < 0.4], frozen[z < 0.4]) and (z >= 0.4).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_any_stride(backend):
    x, cues, at = torch.randn(3, 9, 46), torch.randn(14, 46), torch.randn(7, 46)
    limits, v = torch.randn(14), torch.randn(38, 7)
    base = torch.randn(3, 9, 38)
    args = (base[..., ::2], x[..., ::2], (v[::2], at[:, ::2]), 0.4)
    scope = Membership(None, "own", cues[::2, ::2], limits[::2])
    got = hook_output(*args, scope=scope, backend=backend)
    dense = [t.contiguous() for t in (*args[:2], *args[2], scope.cues, scope.limits)]
    scope = Membership(None, "own", *dense[4:])
    want = hook_output(dense[0], dense[1], tuple(dense[2:4]), 0.4, scope=scope, backend=backend)
    bounds = tol("output", torch.float32, reduction=23, scale=10.0)
    torch.testing.assert_close(got, want, **bounds)


def test_a_decision_does_not_depend_on_padding_or_batch():
    n, count = 37, 7
    prompts = [torch.randn(length, n) for length in (3, 9, 1, 14)]
    delta, cues, limits = make_edits(torch.cat(prompts), 19, count, torch.float32)
    scope = Membership(None, "own", cues, limits)
    x, mask = torch.randn(4, 16, n), torch.zeros(4, 16, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        start = 16 - len(prompt) if row % 2 else 16 - len(prompt) - 1
        x[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = True
    for backend in BACKENDS:
        z = gate_scores(x, delta, mask=mask, scope=scope, backend=backend)
        for row, prompt in enumerate(prompts):
            alone = gate_scores(prompt, delta, scope=scope, backend=backend)
            score = tol("score", torch.float32, reduction=n, scale=5.0)
            torch.testing.assert_close(z[row][mask[row]], alone, **score)


def test_the_decoding_kernels_take_cues_stored_like_the_edits():
    x = torch.randn(1, 1, 8)
    delta = torch.randn(4, 600), torch.randn(600, 8)
    cues = torch.randn(600, 8)
    for own, wanted in ((Membership(None, "own"), True), (Membership(), False)):
        assert decode.takes(x, delta, None, own, x.dtype) == wanted
    for dtype, wanted in ((torch.float32, True), (torch.float64, False), (torch.bfloat16, False)):
        cued = Membership(None, "own", cues.to(dtype), torch.zeros(600))
        assert decode.takes(x, delta, None, cued, x.dtype) == wanted
