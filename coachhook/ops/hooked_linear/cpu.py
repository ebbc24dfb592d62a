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

from coachhook.ops.hooked_linear import pairs
from coachhook.ops.hooked_linear.cues import NEVER, armed_edits, firsts, is_bounded, registers
from coachhook.ops.hooked_linear.gate import NOISE_UNITS, Tokens, fires, scores
from coachhook.ops.hooked_linear.reference import (
    Delta,
    coefficients,
    compute_dtype,
    differentiates,
    project,
)
from coachhook.ops.hooked_linear.scopes import Membership, Population, Scope, Sequence

# Up to so many tokens and features a score is arithmetic on Python numbers. After a layer's weights
# went through the cache every operation of torch is as expensive as reading a megabyte of them.
_FEW_TOKENS, _FEW_FEATURES = 8, 2048
# From here on other products than torch's own pay for handing the tokens over.
_MANY_TOKENS = 32
_NOISE = NOISE_UNITS * torch.finfo(torch.float32).eps


def _features(flat: Tensor, delta: Delta) -> tuple[Tensor, Tensor | None]:
    """Features as of :func:`reference.project`, and their norms where these cost nothing.

    Of many tokens the products are the extension's, which cuts S into pairs of bfloat16 numbers, or
    oneDNN's: torch takes MKL for float32, which leaves half of the vector width idle on AMD's
    processors, and the copy that oneDNN asks for is the conversion that 16-bit tokens need anyway.
    """
    projection = delta if isinstance(delta, Tensor) else delta[1]
    if (
        flat.shape[0] < _MANY_TOKENS
        or flat.dtype == torch.float64
        or projection.dtype != torch.float32
        or 0 in projection.shape
    ):
        return project(flat, delta), None
    if pairs.takes(flat, projection):
        return pairs.product(flat, projection)
    if (
        projection.is_contiguous()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    ):
        return F.linear(flat.to_mkldnn(torch.float32), projection).to_dense(), None
    return project(flat, delta), None


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


def _features_of(flat: Tensor, projection: Tensor, wanted: Tensor) -> Tensor:
    """Features ``[N, f]`` of the rows ``wanted [f]`` of the projection; the others may be -inf."""
    index = wanted.nonzero().squeeze(1)
    count = projection.shape[0]
    # Of few tokens the product costs as much as the copy of its rows.
    if index.shape[0] * (2 if flat.shape[0] >= _MANY_TOKENS else 4) > count:
        return _features(flat, projection)[0]
    features = torch.full((flat.shape[0], count), float("-inf"), dtype=compute_dtype(flat))
    if index.shape[0]:
        features[:, index] = _features(flat, projection.index_select(0, index))[0]
    return features


def _armed(
    seen: Tensor,
    tokens: Tokens,
    limits: Tensor,
    state: Tensor | None,
    reaches: Tensor | None,
    gaps: Tensor | None,
) -> Tensor:
    """:func:`armed_edits`; of many tokens for the few edits alone whose cue was seen at all."""
    count = seen.shape[1]
    if seen.shape[0] < _MANY_TOKENS:
        return armed_edits(seen, tokens, limits, state, reaches, gaps)
    some = ((seen >= limits.to(seen.dtype)) | limits.isneginf()).any(dim=0)
    if state is not None:
        before = (firsts(state) < NEVER).any(dim=0)
        if reaches is not None:
            bounded = is_bounded(limits, reaches, gaps)
            before = torch.where(bounded, registers(state).any(dim=0), before)
        some |= before
    index = some.nonzero().squeeze(1)
    if 2 * index.shape[0] > count:
        return armed_edits(seen, tokens, limits, state, reaches, gaps)
    kept, of_state = None, torch.cat([index.new_zeros(1), 1 + index, 1 + count + index])
    if state is not None:
        kept = state.index_select(1, of_state)
    near, apart = (None if x is None else x.index_select(0, index) for x in (reaches, gaps))
    few = seen.index_select(1, index), tokens, limits.index_select(0, index), kept, near, apart
    armed = torch.zeros(seen.shape, dtype=torch.bool)
    armed[:, index] = armed_edits(*few)
    if state is not None and kept is not None:
        state.index_copy_(1, of_state, kept)
    return armed


def _armed_features(
    flat: Tensor,
    delta: Delta,
    tokens: Tokens,
    cues: Tensor,
    limits: Tensor,
    scope: Membership,
) -> Tensor:
    """Features ``[N, edits]``, -inf for edits that are not armed; updates the state.

    Text names few edits' subjects: only products that a decision hangs on are formed.
    """
    waiting, state, reaches, gaps = ~limits.isneginf(), scope.state, scope.reaches, scope.gaps
    if state is not None:
        open_ = (firsts(state) >= state[:, :1]).any(dim=0)
        waiting &= open_ if reaches is None else open_ | is_bounded(limits, reaches, gaps)
    armed = _armed(_features_of(flat, cues, waiting), tokens, limits, state, reaches, gaps)
    projection = delta if isinstance(delta, Tensor) else delta[1]
    features = _features_of(flat, projection, armed.any(dim=0))
    return features.masked_fill(~armed, float("-inf"))


def _scores(
    x: Tensor, delta: Delta, mask: Tensor | None, cu_seqlens: Tensor | None, scope: Scope
) -> tuple[Tensor, Tensor, Tokens]:
    """Features ``[N, f]`` and scores ``[N]`` of many tokens, and how these are laid out.

    The features of edits that are not armed are -inf.
    """
    tokens = Tokens.of(x, mask, cu_seqlens)
    flat = x.flatten(0, -2)
    with torch.no_grad():
        if isinstance(scope, Membership) and scope.cues is not None and scope.limits is not None:
            features = _armed_features(flat, delta, tokens, scope.cues, scope.limits, scope)
            return features, scores(features, tokens, scope), tokens
        features, norms = _features(flat, delta)
        return features, scores(features, tokens, scope, norms), tokens


def _decide(
    x: Tensor,
    delta: Delta,
    alpha: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scope: Scope,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scores in the leading shape of ``x``, which tokens fire (None: no token), their features."""
    few = _few_scores(x, delta, mask, cu_seqlens, scope)
    if few is not None:
        features, known = few
        z = _as_scores(known, x)
        threshold = c_float(float(alpha)).value  # compared in the dtype of z
        fired = [i for i, score in enumerate(chain(*known)) if score >= threshold]
        if not fired:
            return z, None, features
        index = torch.tensor(fired, dtype=torch.int64)
        return z, index, features.flatten(0, -2).index_select(0, index)
    if isinstance(scope, Sequence) and scope.state is None and cu_seqlens is None:
        if x.shape[-2] == 1:
            # One token has no standard deviation: decoding here costs the frozen layer alone.
            z = x.new_full(x.shape[:-1], float("nan"), dtype=torch.float32)
            return z, None, z
    features, z, tokens = _scores(x, delta, mask, cu_seqlens, scope)
    index = fires(z, alpha, tokens, scope).nonzero().squeeze(1)
    z = z.to(torch.float32).view(x.shape[:-1])
    if index.shape[0] == 0:
        return z, None, features
    return z, index, features.index_select(0, index)


def _corrected(
    base_output: Tensor,
    index: Tensor,
    features: Tensor,
    delta: Delta,
    scope: Scope,
    in_place: bool,
    judged: Tensor | None = None,
) -> Tensor:
    rows = base_output.reshape(-1, base_output.shape[-1])
    hooked = rows.index_select(0, index).to(features.dtype)
    if isinstance(delta, Tensor):
        hooked = hooked + features
    else:
        lift = delta[0].to(features.dtype)
        hooked = torch.addmm(hooked, coefficients(features, scope, judged), lift.T)
    hooked = hooked.to(base_output.dtype)
    if in_place:
        rows.index_copy_(0, index, hooked)
    else:
        rows = rows.index_copy(0, index, hooked)
    return rows.view(base_output.shape)


def gate_scores(
    x: Tensor, delta: Delta, mask: Tensor | None, cu_seqlens: Tensor | None, scope: Scope
) -> Tensor:
    """As :func:`reference.gate_scores`; the same bits as :func:`hook_output` gives."""
    with torch.no_grad():
        few = _few_scores(x, delta, mask, cu_seqlens, scope)
        if few is not None:
            return _as_scores(few[1], x)
        _, z, _ = _scores(x, delta, mask, cu_seqlens, scope)
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
    if differentiates(base_output, x, *parts):
        with torch.no_grad():
            z, index, judged = _decide(x, delta, alpha, mask, cu_seqlens, scope)
        if index is None:
            return base_output, z
        features = project(x.flatten(0, -2).index_select(0, index), delta)
        return _corrected(base_output, index, features, delta, scope, False, judged), z
    z, index, features = _decide(x, delta, alpha, mask, cu_seqlens, scope)
    if index is None:
        return base_output, z
    return _corrected(base_output, index, features, delta, scope, owned), z


def hooked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Delta,
    alpha: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scope: Scope,
) -> tuple[Tensor, Tensor]:
    """The frozen product and :func:`hook_output` on it, bit for bit, the gate first.

    The frozen product would push x, S and the code of the gate out of the caches.
    """
    layer = (x, weight) if bias is None else (x, weight, bias)
    parts = (delta,) if isinstance(delta, Tensor) else delta
    if differentiates(*layer, *parts):
        output = F.linear(x, weight, bias)
        return hook_output(output, x, delta, alpha, mask, cu_seqlens, scope, True)
    z, index, features = _decide(x, delta, alpha, mask, cu_seqlens, scope)
    output = F.linear(x, weight, bias)
    if index is not None:
        output = _corrected(output, index, features, delta, scope, True)
    return output, z
