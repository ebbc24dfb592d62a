"""Texts from files, folders, standard input, iterables and datasets, read as a stream."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

TextSource: TypeAlias = "str | os.PathLike[str] | Iterable[Any]"


def read_texts(source: TextSource) -> TextReader:
    """Return an iterator over the texts of `source`; nothing is read before it is asked for.

    Args:
        source: a path or an iterable. A ``.jsonl`` file gives the field "text" of each line, any
            other file each of its lines; a folder all its ``*.txt`` and ``*.jsonl`` files sorted
            by name, or, where the datasets library saved it (``save_to_disk``), the field "text" of
            its records; "-" the lines of standard input. An iterable gives strings, or records with
            a field "text", as a ``datasets.Dataset`` does. Blank texts are passed over.

    Raises:
        ValueError: the path does not exist, a folder holds no such file; later, while reading: a
            text is not UTF-8 or a line is not such a record (file and line are named).
        TypeError: `source` is none of these; later: an item is not a text.
        ImportError: a saved dataset, and the datasets library is not installed.
    """
    return source if isinstance(source, TextReader) else TextReader(source)


class TextReader(Iterator[str]):
    """The iterator of :func:`read_texts`, which knows how much of its source it has read."""

    def __init__(self, source: TextSource) -> None:
        self._size: int | None = None
        self._done = 0
        self._texts: Iterator[str]
        if source == "-" and sys.stdin is None:
            raise ValueError("read_texts: source must be open, got standard input, which is closed")
        if source == "-":
            # As bytes: which encoding and line ends Python would take there depends on the place.
            self._texts = self._from_stream(sys.stdin.buffer, "standard input", is_json=False)
        elif isinstance(source, (str, os.PathLike)) and _is_saved_dataset(Path(source)):
            records = _saved_dataset(Path(source))
            self._size = len(records)
            self._texts = self._from_items(records)
        elif isinstance(source, (str, os.PathLike)):
            files = _files(Path(source))
            self._size = sum(file.stat().st_size for file in files)
            self._texts = self._from_files(files)
        elif isinstance(source, Iterable) and not isinstance(source, (bytes, Mapping)):
            self._size = len(source) if isinstance(source, Sized) else None
            self._texts = self._from_items(source)
        else:
            raise TypeError(
                "read_texts: source must be a path or an iterable of texts, got "
                f"{type(source).__name__}{_splits(source)}"
            )

    def __next__(self) -> str:
        return next(self._texts)

    @property
    def fraction(self) -> float | None:
        """The share of the source read so far, from 0 to 1; None for a source without a size."""
        return self._done / self._size if self._size else None

    def _from_files(self, files: list[Path]) -> Iterator[str]:
        for file in files:
            with file.open("rb") as stream:
                yield from self._from_stream(stream, str(file), is_json=file.suffix == ".jsonl")

    def _from_stream(self, stream: BinaryIO, name: str, *, is_json: bool) -> Iterator[str]:
        return _parse_lines(self._lines(stream, name), name, is_json=is_json)

    def _lines(self, stream: BinaryIO, name: str) -> Iterator[str]:
        for number, line in enumerate(stream, start=1):
            self._done += len(line)
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"read_texts: {name}, line {number}: text must be UTF-8, got {error}"
                ) from error

    def _from_items(self, items: Iterable[Any]) -> Iterator[str]:
        for number, item in enumerate(items):
            self._done += 1
            text = item.get("text") if isinstance(item, Mapping) else item
            if not isinstance(text, str):
                got = type(text).__name__
                if isinstance(item, Mapping) and "text" not in item:
                    got = f"a record of {', '.join(map(repr, item)) or 'nothing'}"
                raise TypeError(
                    f"read_texts: item {number} must be a string or a record with a string "
                    f'"text", got {got}'
                )
            _check_unicode(text, f"item {number}")
            if text.strip():
                yield text


def _splits(source: object) -> str:
    """What to do with a dictionary of datasets, one for each split."""
    if not isinstance(source, Mapping) or not source:
        return ""
    return f"; give one of its values, such as that of {next(iter(source))!r}"


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _saved_dataset(path: Path) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ImportError(
            f"read_texts: source must be readable, got {path}, a dataset saved by the datasets "
            "library, which is not installed (pip install datasets)"
        ) from error
    return load_from_disk(str(path))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (".txt", ".jsonl") and f.is_file())
        splits = sorted(f.name for f in path.iterdir() if _is_saved_dataset(f))
        if not files and splits:
            raise ValueError(
                f"read_texts: {path} must be one dataset, got several splits; name the folder of "
                f"one of {splits}"
            )
        if not files:
            raise ValueError(f"read_texts: {path} must hold *.txt or *.jsonl files, got none")
        return files
    if not path.exists():
        raise ValueError(
            f"read_texts: source must be an existing file or folder, got {str(path)[:200]!r}; to "
            "give a text itself, put it in a list"
        )
    return [path]


def _parse_lines(lines: Iterable[str], name: str, *, is_json: bool) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not is_json:
            yield line.rstrip("\r\n")
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"read_texts: {name}, line {number}: must be JSON, got {error}"
            ) from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f'read_texts: {name}, line {number}: must be an object with a string "text", got '
                f"{line.strip()[:80]!r}"
            )
        _check_unicode(text, f"{name}, line {number}")
        if text.strip():
            yield text


def _check_unicode(text: str, where: str) -> None:
    """Refuses half of a surrogate pair, which JSON can escape and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"read_texts: {where}: text must be Unicode, got {error}") from error
