"""hooked_linear, hook_output and gate_scores against float64, on every backend of this machine."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from coachhook.ops import (
    Membership,
    Population,
    Prefix,
    Sequence,
    Ungated,
    available_backends,
    gate_scores,
    hook_output,
    hooked_linear,
)
from tests.ops.gate_oracle import oracle, threshold
from tests.tolerances import tol

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BACKENDS = [name for name, (able, _) in available_backends("hooked_linear", "cpu").items() if able]
M, N, RANK = 53, 37, 7
LAYOUTS = ["batch", "left_padded", "right_padded", "packed", "packed_tail", "single"]
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
    "ungated": lambda rows: Ungated(),
}


def make_cues():
    """Cues of which some are seen at once, some later and some never."""
    generator = torch.Generator().manual_seed(1)
    cues = torch.randn(RANK, N, generator=generator) / math.sqrt(N)
    return cues, torch.tensor([-math.inf, 0.3, 0.9, 1.3, math.inf, -0.5, math.nan])


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_layout(name, dtype):
    """x, mask, cu_seqlens and the number of sequences."""
    if name in ("packed", "packed_tail"):
        lengths = [5, 0, 1, 12, 2, 0]
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        total = sum(lengths) + (3 if name == "packed_tail" else 0)
        return torch.randn(total, N).to(dtype), None, cu_seqlens, len(lengths)
    if name == "single":
        return torch.randn(17, N).to(dtype), None, None, 1
    rows, length = 4, 11
    mask = None
    if name != "batch":
        real = torch.tensor([11, 7, 1, 0])[:, None]
        position = torch.arange(length)
        mask = position >= length - real if name == "left_padded" else position < real
    return torch.randn(rows, length, N).to(dtype), mask, None, rows


def make_layer(dtype):
    weight = (torch.randn(M, N) / math.sqrt(N)).to(dtype)
    return weight, torch.randn(M).to(dtype)


def make_delta(storage, dtype):
    if storage == "dense":
        return (0.4 * torch.randn(M, RANK) @ torch.randn(RANK, N) / math.sqrt(N)).to(dtype)
    if storage == "factored":
        q = torch.linalg.qr(torch.randn(M, RANK, dtype=torch.float64))[0]
        return q.to(dtype), (torch.randn(RANK, N) / math.sqrt(N)).to(dtype)
    return torch.randn(M, RANK).to(dtype), (torch.randn(RANK, N) / math.sqrt(N)).to(dtype)


def check(backend, dtype, layer, x, delta, mask=None, cu_seqlens=None, scope=None):
    """All three ops against the oracle; returns what hooked_linear gave."""
    weight, bias = layer
    base = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    alpha = threshold(oracle(base, x, delta, math.inf, mask, cu_seqlens, scope).z)
    expected = oracle(base, x, delta, alpha, mask, cu_seqlens, scope)
    options = {"mask": mask, "cu_seqlens": cu_seqlens, "scope": scope, "backend": backend}

    y, z = hooked_linear(x, weight, bias, delta, alpha, **options)
    scale = float(expected.y.abs().max()) if expected.y.numel() else 1.0
    assert y.dtype == dtype
    assert z.dtype == torch.float32
    bounds = tol("output", dtype, reduction=N + M, scale=scale)
    torch.testing.assert_close(y.double(), expected.y, **bounds)
    score = tol("score", dtype, reduction=N + M, scale=expected.ratio)
    torch.testing.assert_close(z.double(), expected.z, equal_nan=True, **score)
    frozen = F.linear(x, weight, bias)
    unfired = ~expected.taken
    assert torch.equal(y[unfired], frozen[unfired])  # to the bit

    given = frozen.clone()
    y_hook, z_hook = hook_output(given, x, delta, alpha, **options)
    assert torch.equal(y_hook, y)
    assert torch.equal(given, frozen)
    torch.testing.assert_close(z_hook, z, rtol=0, atol=0, equal_nan=True)
    z_only = gate_scores(x, delta, mask=mask, cu_seqlens=cu_seqlens, scope=scope, backend=backend)
    torch.testing.assert_close(z_only, z, rtol=0, atol=0, equal_nan=True)
    return y, z, expected


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend, dtype, scope, layout):
    x, mask, cu_seqlens, rows = make_layout(layout, dtype)
    layer = make_layer(dtype)
    chosen = SCOPES[scope](rows)
    storages = ["pair"] if isinstance(chosen, Membership) else ["dense", "factored"]
    for storage in storages:
        delta = make_delta(storage, dtype)
        _, _, expected = check(backend, dtype, layer, x, delta, mask, cu_seqlens, chosen)
        assert expected.taken.any()


@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_delta_stored_wider_than_the_model(backend, dtype, delta_dtype):
    x = torch.randn(3, 9, N).to(dtype)
    for storage in ("dense", "factored"):
        check(backend, dtype, make_layer(dtype), x, make_delta(storage, delta_dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    wide = torch.randn(5, 13, 2 * N)
    weight, bias = torch.randn(M, 2 * N)[:, ::2], torch.randn(2 * M)[::2]
    q, s = make_delta("factored", torch.float32)
    q_wide, s_wide = torch.full((M, 2 * RANK), 9.0), torch.full((2 * RANK, N + 3), 9.0)
    q_wide[:, :RANK], s_wide[:RANK, :N] = q, s
    delta = (q_wide[:, :RANK], s_wide[:RANK, :N])
    for x in (wide[..., ::2], wide[..., :N], wide[::2, 1::3, N:], wide.transpose(0, 1)[..., :N]):
        check(backend, torch.float32, (weight[:, :N], bias), x, delta)
    base = torch.randn(5, 13, 2 * M)[..., ::2]
    x = wide[..., :N]
    expected = hook_output(base.contiguous(), x.contiguous(), (q, s), 1.0, backend=backend)
    actual = hook_output(base, x, delta, 1.0, backend=backend)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias(backend, bias):
    weight, b = make_layer(torch.float32)
    x = torch.randn(2, 9, N)
    check(backend, torch.float32, (weight, b if bias else None), x, make_delta("dense", x.dtype))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (4, 1), (1, 2)])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_tiny_inputs(backend, scope, shape):
    x = torch.randn(*shape, N)
    chosen = SCOPES[scope](shape[0])
    storage = "pair" if isinstance(chosen, Membership) else "factored"
    delta = make_delta(storage, torch.float32)
    y, z, _ = check(backend, torch.float32, make_layer(torch.float32), x, delta, scope=chosen)
    assert y.shape == (*shape, M)
    assert z.shape == shape
    if shape[1] == 1 and scope in ("sequence", "prefix"):
        assert z.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_without_tokens(backend):
    weight, bias = make_layer(torch.float32)
    cu_seqlens = torch.zeros(3, dtype=torch.int32)
    for scope in (Sequence(torch.ones(2, 3)), Prefix(torch.ones(2, 3)), Population(0.0, 1.0)):
        delta = make_delta("dense", torch.float32)
        y, z = hooked_linear(
            torch.empty(0, N),
            weight,
            bias,
            delta,
            1.0,
            cu_seqlens=cu_seqlens,
            scope=scope,
            backend=backend,
        )
        assert y.shape == (0, M)
        assert z.shape == (0,)


@pytest.mark.parametrize("storage", ["dense", "factored", "pair"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_hook_never_changes_anything(backend, storage):
    weight, bias = make_layer(torch.float32)
    x = torch.randn(2, 9, N)
    delta = torch.zeros(M, N)
    if storage != "dense":
        delta = (torch.zeros(M, 0), torch.zeros(0, N))
    scopes = [Membership(), Membership(correction="own"), Membership(torch.empty(0).long())]
    for scope in scopes if storage == "pair" else [Sequence(), Prefix()]:
        y, z = hooked_linear(x, weight, bias, delta, -100.0, scope=scope, backend=backend)
        assert torch.equal(y, F.linear(x, weight, bias))
        assert z.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_norms_have_no_score(backend, dtype):
    x = torch.randn(N).to(dtype).expand(3, 8, N) * torch.tensor([1.0, -1.0]).repeat(4)[:, None]
    x = x.to(dtype)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 5:] = False
    for scope in (Sequence(), Prefix()):
        for real in (None, mask):
            delta = make_delta("factored", dtype)
            z = gate_scores(x, delta, mask=real, scope=scope, backend=backend)
            assert z.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_equal_up_to_rounding_have_no_score(backend):
    direction = torch.randn(N)
    wobble = 1 + torch.randint(-1, 2, (2, 16, 1)) * torch.finfo(torch.float32).eps
    for scope in (Sequence(), Prefix(), Population(1.0, 1e-9)):
        delta = make_delta("dense", torch.float32)
        assert gate_scores(direction * wobble, delta, scope=scope, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_fire_and_one_ulp_above_does_not(backend):
    """Norms (0, 0, 0, 1) have z of exactly (T - 1) / sqrt(T) = 1.5 (Grubbs' bound)."""
    x = torch.zeros(1, 4, 3)
    x[0, 3, 0] = 1.0
    weight, delta = torch.zeros(2, 3), torch.eye(2, 3)
    y, z = hooked_linear(x, weight, None, delta, 1.5, backend=backend)
    assert z[0, 3] == 1.5
    assert y[0, 3, 0] == 1.0
    above = math.nextafter(1.5, 2.0)
    y, _ = hooked_linear(x, weight, None, delta, above, backend=backend)
    assert y[0, 3, 0] == 1.0  # compared in float32, where the two are one number
    above = float(torch.nextafter(torch.tensor(1.5), torch.tensor(2.0)))
    assert not hooked_linear(x, weight, None, delta, above, backend=backend)[0].any()
    assert not hooked_linear(x, weight, None, delta, math.nan, backend=backend)[0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_as_tensor(backend, dtype):
    weight, bias = make_layer(dtype)
    x, delta = torch.randn(3, 9, N).to(dtype), make_delta("factored", dtype)
    expected = hooked_linear(x, weight, bias, delta, 1.25, backend=backend)
    for alpha_dtype in DTYPES:
        alpha = torch.tensor(1.25, dtype=alpha_dtype)
        actual = hooked_linear(x, weight, bias, delta, alpha, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_token_stays_in_its_sequence(backend):
    weight, bias = make_layer(torch.float32)
    delta = make_delta("factored", torch.float32)
    clean = torch.randn(3, 9, N)
    dirty = clean.clone()
    dirty[1, 4] = math.nan
    cu_seqlens = torch.tensor([0, 9, 18, 27], dtype=torch.int32)
    for scope in (Sequence(), Prefix(), Population(1.0, 1.0)):
        y, z = hooked_linear(clean, weight, bias, delta, 1.0, scope=scope, backend=backend)
        y_dirty, z_dirty = hooked_linear(
            dirty, weight, bias, delta, 1.0, scope=scope, backend=backend
        )
        assert z_dirty[1, 4].isnan()
        close = tol("output", torch.float32, reduction=N, scale=float(y.abs().max()))
        for row in (0, 2):
            torch.testing.assert_close(y_dirty[row], y[row], **close)
            torch.testing.assert_close(z_dirty[row], z[row], rtol=0, atol=0, equal_nan=True)
        z_packed = gate_scores(
            dirty.view(-1, N), delta, cu_seqlens=cu_seqlens, scope=scope, backend=backend
        )
        close = tol("score", torch.float32, reduction=N, scale=5.0)
        torch.testing.assert_close(z_packed.view(3, 9), z_dirty, equal_nan=True, **close)


@pytest.mark.parametrize("scope", [Sequence(), Prefix()], ids=["sequence", "prefix"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_garbage_under_the_mask_changes_nothing(backend, scope):
    weight, bias = make_layer(torch.float32)
    delta = make_delta("factored", torch.float32)
    x, mask, _, _ = make_layout("left_padded", torch.float32)
    garbage = torch.where(mask[..., None], x, math.nan)
    y, z = hooked_linear(x, weight, bias, delta, 1.0, mask=mask, scope=scope, backend=backend)
    y_nan, z_nan = hooked_linear(
        garbage, weight, bias, delta, 1.0, mask=mask, scope=scope, backend=backend
    )
    assert torch.equal(y_nan[mask], y[mask])
    assert torch.equal(z_nan.nan_to_num(), z.nan_to_num())
    assert z[~mask].isnan().all()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decisions_do_not_depend_on_padding_or_batch(backend, scope):
    lengths, width = [3, 9, 1, 14], 16
    prompts = [torch.randn(length, N) for length in lengths]
    weight, bias = make_layer(torch.float32)
    chosen = SCOPES[scope](len(prompts))
    storage = "pair" if isinstance(chosen, Membership) else "factored"
    delta = make_delta(storage, torch.float32)
    x, mask = torch.zeros(4, width, N), torch.zeros(4, width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        start = 2 if row % 2 else width - len(prompt)
        x[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = True
    alpha = threshold(gate_scores(x, delta, mask=mask, scope=chosen))
    y, z = hooked_linear(x, weight, bias, delta, alpha, mask=mask, scope=chosen, backend=backend)
    for row, prompt in enumerate(prompts):
        alone = chosen
        if scope == "population_rows":
            alone = Population(chosen.mean[row], chosen.std[row])
        y_alone, z_alone = hooked_linear(
            prompt, weight, bias, delta, alpha, scope=alone, backend=backend
        )
        close = tol("score", torch.float32, reduction=N, scale=5.0)
        torch.testing.assert_close(z[row][mask[row]], z_alone, equal_nan=True, **close)
        assert torch.equal(z[row][mask[row]] >= alpha, z_alone >= alpha)
        close = tol("output", torch.float32, reduction=N, scale=float(y_alone.abs().max()))
        torch.testing.assert_close(y[row][mask[row]], y_alone, **close)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_bits_on_repeat(backend, scope):
    x, mask, cu_seqlens, rows = make_layout("packed", torch.float32)
    weight, bias = make_layer(torch.float32)
    chosen = SCOPES[scope](rows)
    delta = make_delta("pair" if isinstance(chosen, Membership) else "dense", torch.float32)
    runs = [
        hooked_linear(
            x, weight, bias, delta, 0.5, cu_seqlens=cu_seqlens, scope=chosen, backend=backend
        )
        for _ in range(3)
    ]
    for y, z in runs[1:]:
        assert torch.equal(y, runs[0][0])
        assert torch.equal(z.nan_to_num(), runs[0][1].nan_to_num())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_modes(backend, mode):
    weight, bias = make_layer(torch.float32)
    delta = make_delta("factored", torch.float32)
    state = torch.zeros(2, 3)
    x = torch.randn(2, 9, N)
    expected = hooked_linear(x, weight, bias, delta, 1.0, scope=Prefix(torch.zeros(2, 3)))
    with mode():
        weight = torch.nn.Parameter(weight)
        actual = hooked_linear(x, weight, bias, delta, 1.0, scope=Prefix(state), backend=backend)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    assert (state[:, 0] == 9).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_lowers_the_linear_layer_but_not_the_gate(backend):
    weight, bias = make_layer(torch.float32)
    x, delta = torch.randn(3, 9, N), make_delta("factored", torch.float32)
    z_plain = gate_scores(x, delta, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = hooked_linear(x, weight, bias, delta, 1.0, backend=backend)
        frozen = F.linear(x, weight, bias)
    assert y.dtype == frozen.dtype == torch.bfloat16
    assert torch.equal(z, z_plain)
    assert torch.equal(y[z < 1.0], frozen[z < 1.0])
