"""The part of the network above one block that a change at some tokens can reach.

A token before the first changed one keeps its keys and values in every block: they are computed
once. Each run then takes the tokens from the first changed one on, padded together with rows of
about the same number of them. The keys and values of the tokens before reach a block the way a KV
cache does, as left padding of the live tokens' own:

    keys of a block   [ padding | cached, first_r tokens | live, length_r - first_r | padding ]

Rows differ in their first changed token, so masks and positions of the full run are gathered, not
made anew: windows, biases and whatever else a family puts into its mask stay what they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.models import ForwardEnded

# What the blocks of a family, and of a version of transformers, call their KV cache.
_CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
# Tokens whose cost is that of starting one more group of rows: kernel launches and Python.
_GROUP_COST = {"cpu": 16, "cuda": 256}

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Stands in for a block's KV cache to see its keys and values, each ``[B, H, T, e]``.

    Args:
        ends: whether the forward ends here: nobody needs what the block makes of them.
    """

    _found: tuple[Tensor, Tensor] | None = None

    def __init__(self, ends: bool = False) -> None:
        self._ends = ends

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Hands back what it is given."""
        self._found = keys.detach(), values.detach()
        if self._ends:
            raise ForwardEnded
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """Tokens cached before this forward."""
        return 0

    def states(self) -> tuple[Tensor, Tensor]:
        """Keys and values.

        Raises:
            TypeError: the block has not shown any.
        """
        if self._found is None:
            raise TypeError("live: a block must fill its KV cache, got nothing")
        return self._found


class _Past:
    """A KV cache of one block that is read again and again, and never grows."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self._keys, keys], 2), torch.cat([self._values, values], 2)

    def get_seq_length(self, *_: Any) -> int:
        return self._keys.shape[2]


def named(block: nn.Module, call: Call) -> dict[str, Any]:
    """The arguments after the hidden state by name."""
    names = list(inspect.signature(block.forward).parameters)[1:]
    args, kwargs = call
    return dict(zip(names, args, strict=False)) | kwargs


def with_cache(block: nn.Module, call: dict[str, Any], cache: Any) -> dict[str, Any]:
    """The arguments with another KV cache.

    Raises:
        TypeError: the block takes none.
    """
    known = {*call, *inspect.signature(block.forward).parameters}
    for name in _CACHE_NAMES:
        if name in known:
            return call | {name: cache}
    raise TypeError(f"live: {type(block).__name__} must take a KV cache, got none of its names")


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
class _Group:
    """Rows that run together.

    Attributes:
        rows: index ``[b]`` of each among the rows of its :class:`Live`.
        columns: token ``[b, L]`` of each position.
        inside: index into ``[b, L]`` of the positions that hold a token.
        calls: arguments of each block, KV cache included.
    """

    rows: Tensor
    columns: Tensor
    inside: tuple[Tensor, Tensor]
    calls: list[dict[str, Any]]


@dataclass
class Kept:
    """What one full run leaves of R rows of T tokens.

    Attributes:
        hidden: output of the block below, ``[R, T, d]``.
        lengths: tokens of each row ``[R]``, padding at the right.
        calls: arguments of each block above, by name.
        past: keys and values of each block above, ``[R, H, T, e]``.
        limit: most keys that a block takes; None is any number.
    """

    hidden: Tensor
    lengths: Tensor
    calls: list[dict[str, Any]]
    past: list[tuple[Tensor, Tensor]]
    limit: int | None


class Live:
    """Some of the kept rows, changing from some token on.

    Args:
        kept: the full run.
        blocks: the blocks above.
        rows: index of the rows in question, ``[r]``.
        first: for each the first token that may change, ``[r]``.

    Attributes:
        hidden: output of the block below, ``[r, T, d]``.
    """

    def __init__(
        self, kept: Kept, blocks: Sequence[nn.Module], rows: Tensor, first: Tensor
    ) -> None:
        self._kept, self._blocks, self._rows = kept, blocks, rows
        self.hidden: Tensor = kept.hidden[rows]
        lengths = kept.lengths[rows]
        self._first = torch.minimum(first.to(lengths), lengths - 1)
        self._counts = lengths - self._first
        cost = _GROUP_COST.get(self.hidden.device.type, _GROUP_COST["cuda"])
        self._groups = [
            self._group(torch.tensor(fitting, device=rows.device))
            for group in pack(self._counts.tolist(), cost)
            for fitting in self._split(group)
        ]

    @property
    def tokens(self) -> int:
        """Positions run for these rows, padding included."""
        return sum(group.columns.numel() for group in self._groups)

    def select(self, rows: Tensor, first: Tensor) -> Live:
        """Some of the rows, with what may change in them."""
        return Live(self._kept, self._blocks, self._rows[rows], first)

    def run(self, hidden: Tensor, loss_index: int) -> tuple[Tensor, Tensor]:
        """As the whole suffix on ``hidden [r, T, d]``, changed from the first tokens on only.

        Before those, and in padding, what it gives is zero.
        """
        last = len(self._blocks) - 1
        seen: dict[int, list[Tensor]] = {loss_index: [], last: []}
        for group in self._groups:
            states = hidden[group.rows[:, None], group.columns]
            if -1 in seen:
                seen[-1].append(states[group.inside])
            for index, (block, call) in enumerate(zip(self._blocks, group.calls, strict=True)):
                output = block(states, **call)
                states = output if isinstance(output, Tensor) else output[0]
                if index in seen:
                    seen[index].append(states[group.inside])
        rows = torch.cat([g.rows[g.inside[0]] for g in self._groups])
        columns = torch.cat([g.columns[g.inside] for g in self._groups])
        whole = {
            index: torch.zeros_like(hidden).index_put((rows, columns), torch.cat(parts))
            for index, parts in seen.items()
        }
        return whole[loss_index], whole[last]

    def _split(self, group: list[int]) -> list[list[int]]:
        """The group in parts that do not have more keys than a block takes."""
        keys = int(self._first[group].max()) + int(self._counts[group].max())
        if self._kept.limit is None or keys <= self._kept.limit or len(group) == 1:
            return [group]
        half = len(group) // 2
        return self._split(group[:half]) + self._split(group[half:])

    def _group(self, rows: Tensor) -> _Group:
        kept, width = self._kept, self.hidden.shape[1]
        first, counts = self._first[rows][:, None], self._counts[rows][:, None]
        before, live = int(first.max()), int(counts.max())
        # Tokens that the keys of a block belong to: cached ones, then live ones; -1 is padding.
        keys = torch.arange(before + live, device=rows.device) - before + first
        keys = keys.masked_fill(keys >= width, -1).clamp_min(-1)
        number = torch.arange(live, device=rows.device)
        columns = (number + first).clamp_max(width - 1)
        inside = (number < counts).nonzero(as_tuple=True)
        gather = _Gather(kept.hidden.shape[:2], self._rows[rows], columns, keys, before)
        calls = [
            with_cache(block, gather.call(call), _Past(gather.cached(k), gather.cached(v)))
            for block, call, (k, v) in zip(self._blocks, kept.calls, kept.past, strict=True)
        ]
        return _Group(rows, columns, (inside[0], inside[1]), calls)


class _Gather:
    """What a block is given for some rows from their first tokens on."""

    def __init__(
        self, shape: Sequence[int], rows: Tensor, columns: Tensor, keys: Tensor, before: int
    ) -> None:
        self._batch, self._width = shape
        self._rows, self._columns, self._keys, self._before = rows, columns, keys, before
        # Blocks are given the same tensors, which are gathered once.
        self._made: dict[int | None, Tensor] = {}

    def call(self, arguments: dict[str, Any]) -> dict[str, Any]:
        made = {name: self._value(name, value) for name, value in arguments.items()}
        if "attention_mask" in made and made["attention_mask"] is None:
            # Causal by a flag, which would take the first live token for the first of all.
            if None not in self._made:
                ones = torch.ones(self._width, self._width, dtype=torch.bool)
                self._made[None] = self._mask(ones.tril()[None, None].to(self._rows.device))
            made["attention_mask"] = self._made[None]
        return made

    def cached(self, states: Tensor) -> Tensor:
        """Keys or values ``[b, H, before, e]`` of the tokens before the live ones."""
        at = self._keys[:, : self._before].clamp_min(0)
        rows, at = self._rows.to(states.device), at.to(states.device)
        return states.transpose(1, 2)[rows[:, None], at].transpose(1, 2)

    def _value(self, name: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._value(name, v) for v in value)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = self._tensor(name, value)
        return self._made[id(value)]

    def _tensor(self, name: str, value: Tensor) -> Tensor:
        shape, width = value.shape, self._width
        if value.dim() == 4 and shape[2:] == (width, width):
            return self._mask(value)
        if name == "alibi":  # [B H, 1, T]
            by_row = value.view(self._batch, -1, 1, width)[self._rows.to(value.device)]
            keys = self._keys.clamp_min(0).to(value.device)[:, None, None]
            return by_row.gather(3, keys.expand(*by_row.shape[:3], -1)).flatten(0, 1)
        if value.dim() >= 2 and shape[0] in (1, self._batch) and shape[1] == width:
            rows = self._row_index(value)
            return value[rows[:, None], self._columns.to(value.device)]
        if name == "cache_position":
            first = self._before
            return torch.arange(first, first + self._columns.shape[1], device=value.device)
        return value

    def _mask(self, value: Tensor) -> Tensor:
        """Mask ``[b, H, L, before + L]`` from a mask ``[B, H, T, T]`` of any kind."""
        rows = self._row_index(value)[:, None, None]
        columns, keys = (x.to(value.device) for x in (self._columns, self._keys))
        # No token sees the last one before its time: that entry says how this mask forbids.
        padding = (keys < 0)[:, None]
        queries = columns[:, :, None].masked_fill(padding, 0)
        seen = keys[:, None].expand(-1, columns.shape[1], -1)
        seen = seen.masked_fill(padding, self._width - 1)
        return value.permute(0, 2, 3, 1)[rows, queries, seen].permute(0, 3, 1, 2)

    def _row_index(self, value: Tensor) -> Tensor:
        rows = self._rows.to(value.device)
        return rows if value.shape[0] == self._batch else torch.zeros_like(rows)
