"""``L^-T right`` with few right sides on a CPU.

With one thread the library's solve runs at the speed of its products, and with any number of them
that of ``L^-1 right`` does. With two threads its solve with the transpose of a matrix by rows falls
behind (n = 6400, 32 right sides, MKL, Zen 4: 35 ms against 24). There L is halved again and again,

    [[A, 0], [B, C]]^T [x; y] = [r; s]:   C^T y = s,   A^T x = r - B^T y,

so that all but the blocks on the diagonal is products, which the library splits well: 26 ms. The
right side is kept as its transpose [k, n] by rows: products of k rows with n columns in memory run
at two to four times the speed of n rows with k columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a diagonal block that the library solves.
_BASE = 256
# Below, halving gains nothing.
_LEAST_ROWS = 2048


def solve_transposed(factor: Tensor, right: Tensor) -> Tensor:
    """``L^-T right`` for a lower triangular L [n, n] and right [n, k].

    The strict upper triangle of L is not read.
    """
    if len(factor) <= _LEAST_ROWS or torch.get_num_threads() == 1:
        return torch.linalg.solve_triangular(factor.mT, right, upper=True)
    rows = right.mT.clone(memory_format=torch.contiguous_format)
    _halved_(factor, rows)
    return rows.mT


def _halved_(factor: Tensor, rows: Tensor) -> None:
    n = len(factor)
    if n <= _BASE:
        rows.copy_(torch.linalg.solve_triangular(factor.mT, rows.mT, upper=True).mT)
        return
    half = -(-n // 128) * 64
    upper, lower = rows[:, :half], rows[:, half:]
    _halved_(factor[half:, half:], lower)
    upper.addmm_(lower, factor[half:, :half], alpha=-1)
    _halved_(factor[:half, :half], upper)
