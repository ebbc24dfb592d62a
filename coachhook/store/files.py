"""Folders of one manifest and sharded safetensors files.

``manifest.json`` holds ``format`` ("coachhook-" and the kind), ``format_version``,
``coachhook_version``, the caller's own fields, and under ``files`` the name, size, checksum and
tensor names of every safetensors file. The checksum covers the size and up to 64 evenly spaced
blocks of 64 KiB: enough to notice files of different writes in one folder without reading
gigabytes, and all of a small file.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coachhook._version import __version__
from coachhook.errors import FormatError
from coachhook.store.folders import (
    MANIFEST,
    check_writable,
    current_folder,
    write_folder_atomically,
)

FORMAT_VERSIONS = {"edits": 1, "statistics": 1, "statistics-checkpoint": 1}

_RESERVED = ("format", "format_version", "coachhook_version", "files")
_SHARD_BYTES = 1 << 30
_CHECK_BLOCK = 1 << 16
_CHECK_BLOCKS = 64

TensorSource = Tensor | Callable[[], Tensor]


def save_folder(
    path: str | os.PathLike[str],
    *,
    kind: str,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, TensorSource],
) -> None:
    """Write `manifest` and `tensors` to the folder `path`, whole or not at all.

    Args:
        path: a new or empty folder, or one of the same kind, which is replaced. Files in it that
            coachhook did not write are kept.
        kind: "edits", "statistics" or "statistics-checkpoint".
        manifest: JSON-serialisable fields. Those that this function itself writes are ignored, so
            a loaded manifest can be saved again.
        tensors: tensors of any dtype, shape and device, or functions without arguments that make
            them. Functions are called one after another, and a file is written for every GiB, so
            that not all tensors need to be in memory at once.

    Raises:
        ValueError: `path` cannot be written (:func:`check_writable`) or holds another kind.
    """
    if kind not in FORMAT_VERSIONS:
        raise ValueError(f"save_folder: kind must be one of {list(FORMAT_VERSIONS)}, got {kind!r}")

    def write(folder: Path) -> None:
        file = folder / MANIFEST
        file.touch()
        mode = file.stat().st_mode
        files = {}
        for number, shard in enumerate(_shards(tensors), start=1):
            tensor_file = folder / f"tensors-{number:05}.safetensors"
            save_file(shard, tensor_file)
            tensor_file.chmod(mode)  # safetensors leaves files for their owner alone
            files[tensor_file.name] = {
                "bytes": tensor_file.stat().st_size,
                "checksum": _checksum(tensor_file),
                "tensors": list(shard),
            }
        content = {
            "format": f"coachhook-{kind}",
            "format_version": FORMAT_VERSIONS[kind],
            "coachhook_version": __version__,
            **{name: value for name, value in manifest.items() if name not in _RESERVED},
            "files": files,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")

    def owned(folder: Path) -> set[str]:
        if not any(folder.iterdir()):
            return set()
        try:
            old = read_manifest(folder, kind)
        except FormatError as error:
            raise ValueError(
                f"save: path must be a new or empty folder or hold coachhook {kind}, got {folder}: "
                f"{error}"
            ) from error
        return {MANIFEST, *old["files"]}

    check_writable(path)
    if (current := current_folder(path)).is_dir():
        owned(current)
    write_folder_atomically(path, write, owned=owned)


def load_folder(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Read a folder written by :func:`save_folder`.

    Returns:
        The manifest, and a mapping from name to CPU tensor. The files are memory-mapped: a
        tensor is read from disk when its values are first used, and stays readable when the
        folder is replaced.

    Raises:
        FormatError: the folder does not exist, is of another kind or a newer format version,
            or one of its files is missing, truncated, damaged or of another write.
    """
    while True:
        manifest = read_manifest(path, kind)
        try:
            tensors = _LazyTensors(current_folder(path), manifest["files"])
            problem = None
        except FormatError as error:
            problem = error
        # A writer may have replaced the folder meanwhile: then files of two writes were met.
        if read_manifest(path, kind) == manifest:
            if problem is not None:
                raise problem
            return manifest, tensors


def read_manifest(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read and check the manifest of a folder of the given kind, without its tensors.

    Raises:
        FormatError: see :func:`load_folder`.
    """
    if kind not in FORMAT_VERSIONS:
        raise ValueError(f"load: kind must be one of {list(FORMAT_VERSIONS)}, got {kind!r}")
    file, text = _manifest_text(path, kind)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise FormatError(
            f"load: {file} must be JSON, got a damaged file ({error}); {_REMEDY}"
        ) from error
    check_fields(content, {"format": str, "format_version": int, "files": dict}, file)
    if content["format"] != f"coachhook-{kind}":
        raise FormatError(
            f"load: {file.parent} must hold coachhook {kind}, got format {content['format']!r}"
        )
    if content["format_version"] > FORMAT_VERSIONS[kind]:
        raise FormatError(
            f"load: {file} must be of format version {FORMAT_VERSIONS[kind]} or older, got "
            f"{content['format_version']}, written by coachhook "
            f"{content.get('coachhook_version')}; install that version or a newer one"
        )
    for name, entry in content["files"].items():
        if Path(name).name != name:
            raise FormatError(f"load: {file}: files must be plain names, got {name!r}")
        check_fields(entry, {"bytes": int, "checksum": str, "tensors": list}, file)
    return content


def _manifest_text(path: str | os.PathLike[str], kind: str) -> tuple[Path, bytes]:
    pauses = [0.1, 0.01, 0.001]
    while True:
        file = current_folder(path) / MANIFEST
        try:
            return file, file.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            if not pauses:
                raise FormatError(
                    f"load: path must be a folder of coachhook {kind} with a {MANIFEST}, got {path}"
                    f"{'' if file.parent.exists() else ' (it does not exist)'}"
                ) from error
            time.sleep(pauses.pop())  # a writer may be between its two renames
        except OSError as error:
            raise FormatError(f"load: {file} must be readable, got: {error.strerror}") from error


def check_fields(
    content: Any, fields: Mapping[str, type | tuple[type, ...]], where: str | os.PathLike[str]
) -> None:
    """Check that `content` is a JSON object whose `fields` have the given types.

    ``bool`` does not count as ``int``, and ``float`` takes whole numbers too.

    Raises:
        FormatError: naming the file `where`, the field, and what was found.
    """
    if not isinstance(content, dict):
        raise FormatError(
            f"load: {os.fspath(where)} must be a JSON object, got {type(content).__name__}; "
            f"{_REMEDY}"
        )
    for name, expected in fields.items():
        types = expected if isinstance(expected, tuple) else (expected,)
        value = content.get(name)
        fits = isinstance(value, (*types, int) if float in types else types)
        if name not in content or not fits or (isinstance(value, bool) and bool not in types):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            found = repr(value)[:80] if name in content else "nothing"
            raise FormatError(
                f"load: {os.fspath(where)}: {name} must be {names}, got {found}; {_REMEDY}"
            )


_REMEDY = "make the folder again or restore it from a copy"


class _LazyTensors(Mapping[str, Tensor]):
    """The tensors of a folder's memory-mapped safetensors files, by name."""

    def __init__(self, folder: Path, files: Mapping[str, Any]) -> None:
        self._homes: dict[str, Any] = {}
        for file_name, entry in files.items():
            handle = _open_checked(folder / file_name, entry)
            self._homes.update(dict.fromkeys(entry["tensors"], handle))

    def __getitem__(self, name: str) -> Tensor:
        return self._homes[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


def _open_checked(file: Path, entry: Mapping[str, Any]) -> Any:
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise FormatError(
                f"load: {file} must have {entry['bytes']} bytes, got {size}: it was truncated or "
                f"belongs to another write; {_REMEDY}"
            )
        if _checksum(file) != entry["checksum"]:
            raise FormatError(
                f"load: {file} must have checksum {entry['checksum']}, got another: it was damaged "
                f"or belongs to another write; {_REMEDY}"
            )
        handle = safe_open(file, framework="pt", device="cpu")
    except OSError as error:
        raise FormatError(
            f"load: {file} must be readable, got: {error.strerror}; {_REMEDY}"
        ) from error
    except SafetensorError as error:
        raise FormatError(f"load: {file} must be safetensors, got: {error}; {_REMEDY}") from error
    except RuntimeError as error:  # torch maps the file once more, by name
        raise FormatError(f"load: {file} must be readable, got: {error}; {_REMEDY}") from error
    if missing := set(entry["tensors"]) - set(handle.keys()):
        raise FormatError(
            f"load: {file} must hold {sorted(missing)}, got a file without; {_REMEDY}"
        )
    return handle


def _checksum(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(size - _CHECK_BLOCK, 0)
    with file.open("rb") as stream:
        for start in sorted({last * i // (_CHECK_BLOCKS - 1) for i in range(_CHECK_BLOCKS)}):
            stream.seek(start)
            digest.update(stream.read(_CHECK_BLOCK))
    return digest.hexdigest()[:32]


def _shards(tensors: Mapping[str, TensorSource]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    bases: list[int] = []
    for name, source in tensors.items():
        tensor = (source if isinstance(source, Tensor) else source()).detach().cpu().contiguous()
        if any(tensor.untyped_storage().data_ptr() == base for base in bases):
            tensor = tensor.clone()  # safetensors refuses tensors that share memory
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, size, bases = {}, 0, []
        bases.append(tensor.untyped_storage().data_ptr())
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard
