"""At most 64 tokens through the kernels of ``csrc/decode.cuh`` and ``decode_own.cuh``: two or three
launches.

The stacked rows ``[W0; S]``, or S alone where something else computed the frozen product, and the
cues of edits that have one are read once; gate and correction follow in the launches that sum the
partial products. A call allocates its outputs and a workspace, reads nothing back, and can be
captured in a CUDA graph. Design, bytes and
floors: ``docs/kernels/hooked_linear.md``.

Every argument was checked by the op; what is left to this file is layout.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from coachhook.ops.hooked_linear.native import DTYPES, address, native, stream, threshold
from coachhook.ops.hooked_linear.reference import Delta
from coachhook.ops.hooked_linear.scopes import (
    Membership,
    Population,
    Prefix,
    Scope,
    Sequence,
    Ungated,
)

OVERLAP_SWITCH = "COACHHOOK_DECODING_OVERLAP"

# As in csrc/decode.h; the second axis of a grid bounds the sequences.
MAX_TOKENS = 64
MAX_KEYS = 512
MAX_SEQUENCES = 65534

_SCOPES = {
    Sequence: "sequence",
    Prefix: "prefix",
    Population: "population",
    Membership: "direct",
    Ungated: "ungated",
}


@cache
def _can_overlap(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def overlap_asked() -> bool:
    """The value of ``COACHHOOK_DECODING_OVERLAP``, False where it is unset.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get(OVERLAP_SWITCH) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{OVERLAP_SWITCH} must be 0 or 1, got {value!r}")
    return value == "1"


def _overlaps(device: torch.device) -> bool:
    """Whether a kernel's blocks may start while the one in front drains: where asked, and able."""
    return overlap_asked() and _can_overlap(device)


def _factors(delta: Delta) -> tuple[Tensor | None, Tensor]:
    return (None, delta) if isinstance(delta, Tensor) else delta


def _takes_edits(scope: Scope, projection: Tensor) -> bool:
    if not isinstance(scope, Membership):
        return True
    alone = scope.correction == "own" and scope.groups is None
    if scope.cues is not None and scope.cues.dtype != projection.dtype:
        return False
    return alone or projection.shape[0] <= MAX_KEYS


def takes(
    x: Tensor, delta: Delta, cu_seqlens: Tensor | None, scope: Scope, y_dtype: torch.dtype
) -> bool:
    """Whether the kernels are made for this call."""
    lift, projection = _factors(delta)
    features = projection.shape[0]
    return (
        0 < x.numel() <= MAX_TOKENS * x.shape[-1]
        and x.dtype in DTYPES
        and y_dtype in DTYPES
        and features > 0
        and projection.dtype in (x.dtype, torch.float32)
        and (lift is None or lift.dtype in (y_dtype, torch.float32))
        and _takes_edits(scope, projection)
        and (cu_seqlens is None or cu_seqlens.shape[0] <= MAX_SEQUENCES)
    )


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """``[N, k]`` with adjacent elements in a row, and its stride; a copy only where it must be."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    if flat.stride(1) != 1 and flat.shape[1] > 1:
        flat = flat.contiguous()
    return flat, flat.stride(0) if flat.shape[0] > 1 else flat.shape[1]


@cache
def _workspace_bytes(module: ModuleType, **sizes: Any) -> int:
    sizes |= {key: getattr(module.DType, sizes[key]) for key in ("dtype", "projection_dtype")}
    return int(module.decode_workspace(**sizes))


def _population(value: float | Tensor, device: torch.device) -> tuple[Tensor, bool, int]:
    """Values on the device, whether they are float64, and the stride between sequences."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float64, device=device), True, 0
    if value.device != device or value.dtype not in (torch.float32, torch.float64):
        value = value.to(device, torch.float64)
    stride = value.stride(0) if value.dim() and value.shape[0] > 1 else 0
    return value, value.dtype == torch.float64, stride


def run(
    x: Tensor,
    delta: Delta,
    alpha: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scope: Scope,
    *,
    base: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    owned: bool = False,
) -> tuple[Tensor, Tensor]:
    """y ``[..., m]`` and z, of a call that :func:`takes` accepts.

    Args:
        x, delta, alpha, mask, cu_seqlens, scope: as in ``hooked_linear``.
        base: what the frozen layer said, ``[..., m]``.
        weight: its weight ``[m, n]`` of the dtype of x, instead; with neither, y is empty.
        bias: ``[m]`` of the dtype of x, or None.
        owned: whether ``base`` may be overwritten.
    """
    module, device = native(), x.device
    lift, projection = _factors(delta)
    tokens, x_stride = _rows(x)
    projection, projection_stride = _rows(projection)
    lift_stride = base_stride = weight_stride = out_features = 0
    y, y_dtype = x.new_empty(0), x.dtype
    if base is not None:
        y_dtype, out_features = base.dtype, base.shape[-1]
        y = base if owned and base.is_contiguous() else base.new_empty(base.shape)
        base, base_stride = _rows(base)
    elif weight is not None:
        out_features = weight.shape[0]
        y = x.new_empty(*x.shape[:-1], out_features)
        weight, weight_stride = _rows(weight)
        bias = None if bias is None else bias.contiguous()
    if lift is not None:
        lift, lift_stride = _rows(lift)

    groups = mean = std = state = kept = cues = limits = reaches = gaps = seen = None
    cues_stride = 0
    mean_is_double = std_is_double = True
    mean_stride = std_stride = 0
    if isinstance(scope, Membership):
        groups = None if scope.groups is None else scope.groups.contiguous()
        if scope.cues is not None and scope.limits is not None:
            cues, cues_stride = _rows(scope.cues)
            limits = scope.limits.to(torch.float32).contiguous()
            reaches = None if scope.reaches is None else scope.reaches.contiguous()
            gaps = None if scope.gaps is None else scope.gaps.contiguous()
            if scope.state is not None:
                seen = scope.state.contiguous()
    elif isinstance(scope, Population):
        mean, mean_is_double, mean_stride = _population(scope.mean, device)
        std, std_is_double, std_stride = _population(scope.std, device)
    elif isinstance(scope, (Sequence, Prefix)) and scope.state is not None:
        kept = scope.state
        state = kept.to(torch.float64).contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.int().contiguous()
        sequences = cu_seqlens.shape[0] - 1
    else:
        sequences = x.shape[0] if x.dim() == 3 else 1
    mask = None if mask is None else mask.contiguous()
    alpha_tensor, alpha_value = threshold(alpha, device)

    rows, depth = tokens.shape
    features = projection.shape[0]
    sizes = _workspace_bytes(
        module,
        rows=rows,
        depth=depth,
        out_features=out_features,
        features=features,
        dtype=DTYPES[x.dtype],
        projection_dtype=DTYPES[projection.dtype],
        sequences=sequences,
        frozen=weight is not None,
        lifted=lift is not None,
        own=isinstance(scope, Membership) and scope.correction == "own" and groups is None,
        cued=cues is not None,
    )
    workspace = torch.empty(sizes, dtype=torch.uint8, device=device)
    z = x.new_empty(x.shape[:-1], dtype=torch.float32)
    largest = isinstance(scope, Membership)
    dtypes = module.DType
    module.decode_hooked_linear(
        x=address(tokens),
        dtype=getattr(dtypes, DTYPES[x.dtype]),
        rows=rows,
        depth=depth,
        x_row_stride=x_stride,
        out_features=out_features,
        weight=address(weight),
        weight_row_stride=weight_stride,
        bias=address(bias),
        base=address(base),
        base_row_stride=base_stride,
        projection=address(projection),
        projection_dtype=getattr(dtypes, DTYPES[projection.dtype]),
        features=features,
        projection_row_stride=projection_stride,
        lift=address(lift),
        lift_dtype=getattr(dtypes, DTYPES[torch.float32 if lift is None else lift.dtype]),
        lift_row_stride=lift_stride,
        groups=address(groups),
        own=isinstance(scope, Membership) and scope.correction == "own",
        cues=address(cues),
        cues_row_stride=cues_stride,
        limits=address(limits),
        reaches=address(reaches),
        gaps=address(gaps),
        seen=address(seen),
        reduction=module.Reduction.max if largest else module.Reduction.norm,
        scope=getattr(module.Scope, _SCOPES[type(scope)]),
        sequences=sequences,
        cu_seqlens=address(cu_seqlens),
        mask=address(mask),
        mean=address(mean),
        std=address(std),
        mean_is_double=mean_is_double,
        std_is_double=std_is_double,
        mean_stride=mean_stride,
        std_stride=std_stride,
        alpha=address(alpha_tensor),
        alpha_value=alpha_value,
        state=address(state),
        y=address(y),
        y_dtype=getattr(dtypes, DTYPES[y_dtype]),
        y_row_stride=out_features,
        z=address(z),
        workspace=address(workspace),
        overlap=x.is_cuda and _overlaps(device),
        device=device.index or 0,
        stream=stream(device),
    )
    if kept is not None and state is not None and kept is not state:
        kept.copy_(state)
    if isinstance(scope, Membership) and seen is not None and seen is not scope.state:
        assert scope.state is not None
        scope.state.copy_(seen)
    return y, z
