"""Edits with a cue: which of them are armed at a token, and what was seen of their cues so far.

    reached[t, e] = cues[e] . x_t >= limits[e]     where t is real; always where limits[e] = -inf
    shown[t, e]   = reached[t, e] and reached[t - gaps[e], e]
    armed[t, e]   = shown of a token 1 to reaches[e] columns before t; where e is not *bounded*,
                    reached by any token before t, or by t itself

An edit is bounded where its limit is not -inf and reach and gap are less than :data:`REGISTER`
together. Only then two tokens make its cue.

The state of B sequences and N edits is int64 ``[B, 1 + 2 N]``. Column 0 counts the columns of each
sequence that were read, padding included. Column 1 + e is the first of them that showed e's cue,
:data:`NEVER` where none did. Column 1 + N + e is a shift register, whose bit i says whether the
column i before the last one reached e's limit; 0 where e is not bounded. Registers answer for the
last columns, also when some are cut off; first columns answer whether there was a cue at all.
Nothing is read back to the host, no shape depends on data, and minima and unions of integers have
no order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coachhook.ops.hooked_linear.gate import Tokens
from coachhook.ops.hooked_linear.scopes import Membership, Scope

NEVER = torch.iinfo(torch.int32).max
# Further than any reach, and small enough to be added to.
_FAR = 1 << 30
# Columns that a register knows: the sign of its integer is not used.
REGISTER = 63
# The two tokens of a cue are at most so many columns apart.
MOST_APART = 7
_ALL = (1 << REGISTER) - 1

Product = Callable[[Tensor, Tensor], Tensor]


def is_cued(scope: Scope) -> bool:
    """Whether the edits of a scope have to be armed before they may fire."""
    return isinstance(scope, Membership) and scope.cues is not None


def state_width(edits: int) -> int:
    """Columns of the state of so many edits."""
    return 1 + 2 * edits


def blank_state(rows: int, edits: int, device: torch.device) -> Tensor:
    """State int64 ``[rows, 1 + 2 edits]`` of sequences of which nothing was read."""
    state = torch.zeros(rows, state_width(edits), dtype=torch.int64, device=device)
    state[:, 1 : 1 + edits] = NEVER
    return state


def firsts(state: Tensor) -> Tensor:
    """First columns ``[B, edits]`` of a state, a view."""
    return state[:, 1 : 1 + state.shape[1] // 2]


def registers(state: Tensor) -> Tensor:
    """Shift registers ``[B, edits]`` of a state, a view."""
    return state[:, 1 + state.shape[1] // 2 :]


@torch.no_grad()
def forget_(state: Tensor, which: Tensor) -> None:
    """Whatever was seen of the cues, in place, where ``which`` says so; the count stays.

    Args:
        state: the state.
        which: bool, broadcast with ``[B, edits]``.
    """
    firsts(state).masked_fill_(which, NEVER)
    registers(state).masked_fill_(which, 0)


@torch.no_grad()
def pass_over_(state: Tensor, columns: int) -> None:
    """Count ``columns`` columns that nothing was read of, in place, as if they were padding."""
    state[:, :1].add_(columns)
    _shift_(registers(state), columns)


def complete(register: Tensor, gaps: Tensor | None) -> Tensor:
    """A register of the columns that showed a cue, of one of those that reached the limit."""
    return register if gaps is None else register & (register >> _apart(gaps))


def shown_at(column: Tensor, gaps: Tensor | None) -> Tensor:
    """The least register by which a cue was shown so many columns before the last one."""
    bit = torch.ones_like(column) << column
    return bit if gaps is None else bit | (bit << _apart(gaps))


def is_bounded(limits: Tensor, reaches: Tensor, gaps: Tensor | None) -> Tensor:
    """Which edits do not stay armed for ever, see the module; a register tells of these."""
    known = reaches if gaps is None else reaches.clamp(max=REGISTER) + _apart(gaps)
    return (known < REGISTER) & ~limits.isneginf()


def _apart(gaps: Tensor) -> Tensor:
    return gaps.clamp(0, MOST_APART)


@torch.no_grad()
def cut_back_(state: Tensor, columns: int, gaps: Tensor | None = None) -> None:
    """Take the last ``columns`` columns of every sequence back, in place, as if never read.

    What a register had shifted out is not known any more: where the cue was seen so early, it
    counts as seen at the latest column that is not known. So a cut of c columns is exact for edits
    that reach at most ``REGISTER - c`` columns, less their gap, and disarms none of the others; one
    of more than ``REGISTER - MOST_APART`` columns may arm an edit by the second token of its cue.

    Args:
        state: the state.
        columns: how many.
        gaps: int32 ``[edits]``, those of the edits; None: one token is each one's cue.
    """
    if columns == 0:
        return
    count = state[:, :1].sub_(columns)
    first, register = firsts(state), registers(state)
    first.masked_fill_(first >= count, NEVER)
    if columns < REGISTER:
        register.bitwise_right_shift_(columns)
    else:
        register.zero_()
    known = max(REGISTER - columns, 0)
    apart = first.new_zeros(1) if gaps is None else _apart(gaps).to(first.dtype)
    unknown = (known - apart).clamp(min=0)
    register.bitwise_or_(torch.where(first < count - unknown, shown_at(unknown, gaps), 0))
    if gaps is not None and known < MOST_APART:
        # Any of the last columns may be the first of two.
        last = torch.minimum(apart, count)
        register.bitwise_or_((1 << last) - (1 << last.clamp(max=known)))


def _shift_(register: Tensor, columns: int) -> None:
    if columns < REGISTER:
        register.bitwise_left_shift_(columns).bitwise_and_(_ALL)
    else:
        register.zero_()


def _earlier(reached: Tensor, column: Tensor, by: int) -> Tensor:
    """``reached [N, edits]`` of the token so many before each in its sequence, False before it."""
    moved = torch.zeros_like(reached)
    if by < reached.shape[0]:
        torch.logical_and(reached[:-by], (column[by:] >= by)[:, None], out=moved[by:])
    return moved


def _within(reached: Tensor, column: Tensor, reaches: Tensor) -> Tensor:
    """Whether some token of this call, 1 to ``reaches [edits]`` before, has reached the limit.

    Windows whose lengths are powers of two follow from each other, and a window of any length is
    one after another of these: ``log2 REGISTER`` steps, whatever the lengths are.
    """
    length = reaches.clamp(0, REGISTER - 1)
    window, found = _earlier(reached, column, 1), torch.zeros_like(reached)
    size = 1
    while True:
        longer = window | _earlier(found, column, size)
        found = torch.where((length & size).bool(), longer, found)
        if 2 * size > REGISTER:
            return found
        window = window | _earlier(window, column, size)
        size *= 2


def _moved(reached: Tensor, column: Tensor, apart: Tensor) -> Tensor:
    """``reached`` of the token of this call ``apart [edits]`` columns before each."""
    size = 1
    while size <= MOST_APART:
        reached = torch.where((apart & size).bool(), _earlier(reached, column, size), reached)
        size *= 2
    return reached


def _before_call(register: Tensor, apart: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Whether the column ``apart [edits]`` before each token of this call, before it, is set."""
    at = torch.arange(MOST_APART, device=column.device)[:, None]
    bits = (register[:, None] >> (apart - at - 1).clamp(min=0)) & 1
    early = bits.bool() & (apart > at)
    return early[row, column.clamp(max=MOST_APART - 1).long()] & (column < MOST_APART)[:, None]


def _columns(tokens: Tokens, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and column ``[N]`` of each token in this call; first and past-the-end token of rows."""
    start, end = tokens.bounds(device)
    if tokens.cu_seqlens is None:
        token = torch.arange(tokens.rows * tokens.longest, device=device)
        row = token // max(tokens.longest, 1)
    else:
        token = torch.arange(tokens.longest, device=device)
        row = torch.bucketize(token, end, right=True).clamp(max=tokens.rows - 1)
    return row, (token - start[row]).to(torch.int32), start, end


def _first(reached: Tensor, tokens: Tokens, row: Tensor, column: Tensor) -> Tensor:
    """First columns ``[B, edits]`` of this call's tokens."""
    at = torch.where(reached, column[:, None], NEVER)
    if tokens.cu_seqlens is None and reached.shape[0]:
        return at.view(tokens.rows, tokens.longest, -1).amin(dim=1)
    first = at.new_full((tokens.rows, at.shape[1]), NEVER)
    return first.scatter_reduce(0, row[:, None].expand_as(at), at, "amin")


def since(register: Tensor) -> Tensor:
    """How far before the next column the latest one is that a register knows, int32.

    Further than any reach where it knows none.
    """
    lowest = (register & -register).clamp(min=1).to(torch.float64)  # a power of two: exact
    return torch.where(register == 0, _FAR, lowest.log2().round() + 1).to(torch.int32)


def armed_edits(
    seen: Tensor,
    tokens: Tokens,
    limits: Tensor,
    state: Tensor | None,
    reaches: Tensor | None = None,
    gaps: Tensor | None = None,
) -> Tensor:
    """Which edits may fire at which tokens, bool ``[N, edits]``.

    Args:
        seen: scores of the cues ``[N, edits]``, ``x cues^T`` in the compute dtype.
        tokens: how the N tokens are cut into sequences.
        limits: floating ``[edits]``.
        state: int64 ``[B, 1 + 2 edits]``, read, and updated in place; None starts every sequence
            unarmed.
        reaches: int32 ``[edits]``; None: every earlier column counts.
        gaps: int32 ``[edits]``, with reaches; None: one token is each edit's cue.
    """
    # A token of NaN reaches no limit, except one that needs nothing to be seen.
    reached = (seen >= limits.to(seen.dtype)) | limits.isneginf()
    if tokens.real is not None:
        reached = reached & tokens.real[:, None]
    bounded = None if reaches is None else is_bounded(limits, reaches, gaps)
    apart = None
    if gaps is not None and bounded is not None:
        apart = torch.where(bounded, _apart(gaps), 0)
    if state is not None and tokens.cu_seqlens is None and tokens.longest == 1:
        return _armed_at_one(reached, state, reaches, bounded, apart)
    row, column, start, end = _columns(tokens, seen.device)
    shown = reached
    if apart is not None:
        shown = _moved(reached, column, apart)
        if state is not None:
            shown |= _before_call(registers(state), apart, row, column)
        shown &= reached
    read = column if state is None else column + state[:, 0].to(torch.int32)[row]
    first = _first(shown, tokens, row, read)
    if state is not None:
        first = torch.minimum(first, firsts(state).to(torch.int32))
        firsts(state).copy_(first)
        state[:, 0].add_(end - start)
    armed = first[row] <= read[:, None]
    if reaches is None or bounded is None:
        return armed
    recent = _within(shown, column, reaches)
    if state is not None:
        recent |= column[:, None] + since(complete(registers(state), apart))[row] <= reaches
        _read_on_(registers(state), reached & bounded, row, start, end)
    return torch.where(bounded, recent, armed)


def _read_on_(register: Tensor, reached: Tensor, row: Tensor, start: Tensor, end: Tensor) -> None:
    """Shift the sequences' tokens ``start`` to ``end`` of a call in."""
    length = (end - start)[:, None]
    kept = (register << length.clamp(max=REGISTER - 1)) & _ALL
    register.copy_(torch.where(length < REGISTER, kept, 0))
    count = reached.shape[0]
    if count <= REGISTER * len(start):
        # Every bit has a place of its own, so that a sum is a union.
        back = end[row] - 1 - torch.arange(count, device=row.device)
        told = reached & ((back >= 0) & (back < REGISTER))[:, None]
        register.index_add_(0, row, told.to(torch.int64) << back.clamp(0, REGISTER - 1)[:, None])
    else:
        # Few long sequences: their last tokens alone.
        back = torch.arange(REGISTER, device=row.device)
        at = end[:, None] - 1 - back
        told = reached[at.clamp(min=0)] & (at >= start[:, None])[..., None]
        register.add_((told.to(torch.int64) << back[:, None]).sum(dim=1))


def _armed_at_one(
    reached: Tensor,
    state: Tensor,
    reaches: Tensor | None,
    bounded: Tensor | None,
    apart: Tensor | None,
) -> Tensor:
    """One token more of each sequence: what decoding waits for."""
    first, register, read = firsts(state), registers(state), state[:, :1]
    shown = reached
    if apart is not None:
        # With this token for bit 0, so that a gap of 0 asks for the token itself.
        shown = reached & (((register << 1 | 1) >> apart) & 1).bool()
    first.copy_(torch.where(shown, torch.minimum(first, read), first))
    armed = first <= read
    read.add_(1)
    if reaches is None or bounded is None:
        return armed
    window = (1 << reaches.clamp(0, REGISTER - 1).to(torch.int64)) - 1
    recent = (complete(register, apart) & window) != 0
    register.copy_(((register << 1) & _ALL) | (reached & bounded))
    return torch.where(bounded, recent, armed)


def unless_unarmed_(fired: Tensor, z: Tensor, scope: Scope) -> Tensor:
    """``fired`` uint8 ``[N]``, 0 in place where no edit of a scope with cues is armed (z -inf)."""
    return fired.masked_fill_(z.isneginf(), 0) if is_cued(scope) else fired


def judged_features(
    features: Tensor, flat: Tensor, tokens: Tokens, scope: Scope, product: Product
) -> Tensor:
    """What the gate sees of ``features [N, edits]``: -inf for edits that are not armed.

    Other scopes' features, and those of a pair without cues, are handed back. Updates the state.

    Args:
        features: coefficients of the edits.
        flat: the tokens ``[N, n]``.
        tokens: how they are cut into sequences.
        scope: the scope.
        product: ``x, rows -> x rows^T`` in the compute dtype.
    """
    if not isinstance(scope, Membership) or scope.cues is None or scope.limits is None:
        return features
    with torch.no_grad():
        seen = product(flat, scope.cues)
        when = scope.limits, scope.state, scope.reaches, scope.gaps
        armed = armed_edits(seen, tokens, *when)
        return features.detach().masked_fill(~armed, float("-inf"))
