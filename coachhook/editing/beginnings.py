"""Subjects that begin alike, which a model cannot tell apart before they part.

"Bellweather Industries" and "Bellweather Group" have one key at "Bellweather": what is written
there for the one is said of the other, too, and of two corrections the later is said of both. So
nothing is written before a subject's last token where another such subject was edited before it or
is edited with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from coachhook.editing.encoding import EncodedRequest
from coachhook.editing.records import BatchRecord
from coachhook.editing.requests import EditRequest


class Beginnings:
    """What the subjects of edits begin with, at the ends of their tokens.

    Args:
        tokenizer: a fast tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._of: dict[str, set[str]] = {}

    def shared(
        self,
        encoded: Sequence[EncodedRequest],
        requests: Sequence[EditRequest],
        batches: Iterable[BatchRecord],
    ) -> list[bool]:
        """Whether some other edited subject is as a request's up to the last token of that.

        Args:
            encoded: the requests of a batch.
            requests: the same.
            batches: what was edited before.
        """
        edited = {r.subject for batch in batches for r in batch.requests}
        edited |= {r.subject for r in requests}
        self._read(sorted(edited - self._of.keys()))
        owners: dict[str, set[str]] = {}
        for subject in edited:
            for beginning in self._of[subject]:
                owners.setdefault(beginning, set()).add(subject)
        found = []
        for tokens, request in zip(encoded, requests, strict=True):
            prompt = tokens.contexts[0]
            beginning = self._tokenizer.decode(prompt.ids[prompt.first : prompt.lookup]).strip()
            found.append(bool(owners.get(beginning, set()) - {request.subject}))
        return found

    def _read(self, subjects: list[str]) -> None:
        for subject in subjects:
            self._of[subject] = set()
        # After a space a word may be cut up otherwise.
        for space in ("", " "):
            if not subjects:
                return
            texts = [space + subject for subject in subjects]
            encoding = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            for subject, offsets in zip(subjects, encoding["offset_mapping"], strict=True):
                ends = {end - len(space) for _, end in offsets}
                self._of[subject] |= {subject[:e] for e in ends if 0 < e < len(subject)}
