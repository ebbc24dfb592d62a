"""What the ops are measured against."""

from __future__ import annotations

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
    z = (norms - norms.mean(dim=-1, keepdim=True)) / norms.std(dim=-1, keepdim=True)
    taken = z >= alpha
    base[taken] = hooked[taken]
    return base, z
