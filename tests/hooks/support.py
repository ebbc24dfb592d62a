"""Hooks with random, clearly firing corrections on the tiny models."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
import transformers

from coachhook.hooks import HookedLinear, HookSet, attach_hooks

from ..models.families import tiny

# "cued" is the scope "membership" with edits that have cues.
SCOPES = ("sequence", "prefix", "population", "membership", "cued")
RANK = 4
# Of the edits with cues: two for ever, the others for some tokens or for the next one alone. Of the
# last two a pair of tokens is the cue.
REACHES = torch.tensor([2**31 - 1, 2**31 - 1, 8, 1, 8, 40], dtype=torch.int32)
GAPS = torch.tensor([0, 5, 0, 0, 1, 3], dtype=torch.int32)
CUED = len(REACHES)
PAIRED = (GAPS > 0) & (REACHES + GAPS.long() < 63)
LAYERS = (0, 1)


def shallow(name: str, layers: int = len(LAYERS)) -> Any:
    """A tiny model in float64 with no more layers than have hooks: each takes time to compile."""

    def change(arguments: dict[str, Any]) -> None:
        arguments["n_layer" if "n_layer" in arguments else "num_hidden_layers"] = layers

    return tiny(name, change).double()


def fill(hooks: HookSet, scope: str, size: float = 5.0) -> None:
    """Give every hook a random Delta in the form its scope needs, and the state "validated"."""
    generator = torch.Generator().manual_seed(7)
    for layer in hooks.values():
        m, n = layer.out_features, layer.in_features
        rank = CUED if scope == "cued" else RANK
        q, _ = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64))
        s = torch.randn(rank, n, generator=generator, dtype=torch.float64) * size
        if scope == "membership":
            layer.set_pair(q * 4 * size, s, torch.tensor([0, 0, 1, 2]), "own")
        elif scope == "cued":
            cues = torch.randn(rank, n, generator=generator, dtype=torch.float64)
            limits = torch.tensor([-torch.inf, 0.1, 0.2, 0.3, 0.1, 0.1])
            layer.set_pair(q * 4 * size, s, None, "own", cues, limits, REACHES, GAPS)
        else:
            layer.set_factored(q, s)
        layer.set_scope("membership" if scope == "cued" else scope)
        layer.state = "validated"


def _gap(values: torch.Tensor, share: float) -> float:
    """The middle of the widest gap around the quantile that ``share`` of the values are above."""
    values = values[values.isfinite()].flatten().sort().values
    low, high = int(len(values) * (1 - 1.5 * share)), int(len(values) * (1 - share / 2))
    gap = int((values[low + 1 : high + 1] - values[low:high]).argmax()) + low
    return float((values[gap] + values[gap + 1]) / 2)


def inputs(model: Any, layer: HookedLinear, **given: torch.Tensor) -> torch.Tensor:
    """What a hooked layer sees in a forward, ``[tokens, n]`` in its compute dtype."""
    seen: list[torch.Tensor] = []
    handle = layer.base.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**given)
    handle.remove()
    return seen[0].reshape(-1, layer.in_features).to(layer.delta().dtype)


def calibrate(model: Any, hooks: HookSet, ids: torch.Tensor, share: float = 0.3) -> None:
    """Set each alpha (and the population) from a forward, so that about ``share`` of tokens fire.

    The threshold is put into the widest gap around that quantile, so that rounding cannot move a
    token across it. So are the limits of cues, reached by fewer, so that many a sequence reads
    none; of pairs by more, since two tokens at their distance have to.
    """
    for index, layer in hooks.items():
        if layer.scope == "population":
            x = inputs(model, layer, input_ids=ids)
            size = torch.linalg.vector_norm(x @ layer.delta().T, dim=-1)
            layer.set_scope("population", population=(float(size.mean()), float(size.std())))
        if layer.snapshot().stored.cued:
            stored = layer.snapshot().stored.tensors
            scores = inputs(model, layer, input_ids=ids) @ stored["cues"].T
            shares = torch.where(PAIRED, share, share / 5).tolist()
            limits = [_gap(column, part) for column, part in zip(scores.T, shares, strict=True)]
            limits[0] = -torch.inf
            edits = (stored["left"], stored["right"], None, "own", stored["cues"])
            layer.set_pair(*edits, torch.tensor(limits, dtype=torch.float64), REACHES, GAPS)
        with torch.no_grad(), hooks.record() as records:
            model(ids)
        layer.set_alpha(_gap(torch.cat([z.flatten() for i, z, _ in records if i == index]), share))


def hooked(model: Any, scope: str, layers: tuple[int, ...] = LAYERS, size: float = 5.0) -> HookSet:
    """Attach, fill and calibrate on random text."""
    hooks = attach_hooks(model, layers)
    fill(hooks, scope, size)
    ids = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(3))
    calibrate(model, hooks, ids)
    return hooks


def prompts(count: int = 4, seed: int = 5) -> list[torch.Tensor]:
    """Random prompts of different lengths, 1-dimensional."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, 60, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of rows padded with token 0."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where] = row
        mask[i, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def fired(records: list) -> int:
    """How many tokens fired in the records."""
    return sum(int(flags.sum()) for _, _, flags in records)


def generate(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    """The new tokens of a greedy (or beam) generation of fixed length."""
    settings = {"max_new_tokens": 6, "do_sample": False} | settings
    with torch.no_grad():
        out = model.generate(
            **inputs, min_new_tokens=settings["max_new_tokens"], pad_token_id=0, **settings
        )
    return out[:, inputs["input_ids"].shape[1] :]


def together(
    model: Any,
    rows: list[torch.Tensor],
    *,
    page: int = 16,
    blocks: int = 16,
    batch: int = 64,
    generation: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **settings: Any,
) -> list[Any]:
    """Outputs of continuous batching in the order of the requests, forks behind their parents.

    Args:
        model: the model.
        rows: prompts, 1-dimensional.
        page: tokens of a block of the cache.
        blocks: how many blocks there are.
        batch: how many tokens a forward reads at most.
        generation: changes to the generation settings.
        config: changes to those of continuous batching.
        settings: other arguments of ``generate_batch``.
    """
    made = getattr(transformers, "ContinuousBatchingConfig", None)
    if made is None:
        pytest.skip(f"transformers {transformers.__version__} has no ContinuousBatchingConfig")
    size = "page_size" if "page_size" in inspect.signature(made).parameters else "block_size"
    answers = model.generate_batch(
        inputs=[row.tolist() for row in rows],
        generation_config=transformers.GenerationConfig(
            **{"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
            | (generation or {})
        ),
        continuous_batching_config=made(
            **{size: page, "num_blocks": blocks, "max_batch_tokens": batch} | (config or {})
        ),
        progress_bar=False,
        **settings,
    )
    order = {name: [int(part) for part in re.findall(r"\d+", name)] for name in answers}
    return [answers[name] for name in sorted(answers, key=order.__getitem__)]
