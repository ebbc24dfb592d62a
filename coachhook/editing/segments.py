"""What of an EDITS folder is added to and otherwise stays: rows of memories, records, factors.

A *log* is a row of *parts*, objects whose content never changes, so that a part that was there at
the last save need not be written again, nor looked at. It lies in *segments* of consecutive parts,
each in files of its own. What a save finds new becomes a segment, and segments of about one size
are merged by eights: a log of N bytes has O(log N) of them, and each byte is written O(log N) times
over a whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count

from coachhook.store import TensorSource

_MERGED = 8
# Segments from this size on are not merged any more: few of them hold much, and one that is made
# of eight smaller ones fits into memory beside the rest.
_LARGE = 1 << 27


@dataclass(frozen=True, eq=False)
class Rows:
    """So many rows that came at once; the same object stands for the same numbers."""

    count: int


@dataclass(frozen=True)
class Log:
    """A log as it is now.

    Attributes:
        parts: its parts, compared by identity.
        units: of what each part has so many, such as rows.
        size: bytes of units first..last-1.
        tensors: the tensors of these units for a segment with a number, by their names, which must
            differ from those of any other segment of the log.
    """

    parts: Sequence[object]
    units: Sequence[int]
    size: Callable[[int, int], int]
    tensors: Callable[[int, int, int], Mapping[str, TensorSource]]


@dataclass(frozen=True)
class Segment:
    """Parts that are written together, under a number."""

    number: int
    parts: tuple[object, ...]
    units: int
    size: int


@dataclass(frozen=True)
class Written:
    """A write of a folder: its version, and the segments of its logs."""

    version: str
    segments: Mapping[str, Sequence[Segment]] = field(default_factory=dict)


def single(name: str, part: object, source: TensorSource) -> Log:
    """A log of one part, which is one tensor."""
    return Log([part], [1], lambda first, last: _LARGE, lambda number, first, last: {name: source})


def arranged(log: Log, earlier: Sequence[Segment]) -> list[Segment]:
    """The log in segments, as many of the earlier ones as there are still, as they were."""
    starts = {id(segment.parts[0]): segment for segment in earlier}
    numbers = count(1 + max((segment.number for segment in earlier), default=0))
    units = [0, *accumulate(log.units)]
    found: list[Segment] = []

    def add(first: int, last: int) -> None:
        """Parts that no segment holds yet."""
        a, b = units[first], units[last]
        parts = tuple(log.parts[first:last])
        found.append(Segment(next(numbers), parts, b - a, log.size(a, b)))

    at = fresh = 0
    while at < len(log.parts):
        known = starts.get(id(log.parts[at]))
        end = at + len(known.parts) if known is not None else at
        if known is None or not _same(known.parts, log.parts[at:end]):
            at += 1
            continue
        if fresh < at:
            add(fresh, at)
            _merge(found, add)
        found.append(known)
        _merge(found, add)
        at = fresh = end
    if fresh < at:
        add(fresh, at)
        _merge(found, add)
    return found


def _merge(found: list[Segment], add: Callable[[int, int], None]) -> None:
    """Merges the last segments while there are many of about one size, or smaller."""
    while found and found[-1].size < _LARGE:
        most, run = _level(found[-1]), 0
        while (
            run < len(found) and found[-1 - run].size < _LARGE and _level(found[-1 - run]) <= most
        ):
            run += 1
        if run < _MERGED:
            return
        last = sum(len(segment.parts) for segment in found)
        first = last - sum(len(segment.parts) for segment in found[-run:])
        del found[-run:]
        add(first, last)


def _level(segment: Segment) -> int:
    return segment.size.bit_length() // (_MERGED.bit_length() - 1)


def _same(one: Sequence[object], other: Sequence[object]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def read_segments(log: Log, found: Sequence[tuple[int, int]]) -> list[Segment]:
    """The segments of a log that was read, from their numbers and units.

    Raises:
        ValueError: they are not whole parts, or not all of them.
    """
    units = [0, *accumulate(log.units)]
    ends = {unit: part for part, unit in enumerate(units)}
    segments, at = [], 0
    for number, many in found:
        if at + many not in ends or many < 1:
            raise ValueError(f"load: segments must hold whole parts, got {found}")
        parts = tuple(log.parts[ends[at] : ends[at + many]])
        segments.append(Segment(int(number), parts, many, log.size(at, at + many)))
        at += many
    if at != units[-1]:
        raise ValueError(f"load: segments must hold {units[-1]} in all, got {at}")
    return segments
