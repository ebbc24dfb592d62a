"""The part of the network above one block that a change at some tokens can reach.

A token before the first changed one keeps its keys and values in every block: they are computed
once. Each run then takes the tokens from the first changed one on, padded together with rows of
about the same number of them. The keys and values of the tokens before reach a block the way a KV
cache does, as left padding of the live tokens' own:

    keys of a block   [ padding | cached, first_r tokens | live, length_r - first_r | padding ]

Of the last block only some tokens' outputs are asked for. It is run up to its KV cache for the keys
and values of all live tokens, then whole for those few.

Rows differ in their first changed token, so masks and positions of the full run are gathered, not
made anew: windows, biases and whatever else a family puts into its mask stay what they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.editing.packing import Kept, group_cost, pack
from coachhook.models import ForwardEnded

# What the blocks of a family, and of a version of transformers, call their KV cache.
_CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
Call = tuple[tuple[Any, ...], dict[str, Any]]


def first_tensor(output: Any) -> Tensor:
    """A block's hidden state: blocks return it alone or first in a tuple, depending on version."""
    return output if isinstance(output, Tensor) else output[0]


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
        self._found = keys, values
        if self._ends:
            raise ForwardEnded
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """Tokens cached before this forward."""
        return 0

    def states(self) -> tuple[Tensor, Tensor]:
        """Keys and values, part of the graph where there is one.

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

    def grown(self, keys: Tensor, values: Tensor) -> _Complete:
        """The cache with the live tokens in."""
        return _Complete(*self.update(keys, values))


class _Complete(_Past):
    """A KV cache that holds the tokens asked about, too."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._keys, self._values


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


@dataclass
class _Group:
    """Rows that run together.

    Attributes:
        rows: index ``[b]`` of each among the rows of its :class:`Live`.
        columns: token ``[b, L]`` of each position.
        inside: index into ``[b, L]`` of the positions that hold a token.
        calls: arguments of each block, KV cache included.
        past: KV cache of the last block.
        ask: how the last block is asked about the wanted tokens alone; None where that saves
            little.
    """

    rows: Tensor
    columns: Tensor
    inside: tuple[Tensor, Tensor]
    calls: list[dict[str, Any]]
    past: _Past
    ask: _Ask | None


@dataclass
class _Ask:
    """The wanted tokens of a group's rows.

    Attributes:
        positions: among the row's live tokens ``[b, W]``.
        inside: index into ``[b, W]`` of those that are wanted.
        call: arguments of the last block for them, KV cache excluded.
    """

    positions: Tensor
    inside: tuple[Tensor, Tensor]
    call: dict[str, Any]


class Live:
    """Some of the kept rows, changing from some token on.

    Args:
        kept: the full run.
        blocks: the blocks above.
        rows: index of the rows in question, ``[r]``.
        first: for each the first token that may change, ``[r]``.
        wanted: the tokens whose state at the end is asked for, bool ``[r, T]``; None is all.
        least: so many tokens must be left out of the last block for it to be asked about those
            alone; None is as many as one more group of rows costs.

    Attributes:
        hidden: output of the block below, ``[r, T, d]``.
    """

    def __init__(
        self,
        kept: Kept,
        blocks: Sequence[nn.Module],
        rows: Tensor,
        first: Tensor,
        wanted: Tensor | None = None,
        least: int | None = None,
    ) -> None:
        self._kept, self._blocks, self._rows, self._wanted = kept, blocks, rows, wanted
        self.hidden: Tensor = kept.hidden[rows]
        lengths = kept.lengths[rows]
        self._first = torch.minimum(first.to(lengths), lengths - 1)
        self._counts = lengths - self._first
        cost = group_cost(self.hidden.device)
        self._least = cost if least is None else least
        # A row of which nothing is asked is not run.
        asked = torch.arange(len(rows)) if wanted is None else wanted.any(1).nonzero()[:, 0].cpu()
        self._groups = [
            self._group(torch.tensor(fitting, device=rows.device))
            for group in pack(self._counts[asked.to(rows.device)].tolist(), cost)
            for fitting in self._split(asked[group].tolist())
        ]

    @property
    def tokens(self) -> int:
        """Positions run for these rows, padding included."""
        return sum(group.columns.numel() for group in self._groups)

    def select(self, rows: Tensor, first: Tensor, wanted: Tensor | None = None) -> Live:
        """Some of the rows, with what may change in them and what is asked for."""
        return Live(self._kept, self._blocks, self._rows[rows], first, wanted)

    def run(self, hidden: Tensor, loss_index: int) -> tuple[Tensor, Tensor]:
        """As the whole suffix on ``hidden [r, T, d]``, changed from the first tokens on only.

        Before those, in padding, and at the end where a token is not wanted, what it gives is zero
        or as the whole suffix gives it.
        """
        last = len(self._blocks) - 1
        seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {loss_index: [], last: []}
        for group in self._groups:
            states = hidden[group.rows[:, None], group.columns]
            rows, columns = group.rows[group.inside[0]], group.columns[group.inside]
            if -1 in seen:
                seen[-1].append((rows, columns, states[group.inside]))
            for index, (block, call) in enumerate(zip(self._blocks, group.calls, strict=True)):
                if index == last and group.ask is not None:
                    seen[last].append(self._asked(group, group.ask, states))
                    break
                states = first_tensor(block(states, **call))
                if index in seen:
                    seen[index].append((rows, columns, states[group.inside]))
        whole = {}
        for index, parts in seen.items():
            rows, columns, states = (torch.cat(part) for part in zip(*parts, strict=True))
            whole[index] = torch.zeros_like(hidden).index_put((rows, columns), states)
        return whole[loss_index], whole[last]

    def _asked(self, group: _Group, ask: _Ask, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row, token and state at the end of the wanted tokens."""
        block, recorder = self._blocks[-1], Recorder(ends=True)
        with suppress(ForwardEnded):
            block(states, **with_cache(block, group.calls[-1], recorder))
        call = with_cache(block, ask.call, group.past.grown(*recorder.states()))
        each = torch.arange(len(states), device=states.device)[:, None]
        given = first_tensor(block(states[each, ask.positions], **call))
        rows, columns = group.rows[:, None], group.columns.gather(1, ask.positions)
        return rows[ask.inside[0], 0], columns[ask.inside], given[ask.inside]

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
        past = [_Past(gather.cached(k), gather.cached(v)) for k, v in kept.past]
        calls = [
            with_cache(block, gather.call(call), cache)
            for block, call, cache in zip(self._blocks, kept.calls, past, strict=True)
        ]
        ask = None
        if self._wanted is not None:
            wanted = self._wanted[rows[:, None], columns] & (number < counts)
            most = max(1, int(wanted.sum(1).max()))
            if len(rows) * (live - most) >= self._least:
                # Where a row has fewer wanted ones, any others make up the number. In order, as
                # GPT-Neo takes the queries for the last tokens, which is no harm then.
                chosen = wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)
                positions = chosen[:, :most].sort(dim=1).values
                real = wanted.gather(1, positions).nonzero(as_tuple=True)
                asked = columns.gather(1, positions)
                narrow = _Gather(kept.hidden.shape[:2], self._rows[rows], asked, keys, before)
                ask = _Ask(positions, (real[0], real[1]), narrow.call(kept.calls[-1]))
        return _Group(rows, columns, (inside[0], inside[1]), calls, past[-1], ask)


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
