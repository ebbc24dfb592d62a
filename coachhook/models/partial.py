"""Forward passes that end as soon as what is wanted has been seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class ForwardEnded(Exception):
    """Raised by a hook to end a :func:`partial_forward` whose remainder nobody needs."""


@contextmanager
def partial_forward(*handles: RemovableHandle) -> Iterator[None]:
    """Run a forward pass that one of its hooks may end by raising :class:`ForwardEnded`.

    Args:
        handles: of hooks registered for this pass; they are removed afterwards, whatever happens.
    """
    try:
        yield
    except ForwardEnded:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skipped(blocks: Sequence[nn.Module], rest: tuple[Any, ...] | None) -> Iterator[None]:
    """Blocks hand on the hidden state they are given, alone or (``rest``) first in a tuple."""

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if rest is None else (hidden_states, *rest)

    # A device map, for one, has put another forward there already.
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            vars(block)["forward"] = forward
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = own
