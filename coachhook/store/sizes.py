"""What a folder holds and how much room it takes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from coachhook.store.files import load_folder, manifest_size


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one purpose and number format.

    Attributes:
        name: their common name, numbers of layers and batches left out.
        dtype: the number format on disk.
        tensors: how many.
        bytes: their room on disk.
    """

    name: str
    dtype: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class FolderSizes:
    """The room a folder takes.

    Attributes:
        groups: its tensors, the largest group first.
        other: bytes of the manifest and of the headers of the tensor files.
    """

    groups: tuple[TensorGroup, ...]
    other: int

    @property
    def total(self) -> int:
        """Bytes of the manifest and all tensor files; files of others do not count."""
        return sum(group.bytes for group in self.groups) + self.other


def folder_sizes(path: str | os.PathLike[str], kind: str) -> FolderSizes:
    """Measure a folder written by :func:`~coachhook.store.save_folder`; reads no tensor.

    Raises:
        FormatError: see :func:`~coachhook.store.load_folder`.
    """
    manifest, tensors = load_folder(path, kind)
    found: dict[tuple[str, str], list[int]] = {}
    # From what was mapped: a writer may have replaced the folder since.
    for name, tensor in tensors.items():
        group = _group(name), str(tensor.dtype).removeprefix("torch.")
        found.setdefault(group, []).append(tensor.nbytes)
    total = manifest_size(path, kind) + sum(entry["bytes"] for entry in manifest["files"].values())
    groups = [
        TensorGroup(name, dtype, len(sizes), sum(sizes)) for (name, dtype), sizes in found.items()
    ]
    groups.sort(key=lambda group: (-group.bytes, group.name, group.dtype))
    return FolderSizes(tuple(groups), total - sum(group.bytes for group in groups))


def _group(tensor: str) -> str:
    """``layer.3.memory.factor`` -> ``memory.factor``."""
    parts = [part for part in tensor.split(".") if not part.isdigit()]
    return ".".join(parts[1:] if parts[0] == "layer" and len(parts) > 1 else parts)
