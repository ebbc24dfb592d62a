"""Who computes the two products of a call on a GPU: ``P = x W0^T`` and ``f = x S^T``.

    exact     P the library, f the kernels: tokens that do not fire are the unhooked model's bits
    fused     both the kernels, where they can: x is read once, and no bit depends on the batch
    library   both the library, where f can be: the bits of z may depend on the size of the batch

Bytes, operations and predicted times of the three: ``docs/kernels/hooked_linear.md``.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional as F

from coachhook.ops.hooked_linear.reference import Delta, differentiates

ENVIRONMENT_SWITCH = "COACHHOOK_PRODUCTS"
WAYS = ("exact", "fused", "library")


def way() -> str:
    """The value of ``COACHHOOK_PRODUCTS``, "exact" where it is unset.

    Raises:
        ValueError: it is none of :data:`WAYS`.
    """
    value = os.environ.get(ENVIRONMENT_SWITCH) or "exact"
    if value not in WAYS:
        raise ValueError(f"{ENVIRONMENT_SWITCH} must be one of {', '.join(WAYS)}, got {value!r}")
    return value


def can_fuse(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Delta) -> bool:
    """Whether some kernel may compute the frozen product of these tensors instead of torch.

    Not under autocast or autograd, which want to see it, and not where a row of ``weight`` would
    have to be copied together first.
    """
    parts = (delta,) if isinstance(delta, Tensor) else delta
    layer = (weight,) if bias is None else (weight, bias)
    return (
        all(tensor.dtype == x.dtype for tensor in layer)
        and x.numel() > 0
        and weight.shape[0] > 0
        and weight.stride(1) == 1
        and not torch.is_autocast_enabled(x.device.type)
        and not differentiates(x, *layer, *parts)
    )


def library_takes(x: Tensor, projection: Tensor) -> bool:
    """Whether torch multiplies these 16-bit tensors into float32; its CUDA builds do since 2.8."""
    short = x.dtype in (torch.float16, torch.bfloat16) and projection.dtype == x.dtype
    return short and hasattr(torch.ops.aten.mm, "dtype")


def library_features(x: Tensor, projection: Tensor) -> Tensor:
    """``x S^T``, float32 ``[N, f]``, of tensors that :func:`library_takes`; x ``[N, n]``."""
    if x.is_cuda:
        features: Tensor = torch.mm(x, projection.T, out_dtype=torch.float32)
        return features
    return F.linear(x.float(), projection.float())  # for the interpreter; exact products too
