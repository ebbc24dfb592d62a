"""The prior of an edit memory: key statistics made positive definite, and factored."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from coachhook.errors import NotPositiveDefiniteError
from coachhook.ops.cholesky import native
from coachhook.ops.cholesky.blocked import BlockedFactor, block_rows
from coachhook.ops.cholesky.triangular import solve_transposed

# A pivot this far below its diagonal entry, in eps, is rounding noise.
_PIVOT_NOISE = 32
_ROWS = 512
_FLOAT32_CONDITION = 1e5
# Relative errors of Delta from subtracted keys that a caller will want to know of.
_SPOILT = {torch.float64: 1e-10, torch.float32: 1e-3}
# On a GPU the inverses of a few diagonal blocks are kept, two launches for each block and solve: of
# two blocks up to n = 8,192, where larger ones are faster; beyond, of at most 2,048 rows, an eighth
# of the factor's memory at n = 16,384.
_SMALL = 8192
_STEPS, _SMALL_STEPS = 4, 2
_MOST_ROWS, _SMALL_MOST_ROWS = 2048, 4096


class FactoredPrior:
    """A lower Cholesky factor L [n, n], and what its device needs to solve with it again and again.

    Args:
        factor: L. Not copied: to write to it, :meth:`take` it, and make another one afterwards.
    """

    def __init__(self, factor: Tensor) -> None:
        self._factor: Tensor | None = factor
        self._blocked: BlockedFactor | None = None

    @property
    def factor(self) -> Tensor:
        """L.

        Raises:
            RuntimeError: it was taken.
        """
        if self._factor is None:
            raise RuntimeError(
                "EditMemory: prior must be whole, got one that an error or an interrupt met while "
                "keys were folded into it; delta() is as before, for all else restore a snapshot "
                "or load what was saved"
            )
        return self._factor

    def take(self) -> Tensor:
        """L, to be written to; this object is of no use from then on."""
        factor, self._factor = self.factor, None
        return factor

    @property
    def in_blocks(self) -> bool:
        """Whether solves are chains of products: on a GPU."""
        return self.factor.is_cuda

    def solve(self, right: Tensor) -> Tensor:
        """``L^-1 right`` for right [n, k]."""
        if not self.in_blocks:
            return torch.linalg.solve_triangular(self.factor, right, upper=False)
        return self._blocks().solve(right)

    def solve_transposed(self, right: Tensor) -> Tensor:
        """``L^-T right`` for right [n, k]."""
        if not self.in_blocks:
            return solve_transposed(self.factor, right)
        return self._blocks().solve_transposed(right)

    def solve_both(self, right: Tensor) -> Tensor:
        """``(L L^T)^-1 right`` for right [n, k]."""
        return self.solve_transposed(self.solve(right))

    def share_left(self, keys: Tensor) -> float:
        """What subtracting keys K [n, k] leaves of L L^T where it takes most, from 0 to 1.

        The smallest eigenvalue of ``I - K^T (L L^T)^-1 K``. Rounding in L counts for about eps
        divided by it in what is left.
        """
        solved = self.solve(keys)
        gap = torch.eye(solved.shape[1], dtype=solved.dtype, device=solved.device)
        gap -= solved.mT @ solved
        return float(torch.linalg.eigvalsh(gap)[0])

    def _blocks(self) -> BlockedFactor:
        if self._blocked is None:
            rows = kept_rows(len(self.factor))
            self._blocked = BlockedFactor(self.factor, rows, native.kernels(self.factor))
        return self._blocked


def kept_rows(n: int) -> int:
    """Rows of the diagonal blocks of a factor [n, n] whose inverses are kept."""
    if n <= _SMALL:
        return block_rows(n, _SMALL_STEPS, _SMALL_MOST_ROWS)
    return block_rows(n, _STEPS, _MOST_ROWS)


def regularized_prior(covariance: Tensor, weight: float, ridge: float) -> Tensor:
    """Prior of an :class:`EditMemory` from key statistics, positive definite for any ``ridge > 0``.

    ``C0 = weight (Cov + ridge mean(diag Cov) I)``. The ridge is needed where fewer tokens than n
    were seen, or where some key features are always zero: there Cov alone is singular, and edits
    would be free to write into the unseen directions.

    Args:
        covariance: Cov [n, n], mean of k k^T, any floating dtype.
        weight: lambda, positive.
        ridge: relative to the mean of the diagonal, at least 0.

    Returns:
        C0 [n, n], float64, a new tensor.

    Raises:
        ValueError: wrong shape, or a number out of range.
    """
    _check_square("regularized_prior", "covariance", covariance)
    if not 0 < weight < float("inf"):
        raise ValueError(f"regularized_prior: weight must be positive and finite, got {weight}")
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"regularized_prior: ridge must be at least 0 and finite, got {ridge}")
    prior = covariance.detach().to(torch.float64) * weight
    prior.diagonal().add_(ridge * prior.diagonal().mean())
    return prior


def _check_square(op: str, name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dim() != 2 or value.shape[0] != value.shape[1] or value.shape[0] == 0:
        raise ValueError(f"{op}: {name} must be [n, n] with n >= 1, got {list(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}")
    # In parts: torch.isfinite makes temporaries of the size of its argument.
    if not all(bool(torch.isfinite(rows).all()) for rows in value.split(_ROWS)):
        raise ValueError(f"{op}: {name} must be finite, got NaN or Inf")


def check_finite(op: str, name: str, rows: Tensor) -> None:
    """Refuses NaN and Inf in the columns of a matrix, given by row."""
    if not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows).all(1)).sum())
        raise ValueError(
            f"{op}: {name} must be finite, got NaN or Inf in {bad} of {len(rows)} columns"
        )


def check_columns(op: str, name: str, value: Tensor, length: int, like: Tensor) -> None:
    """Refuses all but a floating-point matrix [length, k] on the device of a factor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}")
    if value.dim() != 2 or value.shape[0] != length:
        raise ValueError(
            f"{op}: {name} must be [{length}, k], one column for each key, got {list(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on {like.device} like the prior, got {value.device}; "
            f"move them with {name}.to(memory.device)"
        )


def by_row(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The columns of a matrix as the rows of a contiguous one."""
    return value.detach().mT.to(dtype).contiguous()


def columns_by_row(op: str, name: str, value: Tensor, length: int, *, like: Tensor) -> Tensor:
    """The columns of a checked, finite matrix [length, k] as rows, in the dtype of a factor.

    Waits for a GPU.
    """
    check_columns(op, name, value, length, like)
    rows = by_row(value, like.dtype)
    check_finite(op, name, rows)
    return rows


def _check_prior(prior: Tensor) -> None:
    _check_square("EditMemory", "prior", prior)
    # Sums in another order differ in the last bits; a matrix that is not symmetric is a mistake.
    allowed = 1e-4 * float(prior.diagonal().abs().max())
    for first in range(0, len(prior), _ROWS):
        last = min(first + _ROWS, len(prior))
        difference = prior[first:last, :last] - prior[:last, first:last].mT
        largest = float(difference.abs().max())
        if largest > allowed:
            raise ValueError(
                f"EditMemory: prior must be symmetric, got entries that differ by {largest:.3g} "
                "from their mirror image; pass (prior + prior.T) / 2"
            )


def factor_prior(prior: Tensor, dtype: torch.dtype) -> Tensor:
    """Lower Cholesky factor of a prior [n, n], in ``dtype``.

    Raises:
        TypeError, ValueError: not a finite, symmetric, square floating-point matrix.
        NotPositiveDefiniteError: not positive definite, to rounding.
    """
    _check_prior(prior)
    # In float64 also for a float32 memory: factored in float32, a condition of 1e7 fails already.
    wide = prior.detach().to(torch.float64)
    factor, info = torch.linalg.cholesky_ex(wide)
    pivots = factor.diagonal().square()
    noise = _PIVOT_NOISE * torch.finfo(torch.float64).eps * wide.diagonal()
    if int(info) or bool((pivots <= noise).any()):
        raise NotPositiveDefiniteError(
            f"EditMemory: prior must be positive definite, got a {list(prior.shape)} matrix that "
            f"is singular or indefinite to rounding; collect statistics of more than {len(prior)} "
            "tokens, or shrunk ones of less text (minimal=True, --minimal), or raise the ridge "
            "(EditConfig.ridge, --ridge; regularized_prior for a matrix of your own)"
        )
    condition = float(pivots.max() / pivots.min())
    if dtype == torch.float32 and condition > _FLOAT32_CONDITION:
        warnings.warn(
            f"EditMemory: the prior has a condition of at least {condition:.0e}, so float32 leaves "
            f"an error of about {2e-7 * condition**0.5:.0e} in Delta; use dtype=torch.float64",
            stacklevel=3,
        )
    return factor.to(dtype)


def warn_of_error(spoilt: float, dtype: torch.dtype) -> None:
    """Says that folded keys taken back have cost Delta a relative error of about ``spoilt``."""
    if spoilt > _SPOILT[dtype]:
        warnings.warn(
            "remove: folded keys that outweigh the rest of the prior were taken back, which leaves "
            f"a relative error of the order of {spoilt:.0e} in Delta; where that is too much, "
            "begin again without them, or set a larger max_keys so that batches are not folded",
            stacklevel=4,
        )
