"""Which parts of a log are written again, how often, and into how many files."""

from __future__ import annotations

import random

import pytest

from coachhook.editing import segments
from coachhook.editing.segments import Log, arranged, read_segments


def log_of(parts):
    """A log of lists of numbers, a byte each."""
    units = [len(part) for part in parts]
    return Log(parts, units, lambda a, b: b - a, lambda number, a, b: {})


def content(found):
    return [number for segment in found for part in segment.parts for number in part]


def same(one, other):
    return any(one is each for each in other)


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_files_and_bytes_stay_few(size):
    parts, found, written, most = [], [], 0, 0
    for i in range(2000):
        parts.append([i] * size)
        earlier, found = found, arranged(log_of(parts), found)
        written += sum(segment.size for segment in found if not same(segment, earlier))
        most = max(most, len(found))
    assert content(found) == [i for i in range(2000) for _ in range(size)]
    assert len({segment.number for segment in found}) == len(found)
    assert most <= 7 * 4
    assert written <= 5 * 2000 * size


def test_sizes_in_any_order_are_merged():
    rng = random.Random(0)
    parts, found = [], []
    for i in range(1500):
        parts.append([i] * rng.choice([1, 1, 1, 5, 40, 3000]))
        found = arranged(log_of(parts), found)
        assert len(found) <= 7 * 8
        if i % 50 == 49:  # which takes the longest
            assert content(found) == content(arranged(log_of(parts), []))


def test_large_segments_stay(monkeypatch):
    monkeypatch.setattr(segments, "_LARGE", 100)
    parts, found, seen = [], [], set()
    for i in range(200):
        parts.append([i] * 20)
        found = arranged(log_of(parts), found)
        seen |= {segment.size for segment in found}
    assert max(seen) == 160
    assert len(found) == 200 // 8


def test_what_was_removed_or_comes_otherwise_is_written_anew():
    parts = [[i] for i in range(5)]
    found = arranged(log_of(parts), [])
    parts += [[5]]
    found = arranged(log_of(parts), found)
    parts += [[6], [7]]
    found = arranged(log_of(parts), found)
    assert [segment.units for segment in found] == [5, 1, 2]
    without = parts[:5] + parts[6:]
    later = arranged(log_of(without), found)
    assert content(later) == [0, 1, 2, 3, 4, 6, 7] and [same(s, found) for s in later] == [True] * 2
    within = [*parts[:2], *parts[3:]]
    later = arranged(log_of(within), found)
    assert content(later) == [0, 1, 3, 4, 5, 6, 7]
    assert [same(s, found) for s in later] == [False, True, True]
    # Equal is not the same.
    later = arranged(log_of([list(part) for part in parts]), found)
    assert not any(same(s, found) for s in later)
    numbers = {segment.number for segment in later}
    assert not numbers & {segment.number for segment in found}
    assert arranged(log_of([]), found) == []


@pytest.mark.parametrize("units", [[[1, 2]], [[1, 1], [2, 3]], [[1, 4], [2, 0]], [[1, 4], [2, 1]]])
def test_segments_that_are_read_hold_whole_parts(units):
    log = log_of([[0, 0], [1, 1]])
    found = read_segments(log, [[7, 2], [3, 2]])
    assert [segment.parts for segment in found] == [([0, 0],), ([1, 1],)]
    assert [segment.number for segment in found] == [7, 3]
    with pytest.raises(ValueError, match="segments must hold"):
        read_segments(log, units)
