"""Forward passes that end as soon as what is wanted has been seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
