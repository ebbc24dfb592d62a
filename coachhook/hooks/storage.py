"""What a running hook reads (Delta, alpha, population statistics), in buffers updated in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["empty", "dense", "factored", "pair"]
Correction = Literal["sum", "own"]

_SMALLEST_CAPACITY = 16
# Columns of Q are orthonormal to rounding; a V passed by mistake is far off.
_UNIT_NORM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class StoredHook:
    """A copy of everything :class:`HookStorage` holds, made by ``snapshot`` for ``restore``."""

    kind: Kind
    rank: int
    grouped: bool
    correction: Correction
    tensors: dict[str, Tensor]


class HookStorage(nn.Module):
    """Delta ``[m, n]`` of one layer in preallocated buffers that are updated in place.

    ``left [m, capacity]`` and ``right [capacity, n]`` hold the factors (Q, S) or the pair
    (V, A^T), ``dense [m, n]`` holds Delta itself; what is not in use takes no memory. The capacity
    at least doubles whenever it is exceeded. After :meth:`reserve` it is fixed, and readers get the
    whole capacity: unused rows are zero and change nothing, so that a compiled or captured graph
    stays valid from batch to batch.

    Args:
        in_features: n.
        out_features: m.
        dtype: compute dtype of the buffers, float32 or float64; casting the model leaves it alone
            except for float64, which widens it (see :meth:`set_dtype`).
        device: where the buffers live.
    """

    dense: Tensor
    left: Tensor
    right: Tensor
    groups: Tensor
    alpha: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.kind: Kind = "empty"
        self.rank = 0
        self.grouped = False
        self.correction: Correction = "sum"
        self.reserved = False
        # Buffers made in inference mode could not be updated outside of it.
        with torch.inference_mode(False):
            for name, value in (("alpha", float("inf")), ("mean", 0.0), ("std", 1.0)):
                self.register_buffer(name, torch.tensor(value, dtype=dtype, device=device))
            m, n = out_features, in_features
            for name, shape in (("dense", (0, n)), ("left", (m, 0)), ("right", (0, n))):
                self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
            self.register_buffer("groups", torch.zeros(0, dtype=torch.int64, device=device))

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the buffers."""
        return self.alpha.dtype

    @property
    def capacity(self) -> int:
        """Number of rows ``left`` and ``right`` have room for."""
        return self.right.shape[0]

    @property
    def active(self) -> bool:
        """Whether there is something to read: a Delta, or a reservation that may be filled."""
        return self.reserved or self.kind != "empty"

    def operand(self) -> Tensor | tuple[Tensor, Tensor]:
        """Delta as the op takes it: ``[m, n]`` or ``([m, r], [r, n])``; views of the buffers."""
        # A compiled graph is guarded on what is read here; a reserved hook reads nothing that
        # changes from batch to batch.
        if self.reserved:
            return self.left, self.right
        if self.kind == "dense":
            return self.dense
        return self.left[:, : self.rank], self.right[: self.rank]

    def key_groups(self) -> Tensor | None:
        """Group of each key of the pair, None where every key is its own."""
        if self.reserved:
            return self.groups
        return self.groups[: self.rank] if self.grouped else None

    def delta(self) -> Tensor:
        """A fresh Delta ``[m, n]``; zeros when empty."""
        if self.kind == "dense":
            return self.dense.clone()
        return self.left[:, : self.rank] @ self.right[: self.rank]

    @torch.no_grad()
    def clear(self) -> None:
        """Forget Delta; addresses are kept."""
        self.dense.zero_()
        self._blank_rows(0)
        self.kind, self.rank, self.grouped = "empty", 0, False

    def reserve(self, rank: int) -> None:
        """Fix the capacity at ``rank`` rows (or what it has already) and all addresses with it.

        Raises:
            ValueError: ``rank`` is not positive or below the rank in use, or Delta is dense.
        """
        if not isinstance(rank, int) or rank < max(1, self.rank):
            raise ValueError(
                f"reserve: rank must be an integer of at least {max(1, self.rank)}, got {rank!r}"
            )
        if self.kind == "dense":
            raise ValueError("reserve: Delta must be stored in factors, got a dense Delta")
        if rank > self.capacity:
            self._resize(rank)
        self.reserved = True

    @torch.no_grad()
    def set_dense(self, delta: Tensor) -> None:
        """Copy in ``delta [m, n]``."""
        self._check("set_delta", "delta", delta, (self.out_features, self.in_features))
        if self.reserved:
            raise ValueError(
                f"set_delta: a hook with {self.capacity} reserved rows must be given in factors, "
                "got a dense Delta"
            )
        if self.dense.shape[0] == 0:
            with torch.inference_mode(False):
                self.dense = self.dense.new_empty(self.out_features, self.in_features)
        self.dense.copy_(delta)
        self.kind, self.rank, self.grouped, self.correction = "dense", 0, False, "sum"
        self._resize(0)

    def set_factored(self, q: Tensor, s: Tensor) -> None:
        """Copy in ``Delta = Q S``, Q ``[m, r]`` with orthonormal columns and S ``[r, n]``."""
        rank = self._check_factors("set_factored", ("Q", "S"), q, s)
        norms = torch.linalg.vector_norm(q.detach().to(self.dtype), dim=0)
        if rank and float((norms - 1).abs().max()) > _UNIT_NORM_TOLERANCE:
            raise ValueError(
                "set_factored: Q must have orthonormal columns, got columns of norm "
                f"{float(norms.min()):.3g} to {float(norms.max()):.3g}; "
                "take Q, R = torch.linalg.qr(V) and S = R @ A^T"
            )
        self._fill("factored", q, s, None, "sum")

    def set_pair(
        self, v: Tensor, at: Tensor, groups: Tensor | None, correction: Correction
    ) -> None:
        """Copy in ``Delta = V A^T``, V ``[m, N]`` and A^T ``[N, n]``, one row per key."""
        rank = self._check_factors("set_pair", ("V", "At"), v, at)
        if correction not in ("sum", "own"):
            raise ValueError(f"set_pair: correction must be 'sum' or 'own', got {correction!r}")
        if groups is not None:
            if groups.dtype != torch.int64 or groups.shape != (rank,):
                raise ValueError(
                    f"set_pair: groups must be int64 [{rank}], got {groups.dtype} "
                    f"{list(groups.shape)}"
                )
            if rank and not 0 <= int(groups.min()) <= int(groups.max()) < rank:
                raise ValueError(
                    f"set_pair: groups must lie in 0..{rank - 1}, got {int(groups.min())} to "
                    f"{int(groups.max())}"
                )
        self._fill("pair", v, at, groups, correction)

    @torch.no_grad()
    def set_dtype(self, dtype: torch.dtype) -> None:
        """Change the compute dtype of all floating buffers."""
        if dtype != self.dtype:
            for name, buffer in self._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    self._buffers[name] = buffer.to(dtype)

    def snapshot(self) -> StoredHook:
        """Copy what is in use, to bring it back with :meth:`restore` bit for bit."""
        rank = self.rank
        tensors = {"alpha": self.alpha, "mean": self.mean, "std": self.std}
        if self.kind == "dense":
            tensors["dense"] = self.dense
        else:
            tensors |= {"left": self.left[:, :rank], "right": self.right[:rank]}
            tensors["groups"] = self.groups[:rank]
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        return StoredHook(self.kind, rank, self.grouped, self.correction, copies)

    @torch.no_grad()
    def restore(self, stored: StoredHook) -> None:
        """Bring back a :meth:`snapshot`, into the buffers as they are now."""
        tensors = stored.tensors
        if stored.kind == "dense":
            self.set_dense(tensors["dense"])
        elif stored.kind == "empty":
            self.clear()
        else:
            groups = tensors["groups"] if stored.grouped else None
            self._fill(stored.kind, tensors["left"], tensors["right"], groups, stored.correction)
        self.correction = stored.correction
        for name in ("alpha", "mean", "std"):
            getattr(self, name).copy_(tensors[name])

    @torch.no_grad()
    def _fill(
        self, kind: Kind, left: Tensor, right: Tensor, groups: Tensor | None, correction: Correction
    ) -> None:
        rank = right.shape[0]
        if rank == 0:
            self.clear()
            return
        if rank > self.capacity:
            self._resize(max(rank, 2 * self.capacity, _SMALLEST_CAPACITY))
        self.left[:, :rank].copy_(left)
        self.right[:rank].copy_(right)
        own = torch.arange(rank, device=self.groups.device)
        self.groups[:rank].copy_(own if groups is None else groups)
        self._blank_rows(rank)
        self.kind, self.rank, self.correction = kind, rank, correction
        self.grouped = groups is not None
        if self.dense.shape[0]:
            self.dense = self.dense.new_zeros(0, self.in_features)

    def _blank_rows(self, rank: int) -> None:
        self.left[:, rank:].zero_()
        self.right[rank:].zero_()
        # A blank row adds exactly 0 to the group it is counted in, so it joins one that exists.
        if rank:
            self.groups[rank:].copy_(self.groups[0])
        else:
            self.groups.zero_()

    @torch.no_grad()
    def _resize(self, capacity: int) -> None:
        kept = min(capacity, self.rank)
        with torch.inference_mode(False):
            left = self.left.new_zeros(self.out_features, capacity)
            right = self.right.new_zeros(capacity, self.in_features)
            groups = self.groups.new_zeros(capacity)
        left[:, :kept].copy_(self.left[:, :kept])
        right[:kept].copy_(self.right[:kept])
        groups[:kept].copy_(self.groups[:kept])
        self.left, self.right, self.groups = left, right, groups
        self._blank_rows(kept)

    def _check_factors(self, op: str, names: tuple[str, str], left: Tensor, right: Tensor) -> int:
        rank = right.shape[0] if isinstance(right, Tensor) and right.dim() == 2 else 0
        self._check(op, names[0], left, (self.out_features, rank))
        self._check(op, names[1], right, (rank, self.in_features))
        if self.reserved and rank > self.capacity:
            raise ValueError(
                f"{op}: {names[1]} must have at most the {self.capacity} rows that were reserved, "
                f"got {rank}; reserve more and capture the graph again"
            )
        return rank

    def _check(self, op: str, name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {got}")
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{op}: {name} must be finite, got NaN or infinity")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HookStorage:
        """Move with the model, but keep the compute dtype when the model is cast."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                kept = moved.dtype == buffer.dtype
                self._buffers[name] = moved if kept else buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Shape, kind and rank."""
        rank = f", rank={self.rank}" if self.kind in ("factored", "pair") else ""
        return f"[{self.out_features}, {self.in_features}], {self.kind}{rank}, {self.dtype}"
