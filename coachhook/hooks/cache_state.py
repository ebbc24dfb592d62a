"""Statistics of the gate that live beside a KV cache, and follow it through beam search and crops.

The statistics hang on the cache object itself, so that they are dropped, copied and pickled with
it. The methods that rearrange a cache are shadowed on the instance; its class is left alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "_coachhook_gate"
_REARRANGING = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset")

Key = tuple[int, str]


@dataclass
class Chunk:
    """One forward's worth of columns of one layer, kept so that a prefix can be taken back.

    Attributes:
        columns: number of columns T of the forward.
        before: moments ``[B, 3]`` before it.
        norms: ``[B, T]`` the norms of its tokens, None for a chunk of one.
        mask: ``[B, T]`` bool, None where every token is real.
    """

    columns: int
    before: Tensor
    norms: Tensor | None
    mask: Tensor | None


@dataclass
class GateState:
    """Moments (count, mean, M2) of each row ``[B, 3]`` float64, per layer and scope, of one cache.

    Attributes:
        moments: the prompt's moments for ``sequence``, the running ones for ``prefix``.
        chunks: what ``prefix`` needs to be taken back column by column, oldest first.
    """

    moments: dict[Key, Tensor] = field(default_factory=dict)
    chunks: dict[int, list[Chunk]] = field(default_factory=dict)

    def get(self, key: Key, rows: int) -> Tensor | None:
        """The moments kept for a layer, None if this is the first it sees of the cache.

        Raises:
            ValueError: they were kept for another number of rows.
        """
        kept = self.moments.get(key)
        if kept is not None and kept.shape[0] != rows:
            raise ValueError(
                f"forward: the batch must have the {kept.shape[0]} rows its cache was filled with, "
                f"got {rows}; expand a cache with batch_repeat_interleave"
            )
        return kept

    def open(self, key: Key, rows: int, device: torch.device) -> Tensor:
        """Start empty moments ``[B, 3]`` for a layer."""
        self.moments[key] = torch.zeros(rows, 3, dtype=torch.float64, device=device)
        return self.moments[key]

    def clear(self) -> None:
        """Forget everything, as if the cache were new."""
        self.moments.clear()
        self.chunks.clear()

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to every tensor's rows."""
        for key, moments in self.moments.items():
            self.moments[key] = change(moments)
        for chunks in self.chunks.values():
            for chunk in chunks:
                chunk.before = change(chunk.before)
                chunk.norms = None if chunk.norms is None else change(chunk.norms)
                chunk.mask = None if chunk.mask is None else change(chunk.mask)

    def take_back(self, columns: int) -> None:
        """Undo the last ``columns`` columns of the running moments.

        The moments of a prompt (``sequence``) stay: they were settled when it was read.

        Raises:
            ValueError: the tokens to take back were not recorded.
        """
        for (layer, kind), moments in self.moments.items():
            if kind == "prefix":
                moments.copy_(_rewound(self.chunks.get(layer, []), columns, moments))


def _rewound(chunks: list[Chunk], columns: int, moments: Tensor) -> Tensor:
    while columns:
        if not chunks:
            raise ValueError(
                "crop: the scope 'prefix' can take back only what was read into a cache passed to "
                "the model; pass an empty DynamicCache with the prompt, or use the scope "
                "'population' or 'membership'"
            )
        chunk = chunks.pop()
        moments = chunk.before
        if chunk.columns > columns and chunk.norms is not None:
            left = chunk.columns - columns
            norms = chunk.norms[:, :left]
            mask = None if chunk.mask is None else chunk.mask[:, :left]
            chunks.append(Chunk(left, chunk.before, norms, mask))
            return extended(chunk.before, norms, mask)
        columns -= chunk.columns
    return moments


def extended(moments: Tensor, norms: Tensor, mask: Tensor | None) -> Tensor:
    """Moments ``[B, 3]`` after the real ones of ``norms [B, T]`` have joined (Welford 1962)."""
    count, mean, m2 = moments.unbind(-1)
    for column in range(norms.shape[1]):
        gap = norms[:, column].to(mean.dtype) - mean
        real = torch.ones_like(count)
        if mask is not None:
            real = mask[:, column].to(count.dtype)
            gap = torch.where(mask[:, column], gap, 0.0)
        count = count + real
        step = gap / count.clamp(min=1)
        m2 = m2 + step * gap * (count - 1)
        mean = mean + step
    return torch.stack((count, mean, m2), dim=-1)


class _FollowedMethod:
    """A method of one cache instance that rearranges the gate's statistics with it."""

    def __init__(self, cache: Any, name: str) -> None:
        # The cache holds this object: a strong reference would keep its memory until a garbage
        # collection.
        self._cache = weakref.ref(cache)
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._cache()
        if cache is None:
            raise RuntimeError(
                f"{self._name}: a shallow copy of a cache cannot outlive the original while hooks "
                "follow it; use copy.deepcopy"
            )
        state: GateState = getattr(cache, _ATTRIBUTE)
        before = cache.get_seq_length() if self._name == "crop" else 0
        result = getattr(type(cache), self._name)(cache, *args, **kwargs)
        if self._name == "reset":
            state.clear()
        elif self._name == "crop":
            after = cache.get_seq_length()
            state.take_back(int(before - after)) if after else state.clear()
        elif self._name == "batch_repeat_interleave":
            (repeats,) = (*args, *kwargs.values())
            state.map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))
        else:
            (index,) = (*args, *kwargs.values())
            state.map_rows(lambda rows: rows[torch.as_tensor(index, device=rows.device)])
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        # Both copy.deepcopy and pickle hand over the new cache here, not the old one.
        return _FollowedMethod, (self._cache(), self._name)


def is_cache(value: Any) -> bool:
    """Whether ``value`` is a cache object of transformers (not a legacy tuple)."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def state_of(cache: Any) -> GateState | None:
    """The gate's statistics kept beside ``cache``, if any."""
    return getattr(cache, _ATTRIBUTE, None)


def follow(cache: Any, state: GateState) -> None:
    """Keep ``state`` beside ``cache`` and let it follow every rearrangement."""
    setattr(cache, _ATTRIBUTE, state)
    for name in _REARRANGING:
        if hasattr(type(cache), name):
            setattr(cache, name, _FollowedMethod(cache, name))
