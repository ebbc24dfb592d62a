"""What of an edit set is kept in logs (:mod:`coachhook.editing.segments`), and read from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from coachhook.editing.edit_space import EditSpace
from coachhook.editing.memory import EditMemory
from coachhook.editing.records import BatchRecord
from coachhook.editing.segments import Log, single
from coachhook.editing.state import EditState
from coachhook.statistics.packed import pack_lower, unpack_triangle
from coachhook.store import TensorSource

BATCHES = "batches"


def logs_of(state: EditState) -> dict[str, Log]:
    """The logs of an edit set, by name."""
    logs = {BATCHES: _batches(state.batches)}
    for index, edits in state.layers.items():
        prefix = f"layer.{index}"
        if edits.sample is not None:
            name = f"{prefix}.sample"
            logs[name] = single(name, edits.sample, edits.sample.contiguous())
        memory = edits.memory
        if not isinstance(memory, EditMemory):
            tensors, _ = memory.state_dict()
            for part in ("prior", "frozen"):
                name = f"{prefix}.memory.{part}"
                logs[name] = single(name, tensors[part], tensors[part].contiguous())
            continue
        prior, base, space, pieces, initial = memory.contents()
        for part, factored in (("factor", prior), ("initial", initial)):
            if factored is not None:
                name = f"{prefix}.memory.{part}"
                packed = partial(pack_lower, factored.factor, memory.dtype)
                logs[name] = single(name, factored, packed)
        if base is not None:
            logs[f"{prefix}.memory.base"] = single(f"{prefix}.memory.base", base, base.contiguous())
        logs[f"{prefix}.memory.rows"] = _rows(f"{prefix}.memory.rows", space)
        kept = [piece for piece in pieces if piece.keys is not None]
        logs[f"{prefix}.memory.folded"] = _folded(f"{prefix}.memory.folded", kept, space)
    return logs


def _batches(batches: Mapping[int, BatchRecord]) -> Log:
    numbers, records = list(batches), list(batches.values())
    bytes_ = [b.targets.nbytes + sum(cues.nbytes for cues in b.cues.values()) for b in records]
    before = [0, *accumulate(bytes_)]

    def tensors(number: int, first: int, last: int) -> dict[str, TensorSource]:
        found: dict[str, TensorSource] = {}
        for i in range(first, last):
            found[f"targets.{numbers[i]}"] = records[i].targets
            found |= {f"cues.{numbers[i]}.{k}": cues for k, cues in records[i].cues.items()}
        return found

    return Log(records, [1] * len(records), lambda a, b: before[b] - before[a], tensors)


def _rows(name: str, space: EditSpace) -> Log:
    n, m, item = space.keys.shape[1], space.targets.shape[1], space.keys.element_size()

    def size(first: int, last: int) -> int:
        # A row of the root is as long as there are keys before it, and itself.
        return item * (last - first) * (2 * n + m + (first + last + 1) // 2)

    def tensors(number: int, first: int, last: int) -> dict[str, TensorSource]:
        part = slice(first, last)
        return {
            f"{name}.{number}.keys": space.keys[part],
            f"{name}.{number}.solved": space.solved[part],
            f"{name}.{number}.targets": space.targets[part],
            f"{name}.{number}.border": space.root[part, :first],
            f"{name}.{number}.corner": partial(
                pack_lower, space.root[part, part], space.root.dtype
            ),
        }

    return Log(space.parts, [part.count for part in space.parts], size, tensors)


def _folded(name: str, pieces: Sequence[Any], space: EditSpace) -> Log:
    width = space.keys.shape[1] + space.targets.shape[1]
    units = [piece.count for piece in pieces]
    starts = list(accumulate(units, initial=0))

    def tensors(number: int, first: int, last: int) -> dict[str, TensorSource]:
        some = pieces[starts.index(first) : starts.index(last)]
        return {
            f"{name}.{number}.keys": lambda: torch.cat([piece.keys for piece in some]),
            f"{name}.{number}.targets": lambda: torch.cat([piece.targets for piece in some]),
        }

    item = space.keys.element_size()
    return Log(pieces, units, lambda a, b: item * (b - a) * width, tensors)


def read_rows(
    name: str,
    segments: Sequence[tuple[int, int]],
    tensors: Mapping[str, Tensor],
    n: int,
    m: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Keys, solved keys, targets and root of a memory, from the segments of its rows.

    Args:
        name: of the log.
        segments: number and rows of each.
        tensors: of the folder.
        n: length of a key.
        m: length of a target.
        dtype: of all of them.

    Raises:
        KeyError, ValueError: something is missing, or does not fit together.
    """
    total = sum(rows for _, rows in segments)
    root = torch.zeros(total, total, dtype=dtype)
    parts: dict[str, list[Tensor]] = {"keys": [], "solved": [], "targets": []}
    at = 0
    for number, rows in segments:
        prefix, end = f"{name}.{number}", at + rows
        corner = rows * (rows + 1) // 2
        shapes: dict[str, tuple[int, ...]] = {"keys": (rows, n), "solved": (rows, n)}
        shapes["targets"] = rows, m
        shapes |= {"border": (rows, at), "corner": (corner,)}
        found = {part: tensors[f"{prefix}.{part}"] for part in shapes}
        for part, shape in shapes.items():
            _check(f"{prefix}.{part}", found[part], shape, dtype)
        for part, several in parts.items():
            several.append(found[part])
        root[at:end, :at] = found["border"]
        root[at:end, at:end] = unpack_triangle(found["corner"], dtype)
        at = end
    empty = {"keys": n, "solved": n, "targets": m}
    return {"root": root} | {
        part: several[0]
        if len(several) == 1  # as it is mapped
        else torch.cat([torch.zeros(0, empty[part], dtype=dtype), *several])
        for part, several in parts.items()
    }


def read_folded(
    name: str,
    segments: Sequence[tuple[int, int]],
    pieces: Sequence[tuple[int, int]],
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Keys and targets of folded pieces, by the names that a memory knows them by.

    Args:
        name: of the log.
        segments: number and keys of each.
        pieces: number in the memory and keys of each.
        tensors: of the folder.

    Raises:
        KeyError, ValueError: something is missing, or does not fit together.
    """
    found: dict[str, Tensor] = {}
    rest = list(pieces)
    for number, many in segments:
        keys, targets = (tensors[f"{name}.{number}.{part}"] for part in ("keys", "targets"))
        at = 0
        while at < many and rest:
            index, rows = rest.pop(0)
            part = slice(at, at + rows)
            found |= {f"folded.{index}.keys": keys[part], f"folded.{index}.targets": targets[part]}
            at += rows
        if at != many:
            raise ValueError(f"{name}.{number} must hold whole pieces, got {many} keys")
    return found


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )
