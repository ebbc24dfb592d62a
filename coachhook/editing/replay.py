"""Runs of the network's upper part that are captured in CUDA graphs and replayed."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coachhook.editing.live import Live

# Of these the host has to know a result before it can go on.
_READ_BACK = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.allclose.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten.unique_consecutive.default,
    torch.ops.aten.bincount.default,
    torch.ops.aten.repeat_interleave.Tensor,  # unless it is told the length of the result
}
_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
}
# The last takes a number on the host to the GPU; products and sums read it as they start.
_COPIES = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.where.self,
}


class Watch(TorchDispatchMode):
    """Sees whether what is run inside could be captured in a CUDA graph.

    A capture that fails leaves torch's allocator in a state in which later calls may crash, so it
    is not tried to find out.

    Attributes:
        refused: names of operations that cannot be: the host reads a result, or something is copied
            between host and GPU, or two GPUs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        devices = {x.device for x in (*args, result) if isinstance(x, Tensor)}
        reads = func in _READ_BACK and kwargs.get("output_size") is None
        if func in _INDEXING:  # by a mask: how many it chooses is the shape of the result
            indices = [i for i in args[1] if i is not None]
            devices.update(i.device for i in indices)
            reads = any(i.dtype in (torch.bool, torch.uint8) for i in indices)
        if reads or (func in _COPIES | _INDEXING and len(devices) > 1):
            self.refused.add(str(func))
        return result


class Replayed:
    """The run of a :class:`Live`: the first time as it is, then captured, then replayed.

    What :meth:`run` returns is overwritten by the next replay. Graphs are freed with the object.

    Args:
        live: the run.
        watched: whether the blocks were seen to do nothing that cannot be captured: the first run
            is replayed already then.

    Attributes:
        hidden: as of the :class:`Live`.
        refused: operations for which it is not captured; None before a first run that is watched.
    """

    def __init__(self, live: Live, *, watched: bool = False) -> None:
        self._live, self.hidden = live, live.hidden
        self.refused: set[str] | None = set() if watched else None
        self._graph: Callable[[Tensor], tuple[Tensor, ...]] | None = None

    @property
    def replays(self) -> bool:
        """Whether it has been captured."""
        return self._graph is not None

    def run(self, hidden: Tensor, loss_index: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Live.run`, always with the same ``loss_index``."""
        if self.refused is None:
            with Watch() as watch:
                found = self._live.run(hidden, loss_index)
            self.refused = watch.refused
            return found
        if self.refused or not hidden.is_cuda:
            return self._live.run(hidden, loss_index)
        if self._graph is None:
            self._graph = self._captured(hidden, loss_index)
            weakref.finalize(self, _let_go, self._graph).atexit = False
        states = self._graph(hidden)
        return states[0], states[-1]

    def _captured(self, hidden: Tensor, loss_index: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
        def call(states: Tensor) -> tuple[Tensor, ...]:
            at_loss, last = self._live.run(states, loss_index)
            return (last,) if at_loss is last else (at_loss, last)

        sample = hidden.detach().clone().requires_grad_(True)
        # One call before the capture readies the libraries on its stream.
        with warnings.catch_warnings():
            # Nothing is accumulated: the gradient is asked for, and the sample is thrown away.
            warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
            with _capturing_on(hidden.device):
                graph: Any = torch.cuda.make_graphed_callables(call, (sample,), num_warmup_iters=1)
        return graph

    def select(self, rows: Tensor, first: Tensor, wanted: Tensor | None = None) -> Live:
        """As :meth:`Live.select`."""
        return self._live.select(rows, first, wanted)


@contextmanager
def _capturing_on(device: torch.device) -> Iterator[None]:
    """Makes a GPU the one that is captured on: what another one does is in no graph.

    torch captures on one stream, which belongs to the GPU that the process has first captured on.
    """
    of = torch.cuda.graph
    before = of.default_capture_stream
    with torch.cuda.device(device):
        if before is not None and before.device != device:
            of.default_capture_stream = None
        try:
            yield
        finally:
            of.default_capture_stream = before or of.default_capture_stream


def _let_go(graph: Any) -> None:
    """Frees what torch captured for a function, which is not to be called again.

    torch keeps it in methods of a class, and a class refers to itself: the graphs and their memory
    would stay until the collector looks at its oldest objects, many batches later. To have it look
    at all objects takes tenths of a second.
    """
    for cell in graph.__closure__ or ():
        held = cell.cell_contents
        if isinstance(held, type) and issubclass(held, torch.autograd.Function):
            for name in {"forward", "backward"} & vars(held).keys():
                delattr(held, name)
