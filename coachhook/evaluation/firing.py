"""Where hooks fire: z and decision of every token, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coachhook.evaluation.scoring import equal_length_batches, input_device

if TYPE_CHECKING:
    from coachhook.hooks import HookSet


@dataclass(frozen=True)
class LayerTrace:
    """What the gate of one layer said about one prompt.

    Args:
        z: what is compared with alpha, float32 ``[T]``; NaN where undefined, -inf where no edit
            may fire because no cue was read.
        fired: whether the token took the hook, bool ``[T]``.
    """

    z: Tensor
    fired: Tensor


@torch.no_grad()
def trace(
    model: Any, hooks: HookSet, prompts: Sequence[tuple[int, ...]], *, batch_size: int = 64
) -> list[dict[int, LayerTrace]]:
    """Runs prompts through the edited model and keeps what each layer's gate said.

    Args:
        model: the model, its hooks attached and on.
        hooks: the attached hooks.
        prompts: token ids, not empty.
        batch_size: prompts per forward pass.

    Returns:
        Per prompt, ``{layer index: LayerTrace}`` on the CPU; hooks that are off, as all are before
        the first edit and after the last was taken back, are not in it.
    """
    device = input_device(model)
    found: dict[int, dict[int, LayerTrace]] = {}
    for batch in equal_length_batches([len(p) for p in prompts], batch_size):
        ids = torch.tensor([prompts[i] for i in batch], device=device)
        with hooks.record() as records:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        for row, index in enumerate(batch):
            found[index] = {
                layer: LayerTrace(z[row].float().cpu(), fired[row].cpu())
                for layer, z, fired in records
            }
    return [found[i] for i in range(len(prompts))]


def fired_anywhere(
    model: Any, hooks: HookSet, prompts: Sequence[tuple[int, ...]], *, batch_size: int = 64
) -> list[Tensor]:
    """Per prompt which tokens take the hook of any layer, bool ``[T]``; arguments of trace."""
    traces = trace(model, hooks, prompts, batch_size=batch_size)
    none = [torch.zeros(len(prompt), dtype=torch.bool) for prompt in prompts]
    return [
        torch.stack([off, *(layer.fired for layer in layers.values())]).any(0)
        for off, layers in zip(none, traces, strict=True)
    ]
