"""Features of bfloat16 tokens through the extension ``coachhook._cpu``, S cut into pairs.

Each number of S is cut into a high and a low bfloat16 number, relative error 2^-16 as on a GPU, and
both products are summed in float32 by the processor's bfloat16 instructions. The design and what it
gains: ``docs/kernels/hooked_linear.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coachhook.errors import BackendUnavailableError
from coachhook.ops import _backends


def takes(x: Tensor, projection: Tensor) -> bool:
    """Whether the extension multiplies these tensors: bfloat16 ``[N, n]``, float32 ``[f, n]``.

    With one thread only: oneDNN shares the work out among several. Up to 192 features: of more
    oneDNN's product is as fast.
    """
    module = _backends.native_cpu()
    return (
        module is not None
        and x.dtype == torch.bfloat16
        and projection.dtype == torch.float32
        and torch.get_num_threads() == 1
        and x.numel() > 0
        and 0 < projection.shape[0] <= module.MAX_RANK
        and x.stride(1) == 1
        and projection.stride(1) == 1
    )


def product(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """Features ``x S^T`` and their norms, of tensors that :func:`takes` accepts.

    The same bits for a token, whatever the others are.

    Args:
        x: bfloat16 ``[N, n]``.
        projection: float32 ``[f, n]``.

    Returns:
        float32 ``[N, f]``, the transpose of a contiguous tensor, and float64 ``[N]``.

    Raises:
        BackendUnavailableError: the extension is not there, or the processor lacks the
            instructions.
    """
    module = _backends.native_cpu()
    if module is None:
        raise BackendUnavailableError(f"hooked_linear: {_backends.native_cpu_error()}")
    features = projection.new_empty(projection.shape[0], x.shape[0])
    norms = projection.new_empty(x.shape[0], dtype=torch.float64)
    module.pair_product(
        x=x.data_ptr(),
        x_row_stride=x.stride(0),
        tokens=x.shape[0],
        n=x.shape[1],
        s=projection.data_ptr(),
        s_row_stride=projection.stride(0),
        rank=projection.shape[0],
        features=features.data_ptr(),
        norms=norms.data_ptr(),
    )
    return features.T, norms
