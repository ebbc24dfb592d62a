"""Statistics that outlive a call: running, kept, and reused for decoding."""

from __future__ import annotations

import pytest
import torch

from coachhook.ops import (
    Population,
    Prefix,
    Sequence,
    available_backends,
    gate_scores,
    hooked_linear,
)
from tests.ops.gate_oracle import oracle, sequences
from tests.tolerances import tol

BACKENDS = [name for name, (able, _) in available_backends("hooked_linear", "cpu").items() if able]
M, N, RANK = 29, 23, 5


@pytest.fixture
def layer():
    q = torch.linalg.qr(torch.randn(M, RANK))[0]
    return torch.randn(M, N), torch.randn(M), (q, torch.randn(RANK, N) / N**0.5)


def expected_state(x, delta, mask=None, cu_seqlens=None):
    """(count, mean, M2) of the norms of each sequence's real tokens, float64."""
    norms = (x.reshape(-1, N).double() @ delta[1].double().T).norm(dim=-1)
    rows = []
    for real in sequences(x, mask, cu_seqlens):
        sample = norms[real]
        mean = sample.mean() if len(real) else torch.tensor(0.0, dtype=torch.float64)
        rows.append([len(real), float(mean), float((sample - mean).square().sum())])
    return torch.tensor(rows, dtype=torch.float64)


def close(actual, expected):
    bounds = tol("statistic", torch.float32, reduction=N, scale=float(expected.abs().max()))
    torch.testing.assert_close(actual.double(), expected, **bounds)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scope", [Sequence, Prefix])
@pytest.mark.parametrize("backend", BACKENDS)
def test_state_after_one_call(layer, backend, scope, state_dtype):
    _, _, delta = layer
    x, mask = torch.randn(4, 9, N), torch.ones(4, 9, dtype=torch.bool)
    mask[1, :4], mask[2, 1:], mask[3] = False, False, False
    cu_seqlens = torch.tensor([0, 5, 5, 6, 30], dtype=torch.int32)
    for options, tokens in (
        ({}, x),
        ({"mask": mask}, x),
        ({"cu_seqlens": cu_seqlens}, x.view(-1, N)),
        ({"cu_seqlens": cu_seqlens, "mask": mask.view(-1)}, x.view(-1, N)),
    ):
        wide = torch.zeros(4, 6, dtype=state_dtype)
        state = wide[:, ::2]  # strides of any kind
        gate_scores(tokens, delta, scope=scope(state), backend=backend, **options)
        close(state, expected_state(tokens, delta, **options))
        assert not wide[:, 1::2].any()


@pytest.mark.parametrize("cuts", [[1] * 17, [5, 0, 12], [16, 1], [3, 3, 3, 8]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_prefix_does_not_depend_on_chunks(layer, backend, cuts):
    weight, bias, delta = layer
    x = torch.randn(3, 17, N)
    whole = torch.zeros(3, 3)
    y, z = hooked_linear(x, weight, bias, delta, 1.0, scope=Prefix(whole), backend=backend)
    base = x.double() @ weight.double().T + bias.double()
    ratio = oracle(base, x, delta, 1.0, scope=Prefix()).ratio
    state, parts = torch.zeros(3, 3), []
    for chunk in x.split(cuts, dim=1):
        parts.append(
            hooked_linear(chunk, weight, bias, delta, 1.0, scope=Prefix(state), backend=backend)
        )
    score = tol("score", torch.float32, reduction=N, scale=ratio)
    output = tol("output", torch.float32, reduction=N, scale=float(y.abs().max()))
    torch.testing.assert_close(torch.cat([z for _, z in parts], dim=1), z, equal_nan=True, **score)
    torch.testing.assert_close(torch.cat([y for y, _ in parts], dim=1), y, **output)
    close(state, whole.double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefix_packed_chunks_continue_their_sequences(layer, backend):
    _, _, delta = layer
    lengths = [4, 0, 7]
    prompts = [torch.randn(length, N) for length in lengths]
    state = torch.zeros(3, 3)
    first = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    second = torch.tensor([0, 1, 1, 6], dtype=torch.int32)
    x1 = torch.cat([prompts[0][:3], prompts[2][:2]])
    x2 = torch.cat([prompts[0][3:], prompts[2][2:]])
    z1 = gate_scores(x1, delta, cu_seqlens=first, scope=Prefix(state), backend=backend)
    z2 = gate_scores(x2, delta, cu_seqlens=second, scope=Prefix(state), backend=backend)
    score = tol("score", torch.float32, reduction=N, scale=20.0)
    alone = [gate_scores(p, delta, scope=Prefix(), backend=backend) for p in prompts]
    torch.testing.assert_close(torch.cat([z1[:3], z2[:1]]), alone[0], equal_nan=True, **score)
    torch.testing.assert_close(torch.cat([z1[3:], z2[1:]]), alone[2], equal_nan=True, **score)
    assert not state[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_prompt_statistics_judge_decoded_tokens(layer, backend):
    _, _, delta = layer
    prompt, step = torch.randn(4, 12, N), torch.randn(4, 1, N)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[0, :11], mask[1, :5] = False, False
    state = torch.empty(4, 3)
    gate_scores(prompt, delta, mask=mask, scope=Sequence(state), backend=backend)
    kept = Population(state[:, 1], (state[:, 2] / (state[:, 0] - 1)).sqrt())
    z = gate_scores(step, delta, scope=kept, backend=backend)
    assert z[0].isnan()  # one real token in the prompt: no standard deviation
    norms = (prompt.double() @ delta[1].double().T).norm(dim=-1)
    for row in range(1, 4):
        sample = norms[row][mask[row]]
        here = (step[row].double() @ delta[1].double().T).norm(dim=-1)
        expected = (here - sample.mean()) / sample.std()
        score = tol("score", torch.float32, reduction=N, scale=float(sample.max() / sample.std()))
        torch.testing.assert_close(z[row].double(), expected, **score)


@pytest.mark.parametrize("offset", [1e2, 1e4])
@pytest.mark.parametrize("scope", [Sequence, Prefix])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_survive_a_large_mean(backend, scope, offset):
    """Norms with mean / std = offset: a sum of squares in float32 would keep no digit at 1e4."""
    norms = offset + torch.randn(2, 400, dtype=torch.float64)
    x = norms.float()[..., None]
    state = torch.zeros(2, 3)
    z = gate_scores(x, torch.ones(1, 1), scope=scope(state), backend=backend)
    exact = x[..., 0].double()
    # The norm of one number is exact, so only float64 statistics and one rounding remain.
    close_to = {"rtol": 1e-6, "atol": 1e-6}
    if scope is Sequence:
        expected = (exact - exact.mean(1, keepdim=True)) / exact.std(1, keepdim=True)
        torch.testing.assert_close(z.double(), expected, **close_to)
    else:
        last = (exact[:, -1] - exact.mean(1)) / exact.std(1)
        torch.testing.assert_close(z[:, -1].double(), last, **close_to)
    m2 = exact.var(1) * (exact.shape[1] - 1)
    torch.testing.assert_close(state[:, 2].double(), m2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefix_recovers_from_an_outlier_at_the_start(backend):
    """The first token of a prompt is often far off: the moments must not be shifted by it alone."""
    x = torch.cat([torch.full((1, 1), 1e5), 1 + 0.1 * torch.rand(300, 1)])
    z = gate_scores(x, torch.ones(1, 1), scope=Prefix(), backend=backend)
    sample = x[:, 0].double()
    expected = (sample[-1] - sample.mean()) / sample.std()
    torch.testing.assert_close(z[-1].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused_calls_leave_the_state(layer, backend):
    weight, bias, delta = layer
    state = torch.rand(2, 3)
    before = state.clone()
    with pytest.raises(ValueError, match="delta must be"):
        hooked_linear(
            torch.randn(2, 4, N), weight, bias, delta[0], 1.0, scope=Prefix(state), backend=backend
        )
    with pytest.raises(ValueError, match="scope.state must be"):
        gate_scores(torch.randn(3, 4, N), delta, scope=Prefix(state), backend=backend)
    assert torch.equal(state, before)
