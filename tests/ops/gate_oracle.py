"""The gate spelled out token by token in float64: what every implementation is tested against."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coachhook.ops import Membership, Population, Prefix, Scope, Sequence, Ungated


@dataclass
class Answer:
    """What the oracle says: outputs, scores, decisions and the largest mean / std of a norm."""

    y: Tensor
    z: Tensor
    taken: Tensor
    ratio: float


def sequences(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> list[list[int]]:
    """Indices of the real tokens of each sequence, in the flattened input."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        cuts = [range(a, b) for a, b in itertools.pairwise(bounds)]
    else:
        rows, length = (x.shape[0], x.shape[1]) if x.dim() == 3 else (1, x.shape[0])
        cuts = [range(row * length, (row + 1) * length) for row in range(rows)]
    real = None if mask is None else mask.reshape(-1).tolist()
    return [[t for t in cut if real is None or real[t]] for cut in cuts]


def _moments(sample: list[float]) -> tuple[float, float]:
    if not sample:
        return 0.0, 0.0
    mean = math.fsum(sample) / len(sample)
    return mean, math.fsum((value - mean) ** 2 for value in sample)


def _standardise(value: float, sample: list[float]) -> float:
    mean, m2 = _moments(sample)
    if len(sample) < 2 or m2 == 0:
        return math.nan
    return (value - mean) / math.sqrt(m2 / (len(sample) - 1))


def _at(value: float | Tensor, row: int) -> float:
    if isinstance(value, Tensor):
        return float(value[row] if value.dim() else value)
    return value


def columns(x: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """Row and column of each token of the flattened input that belongs to a sequence."""
    if cu_seqlens is None:
        rows, length = (x.shape[0], x.shape[1]) if x.dim() == 3 else (1, x.shape[0])
        return [(row, column) for row in range(rows) for column in range(length)]
    cuts = itertools.pairwise(cu_seqlens.tolist())
    return [(row, t - a) for row, (a, b) in enumerate(cuts) for t in range(a, b)]


def arming(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, scope: Membership
) -> tuple[list[list[bool]], Tensor]:
    """Which edits are armed at each token of a sequence, and the state after the call.

    The scope's state is read, not written. Of every edit all columns are kept that are known to
    have reached its limit, and those that have shown its cue; the state after the call is what they
    come to.
    """
    never, most = 2**31 - 1, 62
    tokens = x.reshape(-1, x.shape[-1]).double()
    seen = (tokens @ scope.cues.double().T).tolist()
    limits = scope.limits.double().tolist()
    real = [True] * len(seen) if mask is None else mask.reshape(-1).tolist()
    places = columns(x, cu_seqlens)
    rows = x.shape[0] if x.dim() == 3 else 1
    rows = rows if cu_seqlens is None else len(cu_seqlens) - 1
    count = len(limits)
    reaches = [never] * count if scope.reaches is None else scope.reaches.tolist()
    gaps = [0] * count if scope.gaps is None else scope.gaps.clamp(0, 7).tolist()
    for e, limit in enumerate(limits):
        if limit == -math.inf or reaches[e] + gaps[e] > most:
            reaches[e], gaps[e] = never, 0
    read = [0] * rows
    reached, shown = ([[set() for _ in limits] for _ in range(rows)] for _ in range(2))
    for row, (number, *known) in enumerate([] if scope.state is None else scope.state.tolist()):
        read[row] = number
        for edit, (first, register) in enumerate(zip(known[:count], known[count:], strict=True)):
            at = {number - 1 - bit for bit in range(63) if register >> bit & 1}
            reached[row][edit] |= at
            shown[row][edit] |= {first} - {never} | {one for one in at if one - gaps[edit] in at}
    before = list(read)
    armed = []
    for t, (row, column) in enumerate(places):
        at = before[row] + column
        armed.append([])
        for edit, limit in enumerate(limits):
            if real[t] and (limit == -math.inf or seen[t][edit] >= limit):
                reached[row][edit].add(at)
                if at - gaps[edit] in reached[row][edit]:
                    shown[row][edit].add(at)
            if reaches[edit] <= most:
                near = range(at - reaches[edit], at)
                armed[-1].append(any(one in near for one in shown[row][edit]))
            else:
                armed[-1].append(any(one <= at for one in shown[row][edit]))
        read[row] += 1
    after = [
        [
            read[row],
            *(min(one, default=never) for one in shown[row]),
            *(
                sum(1 << read[row] - 1 - at for at in one if read[row] - 1 - at <= most)
                if reach <= most
                else 0
                for one, reach in zip(reached[row], reaches, strict=True)
            ),
        ]
        for row in range(rows)
    ]
    return armed, torch.tensor(after, dtype=torch.int64).view(rows, 1 + 2 * count)


def _winner(coefficients: list[float], scope: Membership) -> tuple[int, float]:
    groups = list(range(len(coefficients))) if scope.groups is None else scope.groups.tolist()
    sums: dict[int, float] = {}
    for group, coefficient in zip(groups, coefficients, strict=True):
        sums[group] = sums.get(group, 0.0) + coefficient
    best = max(sums, key=lambda group: sums[group])
    return best, sums[best]


def oracle(
    base_output: Tensor,
    x: Tensor,
    delta: Tensor | tuple[Tensor, Tensor],
    alpha: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scope: Scope | None = None,
) -> Answer:
    """y and z of the gated hook; ``base_output`` is the frozen output in float64."""
    scope = Sequence() if scope is None else scope
    tokens = x.reshape(-1, x.shape[-1]).double()
    lift, projection = (None, delta) if isinstance(delta, Tensor) else delta
    features = tokens @ projection.double().T
    added = features if lift is None else features @ lift.double().T
    norms = features.square().sum(-1).sqrt().tolist()
    z = [math.nan] * len(norms)
    taken = [False] * len(norms)
    ratio = 1.0
    cued = isinstance(scope, Membership) and scope.cues is not None
    armed = arming(x, mask, cu_seqlens, scope)[0] if cued else []
    for row, real in enumerate(sequences(x, mask, cu_seqlens)):
        history: list[float] = []
        sample = [norms[t] for t in real]
        mean, m2 = _moments(sample)
        if m2 > 0:
            ratio = max(ratio, max(sample) / math.sqrt(m2 / len(sample)))
        for t in real:
            history.append(norms[t])
            if isinstance(scope, Sequence):
                z[t] = _standardise(norms[t], sample)
            elif isinstance(scope, Prefix):
                z[t] = _standardise(norms[t], history)
            elif isinstance(scope, Population):
                z[t] = (norms[t] - _at(scope.mean, row)) / _at(scope.std, row)
                ratio = max(ratio, abs(_at(scope.mean, row) / _at(scope.std, row)))
            elif isinstance(scope, Membership):
                fit = features[t].tolist()
                if cued:
                    fit = [c if able else -math.inf for c, able in zip(fit, armed[t], strict=True)]
                winner, z[t] = _winner(fit, scope)
                if scope.correction == "own":
                    keys = torch.arange(features.shape[1]) if scope.groups is None else scope.groups
                    own = features[t] * (keys == winner)
                    added[t] = lift.double() @ (own / own.sum())
            taken[t] = True if isinstance(scope, Ungated) else z[t] >= alpha
            if cued and not any(armed[t]):
                taken[t] = False
    y = base_output.reshape(-1, base_output.shape[-1]).clone()
    for t, fired in enumerate(taken):
        if fired:
            y[t] += added[t]
    shape = x.shape[:-1]
    return Answer(
        y.view(base_output.shape),
        torch.tensor(z, dtype=torch.float64).view(shape),
        torch.tensor(taken, dtype=torch.bool).view(shape),
        ratio,
    )


def threshold(z: Tensor) -> float:
    """A threshold in the widest gap of the upper half of the scores: no token is borderline."""
    values = z[z.isfinite()].sort().values
    values = values[len(values) // 2 :]
    if len(values) < 2:
        return 0.5
    widest = int((values[1:] - values[:-1]).argmax())
    return float((values[widest] + values[widest + 1]) / 2)
