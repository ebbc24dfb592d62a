"""The gated hook through the CUDA extension ``coachhook._C``.

Up to 64 tokens go through the kernels of ``csrc/decode.cuh``, see ``decode.py``. For more the
products ``x S^T`` are torch's; norms, statistics, decision and the correction of the tokens that
fire are kernels of ``csrc/gate.cuh``: fixed summation order, no atomics, nothing read back to the
host. So a call can be captured in a CUDA graph, and a token's decision follows from its features
alone; whether those have the same bits in every batch is up to torch's product. There
:class:`Prefix` takes its scan, and :class:`Ungated` its decision, from plain torch.

Every argument was checked by the op; what is left to this file is layout.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from coachhook.ops.hooked_linear import decode
from coachhook.ops.hooked_linear.cues import judged_features, unless_unarmed_
from coachhook.ops.hooked_linear.gate import Tokens, fires, group_sums, scores
from coachhook.ops.hooked_linear.native import DTYPES, address, native, stream, threshold
from coachhook.ops.hooked_linear.products import can_fuse
from coachhook.ops.hooked_linear.reference import Delta, correction, differentiates, project
from coachhook.ops.hooked_linear.scopes import (
    Membership,
    Population,
    Prefix,
    Scope,
    Sequence,
    Ungated,
)

# Oldest architecture the extension is built for, see setup.py.
MIN_CAPABILITY = (8, 0)


@cache
def runtime_problem() -> str | None:
    """Why the extension's CUDA runtime cannot use this machine's driver, or None."""
    build = native().build_info()
    if build["devices"] > 0:
        return None
    runtime, driver = (
        f"{v // 1000}.{v % 1000 // 10}" for v in (build["cuda_runtime"], build["cuda_driver"])
    )
    return (
        f"it was built with CUDA {runtime} and finds no device with the driver for CUDA {driver}; "
        "update the driver, or build with an older CUDA toolkit"
    )


def supports(x: Tensor) -> str | None:
    """Why the kernels cannot take these tokens, or None."""
    if x.dtype not in DTYPES:
        return f"it computes in float32, x is {x.dtype}"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < MIN_CAPABILITY:
        wanted, got = (".".join(map(str, c)) for c in (MIN_CAPABILITY, capability))
        return f"it needs compute capability {wanted}, {x.device} has {got}"
    return runtime_problem()


def _per_sequence(value: float | Tensor, device: torch.device) -> Tensor:
    """float64 ``[1]`` or ``[B]`` on the device; a Python number never waits for the host."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64).reshape(-1).contiguous()
    return torch.full((1,), value, dtype=torch.float64, device=device)


def _gate(
    features: Tensor,
    alpha: float | Tensor,
    tokens: Tokens,
    scope: Sequence | Population | Membership,
) -> tuple[Tensor, Tensor]:
    """z float32 ``[N]`` and fired uint8 ``[N]`` from features float32 ``[N, f]``."""
    module = native()
    rows, device = features.shape[0], features.device
    reduction, kind = module.Reduction.norm, module.Scope.sequence
    mean = std = state = kept = None
    population_stride = 0
    if isinstance(scope, Membership):
        features = group_sums(features, scope.groups)
        reduction, kind = module.Reduction.max, module.Scope.direct
    elif isinstance(scope, Population):
        kind = module.Scope.population
        mean, std = torch.broadcast_tensors(
            _per_sequence(scope.mean, device), _per_sequence(scope.std, device)
        )
        mean, std = mean.contiguous(), std.contiguous()
        population_stride = int(mean.shape[0] > 1)
    elif scope.state is not None:
        state, kept = scope.state, scope.state
        if state.dtype != torch.float64 or not state.is_contiguous():
            state = kept.new_empty(tokens.rows, 3, dtype=torch.float64)

    if features.stride(1) != 1 and features.shape[1] > 1:
        features = features.contiguous()
    mask = None if tokens.real is None else tokens.real.contiguous()
    cu_seqlens = None if tokens.cu_seqlens is None else tokens.cu_seqlens.int().contiguous()
    alpha_tensor, alpha_value = threshold(alpha, device)
    magnitude = features.new_empty(rows)
    z = features.new_empty(rows)
    fired = torch.empty(rows, dtype=torch.uint8, device=device)
    module.row_norm_zscore_gate(
        coefficients=address(features),
        dtype=getattr(module.DType, DTYPES[features.dtype]),
        rows=rows,
        rank=features.shape[1],
        row_stride=features.stride(0),
        reduction=reduction,
        scope=kind,
        sequences=tokens.rows,
        cu_seqlens=address(cu_seqlens),
        mask=address(mask),
        mean=address(mean),
        std=address(std),
        population_stride=population_stride,
        alpha=address(alpha_tensor),
        alpha_value=alpha_value,
        state=address(state),
        magnitude=address(magnitude),
        z=address(z),
        fired=address(fired),
        device=device.index or 0,
        stream=stream(device),
    )
    if kept is not None and state is not None and kept is not state:
        kept.copy_(state)
    return z, fired


def _decide(
    features: Tensor, alpha: float | Tensor, tokens: Tokens, scope: Scope
) -> tuple[Tensor, Tensor]:
    empty = features.shape[1] == 0 and isinstance(scope, Membership)
    if isinstance(scope, (Prefix, Ungated)) or empty:
        z = scores(features, tokens, scope)
        return z, fires(z, alpha, tokens, scope).to(torch.uint8)
    z, fired = _gate(features, alpha, tokens, scope)
    return z, unless_unarmed_(fired, z, scope)


def _add_correction_(y: Tensor, lift: Tensor, weights: Tensor, fired: Tensor) -> None:
    """In place ``y[t] += lift @ weights[t]`` where ``fired``; y ``[N, m]``, weights ``[N, f]``."""
    module = native()
    lift = lift.to(torch.float32).contiguous()
    weights = weights.contiguous()
    module.add_correction(
        y=address(y),
        dtype=getattr(module.DType, DTYPES[y.dtype]),
        rows=y.shape[0],
        out_features=y.shape[1],
        y_row_stride=y.stride(0),
        rank=lift.shape[1],
        q=address(lift),
        q_row_stride=lift.stride(0),
        s=address(weights),
        s_row_stride=weights.stride(0),
        fired=address(fired),
        device=y.device.index or 0,
        stream=stream(y.device),
    )


def gate_scores(
    x: Tensor, delta: Delta, mask: Tensor | None, cu_seqlens: Tensor | None, scope: Scope
) -> Tensor:
    """As :func:`reference.gate_scores`."""
    with torch.no_grad():
        if decode.takes(x, delta, cu_seqlens, scope, x.dtype):
            return decode.run(x, delta, 0.0, mask, cu_seqlens, scope)[1]
        flat, tokens = x.flatten(0, -2), Tokens.of(x, mask, cu_seqlens)
        features = judged_features(project(flat, delta), flat, tokens, scope, project)
        z, _ = _decide(features, 0.0, tokens, scope)
        return z.view(x.shape[:-1])


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
    """As :func:`reference.hook_output`.

    Args:
        owned: whether ``base_output`` may be overwritten.
    """
    parts = (delta,) if isinstance(delta, Tensor) else delta
    learns = differentiates(base_output, x, *parts)
    if not learns and decode.takes(x, delta, cu_seqlens, scope, base_output.dtype):
        with torch.no_grad():
            y, z = decode.run(
                x, delta, alpha, mask, cu_seqlens, scope, base=base_output, owned=owned
            )
        return y, z
    tokens = Tokens.of(x, mask, cu_seqlens)
    flat = x.flatten(0, -2)
    features = project(flat, delta)
    with torch.no_grad():
        judged = judged_features(features.detach(), flat, tokens, scope, project)
        z, fired = _decide(judged, alpha, tokens, scope)
    z = z.view(x.shape[:-1])
    if (
        isinstance(delta, Tensor)  # its features are the correction already
        or (isinstance(scope, Membership) and scope.correction == "own")
        or base_output.dtype not in DTYPES
        or learns
    ):
        added = correction(features, delta, scope, judged).view(base_output.shape)
        hooked = (base_output.to(features.dtype) + added).to(base_output.dtype)
        return torch.where(fired.bool().view(x.shape[:-1])[..., None], hooked, base_output), z
    if owned and base_output.is_contiguous():
        y = base_output
    else:
        y = base_output.clone(memory_format=torch.contiguous_format)
    _add_correction_(y.view(-1, y.shape[-1]), delta[0], features, fired)
    return y, z


def fuses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Delta,
    cu_seqlens: Tensor | None,
    scope: Scope,
) -> bool:
    """Whether :func:`hooked_linear` may compute the frozen product of this call itself."""
    return can_fuse(x, weight, bias, delta) and decode.takes(x, delta, cu_seqlens, scope, x.dtype)


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
    """The whole layer in one pass over ``[W0; S]``, where :func:`fuses` allows it.

    The frozen product is summed in float32 and rounded once: not the bits of ``F.linear``.
    """
    with torch.no_grad():
        y, z = decode.run(x, delta, alpha, mask, cu_seqlens, scope, weight=weight, bias=bias)
    return y, z
