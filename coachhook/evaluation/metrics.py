"""Honest metrics of an edited model, before and after, in three families under distinct names.

* ``teacher_forced``: EasyEdit's token-level definitions. The model reads prompt and answer at once;
  reliability and generality are the share of answer tokens that are its most likely ones, locality
  the share of places whose most likely token is the same before and after. Answer content and
  length leak into these numbers (Yang et al. 2025, "The Mirage of Model Editing").
* ``probability``: CounterFact's ES, PS and NS (Meng et al. 2022). Share of prompts where the new
  target has the lower mean negative log-likelihood per token than the true one; on neighbourhood
  prompts the opposite. Undefined (None) where no true answer is known.
* ``generated``: what a user sees. Greedy decoding with a KV cache from the bare prompt, ended by
  the model's own end-of-text token or a limit that does not depend on the answer. Right where the
  continuation begins with the target and a boundary follows, see :func:`begins_with`; local where
  the first ``locality_tokens`` new tokens are those of the unedited model.

``gate`` tells where the hooks fired: share of unrelated tokens, share of edited prompts.

Each value is the mean over requests of the mean over a request's prompts, so that a request with
five neighbours counts as much as one with a single neighbour.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coachhook.editing.requests import EditRequest
from coachhook.errors import FactsError
from coachhook.evaluation.firing import trace
from coachhook.evaluation.intervals import harmonic_mean, wilson
from coachhook.evaluation.scoring import (
    Row,
    Score,
    decode_each,
    encode_pairs,
    encode_prompts,
    evaluation_mode,
    greedy,
    score,
)
from coachhook.models import describe

if TYPE_CHECKING:
    from coachhook.hooks import HookSet

_FAMILIES = {
    "teacher_forced": ("reliability", "generality", "locality"),
    "probability": ("efficacy", "paraphrase", "neighborhood"),
    "generated": ("reliability", "generality", "locality"),
}


@dataclass(frozen=True)
class _Prompt:
    """A prompt of request ``request`` and the answers it is judged by."""

    request: int
    text: str
    new: str
    true: str | None


@dataclass
class _Prompts:
    edit: list[_Prompt] = field(default_factory=list)
    paraphrase: list[_Prompt] = field(default_factory=list)
    neighborhood: list[_Prompt] = field(default_factory=list)

    @classmethod
    def of(cls, requests: Sequence[EditRequest]) -> _Prompts:
        prompts = cls()
        for i, request in enumerate(requests):
            new, true = request.target_new, request.target_true
            prompts.edit.append(_Prompt(i, request.text, new, true))
            prompts.paraphrase += [_Prompt(i, text, new, true) for text in request.paraphrases]
            answers: Sequence[str | None] = request.neighborhood_targets or (
                [true] * len(request.neighborhood)
            )
            prompts.neighborhood += [
                _Prompt(i, text, new, answer)
                for text, answer in zip(request.neighborhood, answers, strict=True)
            ]
        return prompts

    def all(self) -> list[_Prompt]:
        return self.edit + self.paraphrase + self.neighborhood

    def split(self, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Values in the order of :meth:`all`, by kind."""
        a, b = len(self.edit), len(self.edit) + len(self.paraphrase)
        return list(values[:a]), list(values[a:b]), list(values[b:])


@dataclass
class _Pass:
    """What one state of the model says on every prompt, in the order of ``_Prompts.all``."""

    new: list[Score]
    true: list[Score | None]
    continuations: list[tuple[int, ...]]


def evaluate(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    hooks: HookSet | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 30,
    locality_tokens: int = 10,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures a model with its edits off ("before") and on ("after").

    Args:
        model: the model, its hooks attached.
        tokenizer: its tokenizer.
        requests: the facts to ask for.
        hooks: the attached hooks; None measures the model as it is, before equal to after.
        batch_size: prompts per forward pass.
        max_new_tokens: limit of a greedy continuation, the same for all prompts.
        locality_tokens: new tokens compared for locality of generation.
        progress: show progress bars on stderr.

    Returns:
        A JSON-ready object: ``edits``; per family ``before`` and ``after`` with three shares in
        [0, 1] or None where undefined, ``intervals`` (95 %, Wilson's with one observation per
        request, which is conservative for means of shares), ``mean`` (arithmetic; for
        ``probability`` ``score``, CounterFact's harmonic mean); ``gate``; ``counts``; ``protocol``.

    Raises:
        ValueError: there is no request.
        FactsError: a prompt does not fit the context window; all such prompts are named and
            nothing is run.
    """
    if not requests:
        raise ValueError("evaluate: requests must not be empty, got none")
    prompts = _Prompts.of(requests)
    max_positions = describe(model).max_positions
    work = _Work(model, tokenizer, prompts, max_positions, batch_size, max_new_tokens, progress)
    gate: dict[str, float | None] = {"fired_unrelated": None, "fired_edited": None}
    with evaluation_mode(model):
        if hooks is None:
            before = after = work.run("unedited")
        else:
            with hooks.disabled():
                before = work.run("before")
            after = work.run("after")
            gate = _gate(model, tokenizer, prompts, hooks, batch_size)
    result: dict[str, Any] = {"edits": len(requests)}
    measured = {
        state: _families(tokenizer, prompts, before, this, locality_tokens)
        for state, this in (("before", before), ("after", after))
    }
    for family, names in _FAMILIES.items():
        result[family] = _report(family, names, measured)
    result["gate"] = gate
    result["counts"] = {
        "requests": len(requests),
        "paraphrases": len(prompts.paraphrase),
        "neighborhood": len(prompts.neighborhood),
    }
    result["protocol"] = {
        "max_new_tokens": max_new_tokens,
        "locality_tokens": locality_tokens,
        "intervals": "95 % Wilson, one observation per request",
    }
    return result


class _Work:
    """All prompts tokenised and checked, ready to be run in any state of the model."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: _Prompts,
        max_positions: int | None,
        batch_size: int,
        max_new_tokens: int,
        progress: bool,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.progress = batch_size, progress
        self.max_positions, self.max_new_tokens = max_positions, max_new_tokens
        asked = prompts.all()
        self.prompts = encode_prompts(tokenizer, [p.text for p in asked])
        self.new = encode_pairs(tokenizer, [(p.text, p.new) for p in asked])
        self.with_true = [i for i, p in enumerate(asked) if p.true is not None]
        self.true = encode_pairs(tokenizer, [(p.text, p.true) for p in asked if p.true is not None])
        _check_lengths(asked, self.new, self.true, self.with_true, max_positions)

    def run(self, state: str) -> _Pass:
        scores = score(
            self.model,
            self.new + self.true,
            batch_size=self.batch_size,
            progress=f"{state}: scoring" if self.progress else None,
        )
        true: list[Score | None] = [None] * len(self.new)
        for at, value in zip(self.with_true, scores[len(self.new) :], strict=True):
            true[at] = value
        continuations = greedy(
            self.model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            max_positions=self.max_positions,
            batch_size=self.batch_size,
            progress=f"{state}: generating" if self.progress else None,
        )
        return _Pass(scores[: len(self.new)], true, continuations)


def _check_lengths(
    asked: Sequence[_Prompt],
    new: Sequence[Row],
    true: Sequence[Row],
    with_true: Sequence[int],
    max_positions: int | None,
) -> None:
    if max_positions is None:
        return
    longest = [len(row.ids) for row in new]
    for at, row in zip(with_true, true, strict=True):
        longest[at] = max(longest[at], len(row.ids))
    bad = [
        f"record {p.request}: {n} tokens with its answer: {p.text[:60]!r}..."
        for p, n in zip(asked, longest, strict=True)
        if n > max_positions
    ]
    if bad:
        raise FactsError(
            f"evaluate: prompts must fit the context window of {max_positions} tokens, got "
            f"{len(bad)} longer ones",
            bad,
        )


def begins_with(continuation: str, target: str) -> bool:
    """Whether a continuation gives ``target`` as its answer.

    Leading white space is dropped; then the text must begin with the target, letter case included,
    and the target must end there: at the end of the text, or before a character that is neither a
    letter nor a digit. "Lyon, the" and "Lyon" answer "Lyon"; "Lyons", "lyon" and "the city of Lyon"
    do not.
    """
    text, target = continuation.lstrip(), target.strip()
    rest = text[len(target) :]
    return text.startswith(target) and not rest[:1].isalnum()


def _families(
    tokenizer: Any, prompts: _Prompts, before: _Pass, this: _Pass, locality_tokens: int
) -> dict[str, list[list[tuple[int, float]]]]:
    """Per family and metric the observations (request, value in [0, 1])."""
    edit_new, para_new, near_new = prompts.split(this.new)
    edit_true, para_true, near_true = prompts.split(this.true)
    edit_text, para_text, near_text = prompts.split(this.continuations)
    _, _, near_true_before = prompts.split(before.true)
    _, _, near_text_before = prompts.split(before.continuations)

    def accuracy(asked: list[_Prompt], scores: list[Score]) -> list[tuple[int, float]]:
        return [(p.request, s.accuracy) for p, s in zip(asked, scores, strict=True)]

    def prefers_new(
        asked: list[_Prompt], new: list[Score], true: list[Score | None], *, wanted: bool
    ) -> list[tuple[int, float]]:
        return [
            (p.request, float(n.nll < t.nll if wanted else n.nll > t.nll))
            for p, n, t in zip(asked, new, true, strict=True)
            if t is not None
        ]

    def answered(asked: list[_Prompt], found: list[tuple[int, ...]]) -> list[tuple[int, float]]:
        texts = decode_each(tokenizer, found)
        return [
            (p.request, float(begins_with(t, p.new))) for p, t in zip(asked, texts, strict=True)
        ]

    same_argmax = [
        (p.request, sum(a == b for a, b in zip(s.argmax, s0.argmax, strict=True)) / len(s0.argmax))
        for p, s, s0 in zip(prompts.neighborhood, near_true, near_true_before, strict=True)
        if s is not None and s0 is not None
    ]
    same_text = [
        (p.request, float(a[:locality_tokens] == b[:locality_tokens]))
        for p, a, b in zip(prompts.neighborhood, near_text, near_text_before, strict=True)
    ]
    return {
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
        "generated": [
            answered(prompts.edit, edit_text),
            answered(prompts.paraphrase, para_text),
            same_text,
        ],
    }


def _report(
    family: str,
    names: Sequence[str],
    measured: dict[str, dict[str, list[list[tuple[int, float]]]]],
) -> dict[str, Any]:
    report: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    summary: dict[str, float | None] = {}
    for state, families in measured.items():
        per_request = [_request_means(observed) for observed in families[family]]
        means = [sum(v) / len(v) if v else None for v in per_request]
        report[state] = dict(zip(names, means, strict=True))
        intervals[state] = {
            name: wilson(mean, len(v)) if mean is not None else None
            for name, mean, v in zip(names, means, per_request, strict=True)
        }
        summary[state] = harmonic_mean(means) if family == "probability" else _mean(means)
    report["intervals"] = intervals
    report["score" if family == "probability" else "mean"] = summary
    return report


def _request_means(observed: Iterable[tuple[int, float]]) -> list[float]:
    groups: dict[int, list[float]] = {}
    for request, value in observed:
        groups.setdefault(request, []).append(value)
    return [sum(v) / len(v) for v in groups.values()]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if len(known) == len(values) and known else None


def _gate(
    model: Any, tokenizer: Any, prompts: _Prompts, hooks: HookSet, batch_size: int
) -> dict[str, float | None]:
    """Shares of tokens and of prompts; a token fires where the hook of any layer does."""

    def any_layer(asked: list[_Prompt]) -> list[Tensor]:
        ids = encode_prompts(tokenizer, [p.text for p in asked])
        traces = trace(model, hooks, ids, batch_size=batch_size)
        return [torch.stack([layer.fired for layer in t.values()]).any(0) for t in traces]

    near, edited = any_layer(prompts.neighborhood), any_layer(prompts.edit)
    tokens = sum(fired.numel() for fired in near)
    return {
        "fired_unrelated": sum(int(f.sum()) for f in near) / tokens if tokens else None,
        "fired_edited": sum(bool(f.any()) for f in edited) / len(edited),
    }
