"""Keys that an :class:`~coachhook.editing.EditMemory` has moved into its prior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def most_keys(features: int) -> int:
    """Keys of the membership scope beside the prior; more would outgrow its factor."""
    return max(features, 4096)


@dataclass(frozen=True, eq=False)
class Folded:
    """Keys that moved into the prior, by row, on the CPU; None where they were not kept."""

    batch: int
    count: int
    keys: Tensor | None
    targets: Tensor | None


def rows_of(op: str, pieces: Iterable[Folded], name: str, device: torch.device) -> list[Tensor]:
    """The "keys" or "targets" of each piece, by row.

    Raises:
        ValueError: those of a piece were not kept.
    """
    found = []
    for piece in pieces:
        rows = getattr(piece, name)
        if rows is None:
            raise ValueError(
                f"{op}: batch {piece.batch} must have its keys at hand, got one folded into "
                "the prior without them; fold with keep_folded=True, or set a larger max_keys"
            )
        found.append(rows.to(device))
    return found


def folded_tensors(pieces: Iterable[Folded]) -> dict[str, Tensor]:
    """Keys and targets of the pieces that have them, by name."""
    found: dict[str, Tensor] = {}
    for i, piece in enumerate(pieces):
        if piece.keys is not None and piece.targets is not None:
            found |= {f"folded.{i}.keys": piece.keys, f"folded.{i}.targets": piece.targets}
    return found


def folded_pieces(
    tensors: Mapping[str, Tensor], counts: Sequence[tuple[int, int]]
) -> tuple[Folded, ...]:
    """The pieces of :func:`folded_tensors`; ``counts`` are (batch, keys) of each."""
    return tuple(
        Folded(*run, tensors.get(f"folded.{i}.keys"), tensors.get(f"folded.{i}.targets"))
        for i, run in enumerate(counts)
    )


def check_state(
    op: str, tensors: Mapping[str, Tensor], total: int, counts: Sequence[tuple[int, int]]
) -> None:
    """Checks shapes and dtypes of a memory's tensors.

    Args:
        op: named in messages.
        tensors: of the memory.
        total: keys beside the prior.
        counts: (batch, keys) of each folded piece.

    Raises:
        KeyError, ValueError: one is missing, or is not what it must be.
    """
    factor = tensors["factor"]
    n, m = len(factor), tensors["targets"].shape[-1]
    shapes = {"factor": (n, n), "keys": (total, n), "targets": (total, m)}
    shapes |= {"solved": (total, n), "root": (total, total)}
    if counts:
        shapes["base"] = (m, n)
    if "initial" in tensors:
        shapes["initial"] = (n, n)
    for i, (_, count) in enumerate(counts):
        if f"folded.{i}.keys" in tensors:
            shapes |= {f"folded.{i}.keys": (count, n), f"folded.{i}.targets": (count, m)}
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape or tensors[name].dtype != factor.dtype:
            raise ValueError(
                f"{op}: {name} must be {factor.dtype} {list(shape)}, "
                f"got {tensors[name].dtype} {list(tensors[name].shape)}"
            )
