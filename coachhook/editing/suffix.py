"""The network above one block, run by itself on captured inputs.

Everything below the last edited layer is constant while targets are optimised, so it runs once;
only the blocks above are run again, and differentiated, at every step, and of these only the tokens
that a change can reach (:mod:`coachhook.editing.live`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from coachhook.editing.live import Live, Recorder, first_tensor, named, with_cache
from coachhook.editing.packing import MODEL_COST, Kept, group_cost, merge, pack
from coachhook.editing.replay import Replayed
from coachhook.models import (
    ForwardEnded,
    ModelDescription,
    check_gradients,
    fused_activations,
    get_submodule,
    is_linear_like,
    linear_shape,
    partial_forward,
    passage,
    plain_parts,
    skipped,
)

_log = logging.getLogger(__name__)
# What a block may make of a KV cache that it does not expect.
_REFUSALS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Tokens of which is seen what a run keeps.
_FEW = 32
# Largest relative difference between the whole suffix and its live part that rounding explains. A
# wrong mask or position gives one of order 1; some families compute attention in float32 always.
_AGREE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}


def _select(value: Any, rows: Tensor, batch: int) -> Any:
    """``value`` for a subset of the batch rows; what has no batch dimension is left as it is."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() >= 2 and value.shape[0] == batch else value
    if isinstance(value, tuple | list):
        return type(value)(_select(v, rows, batch) for v in value)
    if isinstance(value, dict):
        selected = {k: _select(v, rows, batch) for k, v in value.items()}
        alibi = value.get("alibi")
        if isinstance(alibi, Tensor):  # [B H, 1, T]
            selected["alibi"] = alibi.view(batch, -1, *alibi.shape[1:])[rows].flatten(0, 1)
        return selected
    return value


def _manner(module: nn.Module) -> tuple[Any, ...]:
    """How a module runs, as far as that shows: equal as long as nobody changed it."""
    return (
        module,
        vars(module).get("forward"),
        # Numbers of hooks are not given twice.
        *module._forward_pre_hooks,
        None,
        *module._forward_hooks,
    )


def _form(value: Any) -> Any:
    """The layout of blocks' arguments, whatever is in them."""
    if isinstance(value, Tensor):
        return value.dtype, value.dim()
    if isinstance(value, tuple | list):
        return tuple(map(_form, value))
    if isinstance(value, dict):
        return tuple((name, _form(v)) for name, v in value.items())
    return type(value)


def _carried(arguments: dict[str, Any], given: Any) -> dict[str, int]:
    """Which arguments of a block are tensors that the block before gave beside its hidden state."""
    if not isinstance(given, tuple):
        return {}
    return {
        name: place
        for name, value in arguments.items()
        for place, other in enumerate(given)
        if place and value is other and isinstance(value, Tensor)
    }


def _relative(expected: Tensor, got: Tensor) -> float:
    return float((expected - got).detach().double().norm() / expected.detach().double().norm())


@dataclass
class _Below:
    """Output of the block below the suffix, run beforehand.

    Attributes:
        hidden: ``[B, T, d]``.
        rest: what the block gives besides; None where it gives a tensor alone.
        own: as of :class:`Captured`.
    """

    hidden: Tensor
    rest: tuple[Any, ...] | None
    own: Tensor | None

    def as_given(self, output: Any) -> Any:
        """The hidden state in the form in which the block gave another."""
        return self.hidden if isinstance(output, Tensor) else (self.hidden, *output[1:])

    @property
    def only_hidden(self) -> bool:
        """Whether nothing that depends on the batch is given besides."""
        return not any(isinstance(value, Tensor) for value in self.rest or ())


@dataclass
class Captured:
    """One batch as it enters the suffix.

    Attributes:
        hidden: output of the block below, ``[B, T, d]``, model dtype.
        calls: positional (without the hidden state) and keyword arguments of each block above.
        kept: what a run of the live tokens alone needs; None where there is only the whole run.
        own: output of the last edited down-projection ``[B, T, d]``, where it is not added to the
            residual as it is; not in parts of the batch.
        carried: for each block the arguments that are entries of what the block before gives, by
            name, and where there.
    """

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    kept: Kept | None = None
    own: Tensor | None = None
    carried: list[dict[str, int]] = field(default_factory=list)

    def select(self, rows: Tensor) -> Captured:
        """The rows given by an index tensor ``[R]``, for runs of all their tokens."""
        batch = self.hidden.shape[0]
        calls = [(_select(a, rows, batch), _select(k, rows, batch)) for a, k in self.calls]
        return Captured(self.hidden[rows], calls, carried=self.carried)


class Suffix:
    """Blocks ``layer + 1 ..``, final norm and head of a model.

    Attributes:
        replays: whether runs of the live tokens may be captured in CUDA graphs; None before a run
            was watched.
        passed: what an output of the last edited down-projection becomes before it is added to the
            residual; None where it stays as it is.
    """

    replays: bool | None = None

    def __init__(self, model: nn.Module, description: ModelDescription, layer: int) -> None:
        self._base = get_submodule(model, description.base_model_path)
        self._below = [
            get_submodule(model, entry.block_path) for entry in description.layers[: layer + 1]
        ]
        self._first = layer + 1
        edited = description.layers[layer]
        self._down = get_submodule(model, edited.path)
        self.passed = None if edited.adds_directly else passage(model, edited)
        self._above: list[nn.Module] = [
            get_submodule(model, entry.block_path) for entry in description.layers[layer + 1 :]
        ]
        self._norm = get_submodule(model, description.final_norm_path)
        self._head = get_submodule(model, description.lm_head_path)
        # That of activations: weights may be quantised, and then no parameters either.
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._element_size = dtype.itemsize
        blocks = (module for block in self._above for module in block.modules())
        check_gradients([*blocks, *self._head.modules()], dtype)
        self._max_positions = description.max_positions
        self._scale, self._cap = description.logit_scale, description.logit_cap
        self._keeps = self._narrows = self._packs = True
        self._sparse = any(entry.experts for entry in description.layers[layer + 1 :])
        self._held: int | None = None
        # Of each form of capture, the most tokens of a row that live runs were found to agree for.
        self._agreed: dict[Any, int] = {}
        self._weights = [
            p for module in (*self._above, self._norm, self._head) for p in module.parameters()
        ]
        if edited.post_norm_path is not None:
            self._weights += get_submodule(model, edited.post_norm_path).parameters()
        self._manner = [
            getattr(getattr(self._base, "config", None), "_attn_implementation", None),
            *(_manner(module) for block in self._above for module in block.modules()),
            *((id(weight), weight.dtype, weight.device) for weight in self._weights),
        ]

    def recall(self, earlier: Suffix) -> None:
        """Takes over what was seen to hold in an earlier one, if it ran in the same manner.

        That is the same blocks with the same hooks, replaced forwards, kind of attention, dtypes
        and devices. A refusal is forgotten, but for that of what no longer would be compared.
        """
        if self._manner == earlier._manner:
            self.replays = earlier.replays or None
            self._agreed, self._narrows = earlier._agreed, earlier._narrows
            self._held = earlier._held

    @property
    def keeps(self) -> bool:
        """Whether runs of the live tokens alone are possible, as far as is known."""
        return self._keeps and bool(self._above)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No weight of the suffix asks for a gradient, so that no input is kept for one."""
        weights = [weight for weight in self._weights if weight.requires_grad]
        try:
            for weight in weights:
                weight.requires_grad_(False)
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(True)

    def fused(self) -> AbstractContextManager[None]:
        """Activations of the blocks above run in one kernel each: no key is read there."""
        return fused_activations(nn.ModuleList(self._above), narrow=True)

    @property
    def bytes_per_token(self) -> int:
        """About what one differentiated token holds: what the matrices of the blocks read and give.

        Twice that, as activations, norms and attention keep about as much again. Which experts a
        token reads, and what is kept of the others, no shape says: with experts a few tokens are
        run, and what is kept of them is taken twice.
        """
        if self._sparse:
            if self._held is None:
                self._held = self._measured()
            return 2 * self._held
        modules = [module for block in self._above for module in block.modules()]
        widths = [sum(linear_shape(module)) for module in modules if is_linear_like(module)]
        return 2 * sum(widths) * self._element_size

    def _measured(self) -> int:
        """Bytes that a differentiated run of a few tokens keeps for each of them."""
        device = next(self._base.parameters()).device
        _, vocabulary = linear_shape(self._head)
        count = _FEW if self._max_positions is None else min(_FEW, self._max_positions)
        ids = torch.arange(count, device=device)[None] % vocabulary
        captured = self.capture(ids, torch.ones_like(ids))
        weights = (t for m in self._above for t in (*m.parameters(), *m.buffers()))
        there = {part.untyped_storage().data_ptr() for t in weights for part in plain_parts(t)}
        kept: dict[int, int] = {}

        def note(value: Tensor) -> Tensor:
            for part in plain_parts(value.detach()):
                storage = part.untyped_storage()
                if storage.data_ptr() not in there:
                    kept[storage.data_ptr()] = storage.nbytes()
            return value

        hidden = captured.hidden.clone().requires_grad_(True)
        with torch.enable_grad(), self.frozen():
            with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
                _, last = self._run(captured, hidden, -1)
        del last
        return sum(kept.values()) // ids.numel()

    @property
    def bytes_per_kept_token(self) -> int:
        """About what a token takes whose keys and values are needed, differentiated or not.

        They are there three times: of all tokens, of those before a run's live ones, and of all
        again beside the live ones' own. A block's are as wide as its hidden state at most.
        """
        width, _ = linear_shape(self._head)
        return 6 * width * len(self._above) * self._element_size

    @torch.no_grad()
    def capture(
        self,
        ids: Tensor,
        mask: Tensor,
        *,
        apart: int | None = None,
        keep: bool = False,
        loss_layer: int | None = None,
    ) -> Captured:
        """Runs the model once on ``ids``, ``mask`` (``[B, T]``), keeping what enters the suffix.

        Args:
            ids: token ids, padded at the right.
            mask: 1 for tokens, 0 for padding.
            apart: so many rows at a time, padded to the longest of them, go through the blocks up
                to the layer; for a layer that looks at padding. None: all rows at once.
            keep: prepare for runs from some token on, see :meth:`select`. Where the blocks take no
                KV cache in a known way, or the two runs differ, there will be whole runs only.
            loss_layer: block whose output such runs will be asked for, besides the last.
        """
        below = None if apart is None else self._run_below(ids, mask, apart)
        if keep and self._above and self._keeps:
            loss_index = self._index(loss_layer)
            try:
                captured = self._captured(ids, mask, below)
                form = (loss_index, apart is None, _form(captured.calls))
                if ids.shape[1] <= self._agreed.get(form, 0):
                    return captured
                difference = self._difference(captured, loss_index)
                if difference <= _AGREE[captured.hidden.dtype]:
                    self._agreed[form] = ids.shape[1]
                    return captured
                reason = f"relative difference {difference:.1e}"
            except torch.cuda.OutOfMemoryError:
                raise
            except _REFUSALS as error:
                reason = f"{type(error).__name__}: {error}"
            _log.info("all tokens of the prompts are run at every step (%s)", reason)
            self._keeps = False
        return self._capture(ids, mask, below, [])

    def _captured(self, ids: Tensor, mask: Tensor, below: _Below | None) -> Captured:
        """A capture with what runs of the live tokens need, rows of about one length at a time."""

        def recorders() -> list[Recorder]:
            return [Recorder(ends=block is self._above[-1]) for block in self._above]

        lengths = mask.sum(1)
        groups: list[list[int]] = []
        if below is None and self._packs:
            groups = pack(lengths.tolist(), MODEL_COST * group_cost(ids.device))
        if len(groups) > 1:
            parts = []
            for group in groups:
                width = int(lengths[group].max())
                part = self._capture(ids[group, :width], mask[group, :width], None, recorders())
                assert part.kept is not None
                parts.append(part.kept)
            try:
                kept = merge(parts, groups, lengths)
            except TypeError as error:
                _log.info("prompts of all lengths are padded together (%s)", error)
                self._packs = False
            else:
                calls = [((), call) for call in kept.calls]
                return Captured(kept.hidden, calls, kept, kept.own, [{} for _ in calls])
        return self._capture(ids, mask, below, recorders())

    def _run_below(self, ids: Tensor, mask: Tensor, apart: int) -> _Below:
        """Output of the block below, some rows at a time; zero beyond their width."""
        parts: list[Tensor] = []
        own: list[Tensor] = []
        rest: tuple[Any, ...] | None = None

        def take(_module: nn.Module, _args: Any, output: Any) -> None:
            nonlocal rest
            parts.append(first_tensor(output).detach())
            rest = None if isinstance(output, Tensor) else tuple(output[1:])
            raise ForwardEnded

        for rows, here in zip(ids.split(apart), mask.split(apart), strict=True):
            width = int(here.sum(1).max())
            with partial_forward(*self._watching(own), self._below[-1].register_forward_hook(take)):
                self._base(
                    input_ids=rows[:, :width], attention_mask=here[:, :width], use_cache=False
                )

        def whole(parts: list[Tensor]) -> Tensor:
            return torch.cat([pad(part, (0, 0, 0, ids.shape[1] - part.shape[1])) for part in parts])

        return _Below(whole(parts), rest, whole(own) if own else None)

    def _watching(self, own: list[Tensor]) -> list[RemovableHandle]:
        """Has the outputs of the last edited down-projection put down where they are wanted."""
        if self.passed is None:
            return []

        def take(_module: nn.Module, _args: Any, output: Any) -> None:
            own.append(first_tensor(output).detach())

        return [self._down.register_forward_hook(take)]

    def _capture(
        self,
        ids: Tensor,
        mask: Tensor,
        below: _Below | None,
        recorders: list[Recorder],
    ) -> Captured:
        found: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        carried: list[dict[str, int]] = []
        given: Any = None  # by the block before
        entering: list[Tensor] = []
        own = [] if below is None or below.own is None else [below.own]

        def see(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                hidden = args[:1] or (kwargs["hidden_states"],)
                kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                found[index] = (args[1:], kwargs)
                carried.append(_carried(named(module, found[index]), given))
                if not recorders:
                    return None
                if carried[-1]:
                    raise TypeError(
                        f"live: a block must read its hidden state alone, got {carried}"
                    )
                return hidden, with_cache(module, named(module, found[index]), recorders[index])

            return hook

        def take(_module: nn.Module, _args: Any, output: Any) -> Any:
            if below is not None:
                output = below.as_given(output)
            entering.append(first_tensor(output).detach())
            return output

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            nonlocal given
            given = output

        handles: list[Any] = [
            block.register_forward_pre_hook(see(i), with_kwargs=True)
            for i, block in enumerate(self._above)
        ]
        handles += [block.register_forward_hook(keep) for block in self._above]
        handles.append(self._below[-1].register_forward_hook(take))
        if not own:
            handles += self._watching(own)
        below_blocks = self._below if below is not None and below.only_hidden else []
        with partial_forward(*handles), skipped(below_blocks, below.rest if below else None):
            self._base(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden = entering[0]
        captured = Captured(hidden, [found[i] for i in range(len(self._above))], carried=carried)
        captured.own = own[0] if own else None
        if recorders:
            captured.kept = Kept(
                hidden,
                mask.sum(1),
                [named(b, call) for b, call in zip(self._above, captured.calls, strict=True)],
                [recorder.states() for recorder in recorders],
                self._max_positions,
                captured.own,
            )
        return captured

    def _difference(self, captured: Captured, loss_index: int) -> float:
        """Largest relative difference of whole and live runs for a few rows that are changed.

        From the changed token on, as the rest is not run.
        """
        assert captured.kept is not None
        lengths = captured.kept.lengths
        rows = torch.unique(torch.linspace(0, len(lengths) - 1, 3).long()).to(lengths.device)
        first = lengths[rows] // torch.arange(2, 2 + len(rows), device=rows.device)
        hidden = captured.hidden[rows]
        each = torch.arange(len(rows), device=rows.device)
        hidden[each, first] *= -1
        positions = torch.arange(hidden.shape[1], device=rows.device)
        real = (positions >= first[:, None]) & (positions < lengths[rows, None])
        whole = self._run(captured.select(rows), hidden, loss_index)
        live = Live(captured.kept, self._above, rows, first).run(hidden, loss_index)
        if self._narrows:
            wanted = (positions == first[:, None]) | (positions == lengths[rows, None] - 1)
            try:
                asked = Live(captured.kept, self._above, rows, first, wanted, least=0)
                _, end = asked.run(hidden, loss_index)
                difference = _relative(whole[1][wanted], end[wanted])
                self._narrows = difference <= _AGREE[hidden.dtype]
            except torch.cuda.OutOfMemoryError:
                raise
            except _REFUSALS:
                self._narrows = False
            if not self._narrows:
                _log.info("the last block is run for all tokens that change")
        return max(_relative(a[real], b[real]) for a, b in zip(whole, live, strict=True))

    def _index(self, loss_layer: int | None) -> int:
        """Which of the blocks above; -1 is the one below them."""
        return len(self._above) - 1 if loss_layer is None else loss_layer - self._first

    def select(
        self,
        captured: Captured | Live | Replayed,
        rows: Tensor,
        first: Tensor,
        wanted: Tensor | None = None,
    ) -> Captured | Live:
        """Some rows, of which nothing changes before a token.

        Args:
            captured: a batch, or some rows of it.
            rows: index ``[R]`` of those wanted.
            first: for each the first token that may change ``[R]``.
            wanted: the tokens that will be asked for, bool ``[R, T]``; None is all.
        """
        if not self._narrows:
            wanted = None
        if isinstance(captured, Live | Replayed):
            return captured.select(rows, first, wanted)
        if captured.kept is not None:
            return Live(captured.kept, self._above, rows, first, wanted)
        return captured.select(rows)

    def run(
        self, captured: Captured | Live | Replayed, hidden: Tensor, loss_layer: int | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B, T, d]`` after block ``loss_layer`` (None: last) and at the end."""
        loss_index = self._index(loss_layer)
        if isinstance(captured, Live | Replayed):
            return captured.run(hidden, loss_index)
        return self._run(captured, hidden, loss_index)

    def _run(self, captured: Captured, hidden: Tensor, loss_index: int) -> tuple[Tensor, Tensor]:
        at_loss = hidden
        given: Any = None
        for index, (block, (args, kwargs), carried) in enumerate(
            zip(self._above, captured.calls, captured.carried, strict=True)
        ):
            if carried:
                now = {name: given[place] for name, place in carried.items()}
                args, kwargs = (), named(block, (args, kwargs)) | now
            given = block(hidden, *args, **kwargs)
            hidden = first_tensor(given)
            if index == loss_index:
                at_loss = hidden
        return at_loss, hidden

    def log_probs(self, states: Tensor) -> Tensor:
        """Log-probabilities of the next token ``[..., V]``, float32 or better."""
        logits = self._head(self._norm(states))
        if logits.dtype != torch.float64:
            logits = logits.float()
        if self._cap is not None:
            logits = self._cap * torch.tanh(logits / self._cap)
        if self._scale != 1:
            logits = logits * self._scale
        return torch.log_softmax(logits, dim=-1)
