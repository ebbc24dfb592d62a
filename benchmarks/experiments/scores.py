"""How far the gate tells edited keys from all others: its score, token by token.

The score is what the hook compares with its threshold alpha: the z-score of the norm
``||Delta x||`` in the published scope, the largest coefficient in ours, 0 where no edit may fire
because none of the cues was read. Tokens fall into groups:

* ``edited``: the last subject token of an edited prompt;
* ``paraphrase``: the last subject token of a paraphrase that names the subject;
* ``same prompt``: the other tokens of an edited prompt;
* ``neighbour``: every token of a neighbourhood prompt;
* ``unrelated``: every token of text that names no edited subject.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.experiments.systems import System
from coachhook.editing import EditRequest
from coachhook.editing.prompts import encode
from coachhook.evaluation.datasets import find_subject
from coachhook.evaluation.firing import trace
from coachhook.evaluation.language import unrelated_rows
from coachhook.models import describe

if TYPE_CHECKING:
    from benchmarks.experiments.worker import Run

GROUPS = ("edited", "paraphrase", "same prompt", "neighbour", "unrelated")
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_KEPT = 3000

# (layer, group) -> scores and decisions
Found = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]


def collect(run: Run, system: System, requests: Sequence[EditRequest]) -> Found:
    """The score and the decision of every layer about every token.

    Raises:
        ValueError: the system has no gate.
    """
    if system.gates is None:
        raise ValueError(f"zscores: system must have a gate, got {run.spec['system']!r}")
    limit = describe(run.model).max_positions
    rows: list[tuple[int, ...]] = []
    labels: list[list[str | None]] = []

    def add(text: str, span: tuple[int, int] | None, here: str, elsewhere: str | None) -> None:
        if span is None:
            ids, lookup = list(run.tokenizer(text)["input_ids"]), -1
        else:
            prompt = encode(run.tokenizer, text, span, limit)
            ids, lookup = prompt.ids, prompt.lookup
        rows.append(tuple(ids))
        labels.append([here if t == lookup else elsewhere for t in range(len(ids))])

    for request in requests:
        add(request.text, request.subject_span, "edited", "same prompt")
        for text in request.paraphrases:
            start = find_subject(text, request.subject)
            if start is not None:
                add(text, (start, start + len(request.subject)), "paraphrase", None)
        for text in request.neighborhood:
            add(text, None, "", "neighbour")
    for row in unrelated_rows(run.tokenizer, run.text, run.spec["text_tokens"], limit):
        rows.append(row)
        labels.append(["unrelated"] * len(row))

    parts: dict[tuple[int, str], list[tuple[float, bool]]] = {}
    for names, layers in zip(labels, trace(run.model, system.gates, rows), strict=True):
        for layer, found in layers.items():
            scores = found.z.masked_fill(found.z.isneginf(), 0.0).tolist()
            for name, z, fired in zip(names, scores, found.fired.tolist(), strict=True):
                if name is not None:
                    parts.setdefault((layer, name), []).append((z, fired))
    return {
        key: (torch.tensor([z for z, _ in pairs]), torch.tensor([f for _, f in pairs]))
        for key, pairs in parts.items()
    }


def summary(found: Found) -> list[dict[str, Any]]:
    """One row per layer and group: how many, quantiles of the score, share that fired, AUC.

    ``auc`` is the probability that an edited key scores higher than a token of the group; a token
    whose score is undefined counts as lower than any.
    """
    rows = []
    for (layer, group), (z, fired) in sorted(found.items(), key=_order):
        defined = z[~z.isnan()].double()
        # NaN where a group has no defined score, as of neighbours that are one token each.
        quantiles = torch.full((len(_QUANTILES),), math.nan, dtype=torch.float64)
        if len(defined):
            quantiles = torch.quantile(defined, torch.tensor(_QUANTILES, dtype=torch.float64))
        rows.append(
            {
                "layer": layer,
                "group": group,
                "tokens": len(z),
                "defined": len(defined),
                "fired": float(fired.float().mean()),
                "auc": auc(found[layer, "edited"][0], z),
                **{
                    f"q{int(100 * q):02d}": float(v)
                    for q, v in zip(_QUANTILES, quantiles, strict=True)
                },
            }
        )
    return rows


def _order(item: Any) -> tuple[int, int]:
    (layer, group), _ = item
    return layer, GROUPS.index(group)


def auc(high: torch.Tensor, low: torch.Tensor) -> float:
    """Probability that a value of ``high`` exceeds one of ``low``, ties half; NaN is lowest."""
    a, b = (t.double().nan_to_num(nan=-torch.inf).sort().values for t in (high, low))
    below = torch.searchsorted(b, a, side="left").double()
    ties = torch.searchsorted(b, a, side="right").double() - below
    return float((below + ties / 2).sum() / (len(a) * len(b)))


def thinned(found: Found, seed: int) -> list[dict[str, Any]]:
    """Up to a few thousand scores of each layer and group, for figures."""
    rows = []
    for (layer, group), (z, _) in sorted(found.items(), key=_order):
        values = [round(v, 5) for v in z.tolist() if v == v]
        if len(values) > _KEPT:
            values = random.Random(seed).sample(values, _KEPT)
        rows.append({"layer": layer, "group": group, "values": values})
    return rows
