"""The CUDA extension as this op calls it: the module, addresses, the stream."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from coachhook.errors import BackendUnavailableError
from coachhook.ops import _backends

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def native() -> ModuleType:
    """``coachhook._C``.

    Raises:
        BackendUnavailableError: it is not built, or does not load.
    """
    module = _backends.native()
    if module is None:
        raise BackendUnavailableError(f"hooked_linear: {_backends.native_error()}")
    return module


def stream(device: torch.device) -> int:
    """The stream that torch is on, 0 for CPU tensors."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def address(tensor: Tensor | None) -> int:
    """Where the data lies, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def threshold(alpha: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """Alpha as a float32 tensor on the device, read by the kernels, or as a number."""
    if not isinstance(alpha, Tensor):
        return None, float(alpha)
    if alpha.device != device:
        return None, float(alpha)  # on the CPU: reading it waits for nothing
    return alpha.to(torch.float32), 0.0
