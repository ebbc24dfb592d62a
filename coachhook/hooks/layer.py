"""A down-projection with a hook: the base module's output, corrected for the tokens that fire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from coachhook.hooks.cache_state import GateState
from coachhook.hooks.context import GateContext
from coachhook.hooks.gathered import GatheredInput
from coachhook.hooks.storage import CUE_TENSORS, Correction, HookStorage, Kind, StoredHook
from coachhook.ops import (
    Membership,
    Population,
    Prefix,
    Sequence,
    Ungated,
    fuses_products,
    gate_scores,
    hook_output,
    hooked_linear,
)
from coachhook.ops._registry import is_plain_eager

State = Literal["off", "temporary", "validated"]
ScopeKind = Literal["sequence", "prefix", "population", "membership"]
_STATES = ("off", "temporary", "validated")
_SCOPES = ("sequence", "prefix", "population", "membership")
Scope = Sequence | Prefix | Population | Membership | Ungated


@dataclass(frozen=True)
class HookSnapshot:
    """Everything that makes up a hook, made by :meth:`HookedLinear.snapshot`."""

    stored: StoredHook
    state: State
    scope: ScopeKind
    include_padding: bool


def _is_bare_linear(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether calling the module is ``F.linear`` of its weight and bias, and nothing besides.

    Args:
        dtype: of the tokens; under autocast it may be another than the weight's.
    """
    every = torch.nn.modules.module
    return (
        type(module) is nn.Linear
        and module.weight.dtype == dtype
        and is_plain_eager(module.weight, module.bias)
        and "forward" not in vars(module)
        and not (every._global_forward_hooks or every._global_forward_pre_hooks)
        and not (every._global_backward_hooks or every._global_backward_pre_hooks)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )


class HookedLinear(nn.Module):
    """Wraps a module that maps the last dimension linearly, ``P = x W0^T + b``, with a hook.

    Or one that maps it in any other way, as the experts of a block together do, with their output
    for P; if it gives a tuple, the first entry is.

        y = P + Delta x     where the gate fires (state "validated"), or everywhere ("temporary")
        y = P               elsewhere, and everywhere in state "off" or without a Delta

    The base module is called, never copied or changed; it may be an ``nn.Linear``, a ``Conv1D``, a
    quantised or any other module. Parameters, buffers, submodules, ``state_dict`` and every other
    attribute are the base's own, under the same names, as if the wrapper were not there. The
    hook's buffers are not among them: they stay in the compute dtype (float32, or float64 for a
    float64 model) when the model is cast, and move with it between devices.

    Args:
        base: the module to wrap.
        in_features: n.
        out_features: m.
        index: index of the block it belongs to.
        dtype: compute dtype of the hook, float32 or float64.
        device: where the hook's buffers live.
        context: what is known of the running forward; shared by the hooks of a model.
        gathered: makes the input whole where the processes of a tensor-parallel model give slices.

    Attributes:
        scope: what a token is judged against: ``"sequence"``, ``"prefix"``, ``"population"`` or
            ``"membership"``.
        include_padding: whether padding counts as text, as in the published code.
    """

    base: nn.Module
    context: GateContext
    _store: HookStorage

    def __init__(
        self,
        base: nn.Module,
        *,
        in_features: int,
        out_features: int,
        index: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        context: GateContext | None = None,
        gathered: GatheredInput | None = None,
    ) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"HookedLinear: dtype must be float32 or float64, got {dtype}")
        store = HookStorage(in_features, out_features, dtype, torch.device(device or "cpu"))
        # Sharing the registries makes the wrapper transparent; as plain attributes the base and
        # the hook's buffers are registered nowhere a second time.
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = base.__dict__[registry]
        self.__dict__["base"] = base
        self.__dict__["_store"] = store
        self.training = base.training
        self.in_features = in_features
        self.out_features = out_features
        self.index = index
        self.context = context or GateContext()
        self._gathered = gathered
        self.scope: ScopeKind = "sequence"
        self.include_padding = False
        self._state: State = "off"
        self._fits = True

    @property
    def state(self) -> State:
        """``"off"``, ``"temporary"`` (every token takes the hook) or ``"validated"`` (gated)."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        if state not in _STATES:
            raise ValueError(f"state must be one of {', '.join(_STATES)}, got {state!r}")
        self._state = state

    @property
    def alpha(self) -> float:
        """Threshold of the gate; a token fires where ``z >= alpha``."""
        return float(self._store.alpha)

    def set_alpha(self, alpha: float) -> None:
        """Set the threshold in place; infinity never fires.

        Raises:
            ValueError: NaN, which would never fire and could not be lowered again.
        """
        value = float(alpha)
        if value != value:
            raise ValueError("set_alpha: alpha must be a number, got NaN")
        self._store.alpha.fill_(value)

    @property
    def population(self) -> tuple[float, float]:
        """Mean and standard deviation the scope ``population`` judges by."""
        return float(self._store.mean), float(self._store.std)

    def set_scope(
        self,
        kind: ScopeKind,
        include_padding: bool = False,
        population: tuple[float, float] | None = None,
    ) -> None:
        """Choose what a token is judged against.

        Args:
            kind: ``"sequence"``: the tokens of its own sequence, and once a KV cache is in use, the
                prompt, whose statistics are kept beside the cache from the first forward on;
                ``"prefix"``: the tokens before it and itself; ``"population"``: a fixed mean and
                standard deviation; ``"membership"``: which edit's key it matches (needs a pair).
            include_padding: as in the published code, padding counts as text, may fire, and nothing
                is kept for decoding: each forward is judged by itself.
            population: (mean, standard deviation) of the norm over unrelated text, for
                ``"population"``; what was set before stays if None.

        Raises:
            ValueError: unknown kind, or a standard deviation that is not positive and finite.
        """
        if kind not in _SCOPES:
            raise ValueError(f"set_scope: kind must be one of {', '.join(_SCOPES)}, got {kind!r}")
        if population is not None:
            mean, std = (float(value) for value in population)
            if not (abs(mean) < float("inf") and 0 < std < float("inf")):
                raise ValueError(
                    "set_scope: population must be a finite mean and a positive standard "
                    f"deviation, got {population!r}"
                )
            self._store.mean.fill_(mean)
            self._store.std.fill_(std)
        self.scope = kind
        self.include_padding = bool(include_padding)
        self._note_fit()

    @property
    def storage(self) -> Kind:
        """``"empty"``, ``"dense"``, ``"factored"`` or ``"pair"``."""
        return self._store.kind

    @property
    def rank(self) -> int:
        """Rows of the factor or pair in use, 0 when empty; min(m, n) for a dense Delta."""
        if self._store.kind == "dense":
            return min(self.in_features, self.out_features)
        return self._store.rank

    def delta(self) -> Tensor:
        """A copy of Delta ``[m, n]`` in the compute dtype; zeros when empty."""
        return self._store.delta()

    def operand(self) -> Tensor | tuple[Tensor, Tensor]:
        """Delta as the ops take it, ``[m, n]`` or (``[m, r]``, ``[r, n]``): the buffers' views."""
        return self._store.operand()

    @property
    def correction(self) -> Correction:
        """What a pair adds, ``"sum"`` or ``"own"``, see :meth:`set_pair`."""
        return self._store.correction

    def cues(self) -> dict[str, Tensor]:
        """``cues [N, n]``, ``limits``, ``reaches`` and ``gaps [N]``, for :class:`Membership`.

        {} where there are none.
        """
        known = self._store.key_cues()
        return {} if known is None else dict(zip(CUE_TENSORS, known, strict=True))

    def set_delta(self, delta: Tensor) -> None:
        """Store ``Delta [m, n]`` densely, copied into the hook's buffers.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: another shape, NaN or infinity, or rows were reserved for factors.
        """
        self._store.set_dense(delta)
        self._note_fit()

    def set_factored(self, q: Tensor, s: Tensor) -> None:
        """Store ``Delta = Q S``, copied: Q ``[m, r]`` with orthonormal columns, S ``[r, n]``.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: shapes that do not fit, NaN or infinity, columns not of unit norm, or more
                rows than were reserved.
        """
        self._store.set_factored(q, s)
        self._note_fit()

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
        """Store ``Delta = V A^T``, copied, for the scope ``membership``.

        An edit with a cue fires only in the ``reaches[e]`` columns after a real token of its
        sequence with ``cues[e] . x >= limits[e]``, or after the second of two such tokens
        ``gaps[e]`` columns apart. What was seen is kept beside a KV cache, as are
        the statistics of the scope ``prefix``; setting a pair forgets it, also for caches in use.

        Args:
            v: V ``[m, N]``, one target per key.
            at: A^T ``[N, n]``.
            groups: int64 ``[N]`` in 0..N-1; keys of one edit share a group. None: each its own.
            correction: add all keys' targets by their coefficients (``"sum"``) or only those of the
                edit that fired (``"own"``).
            cues: ``[N, n]``, floating, one cue per edit; with ``"own"`` and without groups only.
            limits: ``[N]``, floating, comes with cues; -inf for an edit that waits for nothing.
            reaches: int32 ``[N]``, may come with cues; 63 and more: from the cue itself to the
                sequence's end, as without.
            gaps: int32 ``[N]``, may come with reaches; at most 7 (taken for 7 beyond), 0 where one
                token is the cue, as without. Where reach and gap are 63 or more together, it is.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: shapes that do not fit, NaN or infinity (in limits: NaN), groups out of
                range, an unknown correction, cues where there can be none, more rows than were
                reserved, or cues where the rows were reserved without.
        """
        self._store.set_pair(v, at, groups, correction, cues, limits, reaches, gaps)
        self._note_fit()

    def clear(self) -> None:
        """Forget Delta; alpha, scope and state stay."""
        self._store.clear()
        self._note_fit()

    def reserve(self, rank: int, cues: bool = False) -> None:
        """Fix the addresses of the hook's buffers, with room for ``rank`` rows.

        From then on the forward reads all reserved rows, the unused ones being zero, and a compiled
        or captured graph stays valid while batches of edits come and go.

        Args:
            rank: how many rows.
            cues: whether pairs may have cues from then on; pairs without are taken too, with the
                correction ``"own"`` and without groups. The forward then looks at every row's cue.

        Raises:
            ValueError: ``rank`` is below the rank in use, Delta is dense, or ``cues`` and the pair
                in use has groups or another correction than ``"own"``.
        """
        self._store.reserve(rank, cues)

    def snapshot(self) -> HookSnapshot:
        """Copy Delta, alpha, state and scope, to be brought back by :meth:`restore`."""
        return HookSnapshot(self._store.snapshot(), self._state, self.scope, self.include_padding)

    def restore(self, snapshot: HookSnapshot) -> None:
        """Bring a :meth:`snapshot` back bit for bit."""
        self._store.restore(snapshot.stored)
        self._state, self.scope = snapshot.state, snapshot.scope
        self.include_padding = snapshot.include_padding
        self._note_fit()

    def _note_fit(self) -> None:
        # Noted when something changes, so that a compiled graph need not look at the storage.
        paired, empty = self._store.kind == "pair", self._store.kind == "empty"
        self._fits = empty or paired == (self.scope == "membership")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Output of the base for ``x [B, T, n]`` or ``[B T, n]``, with the hook where it fires.

        In a tensor-parallel model ``x`` is this process's slice and the base's output the sum over
        the processes. The hook reads the whole input: each process then decides by the same
        numbers, and adds the same correction once.

        Raises:
            ValueError: the input does not fit the forward it is part of, or Delta is not stored in
                the form the scope needs.
        """
        if self._state == "off" or self.context.disabled or not self._store.active:
            return self.base(x, *args, **kwargs)
        # None: the op computes it together with the hook.
        output: Any = None
        others: tuple[Any, ...] | None = None
        if args or kwargs or not (fuses_products(x) and _is_bare_linear(self.base, x.dtype)):
            output = self.base(x, *args, **kwargs)
            if isinstance(output, tuple):  # of experts, with what their router says
                output, others = output[0], output[1:]
        if self._gathered is not None:
            x = self._gathered(x)
        context, packing, page = self.context, self.context.packing, self.context.forward.page
        rows, columns = self._grid(x, None if packing is None else packing[1], page is not None)
        cu_seqlens = None if packing is None else packing[0].to(x.device)
        known: Tensor | None = None
        if page is not None and self._keeps_cues_in_blocks():
            cu_seqlens, known = page.open(self.index, self._gaps, self._store.version)
        grid = (rows, columns) if cu_seqlens is None else (columns,)
        tokens = x.reshape(*grid, self.in_features)
        mask, scope = None, cast("Scope", Ungated())
        if self._state == "validated":
            # A paged cache holds no padding.
            mask = None if page is not None else self._mask(x, rows, columns)
            scope = self._scope(tokens, mask, known)
        operand, alpha = self._store.operand(), self._store.alpha
        gate: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens, "scope": scope}
        if output is None:
            base = cast("nn.Linear", self.base)
            y, z = hooked_linear(tokens, base.weight, base.bias, operand, alpha, **gate)
        else:
            on_grid = output.reshape(*grid, self.out_features)
            y, z = hook_output(on_grid, tokens, operand, alpha, **gate)
        if page is not None and known is not None:
            page.close(self.index, known, self._gaps, self._store.version)
        for sink in list(context.sinks.values()):
            seen = z.detach().view(rows, columns)
            fired = torch.ones_like(seen, dtype=torch.bool)
            if self._state != "temporary":
                fired = seen >= self._store.alpha
                if isinstance(scope, Membership) and scope.cues is not None:
                    fired &= ~seen.isneginf()
            sink.append((self.index, seen, fired))
        shape = (*x.shape[:-1], self.out_features) if output is None else output.shape
        y = y.reshape(shape)
        return y if others is None else (y, *others)

    def _grid(self, x: Tensor, packed: int | None, paged: bool = False) -> tuple[int, int]:
        """``(B, T)`` of the input; some models flatten it before their MLP.

        Args:
            x: the input.
            packed: how many tokens it must have, in one row.
            paged: whether the model's input is one row.
        """
        if x.dim() == 3:
            rows, columns = x.shape[0], x.shape[1]
        elif x.dim() == 2:
            known = None if paged else self.context.forward.shape
            flattened = known is not None and known[0] * known[1] == x.shape[0]
            rows, columns = cast("tuple[int, int]", known) if flattened else (1, x.shape[0])
        else:
            raise ValueError(f"forward: x must be [B, T, n] or [B T, n], got {list(x.shape)}")
        if packed is not None and (rows != 1 or columns != packed):
            raise ValueError(
                f"forward: x must be one row of the {packed} tokens that cu_seqlens cuts up, got "
                f"{rows} x {columns}"
            )
        return rows, columns

    def _mask(self, x: Tensor, rows: int, columns: int) -> Tensor | None:
        mask = self.context.forward.mask
        if mask is None or self.include_padding:
            return None
        if mask.shape != (rows, columns):
            raise ValueError(
                f"forward: x must hold the {list(mask.shape)} tokens of the model's input, got "
                f"{rows} x {columns}"
            )
        return mask.to(x.device)

    def _keeps_cues_in_blocks(self) -> bool:
        """Whether what was seen of cues is kept beside the blocks of a paged cache."""
        return (
            self._state == "validated"
            and self.scope == "membership"
            and not self.include_padding
            and not self.context.packings
            and self._store.key_cues() is not None
        )

    @property
    def _edits(self) -> int:
        return self._store.operand()[1].shape[0]

    @property
    def _gaps(self) -> Tensor:
        return self._store.gaps[: self._edits]

    def _scope(self, tokens: Tensor, mask: Tensor | None, known: Tensor | None) -> Scope:
        store = self._store
        if not self._fits:
            needed = "a pair (set_pair)" if self.scope == "membership" else "dense or factored"
            raise ValueError(
                f"forward: the scope {self.scope!r} needs Delta stored as {needed}, got "
                f"{store.kind!r} in layer {self.index}"
            )
        if self.scope == "membership":
            cues = store.key_cues()
            if cues is None:
                return Membership(store.key_groups(), store.correction)
            if known is None:
                known = self._seen_cues(tokens)
            filters, limits, reaches, gaps = cues
            return Membership(None, "own", filters, limits, known, reaches, gaps)
        if self.scope == "population":
            return Population(store.mean, store.std)
        state = self.context.gate_state(kept=not self.include_padding)
        if state is None:
            return Sequence() if self.scope == "sequence" else Prefix()
        rows = tokens.shape[0]
        key = (self.index, self.scope)
        kept = state.get(key, rows)
        if self.scope == "sequence":
            if kept is None:
                return Sequence(state.open(key, rows, tokens.device))
            kept = kept.to(tokens.device)
            return Population(kept[:, 1], (kept[:, 2] / (kept[:, 0] - 1)).sqrt())
        if kept is None:
            kept = state.open(key, rows, tokens.device)
        self._remember(state, tokens, mask, kept)
        return Prefix(kept)

    def _seen_cues(self, tokens: Tensor) -> Tensor | None:
        """State of the cues beside the forward's cache; None where nothing carries it on."""
        state = self.context.gate_state(kept=not self.include_padding)
        if state is None:
            return None
        key, store = (self.index, self.scope), self._store
        return state.cues(key, tokens.shape[0], self._edits, store.version, store.gaps)

    def _remember(
        self, state: GateState, tokens: Tensor, mask: Tensor | None, moments: Tensor
    ) -> None:
        """Prepare for a crop of the cache, as speculative decoding does after every guess."""
        if torch.compiler.is_compiling() or not self.context.can_crop:
            state.histories.pop(self.index, None)
            return
        history = state.history(self.index, moments)
        if tokens.shape[1] == 1:
            history.before = moments.clone()
        else:
            plain = Population(0.0, 1.0)
            norms = gate_scores(tokens, self._store.operand(), mask=mask, scope=plain)
            history.append(norms)

    # Everything below keeps the wrapper transparent: the base answers under its own names.

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__:
                raise
            return getattr(self.__dict__["base"], name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own entries, under its own names."""
        return self.base.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.base._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> HookedLinear:
        """Set the base's mode."""
        self.base.train(mode)
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HookedLinear:
        self.base._apply(fn, recurse)
        self._store._apply(fn)
        weight = next((p for p in self.base.parameters() if p.is_floating_point()), None)
        if weight is not None:
            wide = weight.dtype == torch.float64
            self._store.set_dtype(torch.float64 if wide else torch.float32)
        return self

    def extra_repr(self) -> str:
        """What is wrapped and what the hook holds."""
        hook = f"layer {self.index}, {self._state}, {self.scope}, {self._store.extra_repr()}"
        return f"{self.base}, {hook}"
