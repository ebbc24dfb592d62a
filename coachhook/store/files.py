"""Folders of one manifest and sharded safetensors files.

``manifest.json`` holds ``format`` ("coachhook-" and the kind), ``format_version``,
``coachhook_version``, the caller's own fields, and under ``files`` the name, size, checksum and
tensor names of every safetensors file. It is strict JSON (:mod:`coachhook.store.strict_json`). The
checksum covers the size and up to 64 evenly spaced blocks of 64 KiB: enough to notice files of
different writes in one folder without reading gigabytes, and all of a small file. Last comes a
``checksum`` of all other fields; folders of before it existed are read without.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
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
from coachhook.store.strict_json import from_json, to_json

# Edits 2: the factor of a memory as a packed triangle; 3: rows and records in segments.
FORMAT_VERSIONS = {"edits": 3, "statistics": 1, "statistics-checkpoint": 1}

_CHECKSUM = "checksum"
_RESERVED = ("format", "format_version", "coachhook_version", "files", _CHECKSUM)
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
    sets: Sequence[Mapping[str, TensorSource]] = (),
    unchanged: Collection[str] = (),
    replaces: str | None = None,
) -> str:
    """Write `manifest` and `tensors` to the folder `path`, whole or not at all.

    Args:
        path: a new or empty folder, or one of the same kind, which is replaced. Files in it that
            coachhook did not write are kept.
        kind: "edits", "statistics" or "statistics-checkpoint".
        manifest: JSON-serialisable fields; numbers need not be finite. Those that this function
            itself writes are ignored, so a loaded manifest can be saved again.
        tensors: tensors of any dtype, shape and device, or functions without arguments that make
            them. Functions are called one after another, and a file is written for every GiB, so
            that not all tensors need to be in memory at once.
        sets: more tensors, in sets that are written together, each in files of its own.
        unchanged: those of the sets that the write `replaces` holds with the same values: files of
            nothing else are linked into the new folder instead of being written again (where the
            file system knows hard links). Their checksums are looked at, not their values. No file
            is ever changed in place, so the old folder stays whole for its readers.
        replaces: the write that the folder may hold, as :func:`version_of` names it, or "" for
            none: what another process has written since is not lost. None: any.

    Returns:
        What :func:`version_of` this write will be.

    Raises:
        ValueError: `path` cannot be written (:func:`check_writable`), holds another kind, or a
            write other than `replaces`.
        OSError: the disk is full, or fails. What `path` held is still there.
    """
    if kind not in FORMAT_VERSIONS:
        raise ValueError(f"save_folder: kind must be one of {list(FORMAT_VERSIONS)}, got {kind!r}")

    version = ""
    old: dict[str, Any] | None = None

    def write(folder: Path) -> None:
        nonlocal version
        file = folder / MANIFEST
        file.touch()
        mode = file.stat().st_mode
        files: dict[str, Any] = {}
        names = (f"tensors-{number:05}.safetensors" for number in itertools.count(1))
        taken: set[str] = set()
        known = set(unchanged) if replaces else set()
        for source, entry in _sound_files(current_folder(path), old, known):
            place = folder / next(names)
            if _linked(source, place):
                files[place.name] = entry
                taken.update(entry["tensors"])
        for several in (tensors, *sets):
            for shard in _shards({k: v for k, v in several.items() if k not in taken}):
                tensor_file = folder / next(names)
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
        content[_CHECKSUM] = version = _digest(content)
        file.write_text(to_json(content) + "\n", encoding="utf-8")

    def owned(folder: Path) -> set[str]:
        nonlocal old
        if not any(folder.iterdir()):
            return set()
        try:
            old = read_manifest(folder, kind)
        except FormatError as error:
            raise ValueError(
                f"save: path must be a new or empty folder or hold coachhook {kind}, got {folder}: "
                f"{error}"
            ) from error
        if replaces is not None and version_of(old) != replaces:
            raise ValueError(
                f"save: path must hold {'what was last read there' if replaces else 'nothing yet'}"
                f", got {folder}, which something else has written meanwhile; load it again, or "
                "save to another folder"
            )
        return {MANIFEST, *old["files"]}

    check_writable(path)
    if (current := current_folder(path)).is_dir():
        owned(current)
    write_folder_atomically(path, write, owned=owned)
    return version


def version_of(manifest: Mapping[str, Any]) -> str:
    """Return what tells the write that a loaded manifest is of from all others of the folder."""
    return manifest.get(_CHECKSUM) or _digest(manifest)


def _digest(manifest: Mapping[str, Any]) -> str:
    fields = {name: value for name, value in manifest.items() if name != _CHECKSUM}
    # Python's own JSON, which has a form for every number, is many times faster than ours.
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:32]


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
    _check_kind(kind)
    failed: bytes | None = None
    while True:
        file, text = _manifest_text(path, kind)
        manifest = _checked_manifest(file, text, kind)
        try:
            tensors = _LazyTensors(current_folder(path), manifest["files"])
            problem = None
        except FormatError as error:
            problem = error
        # A writer may have replaced the folder meanwhile: then files of two writes were met.
        if _manifest_text(path, kind)[1] == text:
            if problem is None:
                return manifest, tensors
            # Or moved it aside while its files were opened, where the manifest is as it was.
            if failed == text:
                raise problem
            failed = text


def read_manifest(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read and check the manifest of a folder of the given kind, without its tensors.

    Raises:
        FormatError: see :func:`load_folder`.
    """
    _check_kind(kind)
    return _checked_manifest(*_manifest_text(path, kind), kind)


def manifest_size(path: str | os.PathLike[str], kind: str) -> int:
    """Return the bytes of the manifest of a folder."""
    return len(_manifest_text(path, kind)[1])


def folder_kind(path: str | os.PathLike[str]) -> str:
    """Return the kind of a folder written by :func:`save_folder`.

    Raises:
        FormatError: it is none, or its manifest is damaged.
    """
    file, text = _manifest_text(path, " or ".join(FORMAT_VERSIONS))
    found = next((k for k in FORMAT_VERSIONS if _format_of(file, text) == f"coachhook-{k}"), None)
    if found is None:
        raise FormatError(
            f"load: {file.parent} must hold coachhook {' or '.join(FORMAT_VERSIONS)}, got format "
            f"{_format_of(file, text)!r}"
        )
    return found


def _check_kind(kind: str) -> None:
    if kind not in FORMAT_VERSIONS:
        raise ValueError(f"load: kind must be one of {list(FORMAT_VERSIONS)}, got {kind!r}")


def _format_of(file: Path, text: bytes) -> str:
    content = _parsed(file, text)
    check_fields(content, {"format": str}, file)
    name: str = content["format"]
    return name


def _parsed(file: Path, text: bytes) -> Any:
    try:
        return from_json(text)
    except ValueError as error:
        raise FormatError(
            f"load: {file} must be JSON, got a damaged file ({error}); {_REMEDY}"
        ) from error


def _checked_manifest(file: Path, text: bytes, kind: str) -> dict[str, Any]:
    content = _parsed(file, text)
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
    if content.get(_CHECKSUM, found := _digest(content)) != found:
        raise FormatError(
            f"load: {file} must have checksum {content[_CHECKSUM]}, got {found}: it was damaged "
            f"or changed by hand; {_REMEDY}"
        )
    checked: dict[str, Any] = content
    return checked


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


def _sound_files(
    folder: Path, manifest: Mapping[str, Any] | None, names: set[str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of tensors of these names alone, and what the manifest says of them."""
    for name, entry in manifest["files"].items() if manifest is not None else ():
        if entry["tensors"] and names.issuperset(entry["tensors"]):
            with suppress(FormatError):
                _open_checked(folder / name, entry)
                yield folder / name, entry


def _linked(file: Path, place: Path) -> bool:
    try:
        os.link(file, place)
    except OSError:  # the file system has no hard links
        return False
    return True


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
