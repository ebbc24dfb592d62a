"""What was asked and what was seen: prompts of requests, observations, records by request."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from coachhook.editing.requests import EditRequest
from coachhook.evaluation.scoring import Score, decode_each

FAMILIES = {
    "teacher_forced": ("reliability", "generality", "locality"),
    "probability": ("efficacy", "paraphrase", "neighborhood"),
    "generated": ("reliability", "generality", "locality"),
    "contained": ("reliability", "generality"),
    "chat": ("reliability", "generality", "locality"),
}

# Of prompts, in the order of ``Prompts.all``.
_KINDS = ("edit", "paraphrase", "neighborhood")

# (number of the request, value)
Observed: TypeAlias = "list[tuple[int, float]]"


@dataclass(frozen=True)
class Prompt:
    """A prompt of request ``request`` and the answers it is judged by."""

    request: int
    text: str
    new: str
    true: str | None


@dataclass
class Prompts:
    """The prompts of all requests, by kind."""

    edit: list[Prompt] = field(default_factory=list)
    paraphrase: list[Prompt] = field(default_factory=list)
    neighborhood: list[Prompt] = field(default_factory=list)

    @classmethod
    def of(cls, requests: Sequence[EditRequest]) -> Prompts:
        """The prompts of ``requests``, each with the answers it is judged by."""
        prompts = cls()
        for i, request in enumerate(requests):
            new, true = request.target_new, request.target_true
            prompts.edit.append(Prompt(i, request.text, new, true))
            prompts.paraphrase += [Prompt(i, text, new, true) for text in request.paraphrases]
            answers: Sequence[str | None] = request.neighborhood_targets or (
                [true] * len(request.neighborhood)
            )
            prompts.neighborhood += [
                Prompt(i, text, new, answer)
                for text, answer in zip(request.neighborhood, answers, strict=True)
            ]
        return prompts

    def all(self) -> list[Prompt]:
        """Edit prompts, then paraphrases, then neighbourhood prompts."""
        return self.edit + self.paraphrase + self.neighborhood

    def split(self, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Values in the order of :meth:`all`, by kind."""
        a, b = len(self.edit), len(self.edit) + len(self.paraphrase)
        return list(values[:a]), list(values[a:b]), list(values[b:])


@dataclass
class Pass:
    """What one state of the model says on every prompt, in the order of ``Prompts.all``.

    ``replies`` are those to the prompts as messages of a chat.
    """

    new: list[Score]
    true: list[Score | None]
    continuations: list[tuple[int, ...]] | None = None
    replies: list[tuple[int, ...]] | None = None


def begins_with(continuation: str, target: str) -> bool:
    """Whether a continuation gives ``target`` as its answer.

    Leading white space is dropped; then the text must begin with the target, letter case included,
    and the target must end there: at the end of the text, or before a character that is neither a
    letter nor a digit. "Lyon, the" and "Lyon" answer "Lyon"; "Lyons", "lyon" and "the city of Lyon"
    do not. Letters of scripts without case end no word and go on with none.
    """
    text, target = continuation.lstrip(), target.strip()
    return text.startswith(target) and not _one_word(target[-1], text[len(target) :][:1])


def contains(continuation: str, target: str) -> bool:
    """Whether ``target`` stands anywhere in a continuation, as whole words, letter case included.

    Beyond some thirty tokens a match says little, so the limit of the continuation should be short.
    """
    target = target.strip()
    return any(
        not _one_word(target[0], continuation[:at][-1:])
        and not _one_word(target[-1], continuation[at + len(target) :][:1])
        for at in (m.start() for m in re.finditer(f"(?={re.escape(target)})", continuation))
    )


# Letters without case, and vowel and tone signs on them.
_CASELESS = ("Lo", "Lm", "Mn", "Mc")


def _one_word(edge: str, beyond: str) -> bool:
    """Whether the word of a target's first or last character goes on with the one beyond it.

    Scripts without case may set no space between words, so that a letter there says nothing, as
    where edits ask for the ends of words (:mod:`coachhook.editing.word_ends`).
    """
    if not beyond or unicodedata.category(edge) in _CASELESS:
        return False
    if unicodedata.combining(beyond):  # an accent that is a character of its own
        return True
    return beyond.isalnum() and unicodedata.category(beyond) not in _CASELESS


def families_of(
    tokenizer: Any, prompts: Prompts, before: Pass, this: Pass, locality_tokens: int
) -> dict[str, list[Observed]]:
    """Per family and metric the observations (request, value in [0, 1])."""
    edit_new, para_new, near_new = prompts.split(this.new)
    edit_true, para_true, near_true = prompts.split(this.true)
    _, _, near_true_before = prompts.split(before.true)

    def accuracy(asked: list[Prompt], scores: list[Score]) -> Observed:
        return [(p.request, s.accuracy) for p, s in zip(asked, scores, strict=True)]

    def prefers_new(
        asked: list[Prompt], new: list[Score], true: list[Score | None], *, wanted: bool
    ) -> Observed:
        return [
            # Of one answer the two scores differ by rounding at most, which prefers neither.
            (p.request, float(p.new != p.true and (n.nll < t.nll if wanted else n.nll > t.nll)))
            for p, n, t in zip(asked, new, true, strict=True)
            if t is not None
        ]

    def answered(
        asked: list[Prompt], texts: list[str], right: Callable[[str, str], bool]
    ) -> Observed:
        return [(p.request, float(right(t, p.new))) for p, t in zip(asked, texts, strict=True)]

    same_argmax = [
        (p.request, sum(a == b for a, b in zip(s.argmax, s0.argmax, strict=True)) / len(s0.argmax))
        for p, s, s0 in zip(prompts.neighborhood, near_true, near_true_before, strict=True)
        if s is not None and s0 is not None
    ]
    families = {
        "teacher_forced": [
            accuracy(prompts.edit, edit_new),
            accuracy(prompts.paraphrase, para_new),
            same_argmax,
        ],
        "probability": [
            prefers_new(prompts.edit, edit_new, edit_true, wanted=True),
            prefers_new(prompts.paraphrase, para_new, para_true, wanted=True),
            prefers_new(prompts.neighborhood, near_new, near_true, wanted=False),
        ],
    }

    def unchanged(new: list[tuple[int, ...]], old: list[tuple[int, ...]]) -> Observed:
        near = zip(prompts.neighborhood, prompts.split(new)[2], prompts.split(old)[2], strict=True)
        return [(p.request, float(a[:locality_tokens] == b[:locality_tokens])) for p, a, b in near]

    if this.continuations is not None and before.continuations is not None:
        edit_text, para_text, _ = prompts.split(decode_each(tokenizer, this.continuations))
        families["generated"] = [
            answered(prompts.edit, edit_text, begins_with),
            answered(prompts.paraphrase, para_text, begins_with),
            unchanged(this.continuations, before.continuations),
        ]
        families["contained"] = [
            answered(prompts.edit, edit_text, contains),
            answered(prompts.paraphrase, para_text, contains),
        ]
    if this.replies is not None and before.replies is not None:
        edit_text, para_text, _ = prompts.split(decode_each(tokenizer, this.replies))
        families["chat"] = [
            answered(prompts.edit, edit_text, contains),
            answered(prompts.paraphrase, para_text, contains),
            unchanged(this.replies, before.replies),
        ]
    return families


def request_means(observed: Iterable[tuple[int, float]]) -> list[float]:
    """The mean of each request's values, for the requests that have any."""
    groups: dict[int, list[float]] = {}
    for request, value in observed:
        groups.setdefault(request, []).append(value)
    return [sum(v) / len(v) for v in groups.values()]


def request_records(
    tokenizer: Any,
    requests: Sequence[EditRequest],
    prompts: Prompts,
    measured: dict[str, dict[str, list[Observed]]],
    before: Pass,
    after: Pass,
) -> list[dict[str, Any]]:
    """What was measured, request by request.

    Returns:
        Per request ``id``, ``prompt``, ``subject``, ``target_new``, ``target_true``; ``values``,
        by state, family and metric the mean over the request's prompts; ``answers``, by kind of
        prompt ("edit", "paraphrase", "neighborhood") its texts with the continuations before and
        after, empty where nothing was generated; ``replies``, the same of a chat, where it was
        asked for; ``kl`` of its neighbours, None here (:func:`coachhook.evaluation.evaluate` fills
        it in).
    """
    records: list[dict[str, Any]] = [
        {
            "id": r.id,
            "prompt": r.text,
            "subject": r.subject,
            "target_new": r.target_new,
            "target_true": r.target_true,
            "values": {state: {} for state in measured},
            "answers": {kind: [] for kind in _KINDS},
            "kl": None,
        }
        for r in requests
    ]
    for state, families in measured.items():
        for family, observed in families.items():
            for name, values in zip(FAMILIES[family], observed, strict=True):
                groups: dict[int, list[float]] = {}
                for request, value in values:
                    groups.setdefault(request, []).append(value)
                for request, group in groups.items():
                    into = records[request]["values"][state].setdefault(family, {})
                    into[name] = sum(group) / len(group)
    for name, old, new in (
        ("answers", before.continuations, after.continuations),
        ("replies", before.replies, after.replies),
    ):
        if old is None or new is None:
            continue
        texts = [prompts.split(decode_each(tokenizer, tokens)) for tokens in (old, new)]
        asked = prompts.split(prompts.all())
        for kind, theirs, a, b in zip(_KINDS, asked, *texts, strict=True):
            for record in records:
                record.setdefault(name, {})[kind] = []
            for prompt, x, y in zip(theirs, a, b, strict=True):
                said = {"prompt": prompt.text, "before": x, "after": y}
                records[prompt.request][name][kind].append(said)
    return records
