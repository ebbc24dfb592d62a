"""Cholesky update and downdate by factoring again: the truth the fast paths are tested against.

``C' = L L^T + s K K^T`` is formed in float64 and factored; O(n^3) time, three n x n temporaries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coachhook.errors import NotPositiveDefiniteError
from coachhook.ops.cholesky._checks import check_gap, check_values


def _refactor_(op: str, factor: Tensor, keys: Tensor, sign: int) -> Tensor:
    """Overwrite the lower triangle of ``factor``; returns the new factor in float64."""
    check_values(op, factor, keys)
    lower, wide = factor.tril().double(), keys.double()
    if sign < 0:
        check_gap(op, torch.linalg.solve_triangular(factor, keys, upper=False))
    updated, info = torch.linalg.cholesky_ex(lower @ lower.mT + sign * (wide @ wide.mT))
    if int(info):
        raise NotPositiveDefiniteError(
            f"{op}: the result must be positive definite, got a matrix whose leading minor "
            f"{int(info)} is not; the factor is unchanged"
        )
    factor.copy_(updated.tril().to(factor.dtype) + factor.triu(1))
    return updated


def cholesky_update_(factor: Tensor, keys: Tensor) -> None:
    """Reference of :func:`coachhook.ops.cholesky_update_`."""
    _refactor_("cholesky_update_", factor, keys, 1)


def cholesky_downdate_(factor: Tensor, keys: Tensor) -> None:
    """Reference of :func:`coachhook.ops.cholesky_downdate_`."""
    _refactor_("cholesky_downdate_", factor, keys, -1)


def cholesky_update_solve_(factor: Tensor, keys: Tensor) -> Tensor:
    """Reference of :func:`coachhook.ops.cholesky_update_solve_`."""
    updated = _refactor_("cholesky_update_solve_", factor, keys, 1)
    return torch.cholesky_solve(keys.double(), updated).to(factor.dtype)
