"""Rank-k Cholesky update and downdate on a GPU, in place, without an n x n temporary.

1. ``X = L^-1 K`` as a short chain of products, see ``blocked.py``, keeping what is left of K before
   each step.
2. The panels' small factorings from X alone, and every test that can fail, into a flag on the
   device: one kernel, a block for each panel.
3. ``L <- L G`` by independent blocks of rows and chunks of columns, each tile read once and written
   once: one kernel, which writes nothing where the flag is set.

All of this is enqueued before the host reads the flag, once, to raise. More than 64 keys at once,
or no extension, take torch's batched factorings and products for steps 2 and 3; the flag is then
read between them. While a CUDA graph is captured nothing is read: a replay that fails leaves the
factor as it is and makes the solution NaN.

Both dtypes are what they say, on every chip: a float64 residual ``K - C X`` costs ``2 n^2 k``
flops, as many as the two float64 triangular solves that it would correct, so refining a float32
solution is never cheaper than solving in float64.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from coachhook.errors import NotPositiveDefiniteError
from coachhook.ops._precision import float32_products
from coachhook.ops.cholesky import _panels, native
from coachhook.ops.cholesky._checks import (
    PIVOT_LIMIT,
    check_gap,
    check_solved,
    check_values,
    least_gap,
    not_positive_definite,
    overflow,
    shares_well,
)
from coachhook.ops.cholesky.blocked import BlockedFactor, block_rows

# Steps of the chain of products, and rows of a block at most: a step less saves two launches, and
# twice the rows cost twice the flops of the inverses.
_STEPS = 8
_MOST_ROWS = 1024


def cholesky_update_(factor: Tensor, keys: Tensor) -> None:
    """CUDA form of :func:`coachhook.ops.cholesky_update_`."""
    modify_("cholesky_update_", factor, keys, 1, _extension(factor, keys))


def cholesky_downdate_(factor: Tensor, keys: Tensor) -> None:
    """CUDA form of :func:`coachhook.ops.cholesky_downdate_`."""
    modify_("cholesky_downdate_", factor, keys, -1, _extension(factor, keys))


def cholesky_update_solve_(factor: Tensor, keys: Tensor) -> Tensor:
    """CUDA form of :func:`coachhook.ops.cholesky_update_solve_`.

    The solution shares X with the update, as on the CPU; where two solves with the new factor are
    more exact, these follow once the flags were read.
    """
    op = "cholesky_update_solve_"
    result = modify_(op, factor, keys, 1, _extension(factor, keys), solve=True)
    return torch.empty_like(keys) if result is None else result


def _extension(factor: Tensor, keys: Tensor) -> ModuleType | None:
    """The kernels, where they can take these sizes on this device."""
    return native.kernels(factor) if keys.shape[1] <= native.MAX_KEYS else None


def modify_(
    op: str,
    factor: Tensor,
    keys: Tensor,
    sign: int,
    extension: ModuleType | None,
    *,
    solve: bool = False,
) -> Tensor | None:
    """``L L^T <- L L^T + s K K^T``, and ``C'^-1 K`` [n, k] if asked for.

    Args:
        op: name for messages.
        factor: L [n, n].
        keys: K [n, k].
        sign: s, 1 or -1.
        extension: the module with the kernels; None runs torch's products instead, on any device.
        solve: whether to return the solution.
    """
    if not keys.numel():
        check_values(op, factor, keys)
        return None
    capturing = factor.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing and extension is None:
        raise NotImplementedError(
            f"{op}: keys must be at most {native.MAX_KEYS} columns while a CUDA graph is captured, "
            f"with the CUDA extension built; got {keys.shape[1]}"
        )
    with float32_products(tf32=False):
        blocked = BlockedFactor(factor, block_rows(len(factor), _STEPS, _MOST_ROWS), extension)
        form: _Form
        if extension is None:
            form = _Torch(factor, keys, sign)
        else:
            form = _Native(factor, keys, sign, extension)
        shared = solve and keys.shape[1] <= keys.shape[0]
        form.rotate(blocked, shared)
        result = blocked.solve_transposed(form.shared()) if shared else None
        if result is not None and result.shape != keys.shape:
            result = result[:, : keys.shape[1]]
        if extension is None:
            uneven = form.read(op)
            form.apply_()
        else:
            form.apply_()
            uneven = False if capturing else form.read(op)
        if shared and uneven:
            uneven = not form.shares_well()
        if solve and (uneven or not shared):
            updated = BlockedFactor(factor, blocked.rows, extension)
            result = updated.solve_transposed(updated.solve(keys))
        if capturing and result is not None:
            result = form.masked(result)
    return result


class _Form:
    """One update: its stages, and what it has computed so far.

    Attributes:
        solved: ``X = L^-1 K`` in its first n rows and k columns, zero elsewhere.
        status: int32 [2] on the device: failed, pivots of ``I + s X^T X`` not even.
    """

    solved: Tensor

    def __init__(self, factor: Tensor, keys: Tensor, sign: int) -> None:
        self.factor, self.keys, self.sign = factor, keys, sign
        self.status = torch.zeros(2, dtype=torch.int32, device=factor.device)
        self.margin = least_gap(keys) if sign < 0 else 0.0

    def rotate(self, blocked: BlockedFactor, solve: bool) -> None:
        """X, the panels of G, and the flags; with ``solve`` what :meth:`shared` needs."""
        raise NotImplementedError

    def shared(self) -> Tensor:
        """``X (I + X^T X)^-1`` [n, k], perhaps with columns of zeros after it."""
        raise NotImplementedError

    def apply_(self) -> None:
        """Overwrite the factor."""
        raise NotImplementedError

    def shares_well(self) -> bool:
        """Whether the shared solution is the better one all the same, after :meth:`apply_`."""
        wide = self.solved[:, : self.keys.shape[1]].double()
        total = wide.mT @ wide
        total.diagonal().add_(1)
        return bool(shares_well(torch.linalg.cholesky_ex(total).L, self.factor))

    def read(self, op: str) -> bool:
        """Wait for the flags; raise where the update failed, else say whether pivots are uneven."""
        failed, uneven = self.status.tolist()
        if failed:
            raise self._error(op)
        return bool(uneven)

    def masked(self, result: Tensor) -> Tensor:
        """The solution, NaN where the update failed."""
        return torch.where(self.status[0] != 0, torch.nan, result)

    def _error(self, op: str) -> NotPositiveDefiniteError:
        """The reason of a failure. The factor is unchanged, so all can be looked at again."""
        check_values(op, self.factor, self.keys)
        check_solved(op, self.solved)
        if self.sign < 0:
            check_gap(op, self.solved)
        squares = self.solved.mT @ self.solved
        return not_positive_definite(op) if bool(torch.isfinite(squares).all()) else overflow(op)


class _Native(_Form):
    """The kernels: keys padded to 32 or 64 columns, rows to whole panels."""

    def __init__(self, factor: Tensor, keys: Tensor, sign: int, extension: ModuleType) -> None:
        super().__init__(factor, keys, sign)
        self.extension = extension
        columns = native.padded_keys(keys.shape[1])
        self.inverse = keys.new_empty(columns, columns)

    def rotate(self, blocked: BlockedFactor, solve: bool) -> None:
        (n, k), columns = self.keys.shape, len(self.inverse)
        self.chunk = blocked.rows
        self.residuals = self.keys.new_empty(len(blocked), n, columns)
        right = self.residuals[0]
        if k < columns:
            right[:, k:] = 0
            right = right[:, :k]
        right.copy_(self.keys)
        self.solved = self.keys.new_empty(native.padded_rows(n), columns)
        if n < len(self.solved):
            self.solved[n:] = 0
        blocked.solve_keeping(self.residuals, self.solved)
        self.stacked = native.rotations(
            self.extension,
            self.factor,
            self.solved,
            k,
            self.sign,
            self.margin,
            PIVOT_LIMIT,
            self.status,
            self.inverse if solve else None,
        )

    def shared(self) -> Tensor:
        n = len(self.keys)
        solved = self.solved if n == len(self.solved) else self.solved[:n]
        return solved @ self.inverse

    def apply_(self) -> None:
        native.apply_(
            self.extension,
            self.factor,
            self.residuals,
            self.chunk,
            self.solved,
            self.stacked,
            self.status,
        )


class _Torch(_Form):
    """Any number of keys, through torch's batched factorings and products."""

    def rotate(self, blocked: BlockedFactor, solve: bool) -> None:
        self.solved = blocked.solve(self.keys)
        self.stacked, failed = _panels.rotations(self.solved, self.sign)
        # In float64 also for float32: the margin is of the order of the sum's own rounding there.
        wide = self.solved.double()
        total = self.sign * (wide.mT @ wide)
        total.diagonal().add_(1 - self.margin)
        self.root, info = torch.linalg.cholesky_ex(total)
        pivots = self.root.diagonal().square()
        diagonal = self.factor.diagonal()
        good = torch.isfinite(self.solved).all() & torch.isfinite(self.stacked).all()
        good &= ((diagonal > 0) & torch.isfinite(diagonal)).all()
        self.status[0] = failed | (info != 0) | ~good
        self.status[1] = ~(pivots.max() <= PIVOT_LIMIT * pivots.min())

    def shared(self) -> Tensor:
        root = self.root.to(self.solved.dtype)
        half = torch.linalg.solve_triangular(root.mT, self.solved, upper=True, left=False)
        return torch.linalg.solve_triangular(root, half, upper=False, left=False)

    def apply_(self) -> None:
        _panels.apply_(self.factor, self.keys, self.solved, self.stacked, len(self.factor))
