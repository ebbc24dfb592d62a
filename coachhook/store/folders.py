"""Atomic replacement of whole folders.

The new folder is written as ``.<name>.tmp`` beside its place, synced, and renamed. An existing
folder is first renamed to ``.<name>.old`` and deleted last, so at every moment either the old or
the new one exists whole: after a crash between the two renames :func:`current_folder` still finds
the old one, and the next writer moves it back.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "manifest.json"


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def current_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder that holds the last whole write of `path`, which may stand aside."""
    final = Path(path).resolve()
    aside = _aside(final)
    return aside if not final.exists() and aside.is_dir() else final


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that a folder of ours can be written at `path`, before long work is begun.

    Nothing is left behind. Parents that do not exist are fine when they can be made.

    Raises:
        ValueError: `path` is a file, a mount point, a folder of other files, or lies where this
            process may not write.
    """
    final = Path(path).resolve()
    _check_replaceable(final)
    with _writable(final) as ancestor:
        # As long as the names that the folder has while it is written.
        os.rmdir(tempfile.mkdtemp(prefix=f".{final.name}", dir=ancestor))


@contextmanager
def _writable(final: Path) -> Iterator[Path]:
    """Yield the nearest folder above `final` that there is; say so where it cannot be written."""
    ancestor = final.parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    try:
        yield ancestor
    except OSError as error:
        raise ValueError(
            f"save: path must be in a writable folder, got {final} ({error.strerror} in {ancestor})"
        ) from error


def _check_replaceable(final: Path) -> None:
    if os.path.ismount(final):
        raise ValueError(
            f"save: path must be a folder that can be renamed, got the mount point {final}; "
            "give a folder inside it"
        )
    if final.exists() and not final.is_dir():
        raise ValueError(f"save: path must be a folder, got the file {final}")
    try:
        foreign = final.is_dir() and any(final.iterdir()) and not (final / MANIFEST).is_file()
    except OSError as error:
        raise ValueError(
            f"save: path must be a folder this process may read, got {final} ({error.strerror})"
        ) from error
    if foreign:
        raise ValueError(
            f"save: path must be a new or empty folder or one written by coachhook, got {final} "
            f"with other files in it (no {MANIFEST}); choose another folder"
        )
    if final.is_dir() and not os.access(final, os.W_OK):
        raise ValueError(
            f"save: path must be a folder this process may write, got {final}, which is read-only; "
            "give write permission (chmod u+w) or choose another folder"
        )


def write_folder_atomically(
    path: str | os.PathLike[str],
    writer: Callable[[Path], None],
    *,
    owned: Callable[[Path], set[str]] = lambda folder: set(),
) -> None:
    """Write the folder `path` whole or not at all, replacing the one that is there.

    Args:
        path: the folder to write; missing parents are made.
        writer: fills the empty folder it is given with the new content.
        owned: names the files of the old folder that the new one replaces. All others were put
            there by someone else and are carried over.

    Raises:
        ValueError: see :func:`check_writable`; or another process is writing the same folder.
        OSError: it could not be written, such as on a full disk; what was there is still there.
    """
    final = Path(path).resolve()
    _check_replaceable(final)
    aside = _aside(final)
    with _temporary_folder(final) as temporary:
        if aside.exists() and not final.exists():
            os.rename(aside, final)
        elif aside.exists():
            shutil.rmtree(aside)
        try:
            writer(temporary)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(
                f"save: {final} must have room for what is written, got: {error}; nothing was "
                "replaced: make room or choose another folder"
            ) from error
        if final.exists():
            _carry_over(final, temporary, owned(final))
        _sync_tree(temporary)
        if final.exists():
            os.rename(final, aside)
        try:
            os.rename(temporary, final)
        except OSError:
            if aside.exists():
                os.rename(aside, final)
            raise
        _sync(final.parent)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _temporary_folder(final: Path) -> Iterator[Path]:
    """Yield the empty folder beside `final`, locked against a second writer; removed on failure."""
    temporary = final.with_name(f".{final.name}.tmp")
    with _writable(final):
        # Nothing else is made to find that out, which a writer killed just then would leave.
        temporary.mkdir(parents=True, exist_ok=True)
    lock = _lock(temporary)
    try:
        _empty(temporary)
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(temporary: Path) -> int | None:
    """Lock the folder and return the descriptor that holds the lock.

    A lock, unlike a process number in the name, tells a leftover of a killed writer from the
    work of a living one on any host.
    """
    if sys.platform == "win32":
        return None  # no such lock there: two writers at once are not told apart
    import fcntl

    descriptor = None
    try:
        descriptor = os.open(temporary, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The lock may have come free because its holder renamed the folder into place.
        if os.path.samestat(os.fstat(descriptor), temporary.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    if descriptor is not None:
        os.close(descriptor)
    raise ValueError(
        f"save: path must be written by one process at a time, got {temporary.parent} where "
        f"another one holds {temporary.name}; wait for it or choose another folder"
    )


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _carry_over(old: Path, new: Path, replaced: set[str]) -> None:
    for entry in old.iterdir():
        target = new / entry.name
        if entry.name in replaced or target.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True)
        else:
            shutil.copy2(entry, target, follow_symlinks=False)


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(root, name)):
                _sync(Path(root, name))
        _sync(Path(root))
