"""The state of a collection under way, on disk, so that a killed run can be taken up again."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coachhook.errors import FingerprintMismatchError, FormatError
from coachhook.statistics.accumulate import KeySums
from coachhook.statistics.batches import Ints, TokenStream
from coachhook.statistics.share import Share
from coachhook.store import check_fields, check_writable, load_folder, save_folder
from coachhook.store.folders import MANIFEST, current_folder

_KIND = "statistics-checkpoint"


@dataclass(frozen=True)
class Position:
    """How far a run has come.

    Attributes:
        counts: the counts of the stream before the present window.
        texts: digest of all texts read before the present window.
        batches: batches of the present window that are done.
        window: digest of the tokens of the present window; "" when no batch is done.
        tokens: of those batches, for the progress shown.
    """

    counts: dict[str, int]
    texts: str
    batches: int = 0
    window: str = ""
    tokens: int = 0


class Checkpoint:
    """Saves and restores the state of one run in a folder; does nothing without one.

    Args:
        path: the folder, or None. Of several processes each has a folder of its own in there, and
            goes on from it: where one stands does not depend on the others.
        settings: JSON-serialisable; a state saved under other settings is refused.
        seconds: time between two states.
        share: this process's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        settings: Mapping[str, Any],
        seconds: float,
        share: Share,
    ) -> None:
        self._path = None
        if path is not None:
            self._path = _place(Path(path), share)
            check_writable(self._path)
        self._settings = dict(settings)
        self._seconds = seconds
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether the last state is old enough for another."""
        return self._path is not None and time.monotonic() - self._saved_at >= self._seconds

    def save(self, position: Position, sums: KeySums) -> None:
        """Replace the state on disk."""
        if self._path is None:
            return
        manifest = {"settings": self._settings, "position": asdict(position)}
        save_folder(self._path, kind=_KIND, manifest=manifest, tensors=sums.state())
        self._saved_at = time.monotonic()

    def restore(self, stream: TokenStream, sums: KeySums) -> Position | None:
        """Set `stream` and `sums` to the state on disk; None where there is none.

        Raises:
            FingerprintMismatchError: it is of other model weights.
            ValueError: it is of other texts or settings.
            FormatError: it is damaged.
        """
        if self._path is None or not (current_folder(self._path) / MANIFEST).exists():
            return None
        manifest, tensors = load_folder(self._path, _KIND)
        check_fields(manifest, {"settings": dict, "position": dict}, self._path)
        self._check_settings(manifest["settings"])
        try:
            position = Position(**manifest["position"])
        except TypeError as error:
            raise FormatError(f"load: {self._path} must hold a position, got: {error}") from error
        stream.skip_to(position.counts)
        if stream.digest != position.texts:
            raise ValueError(self._refusal("texts", "those read before", "other ones"))
        sums.restore(tensors)
        return position

    def check_window(self, position: Position, window: list[Ints]) -> None:
        """Check that `window` is the one in which the state was saved.

        Raises:
            ValueError: it is not.
        """
        if position.batches and window_digest(window) != position.window:
            raise ValueError(self._refusal("texts or tokenizer", "those used before", "other ones"))

    def _check_settings(self, saved: Mapping[str, Any]) -> None:
        for name, value in self._settings.items():
            if saved.get(name) != value:
                message = self._refusal(name, saved.get(name), value)
                is_weights = name == "fingerprint"
                raise FingerprintMismatchError(message) if is_weights else ValueError(message)

    def _refusal(self, name: str, saved: object, given: object) -> str:
        return (
            f"collect_statistics: resume: {name} must be {saved}, as in {self._path}, got {given}; "
            "repeat the run as it was, or start anew with another checkpoint_dir"
        )


def _place(path: Path, share: Share) -> Path:
    """The folder of this process.

    Raises:
        ValueError: `path` holds the state of one process and there are several, or the reverse.
    """
    alone = share.processes == 1
    if ((path / "process-0") if alone else (path / MANIFEST)).exists():
        raise ValueError(
            "collect_statistics: processes must be as many as before, got "
            f"{share.processes} and in {path} the state of {'several' if alone else 'one'}; repeat "
            "the run as it was, or start anew with another checkpoint_dir"
        )
    return path if alone else path / f"process-{share.rank}"


def window_digest(window: list[Ints]) -> str:
    """Return a digest of token sequences."""
    digest = hashlib.sha256()
    for sequence in window:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.tobytes())
    return digest.hexdigest()
