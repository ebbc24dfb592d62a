"""Second moments of few tokens, shrunk towards uncorrelated features as far as the text asks for.

Let C be the centred second moment of the keys over N tokens, D its diagonal, m the mean key. The
off-diagonal part of C is what few tokens get wrong: ``C*(rho) = (1 - rho) C + rho D``, and the
moment is ``S* = m m^T + C*``. The mean and the diagonal are left as they are. With ``E C`` the
centred moment of all text, and entries in units of ``sqrt(D_i D_j)``, the expected squared error
over the off-diagonal entries,

    sum (1 - rho)^2 Var C_ij + rho^2 (E C_ij)^2,   is least at   rho = sum Var C_ij / sum E C_ij^2

(Ledoit and Wolf 2004, J. Multivariate Analysis 88; for this target Schaefer and Strimmer 2005,
Stat. Appl. Genet. Mol. Biol. 4, where the units make the weight the same for a feature of any
scale). Their estimates of Var C_ij take the samples as independent. Tokens of one text are not, and
texts are: so the texts are drawn into two halves at random, and with moments C1, C2 over N1, N2
tokens, ``Var C = v / N`` gives ``E (C1 - C2)^2 = v (1 / N1 + 1 / N2)``, so that

    rho = min(1, (N1 N2 / N^2) sum_{i != j} (C1 - C2)_ij^2 / (D_i D_j)
                 / sum_{i != j} C_ij^2 / (D_i D_j)).

The target is the diagonal, and not a multiple of the identity, because features of a key are the
outputs of single neurons: the axes mean something, and a few of them may be larger than all others
by orders of magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 512
# Below this share of the second moment a variance is the rounding of float32 products.
_NO_VARIANCE = 1e-6


def shrink_(moment: Tensor, first_half: Tensor, means: Tensor, first: int, second: int) -> float:
    """Shrink a second moment in place and return rho; needs a few rows of working memory.

    Args:
        moment: S [n, n], float64, the mean of k k^T over all tokens; only the lower triangle is
            read and written.
        first_half: S1 [n, n], float64, the mean of k k^T over the first half of the texts; only the
            lower triangle is read.
        means: [2, n], float64, the mean key of each half.
        first: tokens of the first half, positive.
        second: tokens of the second half, positive.
    """
    share = first / (first + second)
    mean = share * means[0] + (1 - share) * means[1]
    variance = moment.diagonal() - mean.square()
    scale = torch.where(variance > _NO_VARIANCE * moment.diagonal(), variance, torch.inf).rsqrt()
    noise = signal = 0.0
    for rows in _row_blocks(len(moment)):
        columns = slice(0, rows.stop)
        centred = _off_diagonal(moment[rows, columns], mean[rows], mean[columns])
        of_first = _off_diagonal(first_half[rows, columns], means[0, rows], means[0, columns])
        # S2 = (S - share S1) / (1 - share): the second half is never stored.
        rest = (moment[rows, columns] - share * first_half[rows, columns]) / (1 - share)
        of_second = _off_diagonal(rest, means[1, rows], means[1, columns])
        weight = scale[rows, None] * scale[columns]
        signal += float((centred * weight).square().sum())
        noise += float(((of_first - of_second) * weight).square().sum())
    noise *= share * (1 - share)
    rho = min(1.0, noise / signal) if signal else 0.0
    for rows in _row_blocks(len(moment)):
        columns = slice(0, rows.stop)
        block = moment[rows, columns]
        block -= rho * _off_diagonal(block, mean[rows], mean[columns])
    return rho


def _row_blocks(n: int) -> list[slice]:
    return [slice(first, min(first + _ROWS, n)) for first in range(0, n, _ROWS)]


def _off_diagonal(block: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``block - left right^T`` for rows of the lower triangle, strictly below the diagonal."""
    return torch.addr(block, left, right, alpha=-1).tril_(right.shape[0] - left.shape[0] - 1)
