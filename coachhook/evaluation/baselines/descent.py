"""Gradient descent on prompts and their new targets, for the baselines that train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.editing.requests import EditRequest
from coachhook.evaluation.baselines.texts import encode_targets, log_probs_at, target_batch
from coachhook.evaluation.scoring import Row, input_device, score

OBJECTIVES = ("prompt_last", "target")


def encode_rows(
    tokenizer: Any, requests: Sequence[EditRequest], max_positions: int | None
) -> list[Row]:
    """Bare prompt and target of each request, as the metrics tokenise them.

    Raises:
        ValueError: a target gives no token, or a prompt with its target does not fit the context
            window; the message names it.
    """
    pairs = [(request.text, request.target_new.strip()) for request in requests]
    return encode_targets("edit", tokenizer, pairs, max_positions)


def row_losses(model: Any, rows: Sequence[Row], objective: str, pad_id: int) -> Tensor:
    """Loss of each row ``[R]``, differentiable, float32 or better.

    Args:
        model: the model.
        rows: prompts with targets ``o_1 .. o_T``.
        objective: "target", the mean of ``-log P(o_t | prompt, o_1 .. o_t-1)``; "prompt_last", the
            mean of ``-log P(o_t | prompt)``, every target token asked for right after the prompt
            (published code of ROME's fine-tuning).
        pad_id: id used for padding.
    """
    batch = target_batch(rows, pad_id, input_device(model))
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    column = batch.column if objective == "target" else batch.last[batch.row]
    return batch.losses(log_probs_at(logits, batch.row, column))[0]


@contextmanager
def trainable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block these parameters alone require gradients."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    chosen = {id(p) for p in parameters}
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in chosen)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def train(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    rows: Sequence[Row],
    *,
    objective: str,
    steps: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
    stop: float,
    pad_id: int,
    after_step: Callable[[], None] | None = None,
) -> list[float]:
    """Runs Adam on the rows in their order.

    A mini-batch whose mean loss is below ``stop`` makes no step, and the training ends with the
    pass in which the mean over all rows is.

    Args:
        model: the model.
        parameters: what is trained.
        rows: prompts with targets.
        objective: see :func:`row_losses`.
        steps: most passes over the rows.
        lr: learning rate.
        weight_decay: Adam's.
        batch_size: rows per step.
        stop: see above.
        pad_id: id used for padding.
        after_step: called after each step.

    Returns:
        The last loss of each row, before the step taken on it.

    Raises:
        ValueError: a loss or a trained value is not finite.
    """
    optimiser = torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay)
    losses = [float("inf")] * len(rows)
    with trainable(model, parameters), torch.enable_grad():
        for _ in range(steps):
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                found = row_losses(model, batch, objective, pad_id)
                if not bool(torch.isfinite(found).all()):
                    raise ValueError(
                        "edit: the model's likelihood of the target must be finite, got NaN or "
                        "infinity; lower the learning rate, or load the model in float32"
                    )
                losses[start : start + len(batch)] = found.tolist()
                mean = found.mean()
                if float(mean.detach()) < stop:
                    continue
                gradients = torch.autograd.grad(mean, list(parameters))
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                if after_step is not None:
                    after_step()
            if sum(losses) / len(losses) < stop:
                break
    # No loss follows the last step, whose values may not be finite either.
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise ValueError(
            "edit: the trained values must be finite, got NaN or infinity; lower the learning "
            "rate, or load the model in float32"
        )
    return losses


def answered(model: Any, rows: Sequence[Row]) -> list[bool]:
    """Whether the target is the model's answer to each prompt, earlier target tokens given."""
    return [s.accuracy == 1.0 for s in score(model, rows)]
