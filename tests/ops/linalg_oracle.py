"""Least-squares problems of a prescribed condition, and their solution beyond float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

F64 = torch.float64


def spd(n: int, condition: float = 10.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 C [n, n] with eigenvalues from 1 down to 1/condition, and H with C = H H^T."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))
    root = q * torch.logspace(0, -math.log10(condition), n, dtype=F64).sqrt()
    matrix = root @ root.mT
    return (matrix + matrix.mT) / 2, root


def batches(
    root: Tensor, count: int, k: int, m: int, *, isotropic: bool = False, seed: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Batches of keys [n, k] and targets [m, k]; keys drawn from C = root root^T or isotropic."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        keys = 0.3 * torch.randn(len(root), k, generator=generator, dtype=F64)
        if not isotropic:
            keys = root @ keys
        made.append((keys, torch.randn(m, k, generator=generator, dtype=F64)))
    return made


def outweighing(factor: Tensor, k: int, size: float, seed: int = 2) -> Tensor:
    """Keys [n, k] for n >= 64 and k <= 64, ``size`` times as large as C = factor factor^T.

    Of ``X = factor^-1 K`` the first 64 rows have orthogonal columns, and with k >= 32 the first 32
    rows are orthogonal: nothing but the size of the keys makes a sum over rows ill conditioned.
    """
    generator = torch.Generator().manual_seed(seed)

    def orthogonal(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64))[0]

    solved = torch.randn(len(factor), k, generator=generator, dtype=F64)
    solved[:64] = 8 * torch.block_diag(orthogonal(32), orthogonal(32))[:, :k] @ orthogonal(k)
    return size * factor.to(F64) @ solved


def joint(prior: Tensor, made: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Delta of all batches at once by a float64 LU solve, the published way."""
    keys, targets = (torch.cat(x, 1) for x in zip(*made, strict=True))
    return torch.linalg.solve(prior + keys @ keys.mT, keys @ targets.mT).mT


def exact(prior: Tensor, made: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The same with an 80-bit matrix and iterative refinement, rounded to float64 at the end."""
    keys, targets = (torch.cat(x, 1).numpy().astype(np.longdouble) for x in zip(*made, strict=True))
    matrix = prior.numpy().astype(np.longdouble) + keys @ keys.T
    right = keys @ targets.T
    factor = torch.linalg.cholesky(torch.from_numpy(matrix.astype(np.float64)))
    solution = np.zeros_like(right)
    for _ in range(12):
        residual = torch.from_numpy((right - matrix @ solution).astype(np.float64))
        solution = solution + torch.cholesky_solve(residual, factor).numpy()
    return torch.from_numpy(solution.astype(np.float64)).mT


def relative(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference relative to that of the expected value."""
    return float((actual.to(F64) - expected).norm() / expected.norm())
