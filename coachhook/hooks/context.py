"""What the hooked layers of a model know of the forward they are part of.

Two hooks on the instance of the base model read its arguments, so that the padding mask and the KV
cache reach every layer without the user passing them on.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coachhook.hooks.cache_state import (
    GateState,
    follow,
    given_cache,
    is_cache,
    returned_cache,
    state_of,
)
from coachhook.hooks.paged import PagedForward, is_paged

GateRecord = tuple[int, Tensor, Tensor]


@dataclass
class Forward:
    """What is known of one forward.

    Attributes:
        shape: ``(B, T)`` of its tokens, None outside of a forward of the base model.
        mask: bool ``[B, T]``, True = real token; None where all are.
        cache: its KV cache, if it was given one.
        pending: what the gate has seen, until there is a cache to keep it beside.
        cacheless: whether no cache comes out of it.
        page: what is known of a paged cache, in which requests share one row, in place of the rest.
    """

    shape: tuple[int, int] | None = None
    mask: Tensor | None = None
    cache: Any = None
    pending: GateState | None = None
    cacheless: bool = True
    page: PagedForward | None = None

    def forget(self) -> None:
        """Be as outside of a forward."""
        self.shape = self.mask = self.cache = self.pending = self.page = None
        self.cacheless = True


class _Thread(threading.local):
    """What belongs to a thread: the forward that it runs. Threads do not see each other's.

    The attribute is set once, and only what it holds changes, so that every graph of a compiled
    model sees it: of a thread's own attributes dynamo of torch 2.11 reads the class's default where
    there is one, and that of 2.13 sets them where no thread finds them.
    """

    # Without it dynamo of torch 2.4 finds nothing that a thread has of its own.
    __slots__ = ()

    def __init__(self) -> None:
        self.forward = Forward()

    def __reduce__(self) -> tuple[type[_Thread], tuple[()]]:
        # A copy is in the middle of no forward.
        return _Thread, ()


class GateContext:
    """State of the running forward, shared by the hooked layers of one model.

    Attributes:
        packings: int32 boundaries of packed rows and their number of tokens, for each
            ``HookSet.packed`` block; the last one holds.
        disabled: an entry for each ``HookSet.disabled`` block, of whatever thread.
        sinks: lists that ``HookSet.record`` fills with (layer, z, fired).

    Blocks of several threads may end in any order: each takes out its own entry, by its key.
    """

    def __init__(self) -> None:
        self._thread = _Thread()
        self.packings: dict[int, tuple[Tensor, int]] = {}
        self.disabled: list[None] = []
        self.sinks: dict[int, list[GateRecord]] = {}
        self._names: Sequence[str] = ()
        self._handles: list[RemovableHandle] = []

    def watch(self, base_model: nn.Module) -> None:
        """Start reading the arguments of ``base_model``'s forward."""
        self._names = tuple(inspect.signature(base_model.forward).parameters)
        self._handles = [
            base_model.register_forward_pre_hook(self.enter, with_kwargs=True),
            base_model.register_forward_hook(self.leave, always_call=True),
        ]

    @property
    def forward(self) -> Forward:
        """What is known of the forward that the calling thread runs."""
        return self._thread.forward

    @property
    def packing(self) -> tuple[Tensor, int] | None:
        """Boundaries of packed rows and their number of tokens; None where rows are not packed."""
        packings = list(self.packings.values())
        return packings[-1] if packings else None

    @property
    def watching(self) -> bool:
        """Whether a base model is being watched."""
        return bool(self._handles)

    def release(self) -> None:
        """Stop watching; safe to call again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the arguments of a forward that starts."""
        forward = self.forward
        forward.forget()
        # Written so that dynamo of torch 2.4 follows it.
        given = {**dict(zip(self._names[: len(args)], args, strict=True)), **kwargs}
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return
        cache = given_cache(given)
        if is_paged(cache):
            forward.page = PagedForward(cache, given, tokens.shape[1])
            return
        if self.disabled:
            state = state_of(cache)
            if state is not None:
                state.pass_over(tokens.shape[1])
            return
        forward.shape = shape = (tokens.shape[0], tokens.shape[1])
        forward.cache = cache
        forward.cacheless = given.get("use_cache") is False and cache is None
        if not self.packings:
            forward.mask = token_mask(given.get("attention_mask"), shape, cache)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hand statistics begun in this forward to the cache it returns, and forget the rest."""
        forward = self.forward
        if output is not None:
            if forward.page is not None:
                forward.page.pass_over()
            elif forward.pending is not None:
                cache = returned_cache(output)
                if cache is not None:
                    follow(cache, forward.pending)
        forward.forget()

    def gate_state(self, kept: bool = True) -> GateState | None:
        """Where this forward's statistics are kept; None where no cache will carry them on.

        Args:
            kept: whether they are to be kept at all.

        Raises:
            TypeError: the cache is a legacy tuple, which cannot carry them, or a paged one, whose
                rows hold the tokens of several requests.
        """
        forward = self.forward
        if self.packings:
            return None
        if forward.page is not None:
            raise TypeError(
                "forward: the cache must hold one sequence in a row for the scopes 'sequence' and "
                "'prefix' and with include_padding, got a paged one, where requests share a row; "
                "use generate instead of continuous batching, or the scope 'population' or "
                "'membership'"
            )
        if not kept or forward.shape is None or forward.cacheless:
            return None
        if forward.cache is None:
            if forward.pending is None:
                forward.pending = GateState()
            return forward.pending
        if not is_cache(forward.cache):
            raise TypeError(
                "forward: the cache must be a transformers Cache for the scopes 'sequence' and "
                f"'prefix' and for edits with cues, got {type(forward.cache).__name__}; pass a "
                "DynamicCache, update transformers, or use the scope 'population', or 'membership' "
                "without cues"
            )
        state = state_of(forward.cache)
        if state is None:
            state = GateState()
            follow(forward.cache, state)
        return state

    @property
    def can_crop(self) -> bool:
        """Whether this forward has been given a cache that may be cropped later."""
        return hasattr(self.forward.cache, "crop")


def token_mask(attention_mask: Any, shape: tuple[int, int], cache: Any) -> Tensor | None:
    """Mask ``[B, T]`` of the current tokens, True = real, from any form of attention mask.

    A mask ``[B, K]`` covers cached and current tokens, and may go on behind them as a preallocated
    cache does. From a mask ``[B, H, T, K]`` (bool, or 0 and a large negative number) or a
    dictionary of such, a token is real where it may attend to itself. None means that every token
    is real.

    Raises:
        TypeError: a mask of another type, such as a compiled block mask.
        ValueError: a mask that does not cover the current tokens.
    """
    rows, columns = shape
    if isinstance(attention_mask, dict):
        masks = [attention_mask.get("full_attention"), *attention_mask.values()]
        attention_mask = next((mask for mask in masks if mask is not None), None)
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            "forward: attention_mask must be a tensor to tell padding from text, got "
            f"{type(attention_mask).__name__}; pass the mask [batch, tokens]"
        )
    if attention_mask.dim() == 4:
        attention_mask = attention_mask[:, 0]
    width = attention_mask.shape[-1]
    if attention_mask.dim() not in (2, 3) or attention_mask.shape[0] not in (1, rows):
        raise ValueError(
            f"forward: attention_mask must be [{rows}, K] or [{rows}, heads, {columns}, K], got "
            f"{list(attention_mask.shape)}"
        )
    if width < columns or (attention_mask.dim() == 3 and attention_mask.shape[1] != columns):
        raise ValueError(
            f"forward: attention_mask must cover the {columns} tokens of the input, got "
            f"{list(attention_mask.shape)}"
        )
    own = _own_columns(attention_mask, columns, cache).expand(rows, columns)
    if own.is_floating_point() and attention_mask.dim() == 3:
        return own > torch.finfo(own.dtype).min / 2
    return own != 0


def _own_columns(mask: Tensor, columns: int, cache: Any) -> Tensor:
    """What a mask ``[B, K]`` or ``[B, T, K]`` says of each current token itself, ``[B, T]``."""
    last_start = mask.shape[-1] - columns
    if is_cache(cache):
        past = cache.get_seq_length()
    else:
        past = 0 if cache is None and mask.dim() == 3 else last_start
    # A sliding window keeps the current tokens in its last columns, a preallocated cache behind
    # what it holds already.
    if mask.dim() == 2 and not isinstance(past, Tensor):
        start = min(past, last_start)
        return mask[:, start : start + columns]
    start = past.clamp(max=last_start) if isinstance(past, Tensor) else min(past, last_start)
    index = (torch.arange(columns, device=mask.device) + start).expand(mask.shape[0], columns)
    if mask.dim() == 2:
        return mask.gather(-1, index)
    return mask.gather(-1, index[..., None]).squeeze(-1)
