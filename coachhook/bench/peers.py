"""What the ops are measured against."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def published_hook(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hook: Tensor,
    hook_bias: Tensor | None,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """The hook layer as published with *Consecutive Batch Model Editing with HooK Layers* (2024).

    Both dense products, norm of their difference, z-score over the tokens of a sequence with the
    unbiased standard deviation, rows assigned by a boolean mask; everything in the dtype of x,
    no padding mask.

    Args:
        x: ``[B, T, n]``.
        weight: ``[m, n]`` and bias ``[m]`` of the frozen layer.
        hook: ``[m, n]``, weight of the hook, ``W0 + Delta``; its bias likewise.
        alpha: threshold.

    Returns:
        y ``[B, T, m]`` and z ``[B, T]``, both in the dtype of x.
    """
    base = F.linear(x, weight, bias)
    hooked = F.linear(x, hook, hook_bias)
    norms = torch.linalg.vector_norm(hooked - base, dim=-1)
    mean = norms.mean(dim=-1, keepdim=True)
    # One token has no standard deviation, which torch says in a warning at every call.
    std = (
        norms.std(dim=-1, keepdim=True) if norms.shape[-1] > 1 else torch.full_like(mean, math.nan)
    )
    z = (norms - mean) / std
    taken = z >= alpha
    base[taken] = hooked[taken]
    return base, z


def plain_hook(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lift: Tensor | None,
    projection: Tensor,
    alpha: float,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best that plain PyTorch does: the frozen product untouched, the hook in low rank.

    No synchronisation and no data-dependent shape, so that it can be captured and compiled. It is
    given less to do than the op: everything is in the dtype of x, padding does not exist.

    Args:
        x: ``[B, T, n]``.
        weight: ``[m, n]`` and bias ``[m]`` of the frozen layer.
        lift: ``[m, r]``, or None for a dense hook.
        projection: ``[r, n]``, or ``[m, n]`` for a dense hook.
        alpha: threshold.
        mean: 0-dim, of a population; None takes the statistics of the sequence.
        std: the same.

    Returns:
        y ``[B, T, m]`` in the dtype of x and z ``[B, T]`` in float32.
    """
    y = F.linear(x, weight, bias)
    features = F.linear(x, projection)
    norms = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32)
    if norms.shape[-1] == 1 and mean is None:
        mean = std = torch.full_like(norms, math.nan)
    if mean is None or std is None:
        std, mean = torch.std_mean(norms, dim=-1, keepdim=True)
    z = (norms - mean) / std
    taken = (z >= alpha)[..., None]
    added = features if lift is None else F.linear(features, lift)
    return torch.where(taken, y + added, y), z


def compiled_hook() -> Callable[..., Any]:
    """:func:`plain_hook` under ``torch.compile``, for the shapes it is called with first.

    Forgets what was compiled before: all shapes of a function share a limit, past which it runs
    uncompiled without a word.
    """
    torch._dynamo.reset()
    return torch.compile(plain_hook, fullgraph=True, dynamic=False)


def lora_layer(weight: Tensor, bias: Tensor | None, rank: int) -> Callable[[Tensor], Tensor] | None:
    """A peft LoRA layer of the same rank around the frozen layer, or None without peft.

    Not gated: what an adapter of this size costs.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return None
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        base.bias = torch.nn.Parameter(bias, requires_grad=False)
    model = torch.nn.ModuleDict({"layer": base})
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=["layer"])
    inject_adapter_in_model(config, model)
    model.to(weight.device, weight.dtype).eval()
    return partial(model["layer"])
