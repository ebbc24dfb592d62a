"""What the gate has seen, beside a KV cache, which it follows through beam search and crops.

Statistics, and the columns at which cues were seen, hang on the cache object itself, so that they
are dropped, copied and pickled with it. The methods that rearrange a cache are shadowed on the
instance; its class is left alone.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coachhook.ops.hooked_linear.cues import (
    blank_state,
    cut_back_,
    forget_,
    pass_over_,
    state_width,
)

_ATTRIBUTE = "_coachhook_gate"
_REARRANGING = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset")

# What transformers calls a model's cache, in its arguments and its outputs: since 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")

Key = tuple[int, str]


@dataclass
class History:
    """Norms of the tokens of one layer, kept so that a running mean can be taken back.

    The norm of a token that came alone is not asked of the gate a second time: it follows from the
    moments before and after it.

    Attributes:
        start: moments ``[B, 3]`` before the first column.
        norms: ``[B, columns]`` float64, NaN for padding.
        before: moments before the last token, where its norm is still to be worked out.
    """

    start: Tensor
    norms: Tensor
    before: Tensor | None = None

    def append(self, norms: Tensor) -> None:
        """Add the columns of a forward of several tokens."""
        self.norms = torch.cat((self.norms, norms.to(self.norms.dtype)), dim=1)

    def settle(self, moments: Tensor) -> None:
        """Add the column of a token that came alone, given the moments after it."""
        if self.before is None:
            return
        (count_before, mean_before, _), (count, mean, _) = self.before.T, moments.T
        norm = mean_before + (mean - mean_before) * count
        self.append(torch.where(count > count_before, norm, float("nan"))[:, None])
        self.before = None

    def take_back(self, columns: int) -> Tensor:
        """Drop the last columns; the moments ``[B, 3]`` of what is left."""
        self.norms = self.norms[:, : self.norms.shape[1] - columns]
        real = ~self.norms.isnan()
        count = real.sum(1).to(self.norms.dtype)
        mean = self.norms.nansum(1) / count.clamp(min=1)
        m2 = (self.norms - mean[:, None]).square().nansum(1)
        # Two samples joined: Chan, Golub, LeVeque 1983.
        count_start, mean_start, m2_start = self.start.T
        total, gap = count_start + count, mean - mean_start
        share = count / total.clamp(min=1)
        joined = (
            total,
            mean_start + gap * share,
            m2_start + m2 + gap.square() * count_start * share,
        )
        return torch.stack(joined, dim=-1)


def _writable(table: dict[Key, Tensor], key: Key) -> Tensor:
    """An entry, copied where it was made in inference mode, outside of which it is read-only."""
    kept = table[key]
    if torch.compiler.is_compiling():  # dynamo cannot be asked
        return kept
    if kept.is_inference() and not torch.is_inference_mode_enabled():
        table[key] = kept = kept.clone()
    return kept


@dataclass
class GateState:
    """What the gate has seen of each row of one cache, per layer and scope.

    Attributes:
        moments: (count, mean, M2), float64 ``[B, 3]``: the prompt's for ``sequence``, the running
            ones for ``prefix``. For ``membership`` the cues seen, int64 ``[B, 1 + 2 edits]``.
        histories: what ``prefix`` needs to be taken back, per layer.
        versions: which edits the cues seen are of, 0-dim, per layer and scope.
        gaps: of these edits, int32 ``[edits or more]``, per layer and scope: the hook's own buffer,
            so that no step has to copy it. Once it holds those of other edits the version is
            another, too, and what a crop makes of the registers is forgotten before it is read.
    """

    moments: dict[Key, Tensor] = field(default_factory=dict)
    histories: dict[int, History] = field(default_factory=dict)
    versions: dict[Key, Tensor] = field(default_factory=dict)
    gaps: dict[Key, Tensor] = field(default_factory=dict)

    def get(self, key: Key, rows: int) -> Tensor | None:
        """The moments kept for a layer, None if this is the first it sees of the cache.

        Raises:
            ValueError: they were kept for another number of rows.
        """
        if key not in self.moments:
            return None
        kept = _writable(self.moments, key)
        if kept.shape[0] != rows:
            raise ValueError(
                f"forward: the batch must have the {kept.shape[0]} rows its cache was filled with, "
                f"got {rows}; expand a cache with batch_repeat_interleave"
            )
        return kept

    def open(self, key: Key, rows: int, device: torch.device) -> Tensor:
        """Start empty moments ``[B, 3]`` for a layer."""
        self.moments[key] = torch.zeros(rows, 3, dtype=torch.float64, device=device)
        return self.moments[key]

    def cues(self, key: Key, rows: int, edits: int, version: Tensor, gaps: Tensor) -> Tensor:
        """State of a layer's cues ``[B, 1 + 2 edits]``, begun anew where the edits are others.

        Args:
            key: layer and scope.
            rows: B.
            edits: number of edits.
            version: int64, 0-dim: another number for other edits. Compared on its device, so that a
                graph compiled or captured before a change stays right after it.
            gaps: int32 ``[edits or more]``, the hook's buffer; see the attribute.

        Raises:
            ValueError: it was kept for another number of rows.
        """
        kept = self.get(key, rows)
        # Each time: a hook may have got another buffer, with room for more edits.
        self.gaps[key] = gaps
        if kept is None or kept.shape[1] != state_width(edits):
            self.moments[key] = blank_state(rows, edits, version.device)
            self.versions[key] = version.clone()
            return self.moments[key]
        known = _writable(self.versions, key)
        forget_(kept, known != version)
        known.copy_(version)
        return kept

    def clear(self) -> None:
        """Forget everything, as if the cache were new."""
        self.moments.clear()
        self.histories.clear()
        self.versions.clear()
        self.gaps.clear()

    def history(self, layer: int, moments: Tensor) -> History:
        """The history of a layer up to ``moments``, begun here if there is none."""
        history = self.histories.get(layer)
        if history is None:
            history = History(moments.clone(), moments.new_zeros(moments.shape[0], 0))
            self.histories[layer] = history
        history.settle(moments)
        return history

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to every tensor's rows."""
        for key, moments in self.moments.items():
            self.moments[key] = change(moments)
        for history in self.histories.values():
            history.start = change(history.start)
            history.norms = change(history.norms)
            history.before = None if history.before is None else change(history.before)

    def pass_over(self, columns: int) -> None:
        """Count columns that the cache takes in while hooks are disabled, as if they were padding.

        A crop may take them back.
        """
        for key, kept in list(self.moments.items()):
            layer, kind = key
            if kind == "membership":
                pass_over_(_writable(self.moments, key), columns)
            elif kind == "prefix" and layer in self.histories:
                history = self.history(layer, kept)
                history.append(kept.new_full((kept.shape[0], columns), float("nan")))

    def take_back(self, columns: int) -> None:
        """Undo the last ``columns`` columns of the running moments and of the cues seen.

        The moments of a prompt (``sequence``) stay: they were settled when it was read.

        Raises:
            ValueError: the tokens to take back were not recorded.
        """
        if columns == 0:
            return
        running = {layer: kept for (layer, kind), kept in self.moments.items() if kind == "prefix"}
        for layer, moments in running.items():
            if self.history(layer, moments).norms.shape[1] < columns:
                raise ValueError(
                    "crop: the scope 'prefix' can take back only what was read, not compiled, into "
                    "a cache passed to the model; pass an empty DynamicCache with the prompt, or "
                    "use the scope 'population' or 'membership'"
                )
        for layer in running:
            moments = _writable(self.moments, (layer, "prefix"))
            moments.copy_(self.histories[layer].take_back(columns))
        for key in list(self.moments):
            if key[1] == "membership":
                kept = _writable(self.moments, key)
                cut_back_(kept, columns, self.gaps[key][: kept.shape[1] // 2])


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
        # A static cache gives a tensor that the crop itself changes: hence a number.
        before = int(cache.get_seq_length()) if self._name == "crop" else 0
        result = getattr(type(cache), self._name)(cache, *args, **kwargs)
        if self._name == "reset":
            state.clear()
        elif self._name == "crop":
            after = int(cache.get_seq_length())
            state.take_back(before - after) if after else state.clear()
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


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """``cache`` under the name that ``model.forward`` has for it."""
    known = inspect.signature(model.forward).parameters
    return {next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[-1]): cache}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments by name; None where there is none."""
    for name in CACHE_NAMES:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def returned_cache(output: Any) -> Any:
    """The cache that a model returns, alone in a tuple or by name; None where there is none."""
    values = list(output) if type(output) is tuple else []
    values += [getattr(output, name, None) for name in CACHE_NAMES]
    return next((value for value in values if is_cache(value)), None)


def state_of(cache: Any) -> GateState | None:
    """The gate's statistics kept beside ``cache``, if any."""
    return getattr(cache, _ATTRIBUTE, None)


def follow(cache: Any, state: GateState) -> None:
    """Keep ``state`` beside ``cache`` and let it follow every rearrangement."""
    setattr(cache, _ATTRIBUTE, state)
    for name in _REARRANGING:
        if hasattr(type(cache), name):
            setattr(cache, name, _FollowedMethod(cache, name))
