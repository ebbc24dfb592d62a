"""Rows of about the same length run together, and what such runs leave put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tokens whose cost is that of starting one more group of rows: kernel launches and Python. On a CPU
# for each of its threads, which make tokens cheaper and starting no faster, up to a number. On a
# GPU the 65 or so kernels of a block and its gradient, of 3 us and more, against .2 us for a token.
_THREAD_COST, _MOST_COST, _GPU_COST = 16, 256, 1024
# What one more run of the whole network costs, in runs of one block.
MODEL_COST = 4


def group_cost(device: torch.device) -> int:
    """Tokens whose cost in a block is that of starting one more group of rows."""
    if device.type != "cpu":
        return _GPU_COST
    return min(_THREAD_COST * torch.get_num_threads(), _MOST_COST)


def pack(lengths: Sequence[int], group_cost: int) -> list[list[int]]:
    """Groups of indices of about the same length: least padding, each group at a cost in tokens.

    Of the groups that are runs of the lengths in order, those with the smallest
    ``sum (group_cost + size * longest)``.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    # Only between different lengths is there anything to gain.
    ends = [
        j
        for j in range(len(order))
        if j + 1 == len(order) or lengths[order[j]] < lengths[order[j + 1]]
    ]
    best: list[tuple[int, int]] = []  # for each end: cost of all up to it, start of the last group
    for at, end in enumerate(ends):
        starts = [0, *(e + 1 for e in ends[:at])]
        before = [0, *(cost for cost, _ in best)]
        width = lengths[order[end]]
        best.append(
            min(
                (cost + group_cost + (end + 1 - start) * width, start)
                for cost, start in zip(before, starts, strict=True)
            )
        )
    groups: list[list[int]] = []
    stop = len(order)
    while stop:
        start = best[ends.index(stop - 1)][1]
        groups.append(order[start:stop])
        stop = start
    return groups[::-1]


@dataclass
class Kept:
    """What one full run leaves of R rows of T tokens.

    Attributes:
        hidden: output of the block below, ``[R, T, d]``.
        lengths: tokens of each row ``[R]``, padding at the right.
        calls: arguments of each block above, by name.
        past: keys and values of each block above, ``[R, H, T, e]``.
        limit: most keys that a block takes; None is any number.
        own: as of :class:`~coachhook.editing.suffix.Captured`.
    """

    hidden: Tensor
    lengths: Tensor
    calls: list[dict[str, Any]]
    past: list[tuple[Tensor, Tensor]]
    limit: int | None
    own: Tensor | None = None


def merge(parts: Sequence[Kept], rows: Sequence[Sequence[int]], lengths: Tensor) -> Kept:
    """The run of all rows, padded together, from runs of some of them each.

    Args:
        parts: those runs, the widest last.
        rows: which rows each had, every row in one of them.
        lengths: tokens of each row ``[R]``.

    Raises:
        TypeError: an argument of the blocks differs between the parts in a way that is not known.
    """
    merger = _Merger(parts, rows, len(lengths))
    past = []
    for states in zip(*(part.past for part in parts), strict=True):
        keys, values = zip(*states, strict=True)
        past.append((merger.states(keys), merger.states(values)))
    calls = [
        {name: merger.argument(name, [call[name] for call in each]) for name in each[-1]}
        for each in zip(*(part.calls for part in parts), strict=True)
    ]
    hidden = merger.rows([part.hidden for part in parts])
    given = [part.own for part in parts if part.own is not None]
    own = merger.rows(given) if given else None
    return Kept(hidden, lengths, calls, past, parts[-1].limit, own)


class _Merger:
    def __init__(self, parts: Sequence[Kept], rows: Sequence[Sequence[int]], count: int) -> None:
        device = parts[-1].hidden.device
        self._index = [torch.tensor(some, device=device) for some in rows]
        self._sizes = [(part.hidden.shape[0], part.hidden.shape[1]) for part in parts]
        self._count, self._width = count, parts[-1].hidden.shape[1]
        # Blocks are given the same tensors, which stay the same.
        self._made: dict[tuple[int, ...], Any] = {}

    def rows(self, values: Sequence[Tensor]) -> Tensor:
        """``[R, T, ..]`` of ``[r, t, ..]`` or ``[1, t, ..]``, zero beyond."""
        whole = values[-1].new_zeros(self._count, self._width, *values[-1].shape[2:])
        for index, value in zip(self._index, values, strict=True):
            whole[index.to(value.device), : value.shape[1]] = value
        return whole

    def states(self, values: Sequence[Tensor]) -> Tensor:
        """Keys or values ``[R, H, T, e]``."""
        return self.rows([value.transpose(1, 2) for value in values]).transpose(1, 2)

    def argument(self, name: str, values: Sequence[Any]) -> Any:
        if isinstance(values[-1], tuple | list):
            return type(values[-1])(self.argument(name, v) for v in zip(*values, strict=True))
        given = [value for value in values if isinstance(value, Tensor)]
        if not given:
            return values[-1]
        key = tuple(map(id, values))
        if key not in self._made:
            self._made[key] = self._tensor(name, values, given[0])
        return self._made[key]

    def _tensor(self, name: str, values: Sequence[Any], like: Tensor) -> Tensor:
        if name == "attention_mask" and like.dim() == 4:
            return self._mask(values, like)
        if all(isinstance(value, Tensor) for value in values):
            shapes = list(zip((value.shape for value in values), self._sizes, strict=True))
            if name == "alibi":  # [r H, 1, t]
                by_row = [
                    v.view(n, -1, 1, t) for v, (n, t) in zip(values, self._sizes, strict=True)
                ]
                return self.states([value.transpose(2, 3) for value in by_row]).mT.flatten(0, 1)
            if all(len(shape) >= 2 and shape[1] == t for shape, (_, t) in shapes):
                if all(shape[0] == n for shape, (n, _) in shapes):
                    return self.rows(values)
                if all(shape[0] == 1 for shape, _ in shapes):
                    return self._widest(values, 1)
            if all(shape == (t,) for shape, (_, t) in shapes):
                return self._widest(values, 0)
            if all(
                shape == like.shape and torch.equal(v, like)
                for v, (shape, _) in zip(values, shapes, strict=True)
            ):
                return like
        raise TypeError(f"merge: {name} must be laid out in a known way, got {tuple(like.shape)}")

    def _widest(self, values: Sequence[Tensor], dim: int) -> Tensor:
        """The last, where it starts with each of the others: the same for all rows."""
        for value in values:
            if not torch.equal(values[-1].narrow(dim, 0, value.shape[dim]), value):
                raise TypeError("merge: positions must be the same for all rows, got others")
        return values[-1]

    def _mask(self, values: Sequence[Any], like: Tensor) -> Tensor:
        """``[R, h, T, T]``; None in a part is causal by a flag."""
        # No token sees the last one before its time: that entry says how this mask forbids. (Some
        # masks of truth values are True there.)
        known = [v for v in values if v is not None and v.shape[-1] > 1]
        if not known:
            raise TypeError("merge: attention_mask must forbid somewhere, got one token")
        forbids = known[-1][0, 0, 0, -1]
        shape = (self._count, like.shape[1], self._width, self._width)
        whole = forbids.expand(shape).clone()
        for index, value, (_, t) in zip(self._index, values, self._sizes, strict=True):
            if value is None:
                ones = torch.ones(t, t, dtype=torch.bool, device=like.device).tril()
                allows = ~forbids if like.dtype == torch.bool else torch.zeros_like(forbids)
                value = torch.where(ones, allows, forbids)[None, None]
            rows = index.to(like.device)
            whole[rows, :, :t, :t] = value
            # Padding, too, has to see something.
            whole[rows, :, t:, :t] = value[..., -1:, :]
        return whole
