"""Sums of k k^T of several layers, taken from one forward pass that ends at the last of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from coachhook.hooks import attached_hooks
from coachhook.models import (
    EditableLayer,
    ForwardEnded,
    ModelDescription,
    evaluating,
    get_submodule,
    partial_forward,
)
from coachhook.ops import gram_update_
from coachhook.ops.gram import gram_add_lower_
from coachhook.statistics.batches import Reservoir, TokenBatch, windows
from coachhook.statistics.packed import mirror_lower_, pack_lower, unpack_lower
from coachhook.statistics.share import Share
from coachhook.statistics.shrinkage import shrink_

# Enough to tell subjects apart; the tokens before them hardly show in a key.
SAMPLE_WINDOW = 8


_Half: TypeAlias = "tuple[int, int]"  # index of the layer, half of the texts


class KeySums:
    """Runs batches through a model and keeps, per layer, sum k k^T and a sample of the keys.

    A batch is multiplied in float32 and added to float64 totals; a float64 model is float64
    throughout. On a device without float64 the totals stay on the CPU.

    Args:
        model: a causal language model.
        description: of that model.
        layers: the layers wanted, in the order of the forward pass.
        sample_size: how many keys to keep per layer.
        halves: keep the sums of each half of the texts apart, and the sums of the keys, to shrink
            the result; twice the memory.

    Attributes:
        counts: number of keys so far, of each half.
    """

    def __init__(
        self,
        model: nn.Module,
        description: ModelDescription,
        layers: Sequence[EditableLayer],
        sample_size: int,
        *,
        halves: bool = False,
    ) -> None:
        base: Any = get_submodule(model, description.base_model_path)
        self._base = base
        self._modules = [(layer, get_submodule(model, layer.path)) for layer in layers]
        self._embedding: Tensor = base.get_input_embeddings().weight
        self._halves = halves
        self._totals: dict[_Half, Tensor] = {}
        self._sums: dict[_Half, Tensor] = {}
        self._scratch: dict[tuple[torch.device, int], Tensor] = {}
        self._samples: dict[int, Tensor] = {}
        self._reservoir = Reservoir(sample_size)
        self._windows = torch.full((sample_size, SAMPLE_WINDOW), -1, dtype=torch.int32)
        self.counts = [0, 0]

    @property
    def tokens(self) -> int:
        """Number of keys so far."""
        return sum(self.counts)

    def skip(self, batch: TokenBatch) -> None:
        """Leave one batch to another process; places in the sample that it takes become zero."""
        slots, _ = self._offer(batch)
        for sample in self._samples.values():
            sample[slots.to(sample.device)] = 0

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
        slots, rows = self._offer(batch)

        def take(layer: EditableLayer, inputs: Tensor) -> None:
            keys = inputs.detach().reshape(-1, layer.in_features)
            if real is not None:
                keys = keys.index_select(0, real.to(keys.device))
            self._add_gram(layer, batch.half, keys)
            self._put_sample(layer, keys, slots, rows)

        mask = None if batch.mask is None else batch.mask.to(device)
        self._forward(batch.input_ids.to(device), mask, take)
        self.counts[batch.half] += len(batch.positions)

    def check_finite(self) -> None:
        """Check that all keys so far were finite; waits for the device.

        Raises:
            ValueError: naming the first layer with a key that is not.
        """
        for layer, _ in self._modules:
            for half in (0, 1):
                total = self._totals.get((layer.index, half))
                if total is not None and not bool(total.diagonal().sum().isfinite()):
                    raise _not_finite(layer)

    def check_halves(self, share: Share) -> None:
        """Check that all processes together have keys of both halves; every one must call this.

        Raises:
            ValueError: shrinkage needs two halves, and one of them is empty.
        """
        first, second = share.total(self.counts)
        if self._halves and not (first and second):
            raise ValueError(
                "collect_statistics: texts must be several for the minimal mode, which compares "
                f"two random halves of them, got halves of {first} and {second} tokens; give more "
                "texts"
            )

    def merge(self, share: Share) -> None:
        """Add up what all processes have; every one of them must call this, and has it all then."""
        if share.processes == 1:
            return
        for layer, module in self._modules:
            device = _device_of(module, self._embedding.device)
            for half in range(1 + self._halves):
                share.add_(self._total(layer, half, device))
                if self._halves:
                    share.add_(self._sum(layer, half, device))
            mine = self._samples.get(layer.index)
            dtype = share.first(None if mine is None else mine.dtype)
            if dtype is not None:  # else no process has seen a key
                share.add_(self._sample(layer, dtype, device))
        self.counts = share.total(self.counts)

    def means(self) -> tuple[dict[int, Tensor], dict[int, float]]:
        """Return the means of k k^T, float64 [n, n] on the CPU, and how much they were shrunk.

        The sums are given up, one layer after another.
        """
        means, shrinkage = {}, {}
        for layer, _ in self._modules:
            index = layer.index
            mean = self._totals.pop((index, 0))
            if self._halves:
                first, mean = mean.cpu(), self._totals.pop((index, 1)).cpu()
                mean.add_(first).div_(self.tokens)
                first.div_(self.counts[0])
                keys = [self._sums.pop((index, h)).cpu() / self.counts[h] for h in (0, 1)]
                shrinkage[index] = shrink_(mean, first, torch.stack(keys), *self.counts)
            else:
                mean.div_(self.tokens)
            mirror_lower_(mean)
            means[index] = mean.cpu()
        return means, shrinkage

    def samples(self) -> tuple[dict[int, Tensor], Tensor]:
        """Return the samples, layer index -> [s, n], and their tokens, on the CPU.

        For the tokens see :attr:`Statistics.sample_tokens`.
        """
        order = torch.from_numpy(self._reservoir.order())
        samples = {i: sample.cpu()[order] for i, sample in self._samples.items() if len(order)}
        return samples, self._windows[order]

    def state(self) -> dict[str, Tensor | Callable[[], Tensor]]:
        """Return all that :meth:`restore` needs, the sums packed when they are asked for."""

        def packing(total: Tensor) -> Callable[[], Tensor]:
            return lambda: pack_lower(total, torch.float64)

        state: dict[str, Tensor | Callable[[], Tensor]] = {
            "counts": torch.tensor(self.counts),
            "positions": torch.from_numpy(self._reservoir.positions),
            "windows": self._windows,
        }
        state |= {f"layer.{i}.total.{h}": packing(t) for (i, h), t in self._totals.items()}
        state |= {f"layer.{i}.sum.{h}": total for (i, h), total in self._sums.items()}
        return state | {f"layer.{i}.sample": sample for i, sample in self._samples.items()}

    def restore(self, state: Any) -> None:
        """Set the sums and the sample as they were when `state` was taken."""
        self.counts = state["counts"].tolist()
        self._reservoir.restore(state["positions"].numpy())
        self._windows = state["windows"].clone()
        for layer, module in self._modules:
            i, device = layer.index, _device_of(module, self._embedding.device)
            for half in (0, 1):
                if f"layer.{i}.total.{half}" in state:
                    packed = state[f"layer.{i}.total.{half}"]
                    self._totals[i, half] = unpack_lower(packed).to(_float64_device(device))
                if f"layer.{i}.sum.{half}" in state:
                    keys = state[f"layer.{i}.sum.{half}"]
                    self._sums[i, half] = keys.clone().to(_float64_device(device))
            if f"layer.{i}.sample" in state:
                self._samples[i] = state[f"layer.{i}.sample"].clone().to(device)

    def _offer(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Slots of the sample that tokens of the batch take, and which tokens."""
        slots, rows = map(torch.from_numpy, self._reservoir.offer(batch.positions))
        self._windows[slots] = windows(batch, rows, SAMPLE_WINDOW)
        return slots, rows

    def _total(self, layer: EditableLayer, half: int, device: torch.device) -> Tensor:
        """The sum of k k^T [n, n] over one half, made where there is none yet."""
        if (layer.index, half) not in self._totals:
            shape, where = (layer.in_features,) * 2, _float64_device(device)
            self._totals[layer.index, half] = torch.zeros(shape, dtype=torch.float64, device=where)
        return self._totals[layer.index, half]

    def _sum(self, layer: EditableLayer, half: int, device: torch.device) -> Tensor:
        """The sum of k [n] over one half."""
        if (layer.index, half) not in self._sums:
            n, where = layer.in_features, _float64_device(device)
            self._sums[layer.index, half] = torch.zeros(n, dtype=torch.float64, device=where)
        return self._sums[layer.index, half]

    def _sample(self, layer: EditableLayer, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The sample [sample_size, n], zero where it is not filled."""
        if layer.index not in self._samples:
            shape = len(self._reservoir.positions), layer.in_features
            self._samples[layer.index] = torch.zeros(shape, dtype=dtype, device=device)
        return self._samples[layer.index]

    def _add_gram(self, layer: EditableLayer, half: int, keys: Tensor) -> None:
        n = layer.in_features
        total = self._total(layer, half, keys.device)
        if self._halves:
            kept = self._sum(layer, half, keys.device)
            wide = keys if keys.dtype == torch.float64 else keys.float()
            kept.add_(wide.sum(0).to(kept.device))
        try:
            if keys.dtype == torch.float64:
                gram_update_(total, keys)
                return
            if keys.device == total.device:
                gram_add_lower_(total, keys)
                return
            # A device without float64: its sums of one batch are taken to those on the CPU.
            place = (keys.device, n)
            if place not in self._scratch:
                self._scratch[place] = torch.empty(n, n, dtype=torch.float32, device=keys.device)
            gram_update_(self._scratch[place].zero_(), keys)
        except ValueError as error:
            if bool(keys.isfinite().all()):
                raise
            raise _not_finite(layer) from error
        total.add_(self._scratch[place].to(total.device))

    def _put_sample(self, layer: EditableLayer, keys: Tensor, slots: Tensor, rows: Tensor) -> None:
        sample = self._sample(layer, keys.dtype, keys.device)
        if len(slots):
            sample[slots.to(sample.device)] = keys[rows.to(keys.device)].to(sample.device)

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
                    raise ForwardEnded

            return hook

        last = len(self._modules) - 1
        handles = [
            module.register_forward_pre_hook(hook_of(layer, i == last))
            for i, (layer, module) in enumerate(self._modules)
        ]
        with partial_forward(*handles):
            self._base(input_ids=input_ids, attention_mask=mask, use_cache=False)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Run a block with `model` in evaluation mode, without gradients and without its edits."""
    hooks = attached_hooks(model)
    with evaluating(model), torch.no_grad():
        with hooks.disabled() if hooks is not None else nullcontext():
            yield


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
