"""Second moment of keys, accumulated in place: ``G <- G + sum over tokens of x_t x_t^T``."""

from __future__ import annotations

import torch
from torch import Tensor

from coachhook.ops import _backends
from coachhook.ops._precision import without_autocast
from coachhook.ops._registry import register_op
from coachhook.ops.gram import cpu, cuda, reference

__all__ = ["gram_add_lower_", "gram_update_"]

_OP = "gram_update_"
_GRAM_DTYPES = (torch.float32, torch.float64)
_X_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_backends.register(_OP, "reference", reference.gram_update_)
_backends.register(_OP, "cpu", cpu.gram_update_)
_backends.register(_OP, "cuda", cuda.gram_update_, extension=False)


@torch.no_grad()
def _body(gram: Tensor, x: Tensor, mask: Tensor | None, backend: str) -> None:
    tokens = x.reshape(-1, x.shape[-1])
    real = None if mask is None else mask.reshape(-1)
    if x.device.type == "cpu":
        _check_finite(tokens, real)
    update = _backends.resolve(_OP, backend, gram, x)
    with without_autocast(x.device.type):
        update(gram, tokens, real)


def _check_finite(tokens: Tensor, real: Tensor | None) -> None:
    # A sum is finite only if all its terms are: one pass, where looking at each takes five.
    wide = torch.promote_types(tokens.dtype, torch.float32)
    if tokens.sum(dtype=wide).isfinite():
        return
    bad = ~torch.isfinite(tokens).all(dim=1)
    if real is not None:
        bad &= real
    if bool(bad.any()):
        raise ValueError(
            f"{_OP}: x must be finite for real tokens, got NaN or Inf in {int(bad.sum())} of "
            f"{len(tokens)} tokens; mask padding out, and keep float16 from overflowing"
        )


def gram_add_lower_(total: Tensor, x: Tensor) -> None:
    """Adds the lower half of ``x^T x`` to float64 sums on the same device, products in float32.

    Args:
        total: [n, n] float64, in place; what is above the diagonal means nothing after it.
        x: keys [N, n], float16, bfloat16 or float32.

    Raises:
        ValueError: NaN or Inf in x, on the CPU, where looking waits for nobody; ``total`` is
            unchanged. On a GPU they end up in ``total``.
    """
    with without_autocast(x.device.type):
        if x.is_cuda:
            cuda.add_lower_(total, x)
        else:
            _check_finite(x, None)
            cpu.add_lower_(total, x)


def _fake(gram: Tensor, x: Tensor, mask: Tensor | None, backend: str) -> None:
    return None


_GRAM_UPDATE = register_op(
    _OP, "(Tensor(a!) gram, Tensor x, Tensor? mask, str backend) -> ()", _body, _fake
)


def gram_update_(
    gram: Tensor, x: Tensor, *, mask: Tensor | None = None, backend: str = "auto"
) -> None:
    """In place ``G <- G + x^T x`` over real tokens.

    Args:
        gram: G [n, n], symmetric (not checked; on CUDA the lower half counts), float32 or float64;
            the products are formed and summed in this dtype. A symmetric G stays symmetric to the
            last bit. With float64, products of 16- and 32-bit keys are exact and G keeps its
            positive semi-definiteness to float64 rounding; a float32 G of fewer than n tokens may
            get eigenvalues as low as ``-1e-7`` times the largest, so add float32 sums to a float64
            total for a prior.
        x: keys [..., n] with any leading shape, float16, bfloat16, float32 or float64.
        mask: bool [...], True for real tokens; None takes all. Values of other tokens are not used,
            NaN included.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"cuda"``.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; NaN or Inf in a real token, which
            is looked for on the CPU only (a GPU is not waited for). ``gram`` is unchanged.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    for name, value in (("gram", gram), ("x", x)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{_OP}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"{_OP}: gram must be [n, n] with n >= 1, got {list(gram.shape)}")
    if gram.dtype not in _GRAM_DTYPES:
        raise TypeError(f"{_OP}: gram must be float32 or float64, got {gram.dtype}")
    if x.dtype not in _X_DTYPES:
        raise TypeError(f"{_OP}: x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != gram.shape[0]:
        raise ValueError(f"{_OP}: x must be [..., n] with n = {gram.shape[0]}, got {list(x.shape)}")
    if x.device != gram.device:
        raise ValueError(
            f"{_OP}: x must be on {gram.device} like gram, got {x.device}; "
            "move it with x.to(gram.device)"
        )
    if gram.shape[0] > 1 and 0 in gram.stride():
        raise ValueError(
            f"{_OP}: gram must have no elements that share memory, got strides "
            f"{tuple(gram.stride())}; it is updated in place, so pass gram.clone()"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{_OP}: mask must be a bool tensor, got {got}; use mask.bool()")
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{_OP}: mask must be {list(x.shape[:-1])} like the tokens of x, "
                f"got {list(mask.shape)}"
            )
        if mask.device != x.device:
            raise ValueError(f"{_OP}: mask must be on {x.device} like x, got {mask.device}")
    _GRAM_UPDATE(gram, x, mask, backend)
