"""Exceptions of the package.

Every error a caller may want to catch derives from :class:`CoachhookError` and from the built-in
exception it refines, so that both ``except CoachhookError`` and ``except ValueError`` work.
"""

from __future__ import annotations


class CoachhookError(Exception):
    """Base class of all errors raised by coachhook."""


class BackendUnavailableError(CoachhookError, RuntimeError):
    """The requested implementation of an op cannot run here; the message gives the reason."""


class NotPositiveDefiniteError(CoachhookError, ArithmeticError):
    """A Cholesky update or downdate would leave a matrix that is not positive definite."""


class UnsupportedModelError(CoachhookError, ValueError):
    """No editable down-projection was found in a model; the message names what was looked for."""


class FingerprintMismatchError(CoachhookError, ValueError):
    """Statistics or edits belong to other model weights than the ones given."""


class FormatError(CoachhookError, ValueError):
    """A file is truncated, of an unknown format version, or not one of ours."""


class FactsError(CoachhookError, ValueError):
    """A facts file holds bad records.

    Args:
        message: summary line.
        problems: one line per bad record, with its position and field.
    """

    def __init__(self, message: str, problems: list[str] | None = None) -> None:
        self.problems = list(problems or [])
        super().__init__("\n".join([message, *(f"  {p}" for p in self.problems)]))
