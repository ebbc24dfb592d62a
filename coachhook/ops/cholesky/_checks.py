"""Argument checks shared by the Cholesky ops and their implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from coachhook.errors import NotPositiveDefiniteError

_DTYPES = (torch.float32, torch.float64)
# Squared pivots of chol(I + X^T X) may differ by this much for the solve that shares X.
PIVOT_LIMIT = 100.0


def check_arguments(op: str, factor: Tensor, keys: Tensor) -> None:
    """Check what can be checked without looking at values."""
    for name, value in (("factor", factor), ("keys", keys)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if factor.dim() != 2 or factor.shape[0] != factor.shape[1] or factor.shape[0] == 0:
        raise ValueError(f"{op}: factor must be [n, n] with n >= 1, got {list(factor.shape)}")
    if factor.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: factor must be float32 or float64, got {factor.dtype}; "
            "convert it with factor.double()"
        )
    n = factor.shape[0]
    if keys.dim() != 2 or keys.shape[0] != n:
        hint = "; pass one key as keys[:, None]" if keys.dim() == 1 else ""
        raise ValueError(
            f"{op}: keys must be [n, k] with n = {n} rows, one key per column, "
            f"got {list(keys.shape)}{hint}"
        )
    if keys.dtype != factor.dtype:
        raise TypeError(
            f"{op}: keys must be {factor.dtype} like factor, got {keys.dtype}; "
            "convert them with keys.to(factor.dtype)"
        )
    if keys.device != factor.device:
        raise ValueError(
            f"{op}: keys must be on {factor.device} like factor, got {keys.device}; "
            "move them with keys.to(factor.device)"
        )
    if n > 1 and 0 in factor.stride():
        raise ValueError(
            f"{op}: factor must have no elements that share memory, got strides "
            f"{tuple(factor.stride())}; it is updated in place, so pass factor.clone()"
        )


def check_values(op: str, factor: Tensor, keys: Tensor) -> None:
    """Check keys and diagonal; reads data, so it belongs inside the op."""
    if not bool(torch.isfinite(keys).all()):
        count = int((~torch.isfinite(keys)).sum())
        raise ValueError(f"{op}: keys must be finite, got {count} NaN or Inf values")
    diagonal = factor.diagonal()
    if not bool(((diagonal > 0) & torch.isfinite(diagonal)).all()):
        raise NotPositiveDefiniteError(
            f"{op}: factor must be a Cholesky factor with positive, finite diagonal, got "
            f"a smallest diagonal value of {float(diagonal.min()):.3g}"
        )


def check_solved(op: str, solved: Tensor) -> None:
    """Check ``X = L^-1 K`` [n, k]."""
    if not bool(torch.isfinite(solved).all()):
        raise NotPositiveDefiniteError(
            f"{op}: factor must be a finite lower Cholesky factor whose square holds keys of this "
            "size, got an overflow or NaN in L^-1 K; the factor is unchanged"
        )


def not_positive_definite(op: str) -> NotPositiveDefiniteError:
    """The error of a result that is not positive definite."""
    return NotPositiveDefiniteError(
        f"{op}: the result must be positive definite, got a matrix that is not, to rounding: "
        "the keys outweigh the factored matrix by more than 1 / eps; the factor is unchanged"
    )


def overflow(op: str) -> NotPositiveDefiniteError:
    """The error of keys whose squares overflow."""
    return NotPositiveDefiniteError(
        f"{op}: keys must be of a size that L^-1 K can be squared, got an overflow; "
        "the factor is unchanged"
    )


def least_gap(solved: Tensor) -> float:
    """What :func:`check_gap` demands of ``lambda_min(I - X^T X)`` for X [n, k]."""
    return 8 * len(solved) * torch.finfo(solved.dtype).eps


def check_gap(op: str, solved: Tensor) -> None:
    """Refuse a downdate whose result is singular to rounding.

    With ``X = L^-1 K`` the downdated matrix is ``L (I - X X^T) L^T``. Its smallest eigenvalue
    relative to ``L L^T`` is the gap ``lambda_min(I - X^T X)``; below ``8 n eps`` it is rounding
    noise of ``X`` itself.

    Args:
        op: name for the message.
        solved: X, [n, k].
    """
    k = solved.shape[1]
    if k == 0:
        return
    wide = solved.double()
    inner = torch.eye(k, dtype=wide.dtype, device=wide.device) - wide.mT @ wide
    if not bool(torch.isfinite(inner).all()):
        raise overflow(op)
    gap = float(torch.linalg.eigvalsh(inner)[0])
    least = least_gap(solved)
    if not gap >= least:
        raise NotPositiveDefiniteError(
            f"{op}: keys must be part of the factored matrix, got lambda_min(I - X^T X) = "
            f"{gap:.3g} with X = L^-1 K, needed at least {least:.3g}; only keys that were added "
            "to this factor before can be taken out of it"
        )


def shares_well(root: Tensor, factor: Tensor) -> Tensor:
    """Whether the solve that shares X is more exact than two with the new factor; bool, 0-dim.

    The error of the one grows with the condition of ``I + X^T X``, that of the other with that of
    C'. The pivots of their factors bound both from below.

    Args:
        root: Cholesky factor of ``I + X^T X`` [k, k], of at most as many keys as rows: more always
            depend on each other, of which even pivots do not tell.
        factor: the new factor [n, n].
    """
    inner, outer = (x.diagonal().double().square() for x in (root, factor))
    most = (outer.max() / outer.min()).clamp(min=PIVOT_LIMIT)
    return inner.max() <= most * inner.min()
