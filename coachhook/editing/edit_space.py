"""The keys of a layer beside a factored prior, and the small matrix G that couples them.

With the prior ``C = L L^T``, keys K and ``Y = C^-1 K``: ``G = I + K^T Y``, kept as its lower
Cholesky factor. Appending keys borders G and costs two triangular solves with L; deleting keys
deletes rows and columns of G. Everything is stored by key, one row for each.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from coachhook.editing.prior import FactoredPrior
from coachhook.editing.segments import Rows
from coachhook.errors import NotPositiveDefiniteError
from coachhook.ops import cholesky_update_

# The error of a solution is about eps cond(G); the pivots of G bound its condition from below.
PIVOT_LIMIT = {torch.float64: 1e6, torch.float32: 1e3}
_OUTWEIGHS = 1e6


# Rows of a diagonal block that torch solves with. A root is a part of a larger buffer, which torch
# copies for every solve: N^2 numbers, ten times the solve with few right sides.
_BLOCK = 512


def solve_lower(root: Tensor, right: Tensor) -> Tensor:
    """``root^-1 right`` for a lower triangular root [N, N] and right [N, r]."""
    rows = right.mT.clone(memory_format=torch.contiguous_format)
    for first in range(0, len(root), _BLOCK):
        part = slice(first, first + _BLOCK)
        block = rows[:, part].addmm_(rows[:, :first], root[part, :first].mT, alpha=-1)
        block.copy_(torch.linalg.solve_triangular(root[part, part], block.mT, upper=False).mT)
    return rows.mT


def solve_transposed(root: Tensor, right: Tensor) -> Tensor:
    """``root^-T right`` for a lower triangular root [N, N] and right [N, r]."""
    rows = right.mT.clone(memory_format=torch.contiguous_format)
    for first in reversed(range(0, len(root), _BLOCK)):
        part = slice(first, first + _BLOCK)
        block = rows[:, part]
        block.copy_(torch.linalg.solve_triangular(root[part, part].mT, block.mT, upper=True).mT)
        rows[:, :first].addmm_(block, root[part, :first], alpha=-1)
    return rows.mT


def solve_both(root: Tensor, right: Tensor) -> Tensor:
    """``(root root^T)^-1 right`` for a lower triangular root [N, N] and right [N, r]."""
    return solve_transposed(root, solve_lower(root, right))


@dataclass(eq=False)
class Buffers:
    """Storage with spare rows, shared by spaces that were appended to one another.

    Attributes:
        keys: [capacity, n]; spare rows hold anything, as in ``solved`` and ``targets``.
        solved: [capacity, n].
        targets: [capacity, m].
        root: [capacity, capacity].
        users: the living spaces.
        inverse: root^-1 [capacity, capacity] in its first ``inverted`` rows, which are zero right
            of the diagonal. None until it is asked for.
        inverted: these rows.
        harmless: whether the other rows of the inverse are finite.
        steps: what appends in fixed shapes keep for the next one, by their number of rows.
    """

    keys: Tensor
    solved: Tensor
    targets: Tensor
    root: Tensor
    users: weakref.WeakSet[EditSpace] = field(default_factory=weakref.WeakSet)
    inverse: Tensor | None = None
    inverted: int = 0
    harmless: bool = True
    steps: dict[int, Any] = field(default_factory=dict)

    def has_room(self, count: int, total: int) -> bool:
        """Whether rows count..total-1 exist and belong to no living space."""
        return total <= len(self.keys) and all(len(space) <= count for space in self.users)

    def grown(self, count: int, capacity: int) -> Buffers:
        """A copy of the first ``count`` rows with room for ``capacity``."""
        rows = []
        for old in (self.keys, self.solved, self.targets):
            new = old.new_empty(capacity, old.shape[1])
            new[:count] = old[:count]
            rows.append(new)
        root = self.root.new_zeros(capacity, capacity)
        root[:count, :count] = self.root[:count, :count]
        return Buffers(rows[0], rows[1], rows[2], root)

    def inverse_of(self, count: int) -> Tensor:
        """The inverse, right in its first ``count`` rows and finite in all, for finite roots.

        Rows that are missing border those that are there: ``c^-1 [-B R^-1, I]`` for rows
        ``[B, c]`` of the root below the part R.
        """
        if self.inverse is None:
            self.inverse = torch.zeros_like(self.root)
        if not self.harmless:
            self.inverse[self.inverted :] = 0
            self.harmless = True
        done = self.inverted
        if done < count:
            rows = self.inverse[done:count]
            rows.zero_()
            rows[:, done:count].fill_diagonal_(1)
            rows[:, :done] = -(self.root[done:count, :done] @ self.inverse[:done, :done])
            corner = self.root[done:count, done:count]
            rows.copy_(torch.linalg.solve_triangular(corner, rows, upper=False))
            self.inverted = count
        return self.inverse


@dataclass(frozen=True, eq=False)
class EditSpace:
    """Keys, targets and the factor of G. Never changes: every method returns a new space.

    Attributes:
        keys: K^T [N, n].
        solved: Y^T [N, n].
        targets: V^T [N, m].
        root: lower Cholesky factor of G [N, N]; NaN where G is indefinite to rounding.
        parts: what the rows came in, oldest first. A part that two spaces begin with after the same
            ones stands for the same rows in both.
    """

    keys: Tensor
    solved: Tensor
    targets: Tensor
    root: Tensor
    parts: tuple[Rows, ...]
    _buffers: Buffers
    _origin: weakref.ref[EditSpace] | None = None
    _pivots: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self._buffers.users.add(self)

    @classmethod
    def of(
        cls,
        keys: Tensor,
        solved: Tensor,
        targets: Tensor,
        root: Tensor,
        parts: Sequence[Rows] | None = None,
    ) -> EditSpace:
        """A space of these tensors, which are not copied before keys are added."""
        parts = [Rows(len(keys))] if parts is None else parts
        known = tuple(part for part in parts if part.count)
        return cls(keys, solved, targets, root, known, Buffers(keys, solved, targets, root))

    @classmethod
    def build(cls, prior: FactoredPrior, keys: Tensor, targets: Tensor) -> EditSpace:
        """Solves for all keys [N, n] at once."""
        half = prior.solve(keys.mT)
        solved = prior.solve_transposed(half).mT.contiguous()
        gram = half.mT @ half
        gram.diagonal().add_(1)
        return cls.of(keys, solved, targets, _factored(gram))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def conditioned(self) -> Tensor:
        """Whether solutions keep most of their digits: a bool on the device, not waited for."""
        pivots = self.root.diagonal().square()
        if not len(self):
            return torch.ones((), dtype=torch.bool, device=pivots.device)
        return pivots.max() <= PIVOT_LIMIT[self.root.dtype] * pivots.min()

    @property
    def is_well_conditioned(self) -> bool:
        """The value of :attr:`conditioned`."""
        return bool(self.conditioned)

    def pivots(self) -> tuple[float, float]:
        """Least and largest squared pivot of G, infinite and 0 without keys.

        Waits for a GPU where no append in fixed shapes has told them.
        """
        if self._pivots is None:
            pivots = (float("inf"), 0.0)
            if len(self):
                squares = self.root.diagonal().square()
                least, largest = torch.stack(torch.aminmax(squares)).tolist()
                pivots = least, largest
            self.know_pivots(*pivots)
        assert self._pivots is not None
        return self._pivots

    @property
    def outweighs_prior(self) -> bool:
        """Whether some key is so large, ``k^T C^-1 k > 1e6``, that it hides the prior's digits."""
        # Row sums of squares of the root are the diagonal of G. NaN counts.
        return bool(~(self.root.square().sum(1) <= _OUTWEIGHS).all())

    def check_foldable(self, keys: int) -> None:
        """Checks that a sum with the first ``keys`` keys leaves something of the prior.

        Raises:
            NotPositiveDefiniteError: one of them outweighs it by more than 1 / eps.
        """
        outweighs = float(torch.einsum("kn,kn->k", self.keys[:keys], self.solved[:keys]).max())
        most = 1 / torch.finfo(self.keys.dtype).eps
        if outweighs > most:
            raise NotPositiveDefiniteError(
                "fold: keys must not outweigh the prior by more than 1 / eps, got k^T C^-1 k = "
                f"{outweighs:.1e} of at most {most:.1e}: nothing would be left of the prior; scale "
                "them down, or leave out keys of which one nearly repeats another"
            )

    def append(
        self, prior: FactoredPrior, keys: Tensor, targets: Tensor
    ) -> tuple[EditSpace, Tensor]:
        """Adds keys [k, n] and targets [k, m]; O(n^2 k + n N k + N^2 k).

        Returns:
            The new space, and whether all its numbers are finite: a bool on the device, not waited
            for. A space without is to be thrown away.
        """
        old, total = len(self), len(self) + len(keys)
        solved, border, corner, finite = self._bordered(prior, keys)
        buffers = self._buffers
        if not buffers.has_room(old, total):
            buffers = buffers.grown(old, max(total, old * 3 // 2))
        buffers.keys[old:total] = keys
        buffers.solved[old:total] = solved
        buffers.targets[old:total] = targets
        buffers.root[old:total, :old] = border.mT
        buffers.root[old:total, old:total] = corner
        buffers.inverted = min(buffers.inverted, old)
        return self._followed_by(buffers, total), finite

    def _followed_by(self, buffers: Buffers, total: int) -> EditSpace:
        """The space of the first ``total`` rows of buffers whose first rows are this space's."""
        return EditSpace(
            buffers.keys[:total],
            buffers.solved[:total],
            buffers.targets[:total],
            buffers.root[:total, :total],
            (*self.parts, Rows(total - len(self))),
            buffers,
            weakref.ref(self),
        )

    def with_room(self, rows: int, least: int, multiple: int) -> Buffers:
        """Buffers of this space with ``rows`` rows after its own that belong to no living space.

        Where there are none the space moves into larger ones, bit for bit: appended to again after
        a snapshot was restored, it is to find the same buffers and what is kept with them.

        Args:
            rows: how many.
            least: rows of new buffers, at least.
            multiple: of which the rows of new buffers are a multiple.
        """
        old, buffers = len(self), self._buffers
        if buffers.has_room(old, old + rows):
            return buffers
        capacity = max(old + rows, old * 3 // 2, least)
        grown = buffers.grown(old, -(-capacity // multiple) * multiple)
        buffers.users.discard(self)
        for name in ("keys", "solved", "targets"):
            object.__setattr__(self, name, getattr(grown, name)[:old])
        object.__setattr__(self, "root", grown.root[:old, :old])
        object.__setattr__(self, "_buffers", grown)
        grown.users.add(self)
        return grown

    def extended(self, keys: int) -> EditSpace:
        """This space and the ``keys`` rows after it, which are written in its buffers."""
        return self._followed_by(self._buffers, len(self) + keys)

    def know_pivots(self, least: float, largest: float) -> None:
        """Takes the squared pivots that :meth:`pivots` would have to look for."""
        object.__setattr__(self, "_pivots", (least, largest))  # what follows from the rest

    def _bordered(
        self, prior: FactoredPrior, keys: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of further keys [k, n]: solved [k, n], the root's border [N, k] and corner, if finite."""
        half = prior.solve(keys.mT)
        solved = prior.solve_transposed(half).mT
        corner = half.mT @ half
        finite = torch.isfinite(corner).all()
        corner.diagonal().add_(1)
        # In this order: on a CPU a product with k columns in memory is half as fast.
        overlap = (keys @ self.solved.mT).mT
        border = solve_lower(self.root, overlap)
        return solved, border, _factored(corner - border.mT @ border), finite

    def coefficients_of(self, prior: FactoredPrior, keys: Tensor) -> Tensor:
        """Those of keys [k, n] as if they were appended; NaN where G is then indefinite."""
        solved, border, corner, _ = self._bordered(prior, keys)
        weights = solve_transposed(self.root, border)
        return solve_both(corner, solved - weights.mT @ self.solved)

    def delete(self, first: int, last: int, backend: str) -> EditSpace:
        """Without keys first..last-1.

        With their rows and columns p gone, the trailing factor becomes that of
        ``L_22 L_22^T + L_2p L_2p^T``: an update, which neither fails nor cancels.
        """
        tail = self.root[last:, last:].clone()
        if len(tail):
            cholesky_update_(tail, self.root[last:, first:last].contiguous(), backend=backend)
        rest = len(self) - (last - first)
        root = self.root.new_zeros(rest, rest)
        root[:first, :first] = self.root[:first, :first]
        root[first:, :first] = self.root[last:, :first]
        root[first:, first:] = tail
        kept = [torch.cat([x[:first], x[last:]]) for x in (self.keys, self.solved, self.targets)]
        ends = accumulate(part.count for part in self.parts)
        before = [part for part, end in zip(self.parts, ends, strict=True) if end <= first]
        others = Rows(rest - sum(part.count for part in before))
        return EditSpace.of(kept[0], kept[1], kept[2], root, [*before, others])

    def solve(self, right: Tensor) -> Tensor:
        """``G^-1 right`` for right [N, r]."""
        return solve_both(self.root, right)

    def follows(self, other: EditSpace) -> bool:
        """Whether this space is the other with keys appended, in one go."""
        return self._origin is not None and self._origin() is other

    def coefficients(self, known: tuple[EditSpace, Tensor] | None = None) -> Tensor:
        """``G^-1 Y^T`` [N, n]; O(N^2 k + N n k) from those before the last k keys were appended.

        With ``W = G_0^-1 B`` for the border B of the k new keys, their rows are
        ``a = S^-1 (Y_1^T - W^T Y_0^T)``, S the Schur complement, and the old rows lose ``W a``.

        Args:
            known: another space and its coefficients; of no use where this one does not extend it.
        """
        if known is not None and known[0] is self:
            return known[1]
        if known is None or not self.follows(known[0]):
            return self.solve(self.solved)
        old = len(known[0])
        border = self.root[old:, :old].mT
        weights = solve_transposed(self.root[:old, :old], border)
        rest = self.solved[old:] - weights.mT @ self.solved[:old]
        found = torch.empty_like(self.solved)
        found[old:] = solve_both(self.root[old:, old:], rest)
        torch.addmm(known[1], weights, found[old:], alpha=-1, out=found[:old])
        return found

    def cosines(self, first: int, last: int) -> Tensor:
        """Cosines of keys first..last-1 with keys 0..last-1 in the metric of C^-1."""
        squares = (self.keys[:last] * self.solved[:last]).sum(1)
        norms = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        return self.keys[first:last] @ self.solved[:last].mT / norms / norms[first:, None]


def _factored(matrix: Tensor) -> Tensor:
    root, info = torch.linalg.cholesky_ex(matrix)
    return root.masked_fill_(info != 0, torch.nan)


def relative_targets(base: Tensor | None, keys: Tensor, targets: Tensor) -> Tensor:
    """Targets [N, m] relative to the base."""
    return targets if base is None else torch.addmm(targets, keys, base.mT, alpha=-1)
