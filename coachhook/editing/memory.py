"""The edits of one layer as linear algebra: recursive least squares with a frozen prior.

Let C0 be the prior (lambda times the key covariance), K the keys of all edits so far and V their
targets relative to the frozen layer, ``V = v - W0 K``. The edit is the minimiser of

    ||D K - V||^2 + tr(D C0 D^T),  that is  Delta = V K^T (C0 + K K^T)^-1.

With ``Y = C0^-1 K`` and ``G = I + K^T Y`` (Woodbury) this is ``Delta = V G^-1 Y^T``: n x n work only
for the new columns of Y. A batch borders G; taking a batch back deletes rows and columns of G. Both
act on the Cholesky factor of G.

*Folding.* Split the keys in old and new. The objective with the old keys alone is, up to a constant,
``tr((D - B) C1 (D - B)^T)`` with ``C1 = C0 + K_old K_old^T`` and B the Delta of the old keys. So old
keys can move into a new prior C1 and a dense base B, and the rest is the same problem for
``D - B`` with targets ``V - B K``:

    Delta = B + (V - B K) G^-1 Y^T,   Y = C1^-1 K,   G = I + K^T Y.

The base itself grows by the same formula, ``B <- B + (V_old - B K_old) (C1^-1 K_old)^T``, and loses a
batch by ``B <- B - (V_b - B K_b) (C2^-1 K_b)^T`` with ``C2 = C1 - K_b K_b^T`` (multiply both sides by
C2 to verify). Delta is the same before and after a fold, to rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coachhook.editing.prior import factor_prior, regularized_prior
from coachhook.ops import cholesky_downdate_, cholesky_update_, cholesky_update_solve_

__all__ = ["EditMemory", "MemorySnapshot", "regularized_prior"]

# Below n / 4 keys the edit space is cheaper than the factor; this many are cheap at any n, and keys
# that are not folded are taken back without loss.
_LEAST_MAX_KEYS = 256
# The error of Delta is about eps cond(G), in float32 as in float64; the pivots of G bound its
# condition from below. Past this ratio the old keys belong into the prior.
_PIVOT_LIMIT = {torch.float64: 1e6, torch.float32: 1e3}
# Keys per pass over the factor while folding: bounds the temporaries to a few [n, 128].
_FOLD_COLUMNS = 128

@dataclass(frozen=True)
class _Folded:
    """Keys that moved into the prior; the tensors are on the CPU, None where not kept."""

    batch: int
    count: int
    keys: Tensor | None
    targets: Tensor | None


@dataclass(frozen=True, eq=False)
class MemorySnapshot:
    """A state that :meth:`EditMemory.restore` goes back to; holds references, not copies."""

    state: dict[str, Any]


class EditMemory:
    """All edits of one layer; see the module's docstring for the algebra.

    Args:
        prior: C0 [n, n], symmetric positive definite, any floating dtype; not changed. Its Cholesky
            factor is kept, C0 itself is not.
        out_features: m.
        dtype: float64; or float32, which keeps about four digits of Delta at a condition of 1e4 of
            the prior and none from about 1e7 on. There is no refinement: that needs C0 in float64.
        max_keys: keys kept beside the prior. When an append goes beyond, the oldest are folded until
            half as many are left. None: the larger of n // 4 and 256. 0 folds every batch at once.
        keep_folded: keep keys and targets of folded batches on the CPU, ``n + m`` numbers per key, so
            that they can still be taken back.
        backend: of the Cholesky ops.

    Keys are also folded, all of them, when they determine directions that the prior leaves almost
    free (pivots of G more than 1e6 apart): Delta would lose the digits that the prior's condition
    costs. The cost of an append is two triangular solves, O(n^2 k), plus O(n N k + N^2 k).

    Raises:
        TypeError, ValueError: an argument does not fit.
        NotPositiveDefiniteError: the prior is not positive definite, to rounding.
    """

    _factor: Tensor  # L [n, n], prior = L L^T
    _base: Tensor | None  # B [m, n], None where nothing is folded
    # Row j belongs to key j; rows beyond num_keys are spare.
    _keys: Tensor  # K^T [capacity, n]
    _solved: Tensor  # Y^T [capacity, n]
    _targets: Tensor  # V^T [capacity, m]
    _root: Tensor  # Cholesky factor of G [capacity, capacity]
    _live: tuple[tuple[int, int], ...]  # (batch, keys), oldest first
    _folded: tuple[_Folded, ...]
    _next: int
    max_keys: int
    keep_folded: bool

    _STATE = (
        *("_factor", "_base", "_keys", "_solved", "_targets", "_root"),
        *("_live", "_folded", "_next", "max_keys", "keep_folded"),
    )

    def __init__(
        self,
        prior: Tensor,
        out_features: int,
        *,
        dtype: torch.dtype = torch.float64,
        max_keys: int | None = None,
        keep_folded: bool = True,
        backend: str = "auto",
    ) -> None:
        if dtype not in _PIVOT_LIMIT:
            raise TypeError(f"EditMemory: dtype must be float64 or float32, got {dtype}")
        if not isinstance(out_features, int) or out_features < 1:
            raise ValueError(
                f"EditMemory: out_features must be a positive int, got {out_features!r}"
            )
        if max_keys is not None and (not isinstance(max_keys, int) or max_keys < 0):
            raise ValueError(f"EditMemory: max_keys must be an int from 0, or None, got {max_keys!r}")
        self._factor = factor_prior(prior, dtype)
        n = self.in_features
        self._base = None
        self._keys = self._factor.new_empty(0, n)
        self._solved = self._factor.new_empty(0, n)
        self._targets = self._factor.new_empty(0, out_features)
        self._root = self._factor.new_empty(0, 0)
        self._live, self._folded, self._next = (), (), 1
        self.max_keys = max(n // 4, _LEAST_MAX_KEYS) if max_keys is None else max_keys
        self.keep_folded = keep_folded
        self._start(backend, owns_factor=True)

    def _start(self, backend: str, owns_factor: bool) -> None:
        self._backend = backend
        self._owns_factor = owns_factor
        self._snapshots: weakref.WeakSet[MemorySnapshot] = weakref.WeakSet()

    @property
    def in_features(self) -> int:
        """Length n of a key."""
        return self._factor.shape[0]

    @property
    def out_features(self) -> int:
        """Length m of a target."""
        return self._targets.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the state and of all results."""
        return self._factor.dtype

    @property
    def device(self) -> torch.device:
        """Of the state and of all results, that of the prior."""
        return self._factor.device

    @property
    def num_keys(self) -> int:
        """Keys beside the prior, not counting the folded ones."""
        return sum(count for _, count in self._live)

    @property
    def num_folded(self) -> int:
        """Keys inside the prior."""
        return sum(piece.count for piece in self._folded)

    @property
    def batches(self) -> list[int]:
        """Numbers of the batches that are there, oldest first, folded ones included."""
        runs = [(piece.batch, piece.count) for piece in self._folded] + list(self._live)
        return list(dict.fromkeys(batch for batch, _ in runs))

    def append(self, keys: Tensor, targets: Tensor) -> int:
        """Adds a batch; may fold, see the class.

        Args:
            keys: K [n, k], k >= 1, any floating dtype.
            targets: V [m, k] relative to the frozen layer, ``v - W0 k``. To change what the layer
                says *now* by R, pass ``apply(keys) + R``.

        Returns:
            The number of the batch: 1, 2, ...; numbers of removed batches are not used again.

        Raises:
            TypeError, ValueError: wrong type, shape, device, NaN or Inf; nothing was changed.
        """
        rows, wanted = self._check_batch("append", keys, targets)
        half = torch.linalg.solve_triangular(self._factor, rows.mT, upper=False)
        solved = torch.linalg.solve_triangular(self._factor.mT, half, upper=True).mT
        corner = _plus_identity(half.mT @ half)
        if not bool(torch.isfinite(corner).all()):
            raise ValueError(
                "append: keys must be of a size that can be squared, got an overflow in "
                "K^T C^-1 K; scale keys and prior"
            )
        old, total = self.num_keys, self.num_keys + len(rows)
        root = self._root[:old, :old]
        border = torch.linalg.solve_triangular(root, self._solved[:old] @ rows.mT, upper=False)
        corner, info = torch.linalg.cholesky_ex(corner - border.mT @ border)
        self._reserve(total)
        self._keys[old:total] = rows
        self._solved[old:total] = solved
        self._targets[old:total] = wanted
        self._root[old:total, :old] = border.mT
        self._root[old:total, old:total] = corner
        batch = self._next
        self._live += ((batch, len(rows)),)
        self._next += 1
        if int(info) or not self._is_well_conditioned():
            self.fold(total)
        elif total > self.max_keys:
            self.fold(total - self.max_keys // 2)
        return batch

    def remove(self, batch: int) -> None:
        """Takes a batch back as if it had never been there, in any order.

        For keys beside the prior this loses nothing. Folded keys are subtracted from the prior by a
        downdate, with a relative error of about ``eps / gap``, ``gap = 1 - k^T C^-1 k`` of the key
        that dominates the prior most; see :func:`~coachhook.ops.cholesky_downdate_`.

        Raises:
            ValueError: there is no such batch, or it is folded and its keys were not kept.
            NotPositiveDefiniteError: it is folded and outweighs the rest of the prior so much that
                subtracting it would leave rounding noise. After any error nothing was changed.
        """
        if batch not in self.batches:
            raise ValueError(f"remove: batch must be one of {self.batches}, got {batch!r}")
        pieces = [piece for piece in self._folded if piece.batch == batch]
        if pieces:
            keys, targets = self._folded_rows("remove", pieces)
            factor = self._writable_factor()
            cholesky_downdate_(factor, keys.mT, backend=self._backend)
            self._folded = tuple(piece for piece in self._folded if piece.batch != batch)
            if self._folded and self._base is not None:
                residual = targets - keys @ self._base.mT
                solved = _solve_both(factor, keys.mT)
                self._base = torch.addmm(self._base, residual.mT, solved.mT, alpha=-1)
            else:
                self._base = None
        first = 0
        for number, count in self._live:
            if number == batch:
                self._delete(first, first + count)
                self._live = tuple(run for run in self._live if run[0] != batch)
                break
            first += count
        if pieces:
            self._rebuild()

    def fold(self, keys: int) -> None:
        """Moves the oldest keys into the factored prior; Delta stays the same, to rounding.

        Args:
            keys: how many, at most ``num_keys``; a batch may be split.

        Raises:
            ValueError: out of range.
        """
        if not isinstance(keys, int) or not 0 <= keys <= self.num_keys:
            raise ValueError(f"fold: keys must be an int from 0 to {self.num_keys}, got {keys!r}")
        if keys == 0:
            return
        factor = self._writable_factor()
        for first in range(0, keys, _FOLD_COLUMNS):
            part = slice(first, min(first + _FOLD_COLUMNS, keys))
            residual = self._residuals(part)
            solved = cholesky_update_solve_(factor, self._keys[part].mT, backend=self._backend)
            product = residual.mT @ solved.mT
            self._base = product if self._base is None else product.add_(self._base)
        pieces, rest, first = [], [], 0
        for batch, count in self._live:
            moved = min(count, max(0, keys - first))
            if moved:
                pieces.append(self._fold_piece(batch, first, moved))
            if moved < count:
                rest.append((batch, count - moved))
            first += count
        total = self.num_keys
        self._folded += tuple(pieces)
        self._live = tuple(rest)
        self._keys = self._keys[keys:total].clone()
        self._targets = self._targets[keys:total].clone()
        self._rebuild()

    def delta(self) -> Tensor:
        """The edit of the layer's weight, Delta [m, n], a new tensor."""
        return self._project(self._residuals(slice(0, self.num_keys)), self._base)

    def apply(self, keys: Tensor) -> Tensor:
        """What the edits add to the layer's output, ``Delta K`` [m, k] for keys [n, k].

        Costs O((n N + N^2 + m N) k), without forming Delta.
        """
        rows = self._check_matrix("apply", "keys", keys, self.in_features)
        total = self.num_keys
        inner = _solve_both(self._root[:total, :total], self._solved[:total] @ rows.mT)
        result = self._residuals(slice(0, total)).mT @ inner
        return result if self._base is None else torch.addmm(result, self._base, rows.mT)

    def factored(self) -> tuple[Tensor, Tensor]:
        """``Delta = Q S`` with Q [m, r] orthonormal and S [r, n]; r = min(m, number of keys).

        After a fold whose keys were not kept, r = m.
        """
        m, total = self.out_features, self.num_keys
        known = all(piece.targets is not None for piece in self._folded)
        if not known or total + self.num_folded >= m:
            return torch.eye(m, dtype=self.dtype, device=self.device), self.delta()
        if self._base is None:
            q, r = torch.linalg.qr(self._targets[:total].mT)
            return q, self._project(r.mT, None)
        q, _ = torch.linalg.qr(self._all_rows("factored")[1].mT)
        return q, q.mT @ self.delta()

    def pair(self) -> tuple[Tensor, Tensor]:
        """``Delta = V A^T`` with the targets V [m, N] and ``A = C^-1 K``, A^T [N, n].

        C is the prior plus all keys. Columns are in the order of :meth:`column_batches`. Folded keys
        are included, at the price of a triangular solve for each.

        Raises:
            ValueError: keys were folded and not kept.
        """
        total = self.num_keys
        root, solved = self._root[:total, :total], self._solved[:total]
        coefficients = _solve_both(root, solved)
        if not self._folded:
            return self._targets[:total].mT.contiguous(), coefficients
        keys, targets = self._all_rows("pair")
        folded = keys[: self.num_folded]
        outer = _solve_both(self._factor, folded.mT).mT
        outer -= (folded @ solved.mT) @ coefficients
        return targets.mT.contiguous(), torch.cat([outer, coefficients])

    def column_batches(self) -> Tensor:
        """Batch number of each column of :meth:`pair`, int64 [N] on the CPU."""
        runs = [(piece.batch, piece.count) for piece in self._folded] + list(self._live)
        numbers = torch.tensor([batch for batch, _ in runs], dtype=torch.int64)
        counts = torch.tensor([count for _, count in runs], dtype=torch.int64)
        return numbers.repeat_interleave(counts)

    def overlaps(self, batch: int, *, above: float = 0.99) -> list[tuple[int, int, float]]:
        """Keys of a batch that nearly repeat an older key beside the prior.

        Two targets for one key are averaged by least squares, so neither is met where they disagree:
        the caller may want to say so, or to remove the older batch.

        Args:
            batch: its number.
            above: least cosine to report, in the metric of the prior's inverse, where keys of
                different facts are nearly orthogonal.

        Returns:
            ``(column of the batch, batch of the older key, cosine)``, at most one for each column,
            the closest. Empty where the batch is folded.
        """
        owners = [number for number, count in self._live for _ in range(count)]
        if batch not in owners:
            return []
        first = owners.index(batch)
        last = first + owners.count(batch)
        offset = sum(piece.count for piece in self._folded if piece.batch == batch)
        gram = self._keys[first:last] @ self._solved[:last].mT
        squares = self._root[:last, :last].square().sum(1) - 1
        cosines = gram / (squares[first:last, None] * squares).clamp_min(1e-300).sqrt()
        cosines.masked_fill_(torch.ones_like(cosines, dtype=torch.bool).triu(first), -1.0)
        best, other = cosines.max(1)
        return [
            (offset + i, owners[int(other[i])], float(best[i]))
            for i in range(last - first)
            if float(best[i]) >= above
        ]

    def snapshot(self) -> MemorySnapshot:
        """The present state, for :meth:`restore`; costs nothing.

        While a snapshot is alive, the first fold or downdate copies the n x n factor instead of
        overwriting it.
        """
        taken = MemorySnapshot({name: getattr(self, name) for name in self._STATE})
        self._snapshots.add(taken)
        return taken

    def restore(self, snapshot: MemorySnapshot) -> None:
        """Goes back to a snapshot of this memory, bit for bit.

        Raises:
            ValueError: it is not a snapshot of this memory.
        """
        if snapshot not in self._snapshots:
            raise ValueError("restore: snapshot must have been taken from this memory")
        for name in self._STATE:
            setattr(self, name, snapshot.state[name])

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of the state: tensors for safetensors and values for JSON.

        The tensors are views of the state: write them before the next change.
        """
        total = self.num_keys
        tensors = {
            "factor": self._factor,
            "keys": self._keys[:total],
            "solved": self._solved[:total],
            "targets": self._targets[:total],
            "root": self._root[:total, :total],
        }
        if self._base is not None:
            tensors["base"] = self._base
        for i, piece in enumerate(self._folded):
            if piece.keys is not None and piece.targets is not None:
                tensors |= {f"folded.{i}.keys": piece.keys, f"folded.{i}.targets": piece.targets}
        values = {
            "live": [list(run) for run in self._live],
            "folded": [[piece.batch, piece.count] for piece in self._folded],
            "next": self._next,
            "max_keys": self.max_keys,
            "keep_folded": self.keep_folded,
        }
        return tensors, values

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, backend: str = "auto"
    ) -> EditMemory:
        """A memory from :meth:`state_dict`; continues bit for bit.

        The tensors are not changed; the factor is not copied before the first fold, so it may be
        memory-mapped. Without "solved" and "root" those are computed again.

        Raises:
            KeyError, ValueError: something is missing, or does not fit together.
        """
        memory = cls.__new__(cls)
        memory._start(backend, owns_factor=False)
        memory.load_state_dict(tensors, values)
        return memory

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Replaces the state by one from :meth:`state_dict`; see :meth:`from_state_dict`."""
        factor, keys, targets = tensors["factor"], tensors["keys"], tensors["targets"]
        live = tuple((int(batch), int(count)) for batch, count in values["live"])
        total = sum(count for _, count in live)
        folded = tuple(
            _Folded(
                int(batch),
                int(count),
                tensors.get(f"folded.{i}.keys"),
                tensors.get(f"folded.{i}.targets"),
            )
            for i, (batch, count) in enumerate(values["folded"])
        )
        n, m = factor.shape[0], targets.shape[1]
        shapes = {"factor": (n, n), "keys": (total, n), "targets": (total, m)}
        shapes |= {"solved": (total, n), "root": (total, total)}
        if folded:
            shapes["base"] = (m, n)
        for i, piece in enumerate(folded):
            shapes |= {f"folded.{i}.keys": (piece.count, n)}
            shapes |= {f"folded.{i}.targets": (piece.count, m)}
        for name, shape in shapes.items():
            if name in tensors and tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"load_state_dict: {name} must be {list(shape)}, "
                    f"got {list(tensors[name].shape)}"
                )
        base = tensors["base"] if folded else None
        number, limit = int(values["next"]), int(values["max_keys"])
        self.keep_folded = bool(values["keep_folded"])
        self._factor, self._base, self._keys, self._targets = factor, base, keys, targets
        self._live, self._folded, self._next, self.max_keys = live, folded, number, limit
        self._owns_factor = False
        self._snapshots = weakref.WeakSet()
        if "solved" in tensors and "root" in tensors:
            self._solved, self._root = tensors["solved"], tensors["root"]
        else:
            self._rebuild()

    def _residuals(self, part: slice) -> Tensor:
        """Targets of live keys relative to the base, [keys, m]."""
        targets = self._targets[part]
        if self._base is None:
            return targets
        return torch.addmm(targets, self._keys[part], self._base.mT, alpha=-1)

    def _project(self, residuals: Tensor, base: Tensor | None) -> Tensor:
        """``base + R^T G^-1 Y^T`` for R [N, r]."""
        total = self.num_keys
        inner = _solve_both(self._root[:total, :total], residuals)
        result = inner.mT @ self._solved[:total]
        return result if base is None else result.add_(base)

    def _is_well_conditioned(self) -> bool:
        pivots = self._root.diagonal()[: self.num_keys].square()
        return not len(pivots) or bool(pivots.max() <= _PIVOT_LIMIT[self.dtype] * pivots.min())

    def _reserve(self, total: int) -> None:
        """Makes room for rows; a buffer is replaced where a snapshot owns the rows to be written."""
        old, capacity = self.num_keys, len(self._keys)
        held = any(
            shot.state["_keys"] is self._keys and sum(c for _, c in shot.state["_live"]) > old
            for shot in self._snapshots
        )
        if total > capacity or held:
            capacity = max(total, capacity if held else capacity * 3 // 2)
            for name in ("_keys", "_solved", "_targets"):
                before: Tensor = getattr(self, name)
                after = before.new_empty(capacity, before.shape[1])
                after[:old] = before[:old]
                setattr(self, name, after)
            root = self._root.new_zeros(capacity, capacity)
            root[:old, :old] = self._root[:old, :old]
            self._root = root

    def _delete(self, first: int, last: int) -> None:
        """Deletes live keys. Without rows and columns p of G, its trailing factor changes by
        ``L'_22 L'_22^T = L_22 L_22^T + L_2p L_2p^T``: an update, which cannot fail or cancel.
        """
        total = self.num_keys
        tail = self._root[last:total, last:total].clone()
        if len(tail):
            gone = self._root[last:total, first:last]
            cholesky_update_(tail, gone.contiguous(), backend=self._backend)
        for name in ("_keys", "_solved", "_targets"):
            rows: Tensor = getattr(self, name)
            setattr(self, name, torch.cat([rows[:first], rows[last:total]]))
        rest = total - (last - first)
        root = self._root.new_zeros(rest, rest)
        root[:first, :first] = self._root[:first, :first]
        root[first:, :first] = self._root[last:total, :first]
        root[first:, first:] = tail
        self._root = root

    def _rebuild(self) -> None:
        """Y and the factor of G from the live keys and the prior; folds where G is no use."""
        total = self.num_keys
        half = torch.linalg.solve_triangular(self._factor, self._keys[:total].mT, upper=False)
        solved = torch.linalg.solve_triangular(self._factor.mT, half, upper=True)
        self._solved = solved.mT.contiguous()
        self._root, info = torch.linalg.cholesky_ex(_plus_identity(half.mT @ half))
        if int(info) or not self._is_well_conditioned():
            self.fold(total)

    def _fold_piece(self, batch: int, first: int, count: int) -> _Folded:
        if not self.keep_folded:
            return _Folded(batch, count, None, None)
        part = slice(first, first + count)
        return _Folded(batch, count, self._keys[part].cpu().clone(), self._targets[part].cpu().clone())

    def _folded_rows(self, op: str, pieces: list[_Folded]) -> tuple[Tensor, Tensor]:
        keys, targets = [], []
        for piece in pieces:
            if piece.keys is None or piece.targets is None:
                raise ValueError(
                    f"{op}: batch {piece.batch} must have its keys at hand, got a batch folded into "
                    "the prior without them (keep_folded=False); use keep_folded=True, or a larger "
                    "max_keys so that batches are not folded"
                )
            keys.append(piece.keys.to(self.device))
            targets.append(piece.targets.to(self.device))
        return torch.cat(keys), torch.cat(targets)

    def _all_rows(self, op: str) -> tuple[Tensor, Tensor]:
        keys, targets = self._folded_rows(op, list(self._folded))
        total = self.num_keys
        return torch.cat([keys, self._keys[:total]]), torch.cat([targets, self._targets[:total]])

    def _writable_factor(self) -> Tensor:
        held = any(shot.state["_factor"] is self._factor for shot in self._snapshots)
        if held or not self._owns_factor:
            self._factor = self._factor.clone()
            self._owns_factor = True
        return self._factor

    def _check_batch(self, op: str, keys: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._check_matrix(op, "keys", keys, self.in_features)
        wanted = self._check_matrix(op, "targets", targets, self.out_features)
        if len(rows) == 0:
            raise ValueError(f"{op}: keys must hold at least one key, got [{self.in_features}, 0]")
        if len(rows) != len(wanted):
            raise ValueError(
                f"{op}: targets must be [m, k] with one column for each of the {len(rows)} keys, "
                f"got {list(targets.shape)}"
            )
        return rows, wanted

    def _check_matrix(self, op: str, name: str, value: Tensor, rows: int) -> Tensor:
        """The columns of a matrix as rows of the memory's dtype."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.dim() != 2 or value.shape[0] != rows:
            hint = "; one column for each key: pass the transpose" if rows in value.shape else ""
            raise ValueError(f"{op}: {name} must be [{rows}, k], got {list(value.shape)}{hint}")
        if not value.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}")
        if value.device != self.device:
            raise ValueError(
                f"{op}: {name} must be on {self.device} like the prior, got {value.device}; "
                f"move them with {name}.to(memory.device)"
            )
        columns = value.detach().mT.to(self.dtype).contiguous()
        if not bool(torch.isfinite(columns).all()):
            bad = int((~torch.isfinite(columns).all(1)).sum())
            raise ValueError(
                f"{op}: {name} must be finite, got NaN or Inf in {bad} of {len(columns)} columns"
            )
        return columns


def _solve_both(root: Tensor, right: Tensor) -> Tensor:
    """``(root root^T)^-1 right``."""
    half = torch.linalg.solve_triangular(root, right, upper=False)
    return torch.linalg.solve_triangular(root.mT, half, upper=True)


def _plus_identity(matrix: Tensor) -> Tensor:
    matrix.diagonal().add_(1)
    return matrix
