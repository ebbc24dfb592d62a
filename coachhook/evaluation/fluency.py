"""How generated text reads: n-gram entropy, agreement with reference texts, and with itself.

* :func:`ngram_entropy`: fluency as CounterFact measures it (Meng et al. 2022, section 3.4): the
  weighted mean of bi- and tri-gram entropies. Text that repeats itself scores low.
* :func:`consistency`: cosine of the TF-IDF vectors of a generated text and of reference texts about
  things that have the new attribute. The records of CounterFact and zsRE hold no reference texts
  (CounterFact keeps them in a file of its own), so ``evaluate`` does not report it; call it with
  your own.
* :func:`cache_agreement`: whether decoding with and without a KV cache gives the same text.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coachhook.evaluation.firing import trace
from coachhook.evaluation.intervals import wilson
from coachhook.evaluation.scoring import (
    decode_each,
    encode_prompts,
    greedy,
    input_device,
)
from coachhook.hooks.cache_state import cache_argument, returned_cache
from coachhook.models import describe, evaluating

# (n, weight) as in the published evaluation of CounterFact.
_ENTROPIES = ((2, 2 / 3), (3, 4 / 3))
_TOKEN = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words and single punctuation marks, in order.

    CounterFact's evaluation uses NLTK's ``word_tokenize``, which splits English contractions
    otherwise; entropies of ordinary text differ in the second decimal at most.
    """
    return _TOKEN.findall(text)


def ngram_entropy(text: str) -> float:
    """``(2/3 H_2 + 4/3 H_3) / 2`` with the entropies H_n of the text's n-grams, in bits.

    A text of fewer than n words has ``H_n = 0``.
    """
    tokens = words(text)
    total = 0.0
    for n, weight in _ENTROPIES:
        grams = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
        count = sum(grams.values())
        total += weight * -sum(c / count * math.log2(c / count) for c in grams.values())
    return total / len(_ENTROPIES)


def consistency(generated: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Cosine of TF-IDF vectors of each generated text and of its reference texts joined.

    Term frequencies are counts of lower-case words; the inverse document frequency is
    ``1 + ln((1 + D) / (1 + d))`` for a word in d of the D reference texts.

    Args:
        generated: one text each.
        references: for each generated text its reference texts.

    Returns:
        One value in [0, 1] each; 0 where either side has no words.

    Raises:
        ValueError: the two lists differ in length.
    """
    if len(generated) != len(references):
        raise ValueError(
            f"consistency: references must be one list for each of {len(generated)} texts, got "
            f"{len(references)}"
        )
    documents = [text for texts in references for text in texts]
    found = Counter(w for text in documents for w in set(words(text.lower())))

    def vector(text: str) -> dict[str, float]:
        counts = Counter(words(text.lower()))
        return {
            w: c * (1 + math.log((1 + len(documents)) / (1 + found[w]))) for w, c in counts.items()
        }

    cosines = []
    for text, texts in zip(generated, references, strict=True):
        a, b = vector(text), vector(" ".join(texts))
        norms = math.hypot(*a.values()) * math.hypot(*b.values())
        cosines.append(sum(v * b.get(w, 0.0) for w, v in a.items()) / norms if norms else 0.0)
    return cosines


@dataclass(frozen=True)
class CacheDifference:
    """A prompt whose greedy continuation depends on the KV cache.

    Args:
        prompt: the prompt.
        cached: continuation decoded with a cache.
        uncached: continuation decoded without one.
        at: number of new tokens the two have in common.
        cause: "gate" where a hook decides otherwise about the tokens they have in common once the
            text goes on, so that the two are different functions of the text; "rounding" where it
            does not, and the two sums are the same in exact arithmetic.
        margin: difference of the two largest logits at the first token that differs, without cache.
    """

    prompt: str
    cached: str
    uncached: str
    at: int
    cause: str
    margin: float


def cache_agreement(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    gates: Any = None,
    max_new_tokens: int = 30,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Share of prompts whose greedy continuation is the same with and without a KV cache.

    With a cache the gate of a sequence is settled when its prompt is read; without one every new
    token brings the whole sequence before the gate again. A gate that looks at single tokens
    (population, membership) decides the same, one that looks at the sequence need not.

    Args:
        model: the model, its edits on.
        tokenizer: its tokenizer.
        prompts: texts, not empty.
        gates: the hooks whose gates are asked for the cause, or None where there are none.
        max_new_tokens: limit of a continuation.
        batch_size: prompts per forward pass.

    Returns:
        A JSON-ready object: ``prompts``, ``same`` (share), ``interval`` (95 %, Wilson), ``causes``
        (how many differ for which) and ``differences``, one record of :class:`CacheDifference` for
        each prompt that differs.

    Raises:
        ValueError: there is no prompt.
    """
    if not prompts:
        raise ValueError("cache_agreement: prompts must not be empty, got none")
    rows = encode_prompts(tokenizer, prompts)
    with evaluating(model):
        cached, uncached = (
            greedy(
                model,
                tokenizer,
                rows,
                max_new_tokens=max_new_tokens,
                max_positions=describe(model).max_positions,
                batch_size=batch_size,
                use_cache=use_cache,
            )
            for use_cache in (True, False)
        )
        differ = [i for i, (a, b) in enumerate(zip(cached, uncached, strict=True)) if a != b]
        found = [
            _difference(model, tokenizer, prompts[i], rows[i], cached[i], uncached[i], gates)
            for i in differ
        ]
    same = 1 - len(found) / len(prompts)
    return {
        "prompts": len(prompts),
        "same": same,
        "interval": wilson(same, len(prompts)),
        "causes": dict(Counter(d.cause for d in found)),
        "differences": [vars(d) for d in found],
    }


@torch.no_grad()
def _difference(
    model: Any,
    tokenizer: Any,
    prompt: str,
    row: tuple[int, ...],
    cached: tuple[int, ...],
    uncached: tuple[int, ...],
    gates: Any,
) -> CacheDifference:
    pairs = zip(cached, uncached, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(cached), len(uncached)))
    seen = row + uncached[:at]
    ids = torch.tensor([seen], device=input_device(model))
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    first, second = logits[0, -1].double().topk(2).values.tolist()
    cause = "rounding"
    if gates is not None:
        stepwise = _fired_stepwise(model, row, uncached[:at], gates)
        (whole,) = trace(model, gates, [seen])
        if any(not torch.equal(stepwise[i], layer.fired) for i, layer in whole.items()):
            cause = "gate"
    with_cache, without = decode_each(tokenizer, [cached, uncached])
    return CacheDifference(prompt, with_cache, without, at, cause, first - second)


def _fired_stepwise(
    model: Any, prompt: tuple[int, ...], new: tuple[int, ...], gates: Any
) -> dict[int, torch.Tensor]:
    """Per layer which tokens took the hook, bool ``[T]``, as decoding with a KV cache sees them."""
    device = input_device(model)
    fired: dict[int, list[torch.Tensor]] = {}
    cache, length = None, 0
    with gates.record() as records:
        for tokens in (prompt, *((token,) for token in new)):
            length += len(tokens)
            output = model(
                input_ids=torch.tensor([tokens], device=device),
                attention_mask=torch.ones(1, length, dtype=torch.int64, device=device),
                use_cache=True,
                **cache_argument(model, cache),
            )
            cache = returned_cache(output)
    for layer, _, decided in records:
        fired.setdefault(layer, []).append(decided[0].cpu())
    return {layer: torch.cat(parts) for layer, parts in fired.items()}
