"""Edits with a cue: which of them are armed at a token, and what was seen of their cues so far.

    reached[t, e] = cues[e] . x_t >= limits[e]     where t is real; always where limits[e] = -inf
    first[b, e]   = first column of sequence b that reaches the limit, or that of its state
    armed[t, e]   = first[b, e] <= column of t

The state of B sequences and N edits is int32 ``[B, N + 1]``: column 0 counts the tokens of each
sequence that were read, padding included, and column 1 + e is ``first[b, e]``, :data:`NEVER` where
no cue was seen. First columns instead of flags, so that a sequence can be cut back exactly. Nothing
is read back to the host, no shape depends on data, and a minimum of integers has no order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coachhook.ops.hooked_linear.gate import Tokens
from coachhook.ops.hooked_linear.scopes import Membership, Scope

NEVER = torch.iinfo(torch.int32).max

Product = Callable[[Tensor, Tensor], Tensor]


def is_cued(scope: Scope) -> bool:
    """Whether the edits of a scope have to be armed before they may fire."""
    return isinstance(scope, Membership) and scope.cues is not None


def blank_state(rows: int, edits: int, device: torch.device) -> Tensor:
    """State int32 ``[rows, edits + 1]`` of sequences of which nothing was read."""
    state = torch.full((rows, edits + 1), NEVER, dtype=torch.int32, device=device)
    state[:, 0] = 0
    return state


@torch.no_grad()
def cut_back_(state: Tensor, columns: int) -> None:
    """Take the last ``columns`` columns of every sequence back, in place, as if never read."""
    count = state[:, :1].sub_(columns)
    seen = state[:, 1:]
    seen.masked_fill_(seen >= count, NEVER)


def _first_in_grid(reached: Tensor, tokens: Tokens, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """First columns ``[B, edits]`` and the tokens' columns ``[B or 1, T]`` of equal sequences."""
    column = torch.arange(tokens.longest, dtype=torch.int32, device=reached.device)[None]
    if state is not None:
        column = column + state[:, :1]
    edits = reached.shape[1]
    if reached.shape[0] == 0:
        return column.new_full((tokens.rows, edits), NEVER), column
    grid = reached.view(tokens.rows, tokens.longest, edits)
    return torch.where(grid, column[..., None], NEVER).amin(dim=1), column


def _first_packed(
    reached: Tensor, tokens: Tokens, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """First columns ``[B, edits]``, and the columns and rows ``[N]`` of packed tokens."""
    start, end = tokens.bounds(reached.device)
    token = torch.arange(reached.shape[0], device=reached.device)
    row = torch.bucketize(token, end, right=True).clamp(max=tokens.rows - 1)
    column = (token - start[row]).to(torch.int32)
    if state is not None:
        column = column + state[:, 0][row]
    at = torch.where(reached, column[:, None], NEVER)
    first = at.new_full((tokens.rows, at.shape[1]), NEVER)
    return first.scatter_reduce(0, row[:, None].expand_as(at), at, "amin"), column, row


def armed_edits(seen: Tensor, tokens: Tokens, limits: Tensor, state: Tensor | None) -> Tensor:
    """Which edits may fire at which tokens, bool ``[N, edits]``.

    Args:
        seen: scores of the cues ``[N, edits]``, ``x cues^T`` in the compute dtype.
        tokens: how the N tokens are cut into sequences.
        limits: floating ``[edits]``.
        state: int32 ``[B, edits + 1]``, read, and updated in place; None starts every sequence
            unarmed.
    """
    # A token of NaN reaches no limit, except one that needs nothing to be seen.
    reached = (seen >= limits.to(seen.dtype)) | limits.isneginf()
    if tokens.real is not None:
        reached = reached & tokens.real[:, None]
    row = None
    if tokens.cu_seqlens is None:
        first, column = _first_in_grid(reached, tokens, state)
    else:
        first, column, row = _first_packed(reached, tokens, state)
    if state is not None:
        first = torch.minimum(first, state[:, 1:])
        state[:, 1:].copy_(first)
        if row is None:
            state[:, 0].add_(tokens.longest)
        else:
            start, end = tokens.bounds(seen.device)
            state[:, 0].add_((end - start).to(torch.int32))
    if row is None:
        return (first[:, None] <= column[..., None]).view(reached.shape)
    return first[row] <= column[:, None]


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
        armed = armed_edits(product(flat, scope.cues), tokens, scope.limits, scope.state)
        return features.detach().masked_fill(~armed, float("-inf"))
