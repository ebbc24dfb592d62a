"""Fine-tuning of one layer, its weights held within a box around where they were if wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from coachhook.editing.requests import EditRequest
from coachhook.evaluation.baselines.descent import OBJECTIVES, answered, encode_rows, train
from coachhook.evaluation.baselines.weights import WeightBaseline
from coachhook.models import get_submodule

# Depth of the layer that FT-M trains: block 21 of the 32 of Llama.
DEPTH = 0.67


@dataclass(frozen=True)
class FineTuningConfig:
    """Settings of :class:`FineTuning`.

    The defaults are those of FT-M (Zhang et al. 2024, EasyEdit's settings for Llama: block 21 of
    32, no box, the likelihood of the target, Adam at 5e-4) but for ``steps``, 25 there, which leave
    most facts of a small model unlearned. FT+L of ROME for GPT-2 XL is ``layer=0,
    norm_constraint=5e-4, objective="prompt_last", steps=25``; its box belongs to that model's size.

    Args:
        layer: block whose down-projection is trained, weight and bias; None takes the block at 67 %
            of the depth.
        norm_constraint: most that any entry may move in one batch; None trains freely.
        objective: "target" is the teacher-forced likelihood; "prompt_last", as in FT+L, asks for
            every target token right after the prompt.
        steps: most passes over the batch.
        lr: Adam's learning rate.
        weight_decay: Adam's.
        batch_size: facts per step.
        stop: the training ends when the mean loss is below.

    Raises:
        ValueError: a field is out of range.
    """

    layer: int | None = None
    norm_constraint: float | None = None
    objective: str = "target"
    steps: int = 100
    lr: float = 5e-4
    weight_decay: float = 0.0
    batch_size: int = 64
    stop: float = 1e-2

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"fine-tuning: objective must be one of {', '.join(OBJECTIVES)}, "
                f"got {self.objective!r}"
            )
        if self.norm_constraint is not None and not self.norm_constraint > 0:
            raise ValueError(
                f"fine-tuning: norm_constraint must be positive or None, got {self.norm_constraint}"
            )
        for name in ("steps", "lr", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"fine-tuning: {name} must be positive, got {getattr(self, name)!r}"
                )
        for name in ("weight_decay", "stop"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"fine-tuning: {name} must not be negative, got {getattr(self, name)!r}"
                )


class FineTuning(WeightBaseline):
    """Adam on W, by projection with ``|W - W_before| <= epsilon`` entry by entry if wanted."""

    name: ClassVar[str] = "fine-tuning"
    reference: ClassVar[str] = (
        "FT-M of Zhang et al. 2024, A Comprehensive Study of Knowledge Editing for Large Language "
        "Models; with a box, Zhu et al. 2020, Modifying Memories in Transformer Models, as FT+L in "
        "Meng et al. 2022, Locating and Editing Factual Associations in GPT, NeurIPS"
    )
    config_type: ClassVar[type] = FineTuningConfig

    def _start(self) -> None:
        layer = self.config.layer
        if layer is None:
            layer = int(DEPTH * self._description.num_layers)
        path = self._description.layer(layer).path
        self._plain_weight(path)
        self._hold(list(get_submodule(self._model, path).parameters()))

    def _edit(self, requests: list[EditRequest]) -> tuple[list[bool], list[float]]:
        config: FineTuningConfig = self.config
        rows = encode_rows(self._tokenizer, requests, self._description.max_positions)
        before = self._values()

        @torch.no_grad()
        def project() -> None:
            epsilon = config.norm_constraint
            if epsilon is not None:
                for parameter, centre in zip(self._parameters, before, strict=True):
                    parameter.clamp_(centre - epsilon, centre + epsilon)

        losses = train(
            self._model,
            self._parameters,
            rows,
            objective=config.objective,
            steps=config.steps,
            lr=config.lr,
            weight_decay=config.weight_decay,
            batch_size=config.batch_size,
            stop=config.stop,
            pad_id=self._tokenizer.pad_token_id,
            after_step=project,
        )
        return answered(self._model, rows), losses
