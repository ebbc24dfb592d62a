"""What a folder holds and how much room it takes, from the headers of its files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from coachhook.store.files import load_folder
from coachhook.store.folders import MANIFEST, current_folder

_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
    "BOOL": "bool",
}


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
    manifest, _ = load_folder(path, kind)
    folder = current_folder(path)
    found: dict[tuple[str, str], list[int]] = {}
    total = (folder / MANIFEST).stat().st_size
    for name in manifest["files"]:
        total += (folder / name).stat().st_size
        with (folder / name).open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for tensor, entry in header.items():
            if tensor != "__metadata__":
                group = _group(tensor), _DTYPES.get(entry["dtype"], entry["dtype"])
                first, last = entry["data_offsets"]
                found.setdefault(group, []).append(last - first)
    groups = [
        TensorGroup(name, dtype, len(sizes), sum(sizes)) for (name, dtype), sizes in found.items()
    ]
    groups.sort(key=lambda group: (-group.bytes, group.name, group.dtype))
    return FolderSizes(tuple(groups), total - sum(group.bytes for group in groups))


def _group(tensor: str) -> str:
    """``layer.3.memory.factor`` -> ``memory.factor``."""
    parts = [part for part in tensor.split(".") if not part.isdigit()]
    return ".".join(parts[1:] if parts[0] == "layer" and len(parts) > 1 else parts)
