"""Attaching hooks to a model, and all hooks of a model at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.hooks.context import GateContext, GateRecord
from coachhook.hooks.gathered import GatheredInput
from coachhook.hooks.layer import HookedLinear, State
from coachhook.models import (
    check_gatherable,
    describe,
    get_submodule,
    set_submodule,
)


class HookSet(Mapping[int, HookedLinear]):
    """The hooks of one model, by layer index; made by :func:`attach_hooks`.

    Usable as a context manager that detaches at the end. Several threads may run the model at once;
    what :meth:`disabled`, :meth:`record` and :meth:`packed` say holds for all of them. What a hook
    holds must not be changed while a forward runs.

    Args:
        model: the model they are attached to.
        paths: dotted path of each hooked module, by layer index.
        layers: the hooks, by layer index.
        context: what they share.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: dict[int, str],
        layers: dict[int, HookedLinear],
        context: GateContext,
    ) -> None:
        self._model = model
        self._paths = paths
        self._layers = layers
        self._context = context

    def __getitem__(self, index: int) -> HookedLinear:
        try:
            return self._layers[index]
        except KeyError:
            raise KeyError(
                f"no hook at layer {index!r}; the hooked layers are {list(self._layers)}"
            ) from None

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        state = "attached to" if self.attached else "detached from"
        return f"HookSet(layers {list(self._layers)} {state} {type(self._model).__name__})"

    # A mapping compares by content, but two sets are the same only if they are one object.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def attached(self) -> bool:
        """Whether the hooks are in the model."""
        return self._context.watching

    def require_attached(self, op: str) -> None:
        """Refuses to go on with hooks that the model does not have.

        Raises:
            RuntimeError: they were detached.
        """
        if not self.attached:
            raise RuntimeError(
                f"{op}: hooks must be attached to the model, got detached ones, which would change "
                "no answer; make a new Editor, or load one that was saved"
            )

    def detach(self) -> None:
        """Put the base modules back; the model then computes bit for bit what it did before.

        Safe to call again.

        Raises:
            RuntimeError: something else was put in place of a hook since; nothing is changed.
        """
        if not self.attached:
            return
        for index, path in self._paths.items():
            found = get_submodule(self._model, path)
            if found is not self._layers[index]:
                raise RuntimeError(
                    f"detach: {path} must hold the hook that was attached there, got "
                    f"{type(found).__name__}; remove what was put on top of it first"
                )
        for index, path in self._paths.items():
            set_submodule(self._model, path, self._layers[index].base)
            _hand_on_offloading(self._layers[index])
        self._context.release()

    def __enter__(self) -> HookSet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def set_state(self, state: State) -> None:
        """Set the state of all layers: ``"off"``, ``"temporary"`` or ``"validated"``."""
        for layer in self._layers.values():
            layer.state = state

    def reserve(self, rank: int, cues: bool = False) -> None:
        """Reserve rows in all layers, see :meth:`HookedLinear.reserve`.

        Args:
            rank: how many rows.
            cues: whether pairs may have cues.

        Raises:
            ValueError: a layer refuses; nothing was changed.
        """
        for layer in self._layers.values():
            layer._store.check_reserve(rank, cues)
        for layer in self._layers.values():
            layer.reserve(rank, cues)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model answers without hooks, bit for bit; blocks may be nested."""
        # Not a count: threads would lose each other's additions.
        self._context.disabled.append(None)
        try:
            yield
        finally:
            self._context.disabled.pop()

    @contextmanager
    def record(self) -> Iterator[list[GateRecord]]:
        """Collect what the gates decide within the block.

        Yields:
            A list that grows by ``(layer index, z [B, T] float32, fired [B, T] bool)`` for every
            forward of every hook that is not off; z is NaN where it is undefined. In float64 models
            ``fired`` is read off the rounded z.
        """
        sink: list[GateRecord] = []
        self._context.sinks[id(sink)] = sink
        try:
            yield sink
        finally:
            del self._context.sinks[id(sink)]

    @contextmanager
    def packed(self, cu_seqlens: Tensor) -> Iterator[None]:
        """Within the block every input is one row of several sequences, one after the other.

        Sequences are judged by themselves; nothing is kept for decoding.

        Args:
            cu_seqlens: integers ``[S + 1]``, 0 and the end of each sequence in tokens.

        Raises:
            ValueError: not one-dimensional, not starting at 0, or decreasing.
        """
        bounds = torch.as_tensor(cu_seqlens)
        if bounds.is_floating_point() or bounds.dim() != 1 or bounds.numel() < 2:
            raise ValueError(
                f"packed: cu_seqlens must be integers [S + 1], got {bounds.dtype} "
                f"{list(bounds.shape)}"
            )
        ends = bounds.tolist()
        if ends[0] != 0 or ends != sorted(ends):
            raise ValueError(f"packed: cu_seqlens must start at 0 and not decrease, got {ends}")
        packing = bounds.to(torch.int32), ends[-1]
        self._context.packings[id(packing)] = packing
        try:
            yield
        finally:
            del self._context.packings[id(packing)]


def attach_hooks(
    model: nn.Module, layers: Sequence[int] | None = None, *, key_site: str = "down_proj"
) -> HookSet:
    """Put a hook, empty and off, on the down-projection of the given layers of a model.

    The instance is changed, not its class: each down-projection is replaced on its parent module by
    a :class:`HookedLinear` around it, and the base model gets two forward hooks that read its mask
    and cache. Attach before ``torch.compile``. A deep copy of a hooked model is hooked by itself;
    :func:`attached_hooks` finds its hooks. Gradient checkpointing runs blocks again when the mask
    is no longer known: train hooked models without it.

    Of a model that several processes hold together as DTensors (tensor parallelism, FSDP2) each of
    them attaches the same hooks, and holds them whole.

    Args:
        model: a causal language model of transformers.
        layers: indices of the blocks to hook; None for the model's default layers.
        key_site: "down_proj", or "mlp" to hook the whole MLP of each of them.

    Raises:
        UnsupportedModelError: the model has no editable down-projections (or MLPs), or is
            tensor-parallel in another way than with DTensors on a mesh of one dimension.
        TypeError: not a transformers model, or a compiled one.
        ValueError: an index out of range or given twice, no index at all, another key site, or
            hooks are attached already.
    """
    description = describe(model, key_site)
    indices = description.default_layers() if layers is None else list(layers)
    editable = [description.layer(index) for index in indices]
    if not editable or len(set(indices)) != len(indices):
        raise ValueError(f"attach_hooks: layers must be distinct layer indices, got {indices}")
    if attached_hooks(model) is not None:
        found = [module.index for module in model.modules() if isinstance(module, HookedLinear)]
        raise ValueError(
            f"attach_hooks: model must not be hooked yet, got hooks at layers {found}; detach them"
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise TypeError(
            "attach_hooks: model must not be compiled yet, got one after model.compile(); compile "
            "after attaching"
        )
    check_gatherable("attach_hooks", model)
    context = GateContext()
    hooked = {}
    for layer in editable:
        base = get_submodule(model, layer.path)
        dtype, device = _placement(base)
        gathered = GatheredInput.of("attach_hooks", layer, base)
        hooked[layer.index] = HookedLinear(
            base,
            in_features=layer.in_features,
            out_features=layer.out_features,
            index=layer.index,
            dtype=dtype,
            device=device,
            context=context,
            gathered=gathered,
        )
    paths = {layer.index: layer.path for layer in editable}
    context.watch(get_submodule(model, description.base_model_path))
    for index, path in paths.items():
        set_submodule(model, path, hooked[index])
    return HookSet(model, paths, hooked, context)


def attached_hooks(model: nn.Module) -> HookSet | None:
    """The hooks attached to a model, None if there are none."""
    found = {path: m for path, m in model.named_modules() if isinstance(m, HookedLinear)}
    if not found:
        return None
    layers = {layer.index: layer for layer in found.values()}
    paths = {layer.index: path for path, layer in found.items()}
    return HookSet(model, paths, layers, next(iter(layers.values())).context)


def _hand_on_offloading(layer: HookedLinear) -> None:
    """Gives the base what accelerate has put on the hook: without it the weights stay away."""
    offloading = vars(layer).get("_hf_hook")
    if offloading is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(layer)
        add_hook_to_module(layer.base, offloading)


def _placement(base: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Compute dtype and device of the hook on ``base``."""
    tensors = [*base.parameters(), *base.buffers()]
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    # Offloaded weights lie on the meta device; accelerate knows where they are computed with.
    owner: Any = next((m for m in base.modules() if hasattr(m, "_hf_hook")), None)
    device = None if owner is None else getattr(owner._hf_hook, "execution_device", None)
    if device is None:
        device = tensors[0].device if tensors else torch.device("cpu")
    return torch.float64 if wide else torch.float32, torch.device(device)
