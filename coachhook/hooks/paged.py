"""Cues beside the paged cache of continuous batching, where requests share one row of tokens.

The keys and values of a request lie in blocks of the cache, and so does what was seen of its cues:

    ages[block, e] = at the last token that was written to the block, how many tokens of its
                     request ago e's cue was seen, plus 1; 0: not at all, 255: 254 ago or more
    hits[block, e] = bit i: whether the token i before that one reached e's limit, so that two
                     tokens may make a cue across a block's end

A request goes on from the block of the token before its next one. So blocks that requests share,
requests that are forked, or thrown out and read again, and blocks that are given to others need no
bookkeeping: nothing is read of a block but what a token of the request's own text left there.
Of a cue in a forward of several blocks, what lies more than 62 tokens before the request's last is
known by its first column alone, and what reached a limit there not at all. At the blocks that end
there the cue counts as seen as late as that allows, and every token that is not known as one that
reached the limit: who goes on from them may see an edit fire that no longer would, or by the second
token of its cue alone, and loses none. Everything happens on the device, in shapes that follow the
arguments' shapes alone.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coachhook.hooks.cache_state import is_cache
from coachhook.ops.hooked_linear.cues import (
    MOST_APART,
    NEVER,
    REGISTER,
    blank_state,
    complete,
    firsts,
    registers,
    shown_at,
    since,
)

_ATTRIBUTE = "_coachhook_cues"
# Methods that copy blocks when a request is forked, of transformers 5.24 and of earlier ones.
_COPYING = ("perform_cache_copy", "copy_cache")
# The largest age that a byte holds.
_OLDEST = 255
# Tokens that a byte tells of; the first of two is at most MOST_APART before the next one.
_HITS = 8
_TOKENS_AT_ONCE = 1024
_NEEDED = ("cu_seq_lens_q", "cu_seq_lens_k", "read_index", "write_index")


def is_paged(cache: Any) -> bool:
    """Whether this is the cache of continuous batching, in which requests share one row."""
    return hasattr(cache, "update") and not is_cache(cache)


@dataclass(frozen=True)
class _Blocks:
    """How a cache lays out the blocks of one group of its layers.

    Attributes:
        group: index of the group.
        kind: the name of its attention.
        tokens: how many tokens of a request a block holds.
        slots: how far the indices of slots go from one block to the next.
        count: number of blocks, those for padding included.
        name: of the allocator, where allocators have one.
    """

    group: int
    kind: str
    tokens: int
    slots: int
    count: int
    name: str | None

    @staticmethod
    def of(cache: Any) -> _Blocks:
        """Those of the first group of full attention, whose slots are never used a second time.

        Raises:
            TypeError: the cache is laid out in another way.
        """
        try:
            if hasattr(cache, "cache_allocators"):  # transformers 5.24
                names, groups = zip(*cache.cache_allocators.items(), strict=True)
                index = _first_full(groups)
                one = groups[index]
                name, count = names[index], one.num_blocks + 2 * one.blocks_per_sector
                tokens, slots = one.tokens_per_page, one.block_physical_stride
            else:
                name, groups = None, cache.group_cache_managers
                index = _first_full(groups)
                tokens, slots, count = cache.block_size, cache.block_size, cache.num_blocks + 2
            windowed = hasattr(groups[index], "sliding_window")
            kind = "sliding_attention" if windowed else "full_attention"
            return _Blocks(index, kind, int(tokens), int(slots), int(count), name)
        except AttributeError as error:
            raise TypeError(
                "forward: the paged cache must lay out its blocks as transformers 4.57 to 5.24 "
                f"do for edits with cues, got one where {error}; use one of these versions, or "
                "edits without cues (EditConfig.cues=False)"
            ) from None


def _first_full(groups: Any) -> int:
    windowed = [hasattr(group, "sliding_window") for group in groups]
    return 0 if all(windowed) else windowed.index(False)


def _moves_blocks(cache: Any) -> bool:
    """Whether blocks are copied to the CPU and back past the cache's own methods.

    Nothing leads from a cache to the manager that does so but that the manager holds the cache.
    """
    holders = gc.get_referrers(cache)
    fields = (held if isinstance(held, dict) else getattr(held, "__dict__", {}) for held in holders)
    return any(
        known.get("_cpu_pool") is not None or known.get("_num_cpu_blocks") for known in fields
    )


class PagedCues:
    """What was seen of the cues by the text in each block of one cache, for each hooked layer.

    Args:
        cache: the paged cache.

    Attributes:
        blocks: how it lays out its blocks.
        ages: uint8 ``[blocks + 1, edits]`` by layer; the last row takes what nobody reads.
        hits: uint8 ``[blocks + 1, edits]`` by layer.
        versions: int64 ``[blocks + 1]`` by layer: of which edits that was noted.

    Raises:
        TypeError: the cache is laid out in an unknown way.
        ValueError: blocks are moved in a way that cannot be followed.
    """

    def __init__(self, cache: Any) -> None:
        self.blocks = _Blocks.of(cache)
        if _moves_blocks(cache):
            raise ValueError(
                "forward: cpu_offload_space of continuous batching must be 0 for edits with cues, "
                "got a cache whose blocks are offloaded to the CPU; leave it out, or use edits "
                "without cues (EditConfig.cues=False)"
            )
        self.ages: dict[int, Tensor] = {}
        self.hits: dict[int, Tensor] = {}
        self.versions: dict[int, Tensor] = {}

    def tables(self, layer: int, edits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept for a layer, begun anew where the number of edits is another."""
        if layer not in self.ages or self.ages[layer].shape[1] != edits:
            rows = self.blocks.count + 1
            # A manager may outlive the mode it was started in.
            with torch.inference_mode(False):
                for table in (self.ages, self.hits):
                    table[layer] = torch.zeros(rows, edits, dtype=torch.uint8, device=device)
                self.versions[layer] = torch.full((rows,), -1, device=device)
        return self.ages[layer], self.hits[layer], self.versions[layer]

    def copy_blocks(self, source: list[int], target: list[int]) -> None:
        """Take along what belongs to blocks that are copied."""
        for table in (*self.ages.values(), *self.hits.values(), *self.versions.values()):
            index = torch.tensor([target, source], device=table.device)
            table.index_copy_(0, index[0], table.index_select(0, index[1]))


class _FollowedCopy:
    """A method of one cache instance that copies blocks, and their cues with them."""

    def __init__(self, cache: Any, name: str) -> None:
        self._cache = weakref.ref(cache)
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._cache()
        cues: PagedCues = getattr(cache, _ATTRIBUTE)
        result = getattr(type(cache), self._name)(cache, *args, **kwargs)
        given = (*args, *kwargs.values())
        source, target = given[0].get(cues.blocks.name, ((), ())) if len(given) == 1 else given
        if source:
            cues.copy_blocks(list(source), list(target))
        return result


def _cues_of(cache: Any) -> PagedCues:
    cues: PagedCues | None = getattr(cache, _ATTRIBUTE, None)
    if cues is None:
        cues = PagedCues(cache)
        setattr(cache, _ATTRIBUTE, cues)
        for name in _COPYING:
            if hasattr(type(cache), name):
                setattr(cache, name, _FollowedCopy(cache, name))
    return cues


class PagedForward:
    """One forward of a paged cache: which tokens belong to which request, and where they lie.

    Args:
        cache: the paged cache.
        given: the forward's arguments by name.
        tokens: how many tokens it reads, padding included.
    """

    def __init__(self, cache: Any, given: Mapping[str, Any], tokens: int) -> None:
        self._cache = cache
        self._given = given
        self._tokens = tokens
        self._seen: set[int] = set()
        self._places: _Places | None = None

    def _located(self, cues: PagedCues) -> _Places:
        if self._places is None:
            self._places = _Places.of(cues.blocks, self._given, self._tokens)
        return self._places

    @torch.compiler.disable
    def open(self, layer: int, gaps: Tensor, version: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the requests ``[B + 1]``, and the state ``[B, 1 + 2 edits]`` of their cues.

        Args:
            layer: index of the hooked layer.
            gaps: int32 ``[edits]``, of the edits.
            version: int64, 0-dim, of the edits: what was noted of others is not taken.

        Raises:
            TypeError: the cache or the arguments are of an unknown kind.
            ValueError: blocks are moved in a way that cannot be followed.
        """
        cues = _cues_of(self._cache)
        ages, hits, versions = cues.tables(layer, gaps.shape[0], version.device)
        places = self._located(cues).to(version.device)
        known = places.going_on & (versions[places.before] == version)
        state = blank_state(known.shape[0], gaps.shape[0], version.device)
        age = (ages[places.before] * known[:, None]).long()
        # As if as many columns had been read as an age can tell of.
        state[:, 0] = _OLDEST
        firsts(state).copy_(torch.where(age > 0, _OLDEST - age, NEVER))
        apart = gaps.clamp(0, MOST_APART).long()
        # Only hits that a token to come may make a cue with: two of those that merely count as hits
        # would be a cue already.
        hit = (hits[places.before] * known[:, None]).long() & ((1 << apart) - 1)
        within = (age > 0) & (age + apart <= REGISTER)
        shown = shown_at((age - 1).clamp(min=0).minimum(REGISTER - 1 - apart), apart)
        registers(state).copy_(hit | torch.where(within, shown, 0))
        return places.bounds, state

    @torch.compiler.disable
    def close(self, layer: int, state: Tensor, gaps: Tensor, version: Tensor) -> None:
        """Note at the blocks what ``state`` says after the forward; the rest as in ``open``."""
        cues = _cues_of(self._cache)
        ages, hits, versions = cues.ages[layer], cues.hits[layer], cues.versions[layer]
        places = self._located(cues).to(version.device)
        # A long prompt's ages are worked out a part at a time: eight bytes for each of them.
        parts = (x.split(_TOKENS_AT_ONCE) for x in (places.request, places.column, places.target))
        for request, column, target in zip(*parts, strict=True):
            age, hit = _noted(state, gaps, request, column)
            ages.index_copy_(0, target, age)
            hits.index_copy_(0, target, hit)
        versions.index_copy_(0, places.target, version.expand(places.target.shape[0]))
        self._seen.add(layer)

    @torch.compiler.disable
    def pass_over(self) -> None:
        """Carry on what is known in layers that have not read the tokens of this forward."""
        cues: PagedCues | None = getattr(self._cache, _ATTRIBUTE, None)
        if cues is None:
            return
        for layer, ages in cues.ages.items():
            if layer in self._seen:
                continue
            hits, versions = cues.hits[layer], cues.versions[layer]
            places = self._located(cues).to(ages.device)
            column = places.column[:, None]
            age, hit = (
                (table[places.before] * places.going_on[:, None])[places.request].int()
                for table in (ages, hits)
            )
            older = torch.where(age > 0, (age + column).clamp(max=_OLDEST), 0)
            noted = versions[places.before]
            ages.index_copy_(0, places.target, older.to(torch.uint8))
            # Those that are further back than a byte tells of are shifted out of it.
            earlier = (hit << column.clamp(max=_HITS)) & 255
            hits.index_copy_(0, places.target, earlier.to(torch.uint8))
            versions.index_copy_(0, places.target, noted[places.request])


def _noted(state: Tensor, gaps: Tensor, request: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Age and hits uint8 ``[N, edits]`` of each cue at some tokens of a forward, from the state.

    A register tells of the last tokens of a request. A cue seen before them counts as seen at the
    latest one of which it does not tell, and what it does not tell of counts as hits.

    Args:
        state: of the cues, after the forward.
        gaps: of the edits, int32 ``[edits]``.
        request: of each token ``[N]``.
        column: of each token, see :class:`_Places`.
    """
    first, register = firsts(state)[request], registers(state)[request]
    column = column[:, None] + (_OLDEST - 1)
    left = state[:, 0][request][:, None] - 1 - column  # tokens of the request that follow
    reached = register >> left.clamp(0, REGISTER - 1)
    told = (REGISTER - left).clamp(min=0)  # how many columns the register tells of
    hits = torch.where(told > 0, reached, 0) | (-1 << told.clamp(max=_HITS))
    shown = complete(reached, gaps)
    # The youngest that the register cannot tell of.
    unknown = (told - gaps.clamp(0, MOST_APART) + 1).clamp(min=1)
    age = torch.where(told > 0, torch.where(shown == 0, unknown, since(shown)), 1)
    oldest = (column - first + 1).clamp(1, _OLDEST)
    age = torch.where(first <= column, torch.minimum(age, oldest), 0)
    return age.to(torch.uint8), (hits & 255).to(torch.uint8)


@dataclass(frozen=True)
class _Places:
    """Where the N tokens and B requests of a forward lie; rows are those of the tables.

    Attributes:
        bounds: int32 ``[B + 1]``: first token of each request, and the end of the last.
        before: row ``[B]`` of the block with the token before each request's first.
        going_on: bool ``[B]``: whether there is such a token.
        request: the request ``[N]`` of each token.
        column: its column ``[N]`` within the request's part of this forward, from 1.
        target: row ``[N]`` of the block it is written to, where it is the last such token, and
            otherwise the last row.
    """

    bounds: Tensor
    before: Tensor
    going_on: Tensor
    request: Tensor
    column: Tensor
    target: Tensor

    @staticmethod
    def of(blocks: _Blocks, given: Mapping[str, Any], tokens: int) -> _Places:
        missing = [name for name in _NEEDED if given.get(name) is None]
        if missing:
            raise TypeError(
                f"forward: the arguments of the model's base must hold {', '.join(_NEEDED)} with a "
                f"paged cache and edits with cues, got none of {', '.join(missing)}; use edits "
                "without cues (EditConfig.cues=False)"
            )
        lengths = given["cu_seq_lens_k"]
        lengths = lengths[blocks.kind] if isinstance(lengths, dict) else lengths
        # Where a batch is padded to a size, what follows the last request may be zeros.
        bounds = given["cu_seq_lens_q"].cummax(0).values
        keys = lengths.cummax(0).values.long()
        queries = bounds.long().diff()
        past = keys.diff() - queries
        token = torch.arange(tokens, device=bounds.device)
        request = torch.bucketize(token, bounds[1:].long(), right=True)
        request = request.clamp(max=queries.shape[0] - 1)
        column = token - bounds[:-1].long()[request]
        table = given.get("block_table")
        if table is not None:
            # Indices of pages, of which a block has one for each layer's keys and values.
            table = table[blocks.group].long() // (blocks.slots // blocks.tokens)
            width = table.shape[1]
            ahead = ((past - 1) // blocks.tokens).clamp(0, width - 1)
            before = table.gather(1, ahead[:, None])[:, 0]
            place = ((past[request] + column) // blocks.tokens).clamp(0, width - 1)
            row = table[request, place]
        else:
            row = given["write_index"][blocks.group].long() // blocks.slots
            read = given["read_index"][blocks.group]
            if read.shape[0]:
                last = (keys[1:] - queries - 1).clamp(0, read.shape[0] - 1)
                before = read[last].long() // blocks.slots
            else:  # nothing of any request was read before
                before, past = torch.full_like(past, blocks.count), torch.zeros_like(past)
        before, row = (
            torch.where((at >= 0) & (at < blocks.count), at, blocks.count) for at in (before, row)
        )
        latest = token.new_full((blocks.count + 1,), -1)
        latest = latest.scatter_reduce(0, row, token, "amax")
        kept = (latest[row] == token) & (token < bounds[-1])
        target = torch.where(kept, row, blocks.count)
        going_on = (past > 0) & (queries > 0)
        return _Places(bounds.int(), before, going_on, request, column + 1, target)

    def to(self, device: torch.device) -> _Places:
        """The same on another device."""
        if self.bounds.device == device:
            return self
        return _Places(*(value.to(device) for value in vars(self).values()))
