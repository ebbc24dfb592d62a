"""Sums of k k^T of several layers, taken from one forward pass that ends at the last of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.hooks import attached_hooks
from coachhook.models import EditableLayer, ModelDescription, get_submodule
from coachhook.ops import gram_update_
from coachhook.statistics.batches import Reservoir, TokenBatch, windows
from coachhook.statistics.packed import mirror_lower_, pack_lower, unpack_lower

# Enough to tell subjects apart; the tokens before them hardly show in a key.
SAMPLE_WINDOW = 8


class KeySums:
    """Runs batches through a model and keeps, per layer, sum k k^T and a sample of the keys.

    A batch is multiplied in float32 and added to float64 totals; a float64 model is float64
    throughout. On a device without float64 the totals stay on the CPU.

    Args:
        model: a causal language model.
        description: of that model.
        layers: the layers wanted, in the order of the forward pass.
        sample_size: how many keys to keep per layer.

    Attributes:
        tokens: number of keys so far.
    """

    def __init__(
        self,
        model: nn.Module,
        description: ModelDescription,
        layers: Sequence[EditableLayer],
        sample_size: int,
    ) -> None:
        base: Any = get_submodule(model, description.base_model_path)
        self._base = base
        self._modules = [(layer, get_submodule(model, layer.path)) for layer in layers]
        self._embedding: Tensor = base.get_input_embeddings().weight
        self._totals: dict[int, Tensor] = {}
        self._scratch: dict[tuple[torch.device, int], Tensor] = {}
        self._samples: dict[int, Tensor] = {}
        self._reservoir = Reservoir(sample_size)
        self._windows = torch.full((sample_size, SAMPLE_WINDOW), -1, dtype=torch.int32)
        self.tokens = 0

    def add(self, batch: TokenBatch) -> None:
        """Add the keys of one batch.

        Raises:
            ValueError: a token id is outside the model's vocabulary.
        """
        vocabulary = self._embedding.shape[0]
        if int(batch.input_ids.max()) >= vocabulary:
            raise ValueError(
                f"collect_statistics: tokenizer must give ids below {vocabulary}, the model's "
                f"vocabulary, got {int(batch.input_ids.max())}; use the model's own tokenizer"
            )
        device = self._embedding.device
        real = None if batch.real is None else batch.real.to(device)
        slots, rows = map(torch.from_numpy, self._reservoir.offer(batch.positions))
        self._windows[slots] = windows(batch, rows, SAMPLE_WINDOW)

        def take(layer: EditableLayer, inputs: Tensor) -> None:
            keys = inputs.detach().reshape(-1, layer.in_features)
            if real is not None:
                keys = keys.index_select(0, real.to(keys.device))
            self._add_gram(layer, keys)
            self._put_sample(layer.index, keys, slots, rows)

        mask = None if batch.mask is None else batch.mask.to(device)
        self._forward(batch.input_ids.to(device), mask, take)
        self.tokens += len(batch.positions)

    def check_finite(self) -> None:
        """Check that all keys so far were finite; waits for the device.

        Raises:
            ValueError: naming the first layer with a key that is not.
        """
        for layer, _ in self._modules:
            total = self._totals.get(layer.index)
            if total is not None and not bool(total.diagonal().sum().isfinite()):
                raise _not_finite(layer)

    def finish(self) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
        """Return the means of k k^T (float64 [n, n]) and the samples ([s, n]) on the CPU.

        The last value holds the token ids up to each sampled token, see
        :attr:`Statistics.sample_tokens`. The sums are given up, one layer after another.
        """
        means = {}
        for index in list(self._totals):
            mean = self._totals.pop(index).cpu()
            mirror_lower_(mean)
            means[index] = mean.div_(self.tokens)
        order = torch.from_numpy(self._reservoir.order())
        samples = {i: sample.cpu()[order] for i, sample in self._samples.items() if len(order)}
        return means, samples, self._windows[order]

    def state(self) -> dict[str, Tensor | Callable[[], Tensor]]:
        """Return all that :meth:`restore` needs, the sums packed when they are asked for."""

        def packing(total: Tensor) -> Callable[[], Tensor]:
            return lambda: pack_lower(total, torch.float64)

        state: dict[str, Tensor | Callable[[], Tensor]] = {
            "tokens": torch.tensor(self.tokens),
            "positions": torch.from_numpy(self._reservoir.positions),
            "windows": self._windows,
        }
        state |= {f"layer.{i}.total": packing(total) for i, total in self._totals.items()}
        return state | {f"layer.{i}.sample": sample for i, sample in self._samples.items()}

    def restore(self, state: Any) -> None:
        """Set the sums and the sample as they were when `state` was taken."""
        self.tokens = int(state["tokens"])
        self._reservoir.restore(state["positions"].numpy())
        self._windows = state["windows"].clone()
        for layer, module in self._modules:
            device = _device_of(module, self._embedding.device)
            total = unpack_lower(state[f"layer.{layer.index}.total"])
            self._totals[layer.index] = total.to(_float64_device(device))
            if f"layer.{layer.index}.sample" in state:
                sample = state[f"layer.{layer.index}.sample"]
                self._samples[layer.index] = sample.clone().to(device)

    def _add_gram(self, layer: EditableLayer, keys: Tensor) -> None:
        n = layer.in_features
        if layer.index not in self._totals:
            where = _float64_device(keys.device)
            self._totals[layer.index] = torch.zeros(n, n, dtype=torch.float64, device=where)
        total = self._totals[layer.index]
        try:
            if keys.dtype == torch.float64:
                gram_update_(total, keys)
                return
            place = (keys.device, n)
            if place not in self._scratch:
                self._scratch[place] = torch.empty(n, n, dtype=torch.float32, device=keys.device)
            gram_update_(self._scratch[place].zero_(), keys)
        except ValueError as error:
            if bool(keys.isfinite().all()):
                raise
            raise _not_finite(layer) from error
        total.add_(self._scratch[place].to(total.device))

    def _put_sample(self, index: int, keys: Tensor, slots: Tensor, rows: Tensor) -> None:
        if index not in self._samples:
            self._samples[index] = keys.new_zeros(len(self._reservoir.positions), keys.shape[1])
        if len(slots):
            device = keys.device
            self._samples[index][slots.to(device)] = keys[rows.to(device)]

    def _forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        take: Callable[[EditableLayer, Tensor], None],
    ) -> None:
        """Run the model up to the last layer wanted, giving each layer's keys to `take`."""

        def hook_of(layer: EditableLayer, is_last: bool) -> Callable[[nn.Module, Any], None]:
            def hook(module: nn.Module, arguments: Any) -> None:
                take(layer, arguments[0])
                if is_last:
                    raise _Reached

            return hook

        last = len(self._modules) - 1
        handles = [
            module.register_forward_pre_hook(hook_of(layer, i == last))
            for i, (layer, module) in enumerate(self._modules)
        ]
        try:
            self._base(input_ids=input_ids, attention_mask=mask, use_cache=False)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()


class _Reached(Exception):
    """Ends a forward pass whose remainder nobody needs."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Run a block with `model` in evaluation mode, without gradients and without its edits."""
    modes = [(module, module.training) for module in model.modules()]
    hooks = attached_hooks(model)
    model.eval()
    try:
        with torch.no_grad(), hooks.disabled() if hooks is not None else nullcontext():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _not_finite(layer: EditableLayer) -> ValueError:
    return ValueError(
        f"collect_statistics: the keys of layer {layer.index} ({layer.path}) must be finite, got "
        "NaN or Inf; weights up to there hold such values, or float16 overflows: check the "
        "checkpoint, or use bfloat16 or float32"
    )


def _device_of(module: nn.Module, default: torch.device) -> torch.device:
    return next((p.device for p in module.parameters()), default)


def _float64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device
