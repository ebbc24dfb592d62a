"""The Triton kernels of cues in the interpreter; ``test_hooked_linear_triton.py`` runs them.

Scores are whole numbers, whose sums are exact, so that everything is compared bit for bit.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from coachhook.ops import Membership
from coachhook.ops.hooked_linear import cues as reference
from coachhook.ops.hooked_linear import triton_cues
from coachhook.ops.hooked_linear.cues import armed_edits, blank_state
from coachhook.ops.hooked_linear.gate import Tokens
from tests.ops.interpreter import language_patched_once

EDITS = 11
FORMS = ["ever", "one", "two"]
# Of one chunk, of two, and of more than are read together; and which layouts of them for each form.
LENGTHS = [1, 32, 33, 150]
EVERY, MASKED = slice(None), slice(2, None, 2)


@pytest.fixture(autouse=True)
def _nan_filled(nan_filled_memory):
    pass


@pytest.fixture(autouse=True, scope="module")
def _cheaper_launches():
    with language_patched_once():
        yield


def scores(splits: int, tokens: int, edits: int) -> Tensor:
    """Parts of scores, few of which reach 3, in rows longer than they are many."""
    parts = torch.full((splits, tokens, edits + 5), math.nan)
    parts[..., :edits] = torch.randint(-3, 2, (splits, tokens, edits)).float()
    parts[0, :, :edits] += 5 * (torch.rand(tokens, edits) < 0.06)
    return parts


def scope(form: str, edits: int, state: Tensor | None, reach: int = 75) -> Membership:
    """Edits of any reach and gap, in and out of range; the first two wait for nothing."""
    limits = torch.full((edits,), 3.0)
    limits[:2], limits[2] = -math.inf, math.inf
    reaches = gaps = None
    if form != "ever":
        reaches = torch.randint(-1, reach, (edits,), dtype=torch.int32)
        reaches[1], reaches[3] = 4, 2**31 - 1
    if form == "two":
        gaps = torch.randint(-1, 10, (edits,), dtype=torch.int32)
    return Membership(None, "own", torch.zeros(edits, 4), limits, state, reaches, gaps)


def layouts(length: int) -> list[tuple[int, Tensor | None, Tensor | None, int]]:
    """Sequences, mask and bounds of batches with rows as long as asked; and their tokens."""
    lengths = torch.randint(0, length + 1, (5,))
    lengths[1], lengths[3] = 0, length
    packed = torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32)
    total = int(packed[-1])
    return [
        (1, None, None, length),
        (3, None, None, 3 * length),
        (3, torch.rand(3, length) < 0.7, None, 3 * length),
        (5, None, packed, total),
        (5, torch.rand(total) < 0.7, packed.long(), total),
    ]


def both(
    part: Tensor,
    seen: Tensor,
    of: Membership,
    x: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Membership]:
    """What the kernels leave of the features, and what the reference does; and its scope.

    The kernels run on ``device``, to which they are given copies, and the state of ``of`` is
    theirs afterwards.
    """
    edits = len(of.limits)
    parts = replace(of, state=None if of.state is None else of.state.clone())
    layout = Tokens.of(x, mask, cu_seqlens)
    when = parts.limits, parts.state, parts.reaches, parts.gaps
    armed = armed_edits(seen[..., :edits].sum(0), layout, *when)
    want = part[..., :edits].sum(0).masked_fill(~armed, -math.inf)
    raw = None if mask is None else mask.reshape(-1).contiguous().view(torch.uint8)
    tensors = {f.name: getattr(of, f.name) for f in fields(of)}
    there = {k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)}
    given = [t if t is None else t.to(device) for t in (raw, cu_seqlens)]
    part = part.to(device)
    triton_cues.arm_(part, seen.to(device), replace(of, **there), layout.rows, x.shape[-2], *given)
    if of.state is not None:
        of.state.copy_(there["state"])
    return part[0, :, :edits].cpu(), want, parts


def check_features_and_states(
    length: int, form: str, device: str = "cpu", which: slice = EVERY
) -> None:
    """The same bits as the reference's, of one call and of another that goes on from it."""
    for rows, mask, packed, tokens in layouts(length)[which]:
        x = torch.empty(tokens, 4) if packed is not None else torch.empty(rows, length, 4)
        kept = blank_state(rows, EDITS, x.device)
        of = scope(form, EDITS, kept)
        for state, splits, more in ((kept, 1, 1), (kept, 2, 3), (None, 1, 2)):
            of = replace(of, state=state)
            part, seen = scores(splits, tokens, EDITS), scores(more, tokens, EDITS)
            got, want, other = both(part, seen, of, x, mask, packed, device)
            assert torch.equal(got, want)
            assert want.isneginf().any() or form == "ever" or length < 9
            assert state is None or torch.equal(state, other.state)


def check_many_sequences(device: str = "cpu", together: int = 128) -> None:
    """More packed ones than the kernels look at ``together``, most of them empty."""
    count = together + 22
    lengths = torch.zeros(count, dtype=torch.int64)
    lengths[torch.randint(0, count, (count // 5,))] = 3
    lengths[[together - 1, together, count - 1]] = 40
    packed = torch.tensor([0, *lengths.cumsum(0)])
    tokens = int(packed[-1])
    x = torch.empty(tokens, 4)
    of = scope("two", 5, blank_state(count, 5, x.device), reach=9)
    part, seen = scores(1, tokens, 5), scores(1, tokens, 5)
    got, want, other = both(part, seen, of, x, None, packed, device)
    assert torch.equal(got, want) and torch.equal(of.state, other.state)


def test_the_constants_are_those_of_the_reference() -> None:
    kernels = triton_cues._kernels()
    found = kernels._REGISTER, kernels._ALL, kernels._MOST_APART, kernels._NEVER
    wanted = reference.REGISTER, reference._ALL, reference.MOST_APART, reference.NEVER
    assert tuple(constant.value for constant in found) == wanted
    assert kernels._APART_BITS.value == (1 << reference.MOST_APART) - 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_features_and_states_are_those_of_the_reference(length, form) -> None:
    every = form == "two" and length == 33
    check_features_and_states(length, form, which=EVERY if every else MASKED)


def test_a_sequence_in_parts_is_the_whole_one() -> None:
    length, edits = 170, 40
    part, seen = scores(1, length, edits), scores(1, length, edits)
    for form in FORMS:
        whole, cut = (scope(form, edits, blank_state(1, edits, part.device)) for _ in range(2))
        cut = replace(cut, reaches=whole.reaches, gaps=whole.gaps)
        at_once, in_parts = part.clone(), part.clone()
        triton_cues.arm_(at_once, seen, whole, 1, length, None, None)
        for a, b in itertools.pairwise((0, 1, 2, 35, 36, 67, 170)):
            some = in_parts[:, a:b].clone()
            triton_cues.arm_(some, seen[:, a:b].clone(), cut, 1, b - a, None, None)
            in_parts[:, a:b] = some
        assert torch.equal(at_once[..., :edits], in_parts[..., :edits])
        assert torch.equal(whole.state, cut.state)


def test_more_sequences_than_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = triton_cues._kernels()
    monkeypatch.setattr(kernels, "_BS", type(kernels._BS)(16))  # programs are slow to interpret
    check_many_sequences(together=16)


def test_states_of_any_stride_and_limits_of_any_dtype() -> None:
    x = torch.empty(2, 40, 4)
    for dtype in (torch.float64, torch.bfloat16):
        wide = torch.zeros(2, 3 * (1 + 2 * EDITS), dtype=torch.int64)[:, ::3]
        wide.copy_(blank_state(2, EDITS, x.device))
        of = scope("two", EDITS, wide)
        limits = torch.stack([of.limits.to(dtype)] * 2, dim=1)[:, 0]
        of = replace(of, limits=limits)
        for length in (40, 7):
            part, seen = scores(1, 2 * length, EDITS), scores(1, 2 * length, EDITS)
            got, want, other = both(part, seen, of, x[:, :length], None, None)
            assert torch.equal(got, want) and torch.equal(wide, other.state)


def test_nan_reaches_no_limit() -> None:
    for length in (5, 50):
        part, seen = scores(1, length, EDITS), scores(1, length, EDITS)
        seen[:, 3:, 4:6] = math.nan
        part[0, 2, 4:6] = math.nan
        of = scope("one", EDITS, None)
        got, want, _ = both(part, seen, of, torch.empty(1, length, 4), None, None)
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_bounds_past_the_last_token_end_there() -> None:
    tokens, found = 75, []
    part, seen = scores(1, tokens, EDITS), scores(1, tokens, EDITS)
    of = scope("two", EDITS, None)
    for last in (tokens, tokens + 40):
        edges, state = torch.tensor([0, 40, last]), blank_state(2, EDITS, part.device)
        mine = part.clone()
        triton_cues.arm_(mine, seen, replace(of, state=state), 2, tokens, None, edges)
        found.append((mine[..., :EDITS], state))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
