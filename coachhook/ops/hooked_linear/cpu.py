"""Fast CPU form: the corrected output is computed only for tokens that fire.

With a factored hook the gate costs ``r n`` per token, and the frozen layer's output is written to
only where the hook is taken. What was tried and measured: ``docs/kernels/hooked_linear.md``.
"""

from __future__ import annotations

import math
from ctypes import c_float
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from coachhook.ops.hooked_linear.gate import NOISE_UNITS, Tokens, fires, scores
from coachhook.ops.hooked_linear.reference import Delta, correction, differentiates, project
from coachhook.ops.hooked_linear.scopes import Population, Scope, Sequence

# Up to so many tokens and features a score is arithmetic on Python numbers. After a layer's weights
# went through the cache every operation of torch is as expensive as reading a megabyte of them.
_FEW_TOKENS, _FEW_FEATURES = 8, 2048
# From here on the product of oneDNN pays for handing the tokens over.
_ONEDNN_TOKENS = 32
_NOISE = NOISE_UNITS * torch.finfo(torch.float32).eps


def _features(flat: Tensor, delta: Delta) -> Tensor:
    """As :func:`reference.project`: float32 products of many tokens through oneDNN.

    torch takes MKL for them, which leaves half of the vector width idle on AMD's processors, and
    the copy that oneDNN asks for is the conversion that 16-bit tokens need anyway.
    """
    projection = delta if isinstance(delta, Tensor) else delta[1]
    if (
        flat.shape[0] < _ONEDNN_TOKENS
        or flat.dtype == torch.float64
        or projection.dtype != torch.float32
        or not projection.is_contiguous()
        or 0 in projection.shape
        or not torch.backends.mkldnn.is_available()
        or not torch.backends.mkldnn.enabled
    ):
        return project(flat, delta)
    return F.linear(flat.to_mkldnn(torch.float32), projection).to_dense()


def _is_one_number(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0


def _norm(token: list[float]) -> float:
    norm = math.hypot(*token)
    # hypot follows IEEE 754, where infinity wins over NaN; in a sum of squares it does not.
    return math.nan if math.isinf(norm) and any(map(math.isnan, token)) else norm


def _few_scores(
    x: Tensor, delta: Delta, mask: Tensor | None, cu_seqlens: Tensor | None, scope: Scope
) -> tuple[Tensor, list[list[float]]] | None:
    """Features and scores ``[sequences][tokens]`` of a few tokens of one population, else None.

    The float64 steps of :func:`gate.scores`, rounded to float32 at the end, without its operations.
    """
    projection = delta if isinstance(delta, Tensor) else delta[1]
    tokens = x.shape[0] * (x.shape[1] if x.dim() == 3 else 1)
    if (
        not isinstance(scope, Population)
        or not 0 < tokens <= _FEW_TOKENS
        or tokens * projection.shape[0] > _FEW_FEATURES
        or mask is not None
        or cu_seqlens is not None
        or x.dtype == torch.float64
        or projection.dtype != torch.float32
        or not _is_one_number(scope.mean)
        or not _is_one_number(scope.std)
    ):
        return None
    features = F.linear(x.to(torch.float32), projection)
    mean, std = float(scope.mean), float(scope.std)
    if not std > max(0.0, mean * _NOISE):
        std = math.nan
    rows = features.tolist() if x.dim() == 3 else [features.tolist()]
    z = [[c_float((_norm(token) - mean) / std).value for token in row] for row in rows]
    return features, z


def _as_scores(z: list[list[float]], x: Tensor) -> Tensor:
    return torch.tensor(z if x.dim() == 3 else z[0], dtype=torch.float32)


def gate_scores(
    x: Tensor, delta: Delta, mask: Tensor | None, cu_seqlens: Tensor | None, scope: Scope
) -> Tensor:
    """As :func:`reference.gate_scores`; the same bits as :func:`hook_output` gives."""
    with torch.no_grad():
        few = _few_scores(x, delta, mask, cu_seqlens, scope)
        if few is not None:
            return _as_scores(few[1], x)
        features = _features(x.flatten(0, -2), delta)
        z = scores(features, Tokens.of(x, mask, cu_seqlens), scope)
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
    """As :func:`reference.hook_output`; returns ``base_output`` itself where nothing fires.

    Args:
        owned: whether ``base_output`` may be overwritten.
    """
    parts = (delta,) if isinstance(delta, Tensor) else delta
    differentiated = differentiates(base_output, x, *parts)
    few = None if differentiated else _few_scores(x, delta, mask, cu_seqlens, scope)
    if few is not None:
        features, known = few
        z = _as_scores(known, x)
        threshold = c_float(float(alpha)).value  # compared in the dtype of z
        fired = [i for i, score in enumerate(chain(*known)) if score >= threshold]
        if not fired:
            return base_output, z
        index = torch.tensor(fired, dtype=torch.int64)
        features = features.flatten(0, -2)[index]
    else:
        tokens = Tokens.of(x, mask, cu_seqlens)
        if isinstance(scope, Sequence) and scope.state is None and tokens.longest == 1:
            # One token has no standard deviation: decoding here costs the frozen layer alone.
            return base_output, x.new_full(x.shape[:-1], float("nan"), dtype=torch.float32)
        flat = x.flatten(0, -2)
        with torch.no_grad():
            features = _features(flat, delta)
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
