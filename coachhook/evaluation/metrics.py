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

``contained`` is the lenient reading of ``generated``: the target stands anywhere in the
continuation, as whole words. ``chat``, on request, sends each prompt as a user's message through
the tokenizer's chat template: the target stands in the reply; a neighbour's reply begins as the
unedited model's does. ``kl`` is the drift ``KL(P_before || P_after)`` of the token after a
neighbourhood prompt. ``gate`` tells where the hooks fired: share of unrelated tokens, share of
edited prompts. On request: ``language`` (unrelated text, see
:mod:`coachhook.evaluation.language`), ``fluency`` and ``cache`` (see
:mod:`coachhook.evaluation.fluency`), and ``records``, everything request by request.

Each value is the mean over requests of the mean over a request's prompts, so that a request with
five neighbours counts as much as one with a single neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from coachhook.editing.requests import EditRequest
from coachhook.errors import FactsError
from coachhook.evaluation.firing import fired_anywhere
from coachhook.evaluation.fluency import cache_agreement, ngram_entropy
from coachhook.evaluation.intervals import harmonic_mean, ratio_interval, wilson
from coachhook.evaluation.language import measure_rows, prompt_drift, text_rows
from coachhook.evaluation.observations import (
    FAMILIES,
    Pass,
    Prompt,
    Prompts,
    families_of,
    request_means,
    request_records,
)
from coachhook.evaluation.scoring import (
    Row,
    Score,
    decode_each,
    encode_chat,
    encode_pairs,
    encode_prompts,
    greedy,
    score,
)
from coachhook.hooks import HookSet
from coachhook.models import describe, evaluating


class Edits(Protocol):
    """What can be measured: the hooks of a model, or a system that edits it in another way."""

    def disabled(self) -> AbstractContextManager[None]:
        """A block in which the model answers without its edits."""


class _Unedited:
    """A model without edits."""

    def disabled(self) -> AbstractContextManager[None]:
        return nullcontext()


def evaluate(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    hooks: Edits | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 30,
    locality_tokens: int = 10,
    generate: bool = True,
    chat: bool = False,
    text: Any = None,
    text_tokens: int = 20_000,
    fluency_tokens: int = 0,
    cache_prompts: int = 0,
    details: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures a model with its edits off ("before") and on ("after").

    Args:
        model: the model, its hooks attached.
        tokenizer: its tokenizer.
        requests: the facts to ask for.
        hooks: the attached hooks, or a baseline of :mod:`coachhook.evaluation.baselines`; None
            measures the model as it is, before equal to after.
        batch_size: prompts per forward pass.
        max_new_tokens: limit of a greedy continuation, the same for all prompts.
        locality_tokens: new tokens compared for locality of generation.
        generate: False leaves out what is generated, ``generated`` and ``contained``, which takes
            most of the time.
        chat: also give ``chat``, from replies to the prompts as messages of a chat.
        text: unrelated text, as for :func:`coachhook.statistics.read_texts`; gives ``language``.
        text_tokens: tokens of ``text`` to use.
        fluency_tokens: length of the texts whose n-gram entropy is taken, prompt included
            (CounterFact: 100); 0 leaves ``fluency`` out.
        cache_prompts: prompts decoded with and without a KV cache too, for ``cache``; 0 leaves it
            out.
        details: also give ``records``, what was measured request by request, see
            :func:`~coachhook.evaluation.observations.request_records`.
        progress: show progress bars on stderr.

    Returns:
        A JSON-ready object: ``edits``; per family ``before`` and ``after`` with shares in
        [0, 1] or None where undefined, ``intervals`` (95 %, Wilson's with one observation per
        request, which is conservative for means of shares), ``mean`` (arithmetic; for
        ``probability`` ``score``, CounterFact's harmonic mean); ``kl`` in nats; ``gate``;
        ``counts``; ``protocol``; and what was asked for besides.

    Raises:
        ValueError: there is no request, ``text`` holds no two tokens in a row, or ``chat`` finds no
            chat template.
        FactsError: a prompt does not fit the context window; all such prompts are named.
            Nothing is run after either.
    """
    if not requests:
        raise ValueError("evaluate: requests must not be empty, got none")
    prompts = Prompts.of(requests)
    work = _Work(model, tokenizer, prompts, batch_size, max_new_tokens, generate, chat, progress)
    # Before anything is run: a text that holds nothing would be seen at the end only.
    unrelated = [] if text is None else text_rows(model, tokenizer, text, text_tokens)
    edits: Edits = hooks if hooks is not None else _Unedited()
    gates = hooks if isinstance(hooks, HookSet) else None
    extra: dict[str, Any] = {}
    with evaluating(model):
        with edits.disabled():
            before = work.run("before")
        after = before if hooks is None else work.run("after")
        drift = prompt_drift(
            model, tokenizer, [p.text for p in prompts.neighborhood], edits, batch_size=batch_size
        )
        gate = _gate(model, tokenizer, prompts, gates, batch_size)
        if unrelated:
            extra["language"] = measure_rows(model, unrelated, hooks=edits, gates=gates)
        if fluency_tokens:
            extra["fluency"] = _fluency(work, requests, edits, fluency_tokens)
        if cache_prompts:
            extra["cache"] = cache_agreement(
                model,
                tokenizer,
                [p.text for p in prompts.all()[:cache_prompts]],
                gates=gates,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
            )
    result: dict[str, Any] = {"edits": len(requests)}
    measured = {
        state: families_of(tokenizer, prompts, before, this, locality_tokens)
        for state, this in (("before", before), ("after", after))
    }
    records = request_records(tokenizer, requests, prompts, measured, before, after)
    result.update(summarise(records))
    drifts = list(zip((p.request for p in prompts.neighborhood), drift, strict=True))
    means = request_means(drifts)
    for number, mean in zip(dict(drifts), means, strict=True):
        records[number]["kl"] = mean
    result["kl"] = {
        "neighborhood": sum(means) / len(means) if means else None,
        "interval": ratio_interval(means, [1] * len(means), lowest=0.0),
    }
    result["gate"] = gate
    result.update(extra)
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
    if details:
        result["records"] = records
    return result


class _Work:
    """All prompts tokenised and checked, ready to be run in any state of the model."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Prompts,
        batch_size: int,
        max_new_tokens: int,
        generate: bool,
        chat: bool,
        progress: bool,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.progress = batch_size, progress
        self.max_positions = describe(model).max_positions
        self.max_new_tokens, self.generate = max_new_tokens, generate
        asked = prompts.all()
        self.prompts = encode_prompts(tokenizer, [p.text for p in asked])
        self.new, self.true, self.with_true = _encode_answers(tokenizer, asked)
        texts = [p.text for p in asked]
        self.messages = encode_chat("evaluate", tokenizer, texts) if chat else None
        rows = (self.new, self.true, self.with_true, self.messages or ())
        bad = _too_long(asked, *rows, self.max_positions)
        if bad:
            raise FactsError(
                "evaluate: prompts must fit the context window, got longer ones",
                [f"record {number}: {line}" for number, lines in bad.items() for line in lines],
            )

    def run(self, state: str) -> Pass:
        scores = score(
            self.model,
            self.new + self.true,
            batch_size=self.batch_size,
            progress=f"{state}: scoring" if self.progress else None,
        )
        true: list[Score | None] = [None] * len(self.new)
        for at, value in zip(self.with_true, scores[len(self.new) :], strict=True):
            true[at] = value
        seen = Pass(scores[: len(self.new)], true)
        if self.generate:
            seen.continuations = self.continue_(self.prompts, self.max_new_tokens, state)
        if self.messages is not None:
            seen.replies = self.continue_(self.messages, self.max_new_tokens, f"{state}, chat")
        return seen

    def continue_(
        self, rows: Sequence[tuple[int, ...]], new: int, state: str, limit: int | None = None
    ) -> list[tuple[int, ...]]:
        """Greedy continuations; ``limit`` bounds the length with the prompt."""
        bounds = [b for b in (limit, self.max_positions) if b is not None]
        return greedy(
            self.model,
            self.tokenizer,
            rows,
            max_new_tokens=new,
            max_positions=min(bounds, default=None),
            batch_size=self.batch_size,
            progress=f"{state}: generating" if self.progress else None,
        )


def long_prompts(
    model: Any, tokenizer: Any, requests: Sequence[EditRequest], chat: bool = False
) -> dict[int, list[str]]:
    """The prompts that :func:`evaluate` would refuse, by the number of their request."""
    asked = Prompts.of(requests).all()
    rows = _encode_answers(tokenizer, asked)
    messages = encode_chat("evaluate", tokenizer, [p.text for p in asked]) if chat else ()
    return _too_long(asked, *rows, messages, describe(model).max_positions)


def _encode_answers(
    tokenizer: Any, asked: Sequence[Prompt]
) -> tuple[list[Row], list[Row], list[int]]:
    """The prompts with their new answers, with their true ones, and which have a true one."""
    new = encode_pairs(tokenizer, [(p.text, p.new) for p in asked])
    true = encode_pairs(tokenizer, [(p.text, p.true) for p in asked if p.true is not None])
    return new, true, [i for i, p in enumerate(asked) if p.true is not None]


def _too_long(
    asked: Sequence[Prompt],
    new: Sequence[Row],
    true: Sequence[Row],
    with_true: Sequence[int],
    messages: Sequence[tuple[int, ...]],
    max_positions: int | None,
) -> dict[int, list[str]]:
    if max_positions is None:
        return {}
    longest = [len(row.ids) for row in new]
    for at, row in zip(with_true, true, strict=True):
        longest[at] = max(longest[at], len(row.ids))
    for at, message in enumerate(messages):  # with a first token of the reply
        longest[at] = max(longest[at], len(message) + 1)
    bad: dict[int, list[str]] = {}
    for p, n in zip(asked, longest, strict=True):
        if n > max_positions:
            bad.setdefault(p.request, []).append(
                f"prompt must fit the context window of {max_positions} tokens with its answer, "
                f"got {n} tokens in {p.text[:60]!r}..."
            )
    return bad


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The families of metrics over some of the ``records`` of :func:`evaluate`.

    Returns:
        Per family that was measured ``before``, ``after``, ``intervals`` and ``mean`` or ``score``,
        as :func:`evaluate` gives them for all records.
    """
    report: dict[str, Any] = {}
    for family, names in FAMILIES.items():
        seen = any(family in record["values"]["after"] for record in records)
        if family in ("generated", "contained", "chat") and not seen:
            continue
        report[family] = {"intervals": {}}
        summary: dict[str, float | None] = {}
        for state in ("before", "after"):
            found = [record["values"][state].get(family, {}) for record in records]
            per_request = [[v[name] for v in found if name in v] for name in names]
            means = [sum(v) / len(v) if v else None for v in per_request]
            report[family][state] = dict(zip(names, means, strict=True))
            report[family]["intervals"][state] = {
                name: wilson(mean, len(v)) if mean is not None else None
                for name, mean, v in zip(names, means, per_request, strict=True)
            }
            summary[state] = harmonic_mean(means) if family == "probability" else _mean(means)
        report[family]["score" if family == "probability" else "mean"] = summary
    return report


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if len(known) == len(values) and known else None


def _gate(
    model: Any, tokenizer: Any, prompts: Prompts, hooks: HookSet | None, batch_size: int
) -> dict[str, float | None]:
    """Shares of tokens and of prompts; a token fires where the hook of any layer does."""
    if hooks is None:
        return {"fired_unrelated": None, "fired_edited": None}
    gates = hooks

    def any_layer(asked: list[Prompt]) -> list[Tensor]:
        ids = encode_prompts(tokenizer, [p.text for p in asked])
        return fired_anywhere(model, gates, ids, batch_size=batch_size)

    near, edited = any_layer(prompts.neighborhood), any_layer(prompts.edit)
    tokens = sum(fired.numel() for fired in near)
    return {
        "fired_unrelated": sum(int(f.sum()) for f in near) / tokens if tokens else None,
        "fired_edited": sum(bool(f.any()) for f in edited) / len(edited),
    }


def _fluency(
    work: _Work, requests: Sequence[EditRequest], edits: Edits, tokens: int
) -> dict[str, Any]:
    """Mean n-gram entropy of texts of up to ``tokens`` tokens, prompt included."""
    asked = [
        (i, text) for i, r in enumerate(requests) for text in r.generation_prompts or (r.text,)
    ]
    rows = encode_prompts(work.tokenizer, [text for _, text in asked])
    report: dict[str, Any] = {"prompts": len(asked), "tokens": tokens, "intervals": {}}

    def measure(state: str) -> None:
        found = work.continue_(rows, tokens, f"{state}: fluency", tokens)
        texts = decode_each(work.tokenizer, [a + b for a, b in zip(rows, found, strict=True)])
        observed = [(i, ngram_entropy(text)) for (i, _), text in zip(asked, texts, strict=True)]
        means = request_means(observed)
        report[state] = sum(means) / len(means)
        report["intervals"][state] = ratio_interval(means, [1] * len(means))

    with edits.disabled():
        measure("before")
    measure("after")
    return report
