"""The whole CUDA path of hooked_linear except the GPU.

bindings.cpp and gate.cu are built for the host into a real extension module, and cuda.py calls it
with CPU tensors: pointers, strides, layouts and exceptions are the ones a GPU build gets.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from coachhook.ops import _backends
from coachhook.ops.hooked_linear import (
    Membership,
    Population,
    Prefix,
    Scope,
    Sequence,
    Ungated,
    cuda,
    reference,
)
from coachhook.ops.hooked_linear.cues import NEVER, blank_state


@pytest.fixture
def native(extension: ModuleType, monkeypatch: pytest.MonkeyPatch, nan_filled_memory: None) -> None:
    monkeypatch.setattr(_backends, "native", lambda: extension)


# More tokens than decode.py takes.
B, T, N_IN, M_OUT, RANK = 3, 24, 16, 12, 7


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    x = torch.randn(B, T, N_IN)
    x[:, ::6] *= 6
    q = torch.linalg.qr(torch.randn(M_OUT, RANK))[0]
    return torch.randn(B, T, M_OUT).to(dtype), x.to(dtype), (q, torch.randn(RANK, N_IN))


def cues() -> tuple[Tensor, Tensor]:
    rows = torch.randn(RANK, N_IN, generator=torch.Generator().manual_seed(1))
    return rows, torch.tensor([-9.0, 3.0, 6.0, 9.0, -torch.inf, torch.inf, torch.nan])


def seen() -> Tensor:
    """As after 30 tokens, one cue seen in each sequence."""
    state = blank_state(B, RANK, torch.device("cpu"))
    state[:, 0], state[:, 6] = 30, torch.tensor([7, 0, 29])
    return state


def seen_apart() -> Tensor:
    """The same of cues that two tokens make; of one cue only the first token was seen."""
    state = seen()
    state[:, 6] = torch.tensor([7, NEVER, 29])
    state[:, 1 + RANK + 5] = torch.tensor([1 << 22 | 1 << 29, 1 << 29, 1 | 1 << 7])
    state[:, 1 + RANK + 1] = 1
    return state


def reaches_and_gaps() -> tuple[Tensor, Tensor]:
    """Of edits that wait for two tokens, for one, and for one since both reach too far."""
    reaches = torch.tensor([3, 5, 60, 40, 3, 33, 4], dtype=torch.int32)
    return reaches, torch.tensor([12, 1, 3, -1, 2, 7, 0], dtype=torch.int32)


def scopes() -> dict[str, Scope]:
    groups = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    return {
        "sequence": Sequence(),
        "sequence_state64": Sequence(torch.zeros(B, 3, dtype=torch.float64)),
        "sequence_state32": Sequence(torch.zeros(B, 3)),
        "prefix": Prefix(torch.tensor([[4.0, 3.0, 2.0]] * B, dtype=torch.float64)),
        "population": Population(9.0, 4.0),
        "population_rows": Population(
            torch.tensor([5.0, 9.0, 20.0]), torch.tensor([2.0, 3.0, 0.0])
        ),
        "membership": Membership(),
        "membership_groups": Membership(groups),
        "membership_own": Membership(groups, "own"),
        "membership_cues": Membership(None, "own", *cues()),
        "membership_cues_state": Membership(None, "own", *cues(), seen()),
        "membership_cues_apart": Membership(
            None, "own", *cues(), seen_apart(), *reaches_and_gaps()
        ),
        "ungated": Ungated(),
    }


def state_of(scope: Scope) -> Tensor | None:
    return getattr(scope, "state", None)


def compare(y: Tensor, z: Tensor, want_y: Tensor, want_z: Tensor, dtype: torch.dtype) -> None:
    # z: both round the same norms in float32, summed in another order.
    torch.testing.assert_close(z, want_z, rtol=1e-5, atol=1e-5, equal_nan=True)
    # y: the correction is summed in float32 and rounded once to the dtype of the model.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, want_y, rtol=2 * eps, atol=4e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(scopes()))
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_reference(native: None, dtype: torch.dtype, name: str, masked: bool) -> None:
    base, x, delta = problem(dtype)
    mask = (torch.arange(T) > torch.tensor([[-1], [4], [11]])) if masked else None
    ours, theirs = scopes()[name], scopes()[name]
    want_y, want_z = reference.hook_output(base, x, delta, 1.2, mask, None, theirs)
    y, z = cuda.hook_output(base, x, delta, 1.2, mask, None, ours)
    compare(y, z, want_y, want_z, dtype)
    assert not torch.equal(want_y, base)
    state = state_of(ours)
    if state is not None:
        torch.testing.assert_close(state, state_of(theirs), rtol=1e-5, atol=1e-5)
    again = cuda.gate_scores(x, delta, mask, None, scopes()[name])
    torch.testing.assert_close(again, z, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_packed_rows(native: None, integer: torch.dtype) -> None:
    base, x, delta = problem(torch.float32)
    base, x = base.view(-1, M_OUT), x.view(-1, N_IN)
    edges = torch.tensor([0, 13, 13, 55], dtype=integer)
    for scope in (Sequence(torch.zeros(3, 3)), Membership(), Membership(None, "own", *cues())):
        want = reference.hook_output(base, x, delta, 1.0, None, edges, scope)
        got = cuda.hook_output(base, x, delta, 1.0, None, edges, scope)
        compare(*got, *want, torch.float32)
        assert got[1][55:].isnan().all()


def test_dense_delta_and_tensor_alpha(native: None) -> None:
    base, x, (q, s) = problem(torch.float32)
    alpha = torch.tensor(1.2, dtype=torch.float64)
    want = reference.hook_output(base, x, q @ s, 1.2, None, None, Sequence())
    compare(*cuda.hook_output(base, x, q @ s, alpha, None, None, Sequence()), *want, torch.float32)


def test_output_is_fresh_unless_owned(native: None) -> None:
    base, x, delta = problem(torch.float32)
    before = base.clone()
    y, _ = cuda.hook_output(base, x, delta, 1.2, None, None, Sequence())
    assert torch.equal(base, before) and y.data_ptr() != base.data_ptr()
    owned, _ = cuda.hook_output(base, x, delta, 1.2, None, None, Sequence(), owned=True)
    assert owned.data_ptr() == base.data_ptr() and torch.equal(owned, y)


def test_strided_input_and_output(native: None) -> None:
    base, x, delta = problem(torch.float32)
    wide = torch.randn(B, T, 2 * M_OUT)
    wide[..., ::2] = base
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    want = reference.hook_output(base, x, delta, 1.2, None, None, Sequence())
    got = cuda.hook_output(wide[..., ::2], strided, delta, 1.2, None, None, Sequence(), owned=True)
    compare(*got, *want, torch.float32)


def test_gradients_are_the_references(native: None) -> None:
    base, x, delta = problem(torch.float32)
    gradients = []
    for implementation in (reference, cuda):
        leaves = [t.clone().requires_grad_() for t in (base, x)]
        y, _ = implementation.hook_output(*leaves, delta, 1.2, None, None, Sequence())
        gradients.append(torch.autograd.grad(y.square().sum(), leaves))
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("scope", [Sequence(), Membership()])
def test_empty_hook_never_fires(native: None, scope: Scope) -> None:
    base, x, _ = problem(torch.float32)
    empty = (torch.empty(M_OUT, 0), torch.empty(0, N_IN))
    y, z = cuda.hook_output(base, x, empty, 0.0, None, None, scope)
    assert torch.equal(y, base) and z.isnan().all()


def test_single_token(native: None) -> None:
    base, x, delta = problem(torch.float32)
    y, z = cuda.hook_output(base[:, :1], x[:, :1], delta, 0.0, None, None, Sequence())
    assert torch.equal(y, base[:, :1]) and z.isnan().all()


@pytest.mark.parametrize("tokens", [1, T])
def test_edits_that_wait_for_nothing_are_those_without_cues(native: None, tokens: int) -> None:
    base, x, delta = problem(torch.float32)
    base, x = base[:, :tokens], x[:, :tokens].contiguous()
    always = Membership(None, "own", cues()[0], torch.full((RANK,), -torch.inf))
    want = reference.hook_output(base, x, delta, 1.2, None, None, Membership(None, "own"))
    compare(*cuda.hook_output(base, x, delta, 1.2, None, None, always), *want, torch.float32)
    want = cuda.gate_scores(x, delta, None, None, always)
    assert torch.equal(cuda.hook_output(base, x, delta, 1.2, None, None, always)[1], want)


def test_nothing_armed_fires_nothing(native: None) -> None:
    base, x, delta = problem(torch.float32)
    never = Membership(None, "own", cues()[0], torch.full((RANK,), torch.inf))
    y, z = cuda.hook_output(base, x, delta, -torch.inf, None, None, never)
    assert torch.equal(y, base) and z.isneginf().all()


@pytest.mark.parametrize("prompt", [20, T - 2])  # the first of them is short enough to decode
@pytest.mark.parametrize("apart", [False, True])
def test_decoding_with_cues_goes_on_where_the_prompt_ended(
    native: None, apart: bool, prompt: int
) -> None:
    base, x, delta = problem(torch.float32)
    asked = reaches_and_gaps() if apart else ()
    want_state, state = (seen_apart() if apart else seen() for _ in range(2))
    scope = Membership(None, "own", *cues(), want_state, *asked)
    want = reference.hook_output(base, x, delta, 1.2, None, None, scope)
    parts = [(0, prompt), *((t, t + 1) for t in range(prompt, T))]
    scope = Membership(None, "own", *cues(), state, *asked)
    got = [
        cuda.hook_output(base[:, a:b], x[:, a:b], delta, 1.2, None, None, scope) for a, b in parts
    ]
    y, z = (torch.cat(pieces, 1) for pieces in zip(*got, strict=True))
    compare(y, z, *want, torch.float32)
    assert torch.equal(state, want_state)


def test_bad_arguments_raise_value_errors(extension: ModuleType) -> None:
    numbers = dict.fromkeys(("rows", "out_features", "y_row_stride", "rank"), 4)
    pointers = dict.fromkeys(("y", "q", "s", "fired", "q_row_stride", "s_row_stride"), 0)
    with pytest.raises(ValueError, match=r"add_correction: y, q, s and fired must be non-null"):
        extension.add_correction(
            dtype=extension.DType.float32, device=0, stream=0, **numbers, **pointers
        )


def test_without_the_extension_the_error_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from coachhook.errors import BackendUnavailableError

    monkeypatch.setattr(_backends, "native", lambda: None)
    monkeypatch.setattr(_backends, "native_error", lambda: "it is not built")
    base, x, delta = problem(torch.float32)
    with pytest.raises(BackendUnavailableError, match="hooked_linear: it is not built"):
        cuda.hook_output(base, x, delta, 1.2, None, None, Sequence())
