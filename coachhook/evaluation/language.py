"""What edits do to text that has nothing to do with them: drift, perplexity, share of tokens gated.

Every number compares the same model with its edits off and on, on the same tokens:

* ``kl``: mean of ``KL(P_before || P_after)`` of the next-token distribution, in nats.
* ``perplexity``: ``exp`` of the mean negative log-likelihood per token, before, after and their
  ratio.
* ``unchanged``: share of places whose most likely next token is the same.
* ``fired``: share of tokens that take a hook in any layer.

Intervals take a text as one observation, because the tokens of a text depend on each other; those
of shares count texts of different lengths as fewer (:func:`effective_count`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coachhook.evaluation.firing import fired_anywhere
from coachhook.evaluation.intervals import effective_count, ratio_interval, wilson
from coachhook.evaluation.scoring import (
    encode_prompts,
    equal_length_batches,
    input_device,
)
from coachhook.models import describe, evaluating
from coachhook.statistics import read_texts

# Logits of one state kept at a time: 2^25 values are 128 MiB in float32.
_KEPT = 2**25


@dataclass(frozen=True)
class TokenDrift:
    """What happened to one sequence of T tokens; every tensor is on the CPU.

    Args:
        kl: ``KL(P_before || P_after)`` of the token after each judged place, float64 ``[J]``.
        nll: negative log-likelihood of the token that really follows, before and after, float64
            ``[2, J']``; J' is J, less one where nothing follows the last place.
        same: whether the most likely next token is the same, bool ``[J]``.
    """

    kl: Tensor
    nll: Tensor
    same: Tensor


@torch.no_grad()
def token_drift(
    model: Any,
    rows: Sequence[tuple[int, ...]],
    hooks: Any,
    *,
    batch_size: int = 64,
    last_only: bool = False,
) -> list[TokenDrift]:
    """Next-token distributions before and after, place by place.

    Args:
        model: a causal language model.
        rows: token ids, not empty.
        hooks: whatever has ``disabled()``, a block in which the model answers without its edits.
        batch_size: sequences per forward pass.
        last_only: judge only the token after the last one of each sequence.

    Returns:
        One result per sequence, in order; J is T, or 1 with ``last_only``.
    """
    found: dict[int, TokenDrift] = {}
    for group in _groups(model, rows, batch_size, last_only):
        # Swapping the weights of an edited model may be costly: all batches of a group at once.
        with hooks.disabled():
            before = [_logits(model, rows, batch, last_only) for batch in group]
        for batch, logits in zip(group, before, strict=True):
            # A divergence is a difference of nearly equal numbers: not in float32.
            old = logits.double().log_softmax(-1)
            new = _logits(model, rows, batch, last_only).double().log_softmax(-1)
            kl = (old.exp() * (old - new)).sum(-1).clamp_min(0).cpu()
            same = (old.argmax(-1) == new.argmax(-1)).cpu()
            ids = torch.tensor([rows[i] for i in batch], device=old.device)[:, 1:]
            keep = 0 if last_only else ids.shape[1]
            ids = ids[:, :keep, None]
            nll = torch.stack([-p[:, :keep].gather(-1, ids)[..., 0] for p in (old, new)], dim=1)
            for row, index in enumerate(batch):
                found[index] = TokenDrift(kl[row], nll[row].cpu(), same[row])
    return [found[i] for i in range(len(rows))]


def _groups(
    model: Any, rows: Sequence[tuple[int, ...]], batch_size: int, last_only: bool
) -> Iterator[list[list[int]]]:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    group: list[list[int]] = []
    held = 0
    for batch in equal_length_batches([len(r) for r in rows], batch_size):
        size = vocabulary * (len(batch) if last_only else sum(len(rows[i]) for i in batch))
        if group and held + size > _KEPT:
            yield group
            group, held = [], 0
        group.append(batch)
        held += size
    if group:
        yield group


def _logits(
    model: Any, rows: Sequence[tuple[int, ...]], batch: list[int], last_only: bool
) -> Tensor:
    """``[B, T, V]``, or ``[B, 1, V]`` with ``last_only``."""
    ids = torch.tensor([rows[i] for i in batch], device=input_device(model))
    keep: dict[str, int] = {}
    if last_only and "logits_to_keep" in inspect.signature(model.forward).parameters:
        keep = {"logits_to_keep": 1}
    logits: Tensor = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep
    ).logits
    return logits[:, -1:] if last_only else logits


def prompt_drift(
    model: Any, tokenizer: Any, prompts: Sequence[str], hooks: Any, *, batch_size: int = 64
) -> list[float]:
    """``KL(P_before || P_after)`` of the token after each prompt, in nats."""
    rows = encode_prompts(tokenizer, prompts)
    drifts = token_drift(model, rows, hooks, batch_size=batch_size, last_only=True)
    return [float(d.kl[0]) for d in drifts]


def measure_language(
    model: Any,
    tokenizer: Any,
    text: Any,
    *,
    hooks: Any,
    gates: Any = None,
    max_tokens: int = 20_000,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Drift, perplexity and share of gated tokens on unrelated text, edits off against on.

    Args:
        model: the model, its edits on.
        tokenizer: its tokenizer.
        text: as for :func:`coachhook.statistics.read_texts`: a file, a folder or texts. Texts
            longer than the context window are cut into windows.
        hooks: whatever has ``disabled()``.
        gates: the hooks whose gates are asked, or None where there are none.
        max_tokens: read no further text once this many tokens are reached.
        batch_size: sequences per forward pass.

    Returns:
        A JSON-ready object: ``texts``, ``tokens``; ``kl`` (nats per token), ``perplexity``
        (``before``, ``after``, ``ratio``), ``unchanged``, ``fired`` (None without gates);
        ``intervals`` (95 %) of ``kl``, ``ratio``, ``unchanged`` and ``fired``.

    Raises:
        ValueError: no text of at least two tokens was found, or ``text`` cannot be read.
    """
    rows = text_rows(model, tokenizer, text, max_tokens)
    return measure_rows(model, rows, hooks=hooks, gates=gates, batch_size=batch_size)


def text_rows(model: Any, tokenizer: Any, text: Any, max_tokens: int) -> list[tuple[int, ...]]:
    """The token ids that :func:`measure_language` judges; arguments and errors of it."""
    rows = unrelated_rows(tokenizer, text, max_tokens, describe(model).max_positions)
    if not rows:
        raise ValueError(
            "measure_language: text must hold at least two tokens in a row, got none within "
            f"{max_tokens} tokens; give other text, or allow more tokens"
        )
    return rows


def measure_rows(
    model: Any,
    rows: Sequence[tuple[int, ...]],
    *,
    hooks: Any,
    gates: Any = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """:func:`measure_language` of the rows of :func:`text_rows`."""
    fired: list[Tensor] = []
    with evaluating(model):
        drifts = token_drift(model, rows, hooks, batch_size=batch_size)
        if gates is not None:
            fired = fired_anywhere(model, gates, rows, batch_size=batch_size)
    places = [len(d.kl) for d in drifts]
    followed = [d.nll.shape[1] for d in drifts]
    sums = torch.stack([d.nll.sum(1) for d in drifts])
    before, after = (sums.sum(0) / sum(followed)).tolist()
    change = ratio_interval((sums[:, 1] - sums[:, 0]).tolist(), followed)
    kl = [float(d.kl.sum()) for d in drifts]
    same = sum(int(d.same.sum()) for d in drifts) / sum(places)
    gated = sum(int(f.sum()) for f in fired) / sum(places) if gates is not None else None
    return {
        "texts": len(rows),
        "tokens": sum(places),
        "kl": sum(kl) / sum(places),
        "perplexity": {
            "before": _exp(before),
            "after": _exp(after),
            "ratio": _exp(after - before),
        },
        "unchanged": same,
        "fired": gated,
        "intervals": {
            "kl": ratio_interval(kl, places, lowest=0.0),
            "ratio": None if change is None else [_exp(c) for c in change],
            "unchanged": wilson(same, effective_count(places)),
            "fired": None if gated is None else wilson(gated, effective_count(places)),
        },
    }


def _exp(nats: float) -> float:
    """``exp``; infinity where a model that has diverged gives more than a float holds."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def unrelated_rows(
    tokenizer: Any, text: Any, max_tokens: int, max_positions: int | None
) -> list[tuple[int, ...]]:
    """Token ids of texts, cut into windows; windows of a single token are left out."""
    rows: list[tuple[int, ...]] = []
    found = 0
    for passage in read_texts(text):
        (ids,) = encode_prompts(tokenizer, [passage])
        width = max_positions or len(ids)
        for start in range(0, len(ids), width):
            row = ids[start : start + min(width, max_tokens - found)]
            if len(row) > 1:
                rows.append(row)
                found += len(row)
            if found >= max_tokens - 1:
                return rows
    return rows
