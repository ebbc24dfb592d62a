"""The truth: a gated hook in plain torch, differentiable, without data-dependent shapes.

    f = x S^T       S the projection: Delta itself, S of Delta = Q S, or A^T of Delta = V A^T
    z = score       of ||f|| in its scope, or the largest coefficient of f
    y = P + Q f     where z >= alpha, else P; Q the lift: none, Q or V

Products are formed in the compute dtype: float64 for float64 input, else float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from coachhook.ops.hooked_linear.cues import judged_features
from coachhook.ops.hooked_linear.gate import Tokens, fires, group_sums, scores
from coachhook.ops.hooked_linear.scopes import Membership, Scope

Delta = Tensor | tuple[Tensor, Tensor]


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def differentiates(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def project(x: Tensor, delta: Delta) -> Tensor:
    """Features ``[N, f]`` of tokens ``[N, n]`` in the compute dtype: Delta x, S x or A^T x."""
    dtype = compute_dtype(x)
    projection = delta if isinstance(delta, Tensor) else delta[1]
    return F.linear(x.to(dtype), projection.to(dtype))


def coefficients(features: Tensor, scope: Scope, judged: Tensor | None = None) -> Tensor:
    """What the columns of the lift are weighted by ``[N, f]`` for tokens with these features.

    Args:
        features: ``[N, f]``.
        scope: the scope.
        judged: the features as the gate saw them, -inf for edits that were not armed; they choose
            the winner and are not differentiated. None: as ``features``.
    """
    if not isinstance(scope, Membership) or scope.correction != "own" or not features.shape[1]:
        return features
    seen = features if judged is None else judged
    winner = group_sums(seen.detach(), scope.groups).argmax(dim=-1, keepdim=True)
    groups = scope.groups
    if groups is None:
        groups = torch.arange(features.shape[1], device=features.device)
    own = torch.where(groups == winner, features, 0.0)
    total = own.sum(dim=-1, keepdim=True)
    return own / torch.where(total == 0, 1.0, total)


def correction(
    features: Tensor, delta: Delta, scope: Scope, judged: Tensor | None = None
) -> Tensor:
    """What the hook adds ``[N, m]`` for tokens with these features, in their dtype.

    Args:
        features, scope, judged: as for :func:`coefficients`.
        delta: the hook.
    """
    if isinstance(delta, Tensor):
        return features
    return F.linear(coefficients(features, scope, judged), delta[0].to(features.dtype))


def gate_scores(
    x: Tensor, delta: Delta, mask: Tensor | None, cu_seqlens: Tensor | None, scope: Scope
) -> Tensor:
    """Scores z, float32, in the leading shape of ``x``."""
    with torch.no_grad():
        flat, tokens = x.flatten(0, -2), Tokens.of(x, mask, cu_seqlens)
        features = judged_features(project(flat, delta), flat, tokens, scope, project)
        z = scores(features, tokens, scope)
        return z.to(torch.float32).view(x.shape[:-1])


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
    """Gated output y and scores z; differentiable in ``x``, ``base_output`` and ``delta``.

    The decision of the gate is a constant to the gradient. ``owned`` is for implementations that
    may write into ``base_output``; this one never does.
    """
    tokens = Tokens.of(x, mask, cu_seqlens)
    flat = x.flatten(0, -2)
    features = project(flat, delta)
    with torch.no_grad():
        judged = judged_features(features, flat, tokens, scope, project)
        z = scores(judged, tokens, scope)
        taken = fires(z, alpha, tokens, scope)
    added = correction(features, delta, scope, judged).view(base_output.shape)
    hooked = (base_output.to(features.dtype) + added).to(base_output.dtype)
    y = torch.where(taken.view(x.shape[:-1])[..., None], hooked, base_output)
    return y, z.to(torch.float32).view(x.shape[:-1])
