"""Triangular solves with few right sides as a short chain of products, for GPUs.

A library's triangular solve walks down the diagonal in steps of 32 or 64 rows, each waiting for
the one before. With the inverses ``D_j`` of diagonal blocks of ``b`` rows at hand, a step is two
products, ``X_j = D_j r_j`` and ``r_i <- r_i - L_ij X_j`` for all rows below, and there are
``n / b`` of them. The inverses come from those of 64 rows by doubling,

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]],

in batched products (methods of this kind: Du Croz and Higham 1992). The error of X is bounded as
that of substitution; the residual ``L X - K`` may be larger by the condition of a diagonal block.
Measured at n = 1024 with one block of all 1,024 rows, conditions of ``L L^T`` from 1e4 to 1e12:
residuals of 1e-16 to 3e-16 against 3e-17 relative to ``|L| |X|``, and up to twice the error of X.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from coachhook.ops.cholesky import native

# Rows of the blocks that one call of the library inverts.
_BASE = 64
# Bytes of the widest access of a kernel.
_ALIGNMENT = 16


def block_rows(n: int, steps: int, most: int) -> int:
    """Rows of a block for about ``steps`` steps: a power of two from 64 to ``most``."""
    rows = _BASE
    while rows * steps < n and rows < most:
        rows *= 2
    return rows


class BlockedFactor:
    """A lower triangular L [n, n] with the inverses of its diagonal blocks.

    Args:
        factor: L; the strict upper triangle is not read. Not copied: after it is written to, the
            inverses are stale.
        rows: of a block, a multiple of 64 by a power of two.
        extension: the module whose kernels invert the blocks and solve with 32 or 64 right sides;
            without it torch does. Such solves must follow one another.

    Nothing is read back to the host. The inverses take ``n rows`` numbers, ``n rows^2`` flops to
    make, and two launches for each doubling. What lies below and to the right of row n in the last
    of them is never looked at.
    """

    def __init__(self, factor: Tensor, rows: int, extension: ModuleType | None = None) -> None:
        self.rows = rows
        self._factor = factor
        self.inverses, self._arrivals = _inverses(factor, rows, extension)
        self._extension = extension
        lefts = range(0, len(factor), rows)
        self._spans = [(left, min(left + rows, len(factor))) for left in lefts]

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._spans)

    def solve(self, right: Tensor) -> Tensor:
        """``L^-1 right`` for right [n, k]."""
        solved = right.new_empty(right.shape)
        if self._takes(right):
            self._solve(_whole(right), torch.empty_like(solved), solved)
            return solved
        residual = right.clone(memory_format=torch.contiguous_format)
        parts = solved.split(self.rows)
        for j, (first, last) in enumerate(self._spans):
            torch.mm(self._diagonal(j), residual[first:last], out=parts[j])
            if last < len(right):
                residual[last:].addmm_(self._below(j), parts[j], alpha=-1)
        return solved

    def solve_keeping(self, residuals: Tensor, solved: Tensor) -> None:
        """``L^-1 right`` and what was left of ``right`` before each step.

        Args:
            residuals: [blocks, n, k], contiguous; the first holds ``right``. Receives in
                ``residuals[j, first:]``, where block j begins at row ``first``, the rows of
                ``right - L[:, :first] X[:first]``.
            solved: [>= n, k], contiguous, receives X in its first n rows.
        """
        if self._takes(solved):
            self._solve(residuals[0], residuals, solved, keep=True)
            return
        _, n, k = residuals.shape
        parts = solved[:n].split(self.rows)
        for j, (first, last) in enumerate(self._spans):
            mine = residuals.as_strided((last - first, k), (k, 1), (j * n + first) * k)
            torch.mm(self._diagonal(j), mine, out=parts[j])
            if last < n:
                below = residuals.as_strided((n - last, k), (k, 1), (j * n + last) * k)
                after = residuals.as_strided((n - last, k), (k, 1), (j * n + n + last) * k)
                torch.addmm(below, self._below(j), parts[j], alpha=-1, out=after)

    def solve_transposed(self, right: Tensor) -> Tensor:
        """``L^-T right`` for right [n, k]."""
        solved = right.new_empty(right.shape)
        if self._takes(right):
            self._solve(_whole(right), torch.empty_like(solved), solved, transposed=True)
            return solved
        residual = right.clone(memory_format=torch.contiguous_format)
        own, parts = residual.split(self.rows), solved.split(self.rows)
        for j in reversed(range(len(self._spans))):
            first, last = self._spans[j]
            torch.mm(self._diagonal(j).mT, own[j], out=parts[j])
            if first:
                left = self._piece((last - first, first), first, 0)
                residual[:first].addmm_(left.mT, parts[j], alpha=-1)
        return solved

    def _takes(self, right: Tensor) -> bool:
        """Whether the kernels solve with so many columns."""
        return self._extension is not None and right.shape[1] in native.COLUMNS

    def _solve(
        self,
        right: Tensor,
        residuals: Tensor,
        solved: Tensor,
        *,
        transposed: bool = False,
        keep: bool = False,
    ) -> None:
        """See :func:`native.solve`."""
        assert self._extension is not None and self._arrivals is not None
        native.solve(
            self._extension,
            self._factor,
            self.inverses,
            self._arrivals,
            right,
            residuals,
            solved,
            transposed=transposed,
            keep=keep,
        )

    def _diagonal(self, j: int) -> Tensor:
        first, last = self._spans[j]
        size, (apart, down, across) = last - first, self.inverses.stride()
        return self.inverses.as_strided((size, size), (down, across), j * apart)

    def _below(self, j: int) -> Tensor:
        first, last = self._spans[j]
        return self._piece((len(self._factor) - last, last - first), last, first)

    def _piece(self, shape: tuple[int, int], row: int, column: int) -> Tensor:
        """A part of L by one call, which counts where a call costs more than a product."""
        down, across = self._factor.stride()
        offset = self._factor.storage_offset() + row * down + column * across
        return self._factor.as_strided(shape, (down, across), offset)


def _whole(right: Tensor) -> Tensor:
    """The right sides as the kernels read them: contiguous, and on 16 bytes."""
    rows = right.contiguous()
    # A part of other storage may begin anywhere.
    return rows if rows.data_ptr() % _ALIGNMENT == 0 else rows.clone()


def _inverses(
    factor: Tensor, rows: int, extension: ModuleType | None
) -> tuple[Tensor, Tensor | None]:
    """Inverses of the diagonal blocks [blocks, rows, rows], and what the kernels solve with.

    Between two blocks there is a gap of ``rows`` numbers: with it, all the pairs that a doubling
    takes lie at one distance from each other, also across blocks, as those of L do.
    """
    n, (down, across) = len(factor), factor.stride()
    blocks, step = -(-n // rows), rows + 1
    shape, strides = (blocks, rows, rows), (rows * step, rows, 1)
    if extension is not None:
        inverses = factor.new_empty(blocks * rows * step).as_strided(shape, strides)
        return inverses, native.invert_diagonal(extension, factor, inverses)
    inverses = factor.new_zeros(blocks * rows * step).as_strided(shape, strides)
    _invert_diagonal(factor, inverses)

    def pairs(size: int, count: int, lower: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the last ``count`` from row ``top`` on: B in L, then A^-1, C^-1, the place of B."""
        apart, start = 2 * size, factor.storage_offset()
        top = 0 if lower == size else n // apart * apart
        of_factor = (apart * (down + across), down, across)
        begin = start + top * (down + across) + size * down
        mine, first = (apart * step, rows, 1), top * step
        return (
            factor.as_strided((count, lower, size), of_factor, begin),
            inverses.as_strided((count, size, size), mine, first),
            inverses.as_strided((count, lower, lower), mine, first + size * step),
            inverses.as_strided((count, lower, size), mine, first + size * rows),
        )

    size = _BASE
    while size < rows:
        count, rest = divmod(n, 2 * size)
        # Whole pairs at once, then one whose lower block ends early.
        for many, lower in ((count, size), (1, rest - size)):
            if many > 0 and lower > 0:
                between, upper, under, below = pairs(size, many, lower)
                below.baddbmm_(under, torch.bmm(between, upper), beta=0, alpha=-1)
        size *= 2
    return inverses, None


def _invert_diagonal(factor: Tensor, inverses: Tensor) -> None:
    """Inverses of the diagonal blocks of 64 rows, in their places among zeros."""
    n, (down, across), rows = len(factor), factor.stride(), inverses.shape[1]
    unit = torch.eye(_BASE, dtype=factor.dtype, device=factor.device)
    whole, rest = divmod(n, _BASE)
    for count, size, top in ((whole, _BASE, 0), (1, rest, whole * _BASE)):
        if count and size:
            shape, begin = (count, size, size), top * (down + across) + factor.storage_offset()
            tips = factor.as_strided(shape, (_BASE * (down + across), down, across), begin).tril()
            places = inverses.as_strided(shape, (_BASE * (rows + 1), rows, 1), top * (rows + 1))
            places.copy_(torch.linalg.solve_triangular(tips, unit[:size, :size], upper=False))
