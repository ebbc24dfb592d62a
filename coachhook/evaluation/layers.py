"""Which layer to edit: what a target put in at the subject token can do there, layer by layer.

Two things must hold at a layer. The state of its block at the last subject token must decide the
answer: v* is optimised for a sample of facts and put in alone, without any weights, and the prompts
and paraphrases are asked (the oracle of :mod:`coachhook.evaluation.oracle`). Above the layer where
the subject's facts have been read, this fails (causal tracing, Meng et al. 2022, section 2). And
the key must be the subject's: the input of the layer's down-projection at that token must be nearer
to that of the same subject in a paraphrase than to those of the other facts, or no memory addressed
by keys will find the edit again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from coachhook.editing import EditConfig, EditRequest
from coachhook.editing.encoding import encode_requests
from coachhook.editing.prompts import EncodedPrompt, encode
from coachhook.editing.reading import read_states
from coachhook.editing.targets import optimise_targets
from coachhook.evaluation.datasets import find_subject
from coachhook.evaluation.intervals import wilson
from coachhook.evaluation.oracle import oracle
from coachhook.hooks import attached_hooks
from coachhook.models import check_whole, describe, evaluating, prepare_tokenizer

# A difference in the score below this is none.
_TIE = 0.02


@dataclass(frozen=True)
class LayerProbe:
    """What was found at one layer; all but the index are shares in [0, 1].

    Args:
        layer: index of the block.
        converged: facts whose target is the answer to the bare prompt with v* in.
        reliability: teacher-forced, v* patched in alone.
        generality: the same of paraphrases that name the subject; None without any.
        addressed: paraphrases whose key is nearest to the key of a fact about their own subject;
            None without any, or where all facts are about one.
        interval: 95 % interval of ``reliability``.
        score: mean of ``reliability``, ``generality`` and ``addressed``, of those there are.
    """

    layer: int
    converged: float
    reliability: float
    generality: float | None
    addressed: float | None
    interval: tuple[float, float]
    score: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "interval": list(self.interval)}


@dataclass(frozen=True)
class LayerAdvice:
    """The probes of all candidates, and the layer to edit.

    Args:
        layer: the lowest of those whose score is the best or as good (within 0.02): a lower layer
            leaves more of the network to read what was written.
        probes: one per candidate, in order.
        facts: facts asked.
        paraphrases: paraphrases that name their subject.
    """

    layer: int
    probes: tuple[LayerProbe, ...]
    facts: int
    paraphrases: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "layer": self.layer,
            "facts": self.facts,
            "paraphrases": self.paraphrases,
            "layers": [probe.to_dict() for probe in self.probes],
        }


def suggest_layers(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    layers: Sequence[int] | None = None,
    contexts: int = 2,
    progress: bool = True,
    **overrides: Any,
) -> LayerAdvice:
    """Probes layers with a sample of facts; the model is not changed.

    Args:
        model: a transformers causal language model without hooks.
        tokenizer: its (fast) tokenizer.
        requests: facts that the model knows otherwise; two or three dozen tell layers apart.
        layers: candidates; None for all that are editable.
        contexts: contexts of the default preset to optimise in.
        progress: show a progress bar on stderr.
        overrides: fields of :class:`~coachhook.EditConfig` for the optimisation of the targets.

    Returns:
        The advice.

    Raises:
        UnsupportedModelError: several processes hold the model together.
        ValueError: there is no request or no layer, hooks are attached, or a layer is out of range
            or a request does not fit the tokenizer or the context window.
    """
    check_whole("suggest_layers", model)
    if not requests:
        raise ValueError("suggest_layers: requests must not be empty, got none")
    if attached_hooks(model) is not None:
        raise ValueError("suggest_layers: model must have no hooks, got some; detach them")
    description = describe(model, overrides.get("key_site", "down_proj"))
    editable = [layer.index for layer in description.layers]
    candidates = sorted(set(editable if layers is None else layers))
    if not candidates:
        raise ValueError("suggest_layers: layers must hold at least one layer, got none")
    tokenizer = prepare_tokenizer(tokenizer)
    configs = {
        layer: EditConfig.for_model(
            model, layers=[layer], **{"places": ("subject_last",), **overrides}
        )
        for layer in candidates
    }
    chosen = next(iter(configs.values())).contexts[:contexts]
    encoded = encode_requests(tokenizer, requests, chosen, description.max_positions)
    asked = _paraphrases(tokenizer, requests, description.max_positions)
    subjects = [request.subject for request in requests]
    pad_id = tokenizer.pad_token_id
    probes = []
    with evaluating(model):
        for layer in tqdm(candidates, desc="layers", disable=not progress, leave=False):
            targets = optimise_targets(
                model, description, encoded, configs[layer].with_(contexts=chosen), pad_id=pad_id
            )
            found = oracle(model, tokenizer, requests, targets.values, layer)
            own = read_states(
                model, description, [e.contexts[0] for e in encoded], layer, layer, pad_id=pad_id
            ).keys
            addressed = None
            if asked and len(set(subjects)) > 1:
                prompts = [prompt for _, prompt in asked]
                keys = read_states(model, description, prompts, layer, layer, pad_id=pad_id).keys
                addressed = _addressed(own, keys, [i for i, _ in asked], subjects)
            shares = [found["reliability"], found["generality"], addressed]
            known = [share for share in shares if share is not None]
            low, high = wilson(found["reliability"], len(requests))
            probes.append(
                LayerProbe(
                    layer,
                    sum(targets.converged) / len(requests),
                    found["reliability"],
                    found["generality"],
                    addressed,
                    (low, high),
                    sum(known) / len(known),
                )
            )
    best = max(probe.score for probe in probes)
    layer = next(probe.layer for probe in probes if probe.score >= best - _TIE)
    return LayerAdvice(layer, tuple(probes), len(requests), len(asked))


def _paraphrases(
    tokenizer: Any, requests: Sequence[EditRequest], max_positions: int | None
) -> list[tuple[int, EncodedPrompt]]:
    """Number of the request and prompt of every paraphrase that names its subject."""
    found = []
    for number, request in enumerate(requests):
        for text in request.paraphrases:
            start = find_subject(text, request.subject)
            if start is not None:
                span = (start, start + len(request.subject))
                found.append((number, encode(tokenizer, text, span, max_positions)))
    return found


def _addressed(own: Tensor, keys: Tensor, owners: list[int], subjects: Sequence[str]) -> float:
    """Share of ``keys [P, n]`` whose nearest of ``own [R, n]``, by centred cosine, has its subject.

    What all keys have in common says nothing about the subject and is taken off first. Facts about
    one subject may have the same key, so that the owner of a key itself need not be the nearest.
    """
    centre = own.mean(dim=0)
    a = torch.nn.functional.normalize(own - centre, dim=1)
    b = torch.nn.functional.normalize(keys - centre, dim=1)
    nearest = (b @ a.T).argmax(dim=1).tolist()
    found = [subjects[n] == subjects[o] for n, o in zip(nearest, owners, strict=True)]
    return sum(found) / len(found)
