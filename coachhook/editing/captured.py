"""Appending keys to an edit space, on a GPU as one CUDA graph.

The few products of an append take less time than Python and the libraries need to enqueue them, so
that they are captured once and replayed. A graph has fixed addresses and shapes, therefore:

* It works on the whole capacity of the space's buffers. How many keys there are is a number on the
  device, ``at``: overlaps with rows from there on are masked, and new rows are written by index.
* Keys are padded by zeros to 32, 64 or 128. A zero key has ``y = 0``, a zero border and a unit
  corner: it changes nothing, and lies behind the last key, where the next batch overwrites it.
* The border ``R^-1 K^T Y`` of the root R is a product with the explicit inverse, which grows by
  bordering like R itself, instead of a solve whose steps wait for one another. R is well
  conditioned: its squared pivots are at most 1e6 apart, or all keys are folded.

What needs only the keys runs beside the first solve with the prior, and the corner's factor beside
the second one, on a second stream. All checks come back as one list of numbers.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from coachhook.editing.edit_space import PIVOT_LIMIT, Buffers, EditSpace
from coachhook.editing.prior import FactoredPrior, by_row, check_finite
from coachhook.ops.cholesky import native

# Batches are padded to a power of two between these. Larger ones keep a GPU busy without a graph.
_LEAST_KEYS, _MOST_KEYS = 32, 128
# Rows of the buffers: few captures while the first batches come.
_LEAST_ROWS, _MULTIPLE = 256, 64
# The run of a step that is followed by a capture, which costs about ten of them.
_CAPTURED_RUN = 2
# All graphs share scratch and host memory, so one must have been read before another one runs.
_ONE_AT_A_TIME = threading.Lock()


def appended(
    space: EditSpace, prior: FactoredPrior, keys: Tensor, targets: Tensor
) -> tuple[EditSpace, bool]:
    """Adds keys K [n, k], k >= 1, and targets [m, k], both on the prior's device.

    Returns:
        The new space, and whether solutions with it keep most of their digits. Where they do not,
        its root may be NaN.

    Raises:
        ValueError: NaN or Inf in the keys or targets, or keys too large to be squared. ``space``
            stays as it was.
    """
    if _takes(prior, keys.shape[1]):
        with _ONE_AT_A_TIME:
            return _in_fixed_shapes(space, prior, keys, targets)
    rows, wanted = (by_row(x, prior.factor.dtype) for x in (keys, targets))
    space, bounded = space.append(prior, rows, wanted)
    # The one time that the host waits for a GPU.
    checks = [*(torch.isfinite(x).all() for x in (rows, wanted)), bounded, space.conditioned]
    finite_keys, finite_targets, is_bounded, conditioned = torch.stack(checks).tolist()
    if not (finite_keys and finite_targets and is_bounded):
        _refuse(rows, wanted)
    return space, conditioned


def _takes(prior: FactoredPrior, keys: int) -> bool:
    """Whether so many keys are appended in fixed shapes."""
    if not prior.in_blocks or keys > _MOST_KEYS:
        return False
    return not (prior.factor.is_cuda and torch.cuda.is_current_stream_capturing())


def _refuse(rows: Tensor, wanted: Tensor) -> None:
    """Says what is wrong with keys and targets, given by row, that led to NaN or Inf."""
    check_finite("append", "keys", rows)
    check_finite("append", "targets", wanted)
    raise ValueError(
        "append: keys must be of a size that can be squared, got an overflow in K^T C^-1 K; "
        "scale keys and prior"
    )


def padded(keys: int) -> int:
    """Rows that a batch of so many keys takes."""
    return max(_LEAST_KEYS, 1 << (keys - 1).bit_length())


def _in_fixed_shapes(
    space: EditSpace, prior: FactoredPrior, keys: Tensor, targets: Tensor
) -> tuple[EditSpace, bool]:
    """See :func:`appended`."""
    at, count, size = len(space), keys.shape[1], padded(keys.shape[1])
    buffers = space.with_room(size, _LEAST_ROWS, _MULTIPLE)
    buffers.inverse_of(at)
    step = buffers.steps.get(size)
    if step is None or step.prior is not prior:
        step = buffers.steps[size] = Step(prior, buffers, size)
    step.load(keys, targets, at)
    # Until the numbers are known to be good; rows of a longer space that is gone are overwritten.
    buffers.inverted, buffers.harmless = at, False
    summary = step.run(buffers)
    # While a GPU works.
    longer, (least, largest) = space.extended(count), space.pivots()
    values = step.read(summary)  # the one time that the host waits for it
    squares, roots = values[:count], values[size : size + count]
    if not all(map(math.isfinite, (*squares, values[-3], values[-2]))):
        del longer  # a traceback would keep it, and with it the rows
        _refuse(step.keys[:count], step.targets[:count])
    positive = values[-1] == 0 and all(map(math.isfinite, roots))
    if positive:
        pivots = [x * x for x in roots]
        least, largest = min(least, *pivots), max(largest, *pivots)
        buffers.inverted, buffers.harmless = at + count, True
    else:
        least = largest = math.nan
        part = slice(at, at + count)
        buffers.root[part, part] = torch.full_like(buffers.root[part, part], math.nan).tril_()
    conditioned = positive and largest <= PIVOT_LIMIT[prior.factor.dtype] * least
    longer.know_pivots(least, largest)
    return longer, conditioned


class _InTurn:
    """Where :func:`step` runs what may run beside the rest: here, one after the other."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """For work that needs what was enqueued so far, and that nothing needs before a join."""
        yield

    def join(self) -> None:
        """What follows comes after all that was done aside."""


class _TwoStreams(_InTurn):
    """On a stream of its own.

    A tensor that crosses over must be kept until after a join: its memory belongs to one stream.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


class Step:
    """Appends of one number of rows to one set of buffers beside one prior.

    Args:
        prior: of the keys; kept, since a graph reads it.
        buffers: that all runs will get; not kept, since they keep this.
        size: rows s.

    Attributes:
        keys: K^T [s, n], zero from the first padded row on.
        targets: V^T [s, m], likewise.
        at: int64 [1], the row of the buffers that the first key goes to.
        right: the same keys as columns, where solves want them so: K [n, s].
    """

    def __init__(self, prior: FactoredPrior, buffers: Buffers, size: int) -> None:
        self.prior = prior
        self.keys = buffers.keys.new_zeros(size, buffers.keys.shape[1])
        self.targets = buffers.targets.new_zeros(size, buffers.targets.shape[1])
        self.unit = torch.eye(size, dtype=self.keys.dtype, device=self.keys.device)
        self.at = torch.zeros(1, dtype=torch.int64, device=self.keys.device)
        self.right = self.keys.mT
        self._kernels = native.kernels(prior.factor) if size in native.COLUMNS else None
        if self._kernels is not None:
            self.right = self.keys.new_zeros(self.right.shape)
        self.places = torch.arange(len(buffers.keys), device=self.keys.device)
        self._at = self._count = self._runs = 0
        self._views = self.keys.mT, self.targets.mT
        self._graph: torch.cuda.CUDAGraph | None = None
        # Of a replay.
        self.summary = _in_host_memory(size, self.keys.dtype) if self.keys.is_cuda else self.at

    def load(self, keys: Tensor, targets: Tensor, at: int) -> None:
        """Takes keys [n, k], k <= s, and targets [m, k] to be written from row ``at`` on."""
        count = keys.shape[1]
        plain = keys.dtype == targets.dtype == self.keys.dtype
        if self._kernels is not None and plain and not (keys.is_neg() or targets.is_neg()):
            places = self.keys, self.right, self.targets
            native.load_batch(self._kernels, keys, targets, *places, at, self.at)
            self._count, self._at = 0, at
            return
        if count != self._count:
            for rows in (self.keys, self.targets):
                rows[count:] = 0
            self._views = self.keys[:count].mT, self.targets[:count].mT
            self._count = count
        self._views[0].copy_(keys)
        self._views[1].copy_(targets)
        if at != self._at:
            self.at.fill_(at)
            self._at = at
        if self._kernels is not None:
            self.right.copy_(self.keys.mT)

    def run(self, buffers: Buffers) -> Tensor:
        """Writes the rows; see :func:`write_rows` for what it returns."""
        if self._graph is not None:
            self._graph.replay()
            return self.summary
        self._runs += 1
        summary = write_rows(self, buffers, _InTurn())
        if self._runs == _CAPTURED_RUN and self.keys.is_cuda:
            try:
                self._graph = _captured(self, buffers)
            except RuntimeError as error:
                _warn_of_no_graph(error)
        return summary

    def read(self, summary: Tensor) -> list[float]:
        """The numbers that :meth:`run` returned, when they are there."""
        if summary is self.summary:
            torch.cuda.current_stream(self.keys.device).synchronize()
        return summary.tolist()


def _warn_of_no_graph(error: RuntimeError) -> None:
    """Of what a driver, a library or the free memory objected to."""
    warnings.warn(
        f"append: a CUDA graph could not be captured, so that appends take longer ({error})",
        stacklevel=6,
    )


@cache
def _in_host_memory(size: int, dtype: torch.dtype) -> Tensor:
    """Where all replays of so many rows leave their numbers, each read before the next one runs.

    Never freed: torch would have to ask the stream of a capture whether the GPU still writes to it.
    """
    # Whatever device the caller made the default one: of another no memory can be pinned.
    return torch.empty(2 * size + 3, dtype=dtype, device="cpu", pin_memory=True)


def write_rows(step: Step, buffers: Buffers, streams: _InTurn) -> Tensor:
    """Appends the loaded batch: writes s rows of all buffers, without a look at any number.

    Needs an inverse that is right in the first ``at`` rows and finite in all.

    Returns:
        Numbers [2 s + 3] that tell how it went: the diagonals of ``I + K^T C^-1 K`` and of the
        corner of the root, least and largest target, and a number that is 0 where the corner of G
        was positive definite. The diagonal of a Gram matrix is finite only where all of it is, and
        where the keys are.
    """
    rows, inverse = step.keys, buffers.inverse
    assert inverse is not None
    with streams.aside():
        there, beyond = step.at + step.places[: len(rows)], step.places >= step.at
        overlap = (rows @ buffers.solved.mT).masked_fill_(beyond, 0)
        border = (overlap @ inverse.mT).masked_fill_(beyond, 0)
        outer = (border @ inverse).neg_().index_copy_(1, there, step.unit)
        buffers.keys.index_copy_(0, there, rows)
        buffers.targets.index_copy_(0, there, step.targets)
        lowest, highest = torch.aminmax(step.targets)
    half = step.prior.solve(step.right)
    with streams.aside():
        corner = half.mT @ half
        corner.diagonal().add_(1)
        schur = torch.addmm(corner, border, border.mT, alpha=-1)
        # Twice, as a batch: that form of cuSOLVER's is a plain launch, which a graph can hold.
        twice, info = torch.linalg.cholesky_ex(schur.expand(2, *schur.shape))
        root = twice[0]
        buffers.root.index_copy_(0, there, border.index_copy_(1, there, root))
        # A product, since a batched solve of one matrix may walk over many right sides in turn.
        tip = torch.linalg.solve_triangular(root, step.unit, upper=False)
        inverse.index_copy_(0, there, tip @ outer)
        others = torch.stack([lowest, highest, info[0].to(root.dtype)])
        summary = torch.cat([corner.diagonal(), root.diagonal(), others])
    solved = step.prior.solve_transposed(half)
    streams.join()
    buffers.solved.index_copy_(0, there, solved.mT)
    return summary


@dataclass(frozen=True)
class _Workplace:
    """Where the graphs of a device are captured."""

    first: torch.cuda.Stream
    second: torch.cuda.Stream
    pool: Any
    keeper: torch.cuda.CUDAGraph  # a pool lasts as long as some graph


@cache
def _workplace(device: torch.device) -> _Workplace:
    """That of the present device, which ``device`` must be."""
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    pool, keeper = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    mark = torch.zeros(1, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        keeper.capture_begin(pool, capture_error_mode="thread_local")
        mark.zero_()
        keeper.capture_end()
    return _Workplace(first, second, pool, keeper)


def _captured(step: Step, buffers: Buffers) -> torch.cuda.CUDAGraph:
    """The graph of :func:`write_rows`, whose replay leaves the result in ``step.summary``.

    Not by ``torch.cuda.graph``, which gives all cached memory back to the driver first. Nothing
    else runs on the two streams, so that the workspaces that libraries have for them lie in the
    pool of the graphs, and nobody can free them for another use.
    """
    with torch.cuda.device(step.keys.device):
        place, graph = _workplace(step.keys.device), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(place.first):
            # Other threads may go on using the GPU meanwhile.
            graph.capture_begin(place.pool, capture_error_mode="thread_local")
            try:
                summary = write_rows(step, buffers, _TwoStreams(place.second))
                step.summary.copy_(summary, non_blocking=True)
            finally:
                graph.capture_end()
    return graph
