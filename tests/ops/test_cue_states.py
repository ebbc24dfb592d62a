"""What is kept of seen cues: cut back, passed over, forgotten, and for how long it arms an edit."""

from __future__ import annotations

import pytest
import torch

from coachhook.ops import Membership, gate_scores
from coachhook.ops.hooked_linear.cues import (
    NEVER,
    blank_state,
    cut_back_,
    firsts,
    forget_,
    pass_over_,
)
from tests.ops.gate_oracle import arming
from tests.ops.test_cues import BACKENDS, make_edits, make_gaps, make_reaches, random_state


@pytest.mark.parametrize("cut", [1, 3, 6, 17])
@pytest.mark.parametrize("bounded", ["no", "yes", "apart"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cut_back_state_is_that_of_the_shorter_sequence(backend, bounded, cut):
    reaches = make_reaches(9) if bounded != "no" else None
    gaps = make_gaps(9) if bounded == "apart" else None
    x, mask = torch.randn(5, 17, 23), torch.rand(5, 17) < 0.8
    delta, cues, limits = make_edits(x, 3, 9, x.dtype)
    states = [blank_state(5, 9, x.device) for _ in range(2)]
    for state, length in zip(states, (17, 17 - cut), strict=True):
        scope = Membership(None, "own", cues, limits, state, reaches, gaps)
        gate_scores(x[:, :length], delta, mask=mask[:, :length], scope=scope, backend=backend)
    assert not torch.equal(*states)
    cut_back_(states[0], 0, gaps)
    cut_back_(states[0], cut, gaps)
    assert torch.equal(*states)


@pytest.mark.parametrize("gap", [None, 0, 1, 7])
@pytest.mark.parametrize("cut", [23, 24, 50, 63, 64, 90])
def test_a_deep_cut_takes_an_edit_from_none(cut, gap):
    """What follows a cut of c columns is exact for edits whose reach and gap come to 63 - c, and a
    superset else.
    """
    x = torch.randn(6, 150, 13)
    count = 8
    delta, cues, limits = make_edits(x, 3, count, x.dtype)
    # Met by a few tokens of a hundred; two of them are needed where there is a gap.
    limits = torch.full_like(limits, 0.9 if gap else 1.5)
    reaches = torch.tensor([0, 8, 39, 40, 41, 55, 62, NEVER], dtype=torch.int32)
    gaps = None if gap is None else torch.full_like(reaches, gap)
    states = [blank_state(6, count, x.device) for _ in range(2)]
    armed = []
    for state, length in zip(states, (110, 110 - cut), strict=True):
        scope = Membership(None, "own", cues, limits, state, reaches, gaps)
        gate_scores(x[:, :length], delta, scope=scope)
        if length == 110:
            cut_back_(state, cut, gaps)
        after = Membership(None, "own", cues, limits, state.clone(), reaches, gaps)
        armed.append(torch.tensor(arming(x[:, 110:], None, None, after)[0]).view(6, 40, count))
    apart = gap or 0
    exact = (reaches <= 63 - cut - apart) | (reaches > 62 - apart)
    assert torch.equal(armed[0][..., exact], armed[1][..., exact])
    assert (armed[0] >= armed[1]).all() and armed[1].any() and not armed[0].all()
    assert torch.equal(states[0][:, 0], states[1][:, 0])
    assert torch.equal(firsts(states[0]), firsts(states[1]))


@pytest.mark.parametrize("columns", [1, 7, 62, 63, 200])
def test_columns_passed_over_are_columns_of_padding(columns):
    x, count = torch.randn(3, 20, 13), 7
    delta, cues, limits = make_edits(x, 3, count, x.dtype)
    reaches = make_reaches(count)
    states = [blank_state(3, count, x.device) for _ in range(2)]
    padding = torch.zeros(3, columns, dtype=torch.bool)
    mask = torch.cat([torch.ones(3, 20, dtype=torch.bool), padding], dim=1)
    wide = torch.cat([x, torch.randn(3, columns, 13)], dim=1)
    scopes = [Membership(None, "own", cues, limits, state, reaches) for state in states]
    gate_scores(x, delta, scope=scopes[0])
    pass_over_(states[0], columns)
    gate_scores(wide, delta, mask=mask, scope=scopes[1])
    assert torch.equal(*states) and (firsts(states[0]) < NEVER).any()


def test_forgetting_keeps_the_count():
    state = random_state(3, 5, 20, make_reaches(5))
    assert not torch.equal(state, blank_state(3, 5, state.device))
    kept = state.clone()
    forget_(state, torch.tensor(False))
    assert torch.equal(state, kept)
    forget_(state, torch.tensor(True))
    want = blank_state(3, 5, state.device)
    want[:, 0] = 20
    assert torch.equal(state, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_edit_is_armed_as_far_as_it_reaches(backend):
    x = torch.zeros(1, 70, 2)
    x[0, :, 0], x[0, 2, 1] = 1.0, 1.0
    delta = torch.ones(1, 1), torch.tensor([[1.0, 0.0]])
    cue, limit = torch.tensor([[0.0, 1.0]]), torch.ones(1)
    for reach, first, last in (
        (-3, 3, 2),
        (0, 3, 2),
        (1, 3, 3),
        (40, 3, 42),
        (62, 3, 64),
        (63, 2, 69),
        (NEVER, 2, 69),
    ):
        reaches = torch.tensor([reach], dtype=torch.int32)
        for size in (1, 7, 70):  # tokens a call
            state = blank_state(1, 1, x.device)
            scope = Membership(None, "own", cue, limit, state, reaches)
            parts = x.split(size, 1)
            z = [gate_scores(part, delta, scope=scope, backend=backend) for part in parts]
            armed = (torch.cat(z, dim=1)[0] == 1).nonzero().flatten().tolist()
            assert armed == list(range(first, last + 1)), (reach, size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_tokens_make_a_cue_only_as_far_apart_as_they_are_wanted(backend):
    x = torch.zeros(1, 40, 2)
    x[0, :, 0] = 1.0
    x[0, [3, 5, 6, 20, 27], 1] = 1.0
    delta = torch.ones(1, 1), torch.tensor([[1.0, 0.0]])
    cue, limit = torch.tensor([[0.0, 1.0]]), torch.ones(1)
    for gap, completed in (
        (0, [3, 5, 6, 20, 27]),
        (1, [6]),
        (2, [5]),
        (3, [6]),
        (4, []),
        (7, [27]),
        (12, [27]),
    ):
        wanted = sorted({t for at in completed for t in range(at + 1, at + 5)})
        gaps = torch.tensor([gap], dtype=torch.int32)
        for size in (1, 2, 5, 40):  # tokens a call
            state = blank_state(1, 1, x.device)
            reaches = torch.full_like(gaps, 4)
            scope = Membership(None, "own", cue, limit, state, reaches, gaps)
            parts = x.split(size, 1)
            z = [gate_scores(part, delta, scope=scope, backend=backend) for part in parts]
            armed = (torch.cat(z, dim=1)[0] == 1).nonzero().flatten().tolist()
            assert armed == wanted, (gap, size)
            assert firsts(state).item() == min(completed, default=NEVER)
