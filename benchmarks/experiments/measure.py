"""What is measured of an edited model: cheaply on the way, in full at the end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.experiments import scores
from benchmarks.experiments.systems import Ours, System
from coachhook.editing import EditRequest
from coachhook.evaluation import evaluate, oracle, summarise
from coachhook.evaluation.scoring import decode_each, encode_prompts
from coachhook.inspecting import gate_pictures
from coachhook.models import describe

if TYPE_CHECKING:
    from benchmarks.experiments.worker import Run

FLUENCY_FACTS = 100
FLUENCY_TOKENS = 100
CACHE_PROMPTS = 50
PICTURES = 4
# Of a passage; what a reader looks at, and few enough for any model.
PICTURE_TOKENS = 60


def _evaluate(run: Run, system: System, requests: Sequence[EditRequest], **more: Any) -> Any:
    return evaluate(
        run.model,
        run.tokenizer,
        requests,
        hooks=system.gates if system.gates is not None else system,
        batch_size=run.spec["evaluation_batch"],
        progress=False,
        **more,
    )


def checkpoint(run: Run, system: System, requests: Sequence[EditRequest]) -> dict[str, Any]:
    """All facts so far, and the first ones alone; teacher-forced and by probability only."""
    if run.spec["experiment"] == "zscores":
        return {"scores": scores.summary(scores.collect(run, system, requests))}
    found = _evaluate(run, system, requests, generate=False, details=True)
    return {
        "all": summarise(found["records"]),
        "first": summarise(found["records"][: run.spec["first"]]),
        "kl": found["kl"],
        "gate": found["gate"],
    }


def full(run: Run, system: System, requests: Sequence[EditRequest]) -> dict[str, Any]:
    """Every family of metrics, with the records."""
    found: dict[str, Any] = _evaluate(run, system, requests, details=True)
    return found


def final(run: Run, system: System) -> dict[str, Any]:
    """Everything, at the end of a consecutive run; on a sample of the facts where one is set."""
    requests, spec = run.requests, run.spec
    if spec["experiment"] == "zscores":
        found = scores.collect(run, system, requests)
        return {"scores": scores.summary(found), "values": scores.thinned(found, spec["seed"])}
    chosen = sorted(sample(len(requests), spec["sample"], spec["seed"]))
    measured = full(run, system, [requests[i] for i in chosen])
    result: dict[str, Any] = {
        "facts_measured": len(chosen),
        "all": summarise(measured["records"]),
        "kl": measured["kl"],
        "gate": measured["gate"],
        "records": measured["records"],
        "oracle": _oracle(run, system, chosen),
    }
    if len(chosen) < len(requests):
        result["checkpoint"] = checkpoint(run, system, requests)
    else:
        first = summarise(measured["records"][: spec["first"]])
        result["checkpoint"] = {"first": first, **{n: result[n] for n in ("all", "kl", "gate")}}
    return {**result, **side_effects(run, system, [requests[i] for i in chosen])}


def sample(total: int, wanted: int | None, seed: int) -> list[int]:
    """Which facts are measured: all, or as many as wanted, the same for every system."""
    if wanted is None or wanted >= total:
        return list(range(total))
    return random.Random(seed).sample(range(total), wanted)


def side_effects(run: Run, system: System, requests: Sequence[EditRequest]) -> dict[str, Any]:
    """Unrelated text, fluency, agreement of cached decoding, and pictures of the gate."""
    few = list(requests[:FLUENCY_FACTS])
    found = _evaluate(
        run,
        system,
        few,
        generate=False,
        text=run.text,
        text_tokens=run.spec["text_tokens"],
        fluency_tokens=FLUENCY_TOKENS,
        cache_prompts=CACHE_PROMPTS,
    )
    effects = {name: found[name] for name in ("language", "fluency", "cache")}
    pictures = []
    if system.gates is not None:
        for kind, text in _shown(requests):
            (picture,) = gate_pictures(run.model, run.tokenizer, system.gates, [text])
            pictures.append({"kind": kind, **picture.to_dict()})
        for text in run.text[:2]:
            text = opening(run.tokenizer, text, describe(run.model).max_positions)
            (picture,) = gate_pictures(run.model, run.tokenizer, system.gates, [text])
            pictures.append({"kind": "unrelated text", **picture.to_dict()})
    return {**effects, "pictures": pictures}


def opening(tokenizer: Any, text: str, window: int | None) -> str:
    """A passage, or the beginning of one that is too long for a picture."""
    (ids,) = encode_prompts(tokenizer, [text])
    # Half of the window: what is tokenised again may come out a little longer.
    most = PICTURE_TOKENS if window is None else min(PICTURE_TOKENS, max(1, window // 2))
    return text if len(ids) <= most else decode_each(tokenizer, [ids[:most]])[0]


def _shown(requests: Sequence[EditRequest]) -> list[tuple[str, str]]:
    """Prompts of a few facts whose gates are worth a look: early, late and between."""
    step = max(1, len(requests) // PICTURES)
    texts = []
    for request in requests[::step][:PICTURES]:
        texts.append(("edited prompt", request.text))
        texts += [("paraphrase", text) for text in request.paraphrases[:1]]
        texts += [("neighbour", text) for text in request.neighborhood[:1]]
    return texts


def _oracle(run: Run, system: System, chosen: Sequence[int]) -> dict[str, Any] | None:
    """The targets patched in alone; None for systems that have none at a single layer."""
    if not isinstance(system, Ours):
        return None
    columns = [
        batch.targets[:, i]
        for batch in system.editor.batches.values()
        for i in range(len(batch.requests))
    ]
    return oracle(
        run.model,
        run.tokenizer,
        [run.requests[i] for i in chosen],
        torch.stack([columns[i] for i in chosen], dim=1),
        system.editor.config.layers[-1],
        hooks=system.gates,
        batch_size=run.spec["evaluation_batch"],
    )


def merge_rounds(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result from the rounds of a single-round run; side effects are those of the first."""
    records = [record for r in rounds for record in r["records"]]
    drifts = [record["kl"] for record in records if record["kl"] is not None]

    def mean(name: str, kind: str) -> float | None:
        # The last round may hold fewer facts than the others.
        asked = [sum(len(record["answers"][kind]) for record in r["records"]) for r in rounds]
        known = [
            (r["gate"][name], n)
            for r, n in zip(rounds, asked, strict=True)
            if r["gate"][name] is not None
        ]
        return sum(v * n for v, n in known) / sum(n for _, n in known) if known else None

    return {
        "facts_measured": len(records),
        "all": summarise(records),
        "kl": {"neighborhood": sum(drifts) / len(drifts) if drifts else None, "interval": None},
        "gate": {
            "fired_unrelated": mean("fired_unrelated", "neighborhood"),
            "fired_edited": mean("fired_edited", "edit"),
        },
        "records": records,
        "oracle": None,
        **rounds[0]["extra"],
    }
