"""Fast CPU form: the corrected output is computed only for tokens that fire.

With a factored hook the gate costs ``r n`` per token, and the frozen layer's output is written to
only where the hook is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coachhook.ops.hooked_linear.gate import Tokens, fires, scores
from coachhook.ops.hooked_linear.reference import Delta, correction, differentiates, project
from coachhook.ops.hooked_linear.scopes import Scope, Sequence


def hook_output(
    base_output: Tensor,
    x: Tensor,
    delta: Delta,
    alpha: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scope: Scope,
    owned: bool = False,
) -> tuple[Tensor, Tensor]:
    """As :func:`reference.hook_output`; returns ``base_output`` itself where nothing fires.

    Args:
        owned: whether ``base_output`` may be overwritten.
    """
    parts = (delta,) if isinstance(delta, Tensor) else delta
    differentiated = differentiates(base_output, x, *parts)
    tokens = Tokens.of(x, mask, cu_seqlens)
    if isinstance(scope, Sequence) and scope.state is None and tokens.longest == 1:
        # One token has no standard deviation: decoding in this scope costs the frozen layer alone.
        return base_output, x.new_full(x.shape[:-1], float("nan"), dtype=torch.float32)
    flat = x.flatten(0, -2)
    with torch.no_grad():
        features = project(flat, delta)
        z = scores(features, tokens, scope)
        index = fires(z, alpha, tokens, scope).nonzero()
    z = z.to(torch.float32).view(x.shape[:-1])
    if index.shape[0] == 0:
        return base_output, z
    index = index.squeeze(1)
    features = project(flat[index], delta) if differentiated else features[index]
    rows = base_output.reshape(-1, base_output.shape[-1])
    hooked = rows[index].to(features.dtype) + correction(features, delta, scope)
    hooked = hooked.to(base_output.dtype)
    if owned and not differentiated:
        rows.index_copy_(0, index, hooked)
    else:
        rows = rows.index_copy(0, index, hooked)
    return rows.view(base_output.shape), z
