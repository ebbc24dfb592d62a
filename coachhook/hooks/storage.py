"""What a running hook reads (Delta, alpha, population statistics), in buffers updated in place."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from coachhook.ops.hooked_linear.cues import NEVER

Kind = Literal["empty", "dense", "factored", "pair"]
Correction = Literal["sum", "own"]

_SMALLEST_CAPACITY = 16
# What an edit of a pair waits for, as Membership names it.
CUE_TENSORS = ("cues", "limits", "reaches", "gaps")
# Columns of Q are orthonormal to rounding; a V passed by mistake is far off.
_UNIT_NORM_TOLERANCE = 1e-2
# Of all hooks, and not those of another process, whose caches may be unpickled here: what was kept
# for some edits is never taken for others'.
_VERSIONS = itertools.count(secrets.randbits(62))


@dataclass(frozen=True)
class StoredHook:
    """A copy of everything :class:`HookStorage` holds, made by ``snapshot`` for ``restore``."""

    kind: Kind
    rank: int
    grouped: bool
    correction: Correction
    tensors: dict[str, Tensor]
    cued: bool = False


class HookStorage(nn.Module):
    """Delta ``[m, n]`` of one layer in preallocated buffers that are updated in place.

    ``left [m, capacity]`` and ``right [capacity, n]`` hold the factors (Q, S) or the pair
    (V, A^T), ``dense [m, n]`` holds Delta itself, ``cues [capacity, n]``, and ``limits``,
    ``reaches`` and ``gaps [capacity]`` what the edits of a pair wait for; what is not in use takes
    no memory. The capacity at least doubles whenever it is exceeded. After :meth:`reserve` it is
    fixed, and readers get the whole capacity: unused rows are zero (and never armed) and change
    nothing, so that a compiled or captured graph stays valid from batch to batch. ``version`` is
    another number after each change of Delta, in a tensor for the same reason.

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
    cues: Tensor
    limits: Tensor
    reaches: Tensor
    gaps: Tensor
    version: Tensor
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
        self.cued = False
        self.reserved_cues = False
        # Buffers made in inference mode could not be updated outside of it.
        with torch.inference_mode(False):
            for name, value in (("alpha", float("inf")), ("mean", 0.0), ("std", 1.0)):
                self.register_buffer(name, torch.tensor(value, dtype=dtype, device=device))
            m, n = out_features, in_features
            for name, shape in (("dense", (0, n)), ("left", (m, 0)), ("right", (0, n))):
                self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
            self.register_buffer("groups", torch.zeros(0, dtype=torch.int64, device=device))
            self.register_buffer("cues", torch.zeros(0, n, dtype=dtype, device=device))
            self.register_buffer("limits", torch.zeros(0, dtype=dtype, device=device))
            for name in ("reaches", "gaps"):
                self.register_buffer(name, torch.zeros(0, dtype=torch.int32, device=device))
            self.register_buffer("version", torch.zeros((), dtype=torch.int64, device=device))

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

    def key_cues(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Cue ``[r, n]``, limit, reach and gap ``[r]`` of each key, as :data:`CUE_TENSORS`.

        None without cues.
        """
        if self.reserved_cues:
            return self.cues, self.limits, self.reaches, self.gaps
        if not self.cued:
            return None
        rank = self.rank
        return self.cues[:rank], self.limits[:rank], self.reaches[:rank], self.gaps[:rank]

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
        self.kind, self.rank, self.grouped, self.cued = "empty", 0, False, False
        self._note_change()

    def reserve(self, rank: int, cues: bool = False) -> None:
        """Fix the capacity at ``rank`` rows (or what it has already) and all addresses with it.

        Args:
            rank: rows to have room for.
            cues: whether edits are to have cues; what was reserved for cues stays so.

        Raises:
            ValueError: ``rank`` is not positive or below the rank in use, Delta is dense, or there
                are to be cues and the pair in use is one that can have none.
        """
        self.check_reserve(rank, cues)
        if rank > self.capacity:
            self._resize(rank)
        self.reserved = True
        if (cues or self.cued) and not self.reserved_cues:
            self._make_room_for_cues()
            self.reserved_cues = True

    def check_reserve(self, rank: int, cues: bool = False) -> None:
        """Raise what :meth:`reserve` would."""
        if not isinstance(rank, int) or rank < max(1, self.rank):
            raise ValueError(
                f"reserve: rank must be an integer of at least {max(1, self.rank)}, got {rank!r}"
            )
        if self.kind == "dense":
            raise ValueError("reserve: Delta must be stored in factors, got a dense Delta")
        if cues and self.kind == "pair":
            self._check_cueable("reserve", self.grouped, self.correction)

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
        self.cued = False
        self._resize(0)
        self._note_change()

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
        self,
        v: Tensor,
        at: Tensor,
        groups: Tensor | None = None,
        correction: Correction = "sum",
        cues: Tensor | None = None,
        limits: Tensor | None = None,
        reaches: Tensor | None = None,
        gaps: Tensor | None = None,
    ) -> None:
        """Copy in ``Delta = V A^T``, V ``[m, N]`` and A^T ``[N, n]``, one row per key.

        Cues ``[N, n]`` come with limits ``[N]``, with the correction "own" and without groups;
        int32 reaches ``[N]`` may come with them, and int32 gaps ``[N]`` with those.
        """
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
        self._check_whole("set_pair", "reaches", rank, reaches, "cues", cues)
        self._check_whole("set_pair", "gaps", rank, gaps, "reaches", reaches)
        self._check_cues("set_pair", rank, cues, limits)
        self._check_room("set_pair", cues is not None, groups is not None, correction)
        self._fill("pair", v, at, groups, correction, cues, limits, reaches, gaps)

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
        if self.cued:
            tensors |= {name: getattr(self, name)[:rank] for name in CUE_TENSORS}
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        return StoredHook(self.kind, rank, self.grouped, self.correction, copies, self.cued)

    @torch.no_grad()
    def restore(self, stored: StoredHook) -> None:
        """Bring back a :meth:`snapshot`, into the buffers as they are now.

        Raises:
            ValueError: its pair has cues and the rows were reserved without, or the other way
                round it can have none.
        """
        tensors = stored.tensors
        if stored.kind == "dense":
            self.set_dense(tensors["dense"])
        elif stored.kind == "empty":
            self.clear()
        else:
            if stored.kind == "pair":
                self._check_room("restore", stored.cued, stored.grouped, stored.correction)
            groups = tensors["groups"] if stored.grouped else None
            cues = [tensors.get(name) for name in CUE_TENSORS]
            left, right = tensors["left"], tensors["right"]
            self._fill(stored.kind, left, right, groups, stored.correction, *cues)
        self.correction = stored.correction
        for name in ("alpha", "mean", "std"):
            getattr(self, name).copy_(tensors[name])

    @torch.no_grad()
    def _fill(
        self,
        kind: Kind,
        left: Tensor,
        right: Tensor,
        groups: Tensor | None,
        correction: Correction,
        cues: Tensor | None = None,
        limits: Tensor | None = None,
        reaches: Tensor | None = None,
        gaps: Tensor | None = None,
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
        self.kind, self.rank, self.correction = kind, rank, correction
        self.grouped, self.cued = groups is not None, cues is not None
        if cues is not None and limits is not None:
            self._make_room_for_cues()
            self.cues[:rank].copy_(cues)
            self.limits[:rank].copy_(limits)
            if reaches is None:
                self.reaches[:rank].fill_(NEVER)
            else:
                self.reaches[:rank].copy_(reaches)
            if gaps is None:
                self.gaps[:rank].zero_()
            else:
                self.gaps[:rank].copy_(gaps)
        elif self.reserved_cues:
            self._arm_rows(rank)
        elif self.cues.shape[0]:
            self._allocate_cues(0)
        self._blank_rows(rank)
        self._note_change()
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
        # The coefficient of a blank row is 0, which may be the largest: it is never armed.
        self.cues[rank:].zero_()
        self.limits[rank:].fill_(float("inf"))
        self.reaches[rank:].fill_(NEVER)
        self.gaps[rank:].zero_()

    def _allocate_cues(self, capacity: int) -> None:
        with torch.inference_mode(False):
            self.cues = self.right.new_zeros(capacity, self.in_features)
            self.limits = self.right.new_zeros(capacity)
            self.reaches = self.right.new_zeros(capacity, dtype=torch.int32)
            self.gaps = self.right.new_zeros(capacity, dtype=torch.int32)

    def _arm_rows(self, rank: int) -> None:
        """Cues of edits that wait for none."""
        self.cues[:rank].zero_()
        self.limits[:rank].fill_(float("-inf"))
        self.reaches[:rank].fill_(NEVER)
        self.gaps[:rank].zero_()

    @torch.no_grad()
    def _make_room_for_cues(self) -> None:
        """A cue for each row there is, those in use armed always."""
        if self.cues.shape[0] == self.capacity:
            return
        self._allocate_cues(self.capacity)
        self._arm_rows(self.rank)
        self._blank_rows(self.rank)

    def _note_change(self) -> None:
        self.version.fill_(next(_VERSIONS))

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
        if self.cues.shape[0]:
            before = {name: getattr(self, name) for name in CUE_TENSORS}
            self._allocate_cues(capacity)
            for name, old in before.items():
                getattr(self, name)[:kept].copy_(old[:kept])
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

    @staticmethod
    def _check_whole(op: str, name: str, rank: int, value: Any, owner: str, owned: Any) -> None:
        """Checks whole numbers, one for each row, that are given together with ``owner`` only."""
        if value is None:
            return
        if owned is None:
            got = "a tensor" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{op}: {name} must be None without {owner}, got {got}")
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be an int32 tensor, got {type(value).__name__}")
        if value.dtype != torch.int32 or value.shape != (rank,):
            raise ValueError(
                f"{op}: {name} must be int32 [{rank}], got {value.dtype} {list(value.shape)}"
            )

    def _check_cues(self, op: str, rank: int, cues: Tensor | None, limits: Tensor | None) -> None:
        if cues is None and limits is None:
            return
        for name, value, other in (("cues", cues, "limits"), ("limits", limits, "cues")):
            if value is None:
                raise ValueError(f"{op}: {name} must be given with {other}, got None; give both")
        self._check(op, "cues", cues, (rank, self.in_features))
        self._check(op, "limits", limits, (rank,), finite=False)
        if bool(cast("Tensor", limits).isnan().any()):
            raise ValueError(f"{op}: limits must be numbers or -inf (always armed), got NaN")

    def _check_room(self, op: str, cued: bool, grouped: bool, correction: Correction) -> None:
        """Whether a pair may have cues, and whether its rows were reserved with or without."""
        if cued and self.reserved and not self.reserved_cues:
            raise ValueError(
                f"{op}: cues must be None in a hook whose rows were reserved without room for "
                "them, got cues; reserve(rank, cues=True) and capture the graph again"
            )
        if cued or self.reserved_cues:
            self._check_cueable(op, grouped, correction)

    def _check_cueable(self, op: str, grouped: bool, correction: Correction) -> None:
        if grouped or correction != "own":
            got = "groups" if grouped else repr(correction)
            raise ValueError(
                f"{op}: correction must be 'own', without groups, where edits have cues or room "
                f"for them, got {got}; give every edit one key, or leave the cues out"
            )

    def _check(
        self, op: str, name: str, tensor: Any, shape: tuple[int, ...], finite: bool = True
    ) -> None:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {got}")
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")
        if finite and not bool(torch.isfinite(tensor).all()):
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
