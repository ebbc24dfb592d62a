"""What a user asks for: one fact to rewrite."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class EditRequest:
    """One fact to write into a model.

    Args:
        prompt: text that the fact completes. Either a template with exactly one ``{}`` where the
            subject goes ("The capital of {} is"), or plain text that contains the subject. After a
            prompt that ends in white space, as a chat's before the reply, the target follows
            directly, after any other a space.
        subject: the entity the fact is about ("France").
        target_new: the completion wanted after the edit ("Lyon"), without a leading space.
        target_true: the completion before the edit, when known; used by metrics only.
        paraphrases: other complete prompts (no ``{}``) that should give ``target_new``.
        neighborhood: complete prompts about other subjects, whose answers should not change.
        neighborhood_targets: expected answers of ``neighborhood``, one each, or empty for
            ``target_true`` throughout.
        generation_prompts: openings of free text about the subject, for metrics of fluency.
        id: any identifier; kept in saved edits.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: a field is empty, ``prompt`` has more than one ``{}``, or it has none and does
            not contain ``subject``.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrases: Sequence[str] = ()
    neighborhood: Sequence[str] = ()
    neighborhood_targets: Sequence[str] = ()
    generation_prompts: Sequence[str] = ()
    id: str | int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"EditRequest: {name} must be a string, got {type(value).__name__}")
            if not value.strip():
                raise ValueError(f"EditRequest: {name} must not be empty, got {value!r}")
            _check_text(name, value)
        if self.target_true is not None and not isinstance(self.target_true, str):
            raise TypeError(
                "EditRequest: target_true must be a string or None, got "
                f"{type(self.target_true).__name__}"
            )
        _check_text("target_true", self.target_true or "")
        try:
            known_as = json.dumps(self.id, ensure_ascii=False)
        except (TypeError, ValueError) as error:  # of other kinds of numbers, and of circles
            raise TypeError(
                "EditRequest: id must be a string, an int or None, got "
                f"{type(self.id).__name__}, which cannot be saved; str(id) and int(id) can"
            ) from error
        _check_text("id", known_as)
        for name in (
            "paraphrases",
            "neighborhood",
            "neighborhood_targets",
            "generation_prompts",
        ):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(v, str) for v in value):
                raise TypeError(f"EditRequest: {name} must be a list of strings, got {value!r}")
            for text in value:
                _check_text(name, text)
            object.__setattr__(self, name, tuple(value))
        if self.neighborhood_targets and len(self.neighborhood_targets) != len(self.neighborhood):
            raise ValueError(
                "EditRequest: neighborhood_targets must be empty or match neighborhood "
                f"({len(self.neighborhood)}), got {len(self.neighborhood_targets)}"
            )
        slots = self.prompt.count("{}")
        if slots > 1:
            raise ValueError(
                f"EditRequest: prompt must have exactly one '{{}}', got {slots} in {self.prompt!r}"
            )
        if slots == 0 and self.subject not in self.prompt:
            raise ValueError(
                "EditRequest: prompt must have a '{}' or contain the subject "
                f"{self.subject!r}, got {self.prompt!r}"
            )

    @property
    def template(self) -> str:
        """The prompt with exactly one ``{}``; a literal subject is replaced at its last place."""
        if "{}" in self.prompt:
            return self.prompt
        head, tail = self.prompt.rsplit(self.subject, 1)
        return f"{head}{{}}{tail}"

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.template.replace("{}", self.subject)

    @property
    def subject_span(self) -> tuple[int, int]:
        """Character offsets ``(start, end)`` of the subject in :attr:`text`."""
        start = self.template.index("{}")
        return start, start + len(self.subject)

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON-ready values; empty fields are left out."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        # An id may be 0: that of CounterFact's first record is.
        kept = {k: v for k, v in record.items() if v or (k == "id" and v is not None)}
        return {k: list(v) if isinstance(v, list | tuple) else v for k, v in kept.items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> EditRequest:
        """The inverse of :meth:`to_dict`."""
        return cls(**record)


def is_text(value: str) -> bool:
    """Whether a string has a form in UTF-8; half of a surrogate pair has none for a tokenizer."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_text(name: str, value: str) -> None:
    if not is_text(value):
        raise ValueError(f"EditRequest: {name} must be Unicode text, got {value!r}")


def check_kind(what: str, value: Any, kind: type) -> None:
    """Refuses an argument of another class.

    Raises:
        TypeError: ``what`` must be a ``kind`` and is none.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{what} must be {kind.__name__}, got {type(value).__name__}")


def check_requests(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests of a batch as a list.

    Raises:
        TypeError: something else than a list of requests was given.
        ValueError: there is none.
    """
    if isinstance(requests, EditRequest | str) or not isinstance(requests, Iterable):
        raise TypeError(
            f"edit: requests must be a list of EditRequest, got one {type(requests).__name__}"
        )
    found = list(requests)
    wrong = next((r for r in found if not isinstance(r, EditRequest)), None)
    if wrong is not None:
        raise TypeError(
            f"edit: requests must be a list of EditRequest, got a {type(wrong).__name__} in it"
        )
    if not found:
        raise ValueError("edit: requests must hold at least one request, got none")
    return found
