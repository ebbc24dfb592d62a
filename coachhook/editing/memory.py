"""The edits of one layer as linear algebra: recursive least squares with a frozen prior.

Let C0 be the prior (lambda times the key covariance), K the keys of all edits so far and V their
targets relative to the frozen layer, ``V = v - W0 K``. The edit is the minimiser of

    ||D K - V||^2 + tr(D C0 D^T),  that is  Delta = V K^T (C0 + K K^T)^-1.

With ``Y = C0^-1 K`` and ``G = I + K^T Y`` (Woodbury) this is ``Delta = V G^-1 Y^T``: work of order
n^2 only for the new columns of Y, and any batch can be deleted from G.

*Folding.* Split the keys in old and new. The objective with the old keys alone is, up to a
constant, ``tr((D - B) C1 (D - B)^T)`` with ``C1 = C0 + K_old K_old^T`` and B the Delta of the old
keys. So old keys can move into a new prior C1 and a dense base B, and what is left is the same
problem for ``D - B`` with targets ``V - B K``:

    Delta = B + (V - B K) G^-1 Y^T,   Y = C1^-1 K,   G = I + K^T Y.

The base grows by the same formula, ``B <- B + (V_old - B K_old) (C1^-1 K_old)^T``, and loses a
batch by ``B <- B - (V_b - B K_b) (C2^-1 K_b)^T`` with ``C2 = C1 - K_b K_b^T`` (multiply both sides
by C2 to verify). Delta is the same before and after a fold, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coachhook.editing.captured import appended
from coachhook.editing.edit_space import EditSpace, relative_targets
from coachhook.editing.folded import Folded, check_state, folded_pieces, folded_tensors, rows_of
from coachhook.editing.prior import (
    FactoredPrior,
    check_columns,
    columns_by_row,
    factor_prior,
    regularized_prior,
    warn_of_error,
)
from coachhook.editing.segments import Rows
from coachhook.ops import _backends, cholesky_downdate_, cholesky_update_solve_
from coachhook.ops._precision import float32_products

__all__ = ["EditMemory", "MemorySnapshot", "regularized_prior"]

# Beyond n / 4 keys the factor is cheaper than the edit space; this many are cheap at any n.
_LEAST_MAX_KEYS = 64
# Keys per pass over the factor while folding: more are faster for each key, on a GPU as many as its
# kernels take; where keys outweigh the prior, few at a time keep two to four digits more.
_FOLD_COLUMNS = {"cpu": 128, "cuda": 64}
_CAREFUL_FOLD_COLUMNS = 8


@dataclass(frozen=True, eq=False)
class MemorySnapshot:
    """A state that :meth:`EditMemory.restore` goes back to; holds references, not copies."""

    memory: EditMemory
    state: dict[str, Any]


class EditMemory:
    """All edits of one layer; see the module's docstring for the algebra.

    Args:
        prior: C0 [n, n], symmetric positive definite, any floating dtype; not changed. Its Cholesky
            factor is kept, C0 itself is not. See :func:`regularized_prior`.
        out_features: m.
        dtype: float64; or float32, without refinement, which would need C0 in float64. After a
            thousand batches Delta then has errors of 2e-5, 2e-4 and 2e-3 at conditions of 1e4, 1e6
            and 1e8 of the prior; a warning is given beyond 1e5.
        max_keys: keys kept beside the prior. When an append goes beyond, the oldest are folded
            until half as many are left. None: the larger of n // 4 and 64. 0 folds every batch at
            once.
        keep_folded: keep keys and targets of folded batches on the CPU, n + m numbers for each key,
            so that they can still be taken back.
        keep_prior: keep the factor of C0 when keys are folded, n^2 numbers more, so that
            :meth:`prior_solve` and :meth:`prior` go on speaking of C0.
        backend: of the Cholesky ops.

    Whatever ``max_keys``, all keys are folded once they determine directions that the prior leaves
    almost free (squared pivots of G more than 1e6 apart; 1e3 in float32): beside the prior Delta
    would keep the error of the prior's condition number, which a joint solve no longer has. A fold
    that is cut off (Ctrl-C, no memory) without a snapshot leaves Delta alone of use.

    An append costs two triangular solves, O(n^2 k), and O(n N k + N^2 k) for N keys. On a GPU the
    solves are chains of products with the inverses of diagonal blocks of the factor, an eighth of
    its memory at n = 16,384 and up to half of it below 8,193; from the third append of about as
    many keys on all of it is one CUDA graph, until the room for keys has to grow; and an append
    that folds nothing waits for the GPU once, after a removal twice.

    Raises:
        TypeError, ValueError: an argument does not fit.
        NotPositiveDefiniteError: the prior is not positive definite, to rounding.
        BackendUnavailableError: the backend cannot run here.
    """

    _prior: FactoredPrior  # of L [n, n]; prior = L L^T
    _base: Tensor | None  # B [m, n]; None where nothing is folded
    _space: EditSpace
    _live: tuple[tuple[int, int], ...]  # (batch, keys) beside the prior, oldest first
    _folded: tuple[Folded, ...]
    _next: int
    _spoilt: float  # relative error of Delta from folded keys that were taken back, about
    max_keys: int
    keep_folded: bool
    _initial: FactoredPrior | None  # of C0, where keys are folded and it is kept
    # A space and the coefficients of all keys, so that those after an append follow from them.
    _known: tuple[EditSpace, Tensor] | None = None

    _STATE = (
        *("_prior", "_base", "_space", "_live", "_folded", "_next", "_known"),
        *("_initial", "_spoilt", "max_keys", "keep_folded", "keep_prior"),
    )

    @torch.inference_mode(False)
    def __init__(
        self,
        prior: Tensor,
        out_features: int,
        *,
        dtype: torch.dtype = torch.float64,
        max_keys: int | None = None,
        keep_folded: bool = True,
        keep_prior: bool = False,
        backend: str = "auto",
    ) -> None:
        if dtype not in (torch.float64, torch.float32):
            raise TypeError(f"EditMemory: dtype must be float64 or float32, got {dtype}")
        if not isinstance(out_features, int) or out_features < 1:
            raise ValueError(
                f"EditMemory: out_features must be a positive int, got {out_features!r}"
            )
        if max_keys is not None and (not isinstance(max_keys, int) or max_keys < 0):
            raise ValueError(
                f"EditMemory: max_keys must be an int from 0, or None, got {max_keys!r}"
            )
        factor = factor_prior(prior, dtype)
        n = len(factor)
        if backend != "auto":  # a later fold must not be the first to find out
            _backends.resolve("cholesky_update_solve_", backend, factor)
        self._prior, self._owns_factor, self._base = FactoredPrior(factor), True, None
        self._space = EditSpace.build(
            self._prior, factor.new_empty(0, n), factor.new_empty(0, out_features)
        )
        self._live, self._folded, self._next, self._spoilt = (), (), 1, 0.0
        self._initial, self.keep_prior = None, keep_prior
        self.max_keys = max(n // 4, _LEAST_MAX_KEYS) if max_keys is None else max_keys
        self.keep_folded = keep_folded
        self._backend = backend

    @property
    def _factor(self) -> Tensor:
        return self._prior.factor

    @property
    def in_features(self) -> int:
        """Length n of a key."""
        return len(self._factor)

    @property
    def out_features(self) -> int:
        """Length m of a target."""
        return self._space.targets.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the state and of all results."""
        return self._factor.dtype

    @property
    def device(self) -> torch.device:
        """Of the state and of all results: that of the prior."""
        return self._factor.device

    @property
    def num_keys(self) -> int:
        """Keys beside the prior, not counting the folded ones."""
        return len(self._space)

    @property
    def num_folded(self) -> int:
        """Keys inside the prior."""
        return sum(piece.count for piece in self._folded)

    @property
    def batches(self) -> list[int]:
        """Numbers of the batches that are there, oldest first, folded ones included."""
        return list(dict.fromkeys(batch for batch, _ in self._runs()))

    def append(self, keys: Tensor, targets: Tensor) -> int:
        """Adds a batch; may fold, see the class.

        Args:
            keys: K [n, k], k >= 1, any floating dtype.
            targets: V [m, k] relative to the frozen layer, ``v - W0 k``. To change what the layer
                says *now* by R, pass ``apply(keys) + R``.

        Returns:
            The number of the batch: 1, 2, ... Numbers of removed batches are not used again.

        Raises:
            TypeError, ValueError: wrong type, shape or device; NaN or Inf.
            NotPositiveDefiniteError: the keys must be folded but outweigh the prior by more than
                1 / eps. After any error nothing was changed.
        """
        check_columns("append", "keys", keys, self.in_features, self._factor)
        check_columns("append", "targets", targets, self.out_features, self._factor)
        count = keys.shape[1]
        if not count or count != targets.shape[1]:
            raise ValueError(
                "append: keys [n, k] and targets [m, k] must have the same number k >= 1 of "
                f"columns, got {list(keys.shape)} and {list(targets.shape)}"
            )
        batch = self._next
        with self._all_or_nothing():
            self._space, conditioned = appended(self._space, self._prior, keys, targets)
            self._live += ((batch, count),)
            self._next += 1
            if not conditioned:
                self.fold(self.num_keys)
            elif self.num_keys > self.max_keys:
                self.fold(self.num_keys - self.max_keys // 2)
        return batch

    def remove(self, batch: int) -> None:
        """Takes a batch back as if it had never been there, in any order.

        For keys beside the prior this loses nothing. Folded keys are subtracted from a copy of the
        prior's factor, with a relative error of about ``eps / gap``, where
        ``gap = lambda_min(I - K_b^T C^-1 K_b)``; see :func:`~coachhook.ops.cholesky_downdate_`. A
        warning is given where these add up to more than 1e-10 (1e-3 in float32).

        Raises:
            ValueError: there is no such batch, or it is folded and its keys were not kept.
            NotPositiveDefiniteError: it is folded and outweighs the rest of the prior so much that
                subtracting it would leave rounding noise. After any error nothing was changed.
        """
        if batch not in self.batches:
            raise ValueError(f"remove: batch must be one of {self.batches}, got {batch!r}")
        pieces = [piece for piece in self._folded if piece.batch == batch]
        counts = dict(self._live)
        with self._all_or_nothing():
            if pieces:
                self._unfold(pieces)
            if batch in counts:
                first = sum(count for number, count in self._live if number < batch)
                self._space = self._space.delete(first, first + counts[batch], self._backend)
                self._live = tuple(run for run in self._live if run[0] != batch)
            if pieces:
                self._rebuild(self._space.keys, self._space.targets)
        if pieces:
            warn_of_error(self._spoilt, self.dtype)

    def fold(self, keys: int) -> None:
        """Moves the oldest keys into the factored prior; Delta stays the same, to rounding.

        Args:
            keys: how many, at most ``num_keys``; a batch may be split.

        Raises:
            ValueError: out of range.
            NotPositiveDefiniteError: keys outweigh the prior by more than 1 / eps. Nothing was
                changed.
        """
        if not isinstance(keys, int) or not 0 <= keys <= self.num_keys:
            raise ValueError(f"fold: keys must be an int from 0 to {self.num_keys}, got {keys!r}")
        if keys:
            with self._all_or_nothing():
                self._fold(keys)

    def _fold(self, keys: int) -> None:
        space, base = self._space, self._base
        space.check_foldable(keys)
        known = None
        if self._known is not None and self.keep_folded and space.is_well_conditioned:
            # The sum of prior and keys stays the same, and with it every key's coefficients.
            known = self._coefficients()
        if self.keep_prior and not self._folded:
            self._initial, self._owns_factor = self._prior, False
        step = _FOLD_COLUMNS.get(self.device.type, 128)
        if space.outweighs_prior:
            # Only here may a later part fail; the original is needed then.
            self._owns_factor, step = False, _CAREFUL_FOLD_COLUMNS
        factor = self._writable_factor()
        for first in range(0, keys, step):
            part = slice(first, min(first + step, keys))
            residual = relative_targets(base, space.keys[part], space.targets[part])
            solved = cholesky_update_solve_(factor, space.keys[part].mT, backend=self._backend)
            grown = residual.mT @ solved.mT
            base = grown if base is None else grown.add_(base)
        pieces, rest, first = [], [], 0
        for batch, count in self._live:
            moved = min(count, max(0, keys - first))
            if moved:
                kept = slice(first, first + moved)
                pieces.append(
                    Folded(
                        batch,
                        moved,
                        space.keys[kept].cpu().clone() if self.keep_folded else None,
                        space.targets[kept].cpu().clone() if self.keep_folded else None,
                    )
                )
            if moved < count:
                rest.append((batch, count - moved))
            first += count
        self._prior, self._base = FactoredPrior(factor), base
        self._folded += tuple(pieces)
        self._live = tuple(rest)
        self._rebuild(space.keys[keys:].clone(), space.targets[keys:].clone())
        if known is not None:
            self._known = self._space, known

    @float32_products(tf32=False)
    def delta(self) -> Tensor:
        """The edit of the layer's weight, Delta [m, n], a new tensor."""
        space = self._space
        residual = relative_targets(self._base, space.keys, space.targets)
        delta = space.solve(residual).mT @ space.solved
        return delta if self._base is None else delta.add_(self._base)

    @float32_products(tf32=False)
    def apply(self, keys: Tensor) -> Tensor:
        """What the edits add to the layer's output, ``Delta K`` [m, k] for keys [n, k].

        O((n N + N^2 + m N) k), without forming Delta (m n k more where keys are folded).
        """
        rows, space = self._by_row("apply", keys), self._space
        residual = relative_targets(self._base, space.keys, space.targets)
        result = residual.mT @ space.solve(space.solved @ rows.mT)
        return result if self._base is None else torch.addmm(result, self._base, rows.mT)

    @float32_products(tf32=False)
    def factored(self) -> tuple[Tensor, Tensor]:
        """``Delta = Q S`` with Q [m, r] orthonormal and S [r, n]; r = min(m, number of keys).

        After a fold whose keys were not kept, r = m.
        """
        m, space = self.out_features, self._space
        known = all(piece.targets is not None for piece in self._folded)
        if not known or self.num_keys + self.num_folded >= m:
            return torch.eye(m, dtype=self.dtype, device=self.device), self.delta()
        if self._base is None:
            q, r = torch.linalg.qr(space.targets.mT)
            return q, space.solve(r.mT).mT @ space.solved
        q, _ = torch.linalg.qr(self._all_rows("factored", "targets").mT)
        return q, q.mT @ self.delta()

    def contents(self) -> tuple[Any, ...]:
        """Objects of which at least one is another after every change, and none after a restore."""
        return self._prior, self._base, self._space, self._folded, self._initial

    @float32_products(tf32=False)
    def pair(self) -> tuple[Tensor, Tensor]:
        """``Delta = V A^T`` with the targets V [m, N] and ``A = C^-1 K``, A^T [N, n].

        C is the prior plus all keys. The N columns are those of :meth:`column_batches`. Folded keys
        are included; where the pair before the last append is not known, at the price of two
        triangular solves for each.

        Raises:
            ValueError: keys were folded and not kept.
        """
        return self._all_rows("pair", "targets").mT.contiguous(), self._coefficients()

    def _coefficients(self) -> Tensor:
        """A^T [N, n] of all keys, folded ones first."""
        space, known, first = self._space, self._known, self.num_folded
        if known is not None and known[0] is space:
            return known[1]
        if known is None or not space.follows(known[0]):
            found = space.coefficients()
            if first:
                keys = self._folded_rows("pair", "keys")
                outer = self._prior.solve_both(keys.mT).mT - (keys @ space.solved.mT) @ found
                found = torch.cat([outer, found])
        else:
            found = space.coefficients((known[0], known[1][first:]))
            if first:
                # As old keys beside the prior, folded ones lose (A^T K) a for new rows a of A^T.
                outer, old = known[1][:first], len(known[0])
                weights = outer @ space.keys[old:].mT
                found = torch.cat([torch.addmm(outer, weights, found[old:], alpha=-1), found])
        self._known = space, found
        return found

    @float32_products(tf32=False)
    def coefficients_of(self, keys: Tensor) -> Tensor:
        """Rows of A^T that keys K [n, k] would have if they were appended; changes nothing.

        They are ``K^T (C + K K^T)^-1`` [k, n]; NaN where K outweighs C by more than 1 / eps.
        """
        rows = self._by_row("coefficients_of", keys)
        return self._space.coefficients_of(self._prior, rows)

    @float32_products(tf32=False)
    def prior(self) -> Tensor:
        """C0 [n, n], without the keys folded into it: a new tensor.

        Raises:
            ValueError: keys were folded and not kept.
        """
        factor = (self._prior if self._initial is None else self._initial).factor.tril()
        prior = factor @ factor.mT
        if not self._folded or self._initial is not None:
            return prior
        keys = self._folded_rows("prior", "keys")
        return torch.addmm(prior, keys.mT, keys, alpha=-1)

    @float32_products(tf32=False)
    def prior_solve(self, keys: Tensor) -> Tensor:
        """``C^-1 K`` [n, k] for K [n, k]; without ``keep_prior`` C has the folded keys in it."""
        rows = self._by_row("prior_solve", keys)
        return (self._prior if self._initial is None else self._initial).solve_both(rows.mT)

    def keys(self) -> Tensor:
        """All keys K [n, N], in the order of :meth:`column_batches`.

        Raises:
            ValueError: keys were folded and not kept.
        """
        return self._all_rows("keys", "keys").mT

    def column_batches(self) -> Tensor:
        """Batch number of each column of :meth:`pair`, int64 [N] on the CPU, oldest first."""
        columns = [batch for batch, count in self._runs() for _ in range(count)]
        return torch.tensor(columns, dtype=torch.int64)

    @float32_products(tf32=False)
    def overlaps(self, batch: int, *, above: float = 0.99) -> list[tuple[int, int, float]]:
        """Keys of a batch that nearly repeat an older key beside the prior.

        Least squares averages two targets for one key, so where they disagree neither is met: the
        caller may want to say so, or to remove the older batch.

        Args:
            batch: its number.
            above: least cosine to report, positive, in the metric of the prior's inverse, where
                keys of different facts are nearly orthogonal.

        Returns:
            ``(column of the batch, batch of the older key, cosine)``, for each column the closest
            older key at most. Folded keys are not compared.
        """
        owners = [number for number, count in self._live for _ in range(count)]
        if batch not in owners:
            return []
        first, count = owners.index(batch), owners.count(batch)
        moved = sum(piece.count for piece in self._folded if piece.batch == batch)
        cosines = self._space.cosines(first, first + count).tril(first - 1)
        largest, older = (values.tolist() for values in cosines.max(1))
        return [
            (moved + column, owners[older[column]], largest[column])
            for column in range(count)
            if largest[column] >= above
        ]

    def snapshot(self) -> MemorySnapshot:
        """The present state, for :meth:`restore`; costs nothing.

        The next fold or downdate copies the n x n factor instead of overwriting it.
        """
        self._owns_factor = False
        return MemorySnapshot(self, {name: getattr(self, name) for name in self._STATE})

    def restore(self, snapshot: MemorySnapshot) -> None:
        """Goes back to a snapshot of this memory, bit for bit.

        Raises:
            ValueError: it is not a snapshot of this memory.
        """
        if not isinstance(snapshot, MemorySnapshot) or snapshot.memory is not self:
            raise ValueError("restore: snapshot must have been taken from this memory")
        for name, value in snapshot.state.items():
            setattr(self, name, value)
        self._owns_factor = False

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of the state: tensors, which share its memory until the next change, and JSON."""
        space = self._space
        tensors = {"factor": self._factor, "keys": space.keys, "targets": space.targets}
        tensors |= {"solved": space.solved, "root": space.root}
        if self._base is not None:
            tensors["base"] = self._base
        if self._initial is not None:
            tensors["initial"] = self._initial.factor
        tensors |= folded_tensors(self._folded)
        values = {
            "live": [list(run) for run in self._live],
            "folded": [[piece.batch, piece.count] for piece in self._folded],
            "next": self._next,
            "spoilt": self._spoilt,
            "max_keys": self.max_keys,
            "keep_folded": self.keep_folded,
            "keep_prior": self.keep_prior,
        }
        return tensors, values

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, backend: str = "auto"
    ) -> EditMemory:
        """A memory with exactly the state of :meth:`state_dict`.

        The tensors are never written to, so they may be memory-mapped.

        Raises:
            KeyError, ValueError: something is missing, or does not fit together.
        """
        memory = cls.__new__(cls)
        memory._backend = backend
        memory.load_state_dict(tensors, values)
        return memory

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Replaces the state by one from :meth:`state_dict`; see :meth:`from_state_dict`."""
        live = tuple((int(batch), int(count)) for batch, count in values["live"])
        counts = [(int(batch), int(count)) for batch, count in values["folded"]]
        total = sum(count for _, count in live)
        check_state("load_state_dict", tensors, total, counts)
        parts = tensors["keys"], tensors["solved"], tensors["targets"], tensors["root"]
        state = {
            "_prior": FactoredPrior(tensors["factor"]),
            "_base": tensors["base"] if counts else None,
            "_space": EditSpace.of(*parts, [Rows(int(x)) for x in values.get("rows", [total])]),
            "_live": live,
            "_folded": folded_pieces(tensors, counts),
            "_next": int(values["next"]),
            "_spoilt": float(values.get("spoilt", 0.0)),
            "max_keys": int(values["max_keys"]),
            "keep_folded": bool(values["keep_folded"]),
            "keep_prior": bool(values.get("keep_prior", False)),
            "_initial": FactoredPrior(tensors["initial"]) if "initial" in tensors else None,
        }
        self.restore(MemorySnapshot(self, state))

    def _runs(self) -> list[tuple[int, int]]:
        return [(piece.batch, piece.count) for piece in self._folded] + list(self._live)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Restores the state if the block fails; a prior that was written to refuses to be used."""
        before = {name: getattr(self, name) for name in (*self._STATE, "_owns_factor")}
        try:
            # What is stored here is updated in place later, perhaps outside an inference mode.
            with torch.inference_mode(False), torch.no_grad(), float32_products(tf32=False):
                yield
        except BaseException:
            for name, value in before.items():
                setattr(self, name, value)
            raise

    def _unfold(self, pieces: list[Folded]) -> None:
        """Subtracts folded keys from prior and base; the edit space is stale afterwards."""
        both = (rows_of("remove", pieces, name, self.device) for name in ("keys", "targets"))
        keys, targets = map(torch.cat, both)
        self._owns_factor = False
        gap = self._prior.share_left(keys.mT)
        factor = self._writable_factor()
        cholesky_downdate_(factor, keys.mT, backend=self._backend)
        self._spoilt += torch.finfo(self.dtype).eps / max(gap, torch.finfo(self.dtype).eps)
        self._prior = FactoredPrior(factor)
        self._folded = tuple(piece for piece in self._folded if piece not in pieces)
        if self._folded and self._base is not None:
            residual = relative_targets(self._base, keys, targets)
            solved = self._prior.solve_both(keys.mT)
            self._base = torch.addmm(self._base, residual.mT, solved.mT, alpha=-1)
        else:
            self._base = None
        if not self._folded and self._initial is not None:
            # What was never there left no rounding either.
            self._prior, self._initial, self._owns_factor = self._initial, None, False

    def _rebuild(self, keys: Tensor, targets: Tensor) -> None:
        """Puts these keys, by row, beside the prior; folds them where that is no use."""
        self._space = EditSpace.build(self._prior, keys, targets)
        if not self._space.is_well_conditioned:
            self.fold(self.num_keys)

    def _folded_rows(self, op: str, name: str) -> Tensor:
        return torch.cat(rows_of(op, self._folded, name, self.device))

    def _all_rows(self, op: str, name: str) -> Tensor:
        rows: Tensor = getattr(self._space, name)
        folded = rows_of(op, self._folded, name, self.device)
        return torch.cat([*folded, rows]) if folded else rows

    def _writable_factor(self) -> Tensor:
        """The factor, taken from its prior, or, where it is shared, a copy."""
        factor = self._prior.take() if self._owns_factor else self._factor.clone()
        self._owns_factor = True
        return factor

    def _by_row(self, op: str, keys: Tensor) -> Tensor:
        return columns_by_row(op, "keys", keys, self.in_features, like=self._factor)
