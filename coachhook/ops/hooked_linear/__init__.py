"""A frozen linear layer with a gated hook.

    P = x W0^T + b              what the frozen layer says
    M_t = ||Delta x_t||_2       how far the hook would move it
    z_t                         M_t standardised in a scope (or the largest coefficient)
    y_t = P_t + Delta x_t where z_t >= alpha, else P_t

``Delta [m, n]`` is given dense, or as a pair with ``Delta = Q S``: with Q orthonormal the norm is
``||S x||`` exactly, and the gate costs ``r n`` instead of ``m n`` per token. Norms and scores are
formed in float32 (float64 for float64 input) whatever the dtype of the model. Source: the hook
layer of *Consecutive Batch Model Editing with HooK Layers* (EMNLP 2024), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coachhook.ops import _backends
from coachhook.ops._precision import without_autocast
from coachhook.ops._registry import is_plain_eager, register_op
from coachhook.ops.hooked_linear import cpu, cuda, decode, products, reference, triton
from coachhook.ops.hooked_linear.checks import (
    check_base_output,
    check_gate,
    check_input,
    check_weight,
)
from coachhook.ops.hooked_linear.known import facts_of, recall, remember
from coachhook.ops.hooked_linear.reference import Delta
from coachhook.ops.hooked_linear.scopes import (
    Membership,
    Population,
    Prefix,
    Scope,
    Sequence,
    Ungated,
)

__all__ = [
    "Membership",
    "Population",
    "Prefix",
    "Scope",
    "Sequence",
    "Ungated",
    "fuses_products",
    "gate_scores",
    "hook_output",
    "hooked_linear",
]

_backends.register("hooked_linear", "reference", reference.hook_output)
_backends.register("hooked_linear", "cpu", cpu.hook_output)
_backends.register("gate_scores", "reference", reference.gate_scores)
_backends.register("hooked_linear", "cuda", cuda.hook_output, supports=cuda.supports)
_backends.register("gate_scores", "cpu", cpu.gate_scores)
_backends.register("gate_scores", "cuda", cuda.gate_scores, supports=cuda.supports)
_backends.register("hooked_linear", "triton", triton.hook_output, supports=triton.supports)
_backends.register("gate_scores", "triton", triton.gate_scores, supports=triton.supports)


def _tensors(delta: Delta) -> tuple[Tensor, ...]:
    return (delta,) if isinstance(delta, Tensor) else delta


def _is_decoding(x: Tensor) -> bool:
    """Few tokens: the weights' bytes and the launches are what a call costs."""
    return x.numel() <= decode.MAX_TOKENS * x.shape[-1]


def _implementation(op: str, backend: str, x: Tensor) -> Callable[..., Any]:
    """What runs the op: on a GPU by shape alone, so that a graph holds one choice."""
    first = None
    if x.is_cuda:
        first = "cuda" if _is_decoding(x) else "triton"
    return _backends.resolve(op, backend, x, first=first)


def _run(op: str, backend: str, x: Tensor, *arguments: Any) -> Any:
    function = _implementation(op, backend, x)
    if not torch._C._is_any_autocast_enabled():
        return function(*arguments)
    with without_autocast(x.device.type):
        return function(*arguments)


# The registered forms: scopes travel as a name and their tensors.

_GATE_SCHEMA = (
    "Tensor projection, Tensor? lift, Tensor? mask, Tensor? cu_seqlens, str scope, "
    "Tensor? mean, Tensor? std, Tensor? groups, Tensor? cues, Tensor? limits, "
    "Tensor? reaches, Tensor? gaps, Tensor(a!)? state, str backend"
)


def _pack(
    x: Tensor,
    delta: Delta,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scope: Scope,
    backend: str,
) -> tuple[Any, ...]:
    lift, projection = (None, delta) if isinstance(delta, Tensor) else delta
    mean = std = groups = cues = limits = reaches = gaps = state = None
    if isinstance(scope, (Sequence, Prefix)):
        kind = "sequence" if isinstance(scope, Sequence) else "prefix"
        state = scope.state
    elif isinstance(scope, Population):
        kind, mean, std = "population", _scalar(scope.mean, x), _scalar(scope.std, x)
    elif isinstance(scope, Membership):
        kind, groups = f"membership_{scope.correction}", scope.groups
        cues, limits, state = scope.cues, scope.limits, scope.state
        reaches, gaps = scope.reaches, scope.gaps
    else:
        kind = "ungated"
    scope_tensors = mean, std, groups, cues, limits, reaches, gaps, state
    return projection, lift, mask, cu_seqlens, kind, *scope_tensors, backend


def _scalar(value: float | Tensor, x: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float64, device=x.device)


def _unpack(
    projection: Tensor,
    lift: Tensor | None,
    kind: str,
    mean: Tensor | None,
    std: Tensor | None,
    groups: Tensor | None,
    cues: Tensor | None,
    limits: Tensor | None,
    reaches: Tensor | None,
    gaps: Tensor | None,
    state: Tensor | None,
) -> tuple[Delta, Scope]:
    delta: Delta = projection if lift is None else (lift, projection)
    if mean is not None and std is not None:
        return delta, Population(mean, std)
    if kind == "sequence":
        return delta, Sequence(state)
    if kind == "prefix":
        return delta, Prefix(state)
    if kind == "membership_sum":
        return delta, Membership(groups, "sum")
    if kind == "membership_own":
        return delta, Membership(groups, "own", cues, limits, state, reaches, gaps)
    return delta, Ungated()


def _hook_output_body(
    base_output: Tensor,
    x: Tensor,
    alpha: Tensor,
    projection: Tensor,
    lift: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    mean: Tensor | None,
    std: Tensor | None,
    groups: Tensor | None,
    cues: Tensor | None,
    limits: Tensor | None,
    reaches: Tensor | None,
    gaps: Tensor | None,
    state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = mean, std, groups, cues, limits, reaches, gaps, state
    delta, scope = _unpack(projection, lift, kind, *tensors)
    arguments = base_output, x, delta, alpha, mask, cu_seqlens, scope, False
    y, z = _run("hooked_linear", backend, x, *arguments)
    if y is base_output:  # an op must not return its input
        y = base_output.clone(memory_format=torch.contiguous_format)
    return y.contiguous(), z


def _hook_output_fake(base_output: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = base_output.new_empty(base_output.shape)
    return y, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _gate_scores_body(
    x: Tensor,
    projection: Tensor,
    lift: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    mean: Tensor | None,
    std: Tensor | None,
    groups: Tensor | None,
    cues: Tensor | None,
    limits: Tensor | None,
    reaches: Tensor | None,
    gaps: Tensor | None,
    state: Tensor | None,
    backend: str,
) -> Tensor:
    tensors = mean, std, groups, cues, limits, reaches, gaps, state
    delta, scope = _unpack(projection, lift, kind, *tensors)
    return _run("gate_scores", backend, x, x, delta, mask, cu_seqlens, scope)


def _gate_scores_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


_HOOK_OUTPUT = register_op(
    "hook_output",
    f"(Tensor base_output, Tensor x, Tensor alpha, {_GATE_SCHEMA}) -> (Tensor, Tensor)",
    _hook_output_body,
    _hook_output_fake,
)
_GATE_SCORES = register_op(
    "gate_scores", f"(Tensor x, {_GATE_SCHEMA}) -> Tensor", _gate_scores_body, _gate_scores_fake
)


def _hook(
    base_output: Tensor,
    x: Tensor,
    delta: Delta,
    alpha: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scope: Scope,
    backend: str,
    owned: bool,
) -> tuple[Tensor, Tensor]:
    parts = _tensors(delta)
    if is_plain_eager(base_output, x, *parts):
        arguments = base_output, x, delta, alpha, mask, cu_seqlens, scope, owned
        return _run("hooked_linear", backend, x, *arguments)
    if reference.differentiates(base_output, x, *parts):
        with without_autocast(x.device.type):
            return reference.hook_output(base_output, x, delta, alpha, mask, cu_seqlens, scope)
    packed = _pack(x, delta, mask, cu_seqlens, scope, backend)
    registered = _HOOK_OUTPUT.registered
    y, z = registered(base_output, x, _scalar(alpha, x), *packed)
    return y, z


def fuses_products(x: Tensor) -> bool:
    """Whether :func:`hooked_linear` is to compute the frozen product of ``x`` itself if it can.

    That is for a contiguous ``x`` on a CPU, where the tokens are scored before the product (the
    same bits as the hook after it), and on a CUDA device where ``COACHHOOK_PRODUCTS=fused``; never
    while something is being traced or compiled.

    Raises:
        ValueError: ``COACHHOOK_PRODUCTS`` is none of "exact", "fused" and "library".
    """
    if not is_plain_eager(x):
        return False
    return x.is_contiguous() if x.is_cpu else x.is_cuda and products.way() == "fused"


def _layer_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The whole layer with an implementation of the hook."""
    if function is cpu.hook_output:
        return cpu.hooked_linear

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Any:
        return function(F.linear(x, weight, bias), x, *arguments, True)

    return layer


def hooked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor | tuple[Tensor, Tensor],
    alpha: float | Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scope: Scope | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Frozen linear layer plus a gated hook, ``y_t = W0 x_t + b (+ Delta x_t where z_t >= alpha)``.

    Tokens that do not fire are bit-identical to ``F.linear(x, weight, bias)``, except where the
    environment asks for another frozen product, see :func:`fuses_products`. In a compiled graph the
    frozen product stays visible to the compiler; the gate is the op ``coachhook::hook_output``.

    Args:
        x: ``[B, T, n]``; ``[T, n]`` is one sequence; ``[N, n]`` with ``cu_seqlens`` is packed.
            float16, bfloat16, float32 or float64, any strides.
        weight: ``[m, n]``, dtype of ``x``.
        bias: ``[m]`` or None.
        delta: ``[m, n]``; or ``(Q [m, r], S [r, n])`` with Q orthonormal (not checked); or, for
            :class:`Membership`, ``(V [m, N], A^T [N, n])``. Any floating dtype: products are formed
            in float32 (float64 for float64 ``x``) and the correction is rounded once.
        alpha: threshold, a float or a 0-dim tensor.
        mask: bool, leading shape of ``x``, True for real tokens. The others never fire, have z NaN
            and enter no statistic. None: all are real.
        cu_seqlens: int32 ``[B + 1]``, offsets of packed sequences, from 0, non-decreasing; tokens
            past the last offset belong to no sequence. Values are checked on CPU only.
        scope: :class:`Sequence` (None), :class:`Prefix`, :class:`Population`, :class:`Membership`
            or :class:`Ungated`.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        y ``[..., m]`` in the dtype of the linear layer's output, and z, float32, in the leading
        shape of ``x``: NaN where undefined (fewer than two real tokens, a standard deviation of
        zero or within rounding noise, NaN in x, a token that is not real). NaN never fires.

        y is differentiable in ``x``, ``weight`` and ``bias``, with the decision of the gate held
        constant.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing was changed.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    op = "hooked_linear"
    facts = facts_of(op, (x, weight, bias), delta, alpha, mask, cu_seqlens, scope, backend)
    function = None if facts is None else recall(facts)
    if function is not None and (function is cpu.hooked_linear or not fuses_products(x)):
        return function(x, weight, bias, delta, alpha, mask, None, scope or Sequence())
    given = check_input(op, x)
    m = check_weight(op, given, weight, bias)
    delta, scope = check_gate(op, given, delta, alpha, mask, cu_seqlens, scope, m)
    _backends.check_backend(op, backend)
    plain = is_plain_eager(x, weight, bias, *_tensors(delta))
    if plain and fuses_products(x):
        function = _implementation(op, backend, x)
        for kernels in (cuda, triton):
            if function is kernels.hook_output and kernels.fuses(
                x, weight, bias, delta, cu_seqlens, scope
            ):
                return kernels.hooked_linear(x, weight, bias, delta, alpha, mask, cu_seqlens, scope)
    if plain and not torch._C._is_any_autocast_enabled():
        layer = _layer_of(_implementation(op, backend, x))
        if facts is not None:
            remember(facts, layer)
        return layer(x, weight, bias, delta, alpha, mask, cu_seqlens, scope)
    base_output = F.linear(x, weight, bias)
    return _hook(base_output, x, delta, alpha, mask, cu_seqlens, scope, backend, True)


def hook_output(
    base_output: Tensor,
    x: Tensor,
    delta: Tensor | tuple[Tensor, Tensor],
    alpha: float | Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scope: Scope | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The gated hook on top of an output P that some linear module computed from ``x``.

    Args:
        base_output: ``[..., m]`` in the leading shape of ``x``; never written to.
        x, delta, alpha, mask, cu_seqlens, scope, backend: as in :func:`hooked_linear`.

    Returns:
        y and z as in :func:`hooked_linear`, y in the dtype of ``base_output``. In eager mode y may
        be ``base_output`` itself where nothing fires.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing was changed.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    op = "hook_output"
    facts = facts_of(op, (x, base_output), delta, alpha, mask, cu_seqlens, scope, backend)
    function = None if facts is None else recall(facts)
    if function is not None:
        return function(base_output, x, delta, alpha, mask, None, scope or Sequence(), False)
    given = check_input(op, x)
    m = check_base_output(op, given, base_output)
    delta, scope = check_gate(op, given, delta, alpha, mask, cu_seqlens, scope, m)
    _backends.check_backend(op, backend)
    if facts is not None:
        remember(facts, _implementation("hooked_linear", backend, x))
    return _hook(base_output, x, delta, alpha, mask, cu_seqlens, scope, backend, False)


def gate_scores(
    x: Tensor,
    delta: Tensor | tuple[Tensor, Tensor],
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scope: Scope | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scores z of the gate alone, float32 in the leading shape of ``x``; see :func:`hooked_linear`.

    Updates the state of the scope as :func:`hooked_linear` does. Not differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing was changed.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    op = "gate_scores"
    given = check_input(op, x)
    delta, scope = check_gate(op, given, delta, 0.0, mask, cu_seqlens, scope, None)
    _backends.check_backend(op, backend)
    parts = _tensors(delta)
    if is_plain_eager(x, *parts):
        return _run(op, backend, x, x, delta, mask, cu_seqlens, scope)
    registered = _GATE_SCORES.registered
    z = registered(x, *_pack(x, delta, mask, cu_seqlens, scope, backend))
    return z
