"""Scores of the gate from the features of the tokens, for every scope.

Statistics are formed in float64, shifted or pairwise, and rounded once: a decision depends neither
on padding nor on the rest of the batch, and equal norms have a standard deviation of exactly zero.
Triples (count, mean, M2) are kept in the last dimension of one tensor; M2 is the sum of squared
deviations from the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coachhook.ops.hooked_linear.scopes import (
    Membership,
    Population,
    Prefix,
    Scope,
    Ungated,
)

# A standard deviation within this many units of rounding of the mean norm is noise.
NOISE_UNITS = 8


@dataclass(frozen=True)
class Tokens:
    """How N flattened tokens are cut into sequences.

    Attributes:
        rows: number of sequences B.
        longest: upper bound of their lengths; their length where ``cu_seqlens`` is None.
        real: bool ``[N]``; None where every token is real.
        cu_seqlens: int64 ``[B + 1]``, or None where all sequences have the same length.
    """

    rows: int
    longest: int
    real: Tensor | None
    cu_seqlens: Tensor | None

    @staticmethod
    def of(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tokens:
        """Layout of an input ``[B, T, n]``, ``[T, n]``, or ``[N, n]`` with ``cu_seqlens``."""
        real = None if mask is None else mask.reshape(-1)
        if cu_seqlens is None:
            return Tokens(x.shape[0] if x.dim() == 3 else 1, x.shape[-2], real, None)
        cu_seqlens = cu_seqlens.long()
        inside = torch.arange(x.shape[0], device=x.device) < cu_seqlens[-1]
        real = inside if real is None else real & inside
        return Tokens(cu_seqlens.shape[0] - 1, x.shape[0], real, cu_seqlens)

    def grid(self, per_token: Tensor) -> Tensor:
        """Values of the tokens ``[N]`` as ``[B, T]``, or as they are where packed."""
        if self.cu_seqlens is not None:
            return per_token
        return per_token.view(self.rows, self.longest)

    def spread(self, per_row: Tensor) -> Tensor:
        """Values of the sequences ``[B, ...]``, shaped to broadcast with a grid."""
        if self.cu_seqlens is None:
            return per_row[:, None]
        token = torch.arange(self.longest, device=per_row.device)
        row = torch.bucketize(token, self.cu_seqlens[1:], right=True)
        return per_row[row.clamp(max=self.rows - 1)]

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """First token and past-the-end token ``[B]`` of the sequences."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens[:-1], self.cu_seqlens[1:]
        start = torch.arange(self.rows, device=device) * self.longest
        return start, start + self.longest


def _combine(left: Tensor, right: Tensor) -> Tensor:
    """Moments of the union of two samples (Chan, Golub, LeVeque 1983), elementwise ``[..., 3]``."""
    n_left, mean_left, m2_left = left.unbind(-1)
    n_right, mean_right, m2_right = right.unbind(-1)
    count = n_left + n_right
    share = n_right / count.clamp(min=1)
    gap = mean_right - mean_left
    m2 = m2_left + m2_right + gap * gap * n_left * share
    return torch.stack((count, mean_left + gap * share, m2), dim=-1)


def running_moments(norms: Tensor, tokens: Tokens, state: Tensor | None) -> Tensor:
    """Moments ``[N, 3]`` of the real tokens of each token's sequence up to the token itself.

    A prefix scan in log2(longest) steps: no loop over sequences, no sum that leaks from one
    sequence into the next, the same bits on every run.

    Args:
        norms: float64 ``[N]``.
        tokens: the layout.
        state: float64 ``[B, 3]``, what came before each sequence; None for nothing.
    """
    moments = torch.stack((torch.ones_like(norms), norms, torch.zeros_like(norms)), dim=-1)
    if tokens.real is not None:
        moments = torch.where(tokens.real[:, None], moments, 0.0)
    start, _ = tokens.bounds(norms.device)
    token = torch.arange(norms.shape[0], device=norms.device)
    position = (tokens.grid(token) - tokens.spread(start)).view(-1, 1)
    if state is not None:
        grid = moments.view(*tokens.grid(norms).shape, 3)
        opened = _combine(tokens.spread(state), grid).view(-1, 3)
        moments = torch.where(position == 0, opened, moments)
    step = 1
    while step < tokens.longest:
        later = moments[step:]
        joined = _combine(moments[:-step], later)
        later = torch.where(position[step:] >= step, joined, later)
        moments = torch.cat((moments[:step], later))
        step *= 2
    return moments


def _last_moments(running: Tensor, tokens: Tokens, state: Tensor | None) -> Tensor:
    """Moments ``[B, 3]`` at the end of each sequence; an empty one keeps its state."""
    if state is None:
        state = running.new_zeros(tokens.rows, 3)
    if running.shape[0] == 0:
        return state
    start, end = tokens.bounds(running.device)
    return torch.where((end > start)[:, None], running[(end - 1).clamp(min=0)], state)


def sequence_moments(norms: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and M2 ``[B]`` of the real tokens of each sequence; float64 ``norms [N]``."""
    if tokens.cu_seqlens is not None or norms.shape[0] == 0:
        last = _last_moments(running_moments(norms, tokens, None), tokens, None)
        return last[:, 0], last[:, 1], last[:, 2]
    grid = tokens.grid(norms)
    real = (
        torch.ones_like(grid, dtype=torch.bool) if tokens.real is None else tokens.grid(tokens.real)
    )
    first = grid.gather(1, real.to(torch.uint8).argmax(dim=-1, keepdim=True))
    count = real.sum(dim=-1, dtype=torch.float64)
    shifted = torch.where(real, grid - first, 0.0)
    mean = shifted.sum(dim=-1) / count.clamp(min=1)
    m2 = torch.where(real, shifted - mean[:, None], 0.0).square().sum(dim=-1)
    return count, torch.where(count > 0, first[:, 0] + mean, 0.0), m2


def _std(count: Tensor, m2: Tensor) -> Tensor:
    return (m2 / (count - 1)).sqrt()


def _sequence_statistics(
    norms: Tensor, tokens: Tokens, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean and std of each token's sequence, shaped to broadcast with the grid of the norms."""
    plain = tokens.real is None and tokens.cu_seqlens is None and state is None
    if plain and tokens.longest > 1 and norms.shape[0]:
        # The common case in few operations: at one token their number is what costs.
        grid = tokens.grid(norms)
        first = grid[:, :1]
        std, mean = torch.std_mean(grid - first, dim=-1, correction=1, keepdim=True)
        return first + mean, std
    count, mean, m2 = sequence_moments(norms, tokens)
    if state is not None:
        state.copy_(torch.stack((count, mean, m2), dim=-1))
    return tokens.spread(mean), tokens.spread(_std(count, m2))


def _prefix_statistics(
    norms: Tensor, tokens: Tokens, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean and std of what each token's sequence held up to the token, shaped as the grid."""
    before = None if state is None else state.double()
    moments = running_moments(norms, tokens, before)
    if state is not None:
        state.copy_(_last_moments(moments, tokens, before))
    return tokens.grid(moments[:, 1]), tokens.grid(_std(moments[:, 0], moments[:, 2]))


def _population_statistics(
    scope: Population, tokens: Tokens, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and std of a population, shaped to broadcast with the grid of the norms."""
    values = []
    for value in (scope.mean, scope.std):
        value = torch.as_tensor(value, dtype=torch.float64, device=device)
        values.append(tokens.spread(value) if value.dim() else value)
    return values[0], values[1]


def group_sums(coefficients: Tensor, groups: Tensor | None) -> Tensor:
    """Coefficients ``[N, keys]`` summed per group: column g holds group g, -inf where unused."""
    if groups is None:
        return coefficients
    sums = torch.zeros_like(coefficients).index_add(1, groups, coefficients)
    unused = torch.ones_like(groups, dtype=torch.bool).index_fill(0, groups, False)
    return sums.masked_fill(unused, float("-inf"))


def scores(features: Tensor, tokens: Tokens, scope: Scope, norms: Tensor | None = None) -> Tensor:
    """Score z ``[N]`` of every token, in the dtype of ``features``; NaN where undefined.

    Args:
        features: ``[N, f]`` in the compute dtype, with the norm of the correction (or, for
            :class:`Membership`, the coefficients of the keys, -inf where one may not fire).
        tokens: how the N tokens are cut into sequences.
        scope: the scope; its state is updated in place.
        norms: float64 ``[N]``, of the rows of ``features``, where they are known already.
    """
    if isinstance(scope, Ungated):
        return features.new_full(features.shape[:1], float("nan"))
    if isinstance(scope, Membership):
        if features.shape[1] == 0:
            return features.new_full(features.shape[:1], float("nan"))
        z = group_sums(features, scope.groups).amax(dim=-1)
    else:
        if norms is None:
            norms = torch.linalg.vector_norm(features, dim=-1).double()
        if isinstance(scope, Population):
            mean, std = _population_statistics(scope, tokens, norms.device)
        elif isinstance(scope, Prefix):
            mean, std = _prefix_statistics(norms, tokens, scope.state)
        else:
            mean, std = _sequence_statistics(norms, tokens, scope.state)
        noise = mean * (NOISE_UNITS * torch.finfo(features.dtype).eps)
        std = std.masked_fill(std <= noise, float("nan"))
        z = ((tokens.grid(norms) - mean) / std).to(features.dtype).view(-1)
    return z if tokens.real is None else z.masked_fill(~tokens.real, float("nan"))


def fires(z: Tensor, alpha: float | Tensor, tokens: Tokens, scope: Scope) -> Tensor:
    """Which tokens ``[N]`` take the hook: ``z >= alpha`` in the dtype of z; NaN never does.

    Nor does -inf where edits have cues: none of them is armed there.
    """
    if isinstance(scope, Ungated):
        return torch.ones_like(z, dtype=torch.bool) if tokens.real is None else tokens.real
    if isinstance(scope, Membership) and scope.cues is not None:
        return (z >= alpha) & ~z.isneginf()  # no threshold is so low that an unarmed edit fires
    return z >= alpha
