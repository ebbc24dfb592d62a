"""LoRA: low-rank adapters trained on the facts, by peft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from coachhook.editing.requests import EditRequest
from coachhook.evaluation.baselines.base import Baseline
from coachhook.evaluation.baselines.descent import answered, encode_rows, train
from coachhook.evaluation.baselines.fine_tuning import DEPTH
from coachhook.models import set_submodule

_ADAPTER = "coachhook"


@dataclass(frozen=True)
class LoraConfig:
    """Settings of :class:`Lora`.

    The defaults are not published ones. EasyEdit's for Llama are rank 8, scaling 32, the query and
    value projections of the attention, Adam at 5e-3 and 70 passes of one fact per step: made for
    one edit of a large model, they leave nothing of a small one batch after batch. The defaults
    kept most after ten batches: one adapter on the layer that fine-tuning trains, of a higher rank
    and a smaller scale, a fifth of the learning rate, and the whole batch at each step
    (docs/quality-choices.md).

    Args:
        rank: of every adapter.
        scaling: the adapter's output is multiplied by ``scaling / rank`` (peft's ``lora_alpha``).
        modules: names of the adapted modules; None takes the down-projection of the block at 67 %
            of the depth.
        steps: most passes over a batch.
        lr: Adam's learning rate.
        weight_decay: Adam's.
        batch_size: facts per step.
        stop: the training on a batch ends when the mean loss is below.
        seed: of the adapters' first values.

    Raises:
        ValueError: a field is out of range.
    """

    rank: int = 64
    scaling: float = 64.0
    modules: Sequence[str] | None = None
    steps: int = 100
    lr: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 64
    stop: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "scaling", "steps", "lr", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"lora: {name} must be positive, got {getattr(self, name)!r}")
        for name in ("rank", "steps", "batch_size"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"lora: {name} must be an integer, got {getattr(self, name)!r}")
        for name in ("weight_decay", "stop"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"lora: {name} must not be negative, got {getattr(self, name)!r}")
        if self.modules is not None:
            if isinstance(self.modules, str) or not self.modules:
                raise ValueError(
                    f"lora: modules must be a list of module names or None, got {self.modules!r}"
                )
            object.__setattr__(self, "modules", tuple(self.modules))


class Lora(Baseline):
    """``W x + (s / r) B A x`` beside frozen weights; A and B go on being trained batch by batch."""

    name: ClassVar[str] = "lora"
    reference: ClassVar[str] = (
        "Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models, ICLR; equation 3"
    )
    config_type: ClassVar[type] = LoraConfig

    def _start(self) -> None:
        peft: Any = _import_peft()
        from peft.tuners.tuners_utils import BaseTunerLayer
        from transformers.pytorch_utils import Conv1D

        if any(isinstance(module, BaseTunerLayer) for module in self._model.modules()):
            raise ValueError("lora: model must have no adapters, got some; unload them")
        config: LoraConfig = self.config
        modules = config.modules
        if modules is None:
            depth = int(DEPTH * self._description.num_layers)
            modules = [self._description.layer(depth).path]
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.scaling,
            lora_dropout=0.0,
            target_modules=list(modules),
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in self._model.modules()),
        )
        self._flags = [(p, p.requires_grad) for p in self._model.parameters()]
        self._attributes = set(vars(self._model))
        self._modules = dict(self._model.named_modules())
        try:
            with torch.random.fork_rng(), torch.inference_mode(False):
                torch.manual_seed(config.seed)
                peft.inject_adapter_in_model(settings, self._model, adapter_name=_ADAPTER)
        except BaseException:
            self._close()
            raise
        self._parameters: list[nn.Parameter] = [
            p for name, p in self._model.named_parameters() if f".{_ADAPTER}." in name
        ]
        # As peft's own get_peft_model does: in 16 bits Adam's steps round away or are NaN.
        for parameter in self._parameters:
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    def _layers(self) -> dict[str, Any]:
        """Path -> adapted module, of those that took the place of another."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        return {
            path: module
            for path, module in self._model.named_modules()
            if isinstance(module, BaseTunerLayer) and path in self._modules
        }

    def _edit(self, requests: list[EditRequest]) -> tuple[list[bool], list[float]]:
        config: LoraConfig = self.config
        rows = encode_rows(self._tokenizer, requests, self._description.max_positions)
        losses = train(
            self._model,
            self._parameters,
            rows,
            objective="target",
            steps=config.steps,
            lr=config.lr,
            weight_decay=config.weight_decay,
            batch_size=config.batch_size,
            stop=config.stop,
            pad_id=self._tokenizer.pad_token_id,
        )
        return answered(self._model, rows), losses

    def _snapshot(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def _restore(self, snapshot: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, snapshot, strict=True):
            parameter.copy_(value)

    def _disable(self) -> None:
        for layer in self._layers().values():
            layer.enable_adapters(False)

    def _enable(self) -> None:
        for layer in self._layers().values():
            layer.enable_adapters(True)

    def _close(self) -> None:
        for path in self._layers():
            set_submodule(self._model, path, self._modules[path])
        for name in set(vars(self._model)) - self._attributes:  # peft leaves its settings there
            delattr(self._model, name)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "lora: peft must be installed, got none; run: pip install 'coachhook[baselines]'"
        ) from error
    return peft
