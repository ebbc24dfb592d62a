"""Baselines that write into the model's own parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.evaluation.baselines.base import Baseline
from coachhook.models import get_submodule, weight_of


class WeightBaseline(Baseline):
    """Keeps the parameters that a baseline writes to as they were before it.

    A subclass calls :meth:`_hold` at the start; while it edits it may change those parameters only.
    """

    _parameters: list[nn.Parameter]
    _original: list[Tensor]
    _edited: list[Tensor]

    def _hold(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._original = self._values()
        self._edited = []

    def _plain_weight(self, path: str) -> Tensor:
        """The weight ``[m, n]`` of the linear layer at ``path``, a view of its parameter.

        Raises:
            ValueError: it has no plain weight that could be written to.
        """
        module = get_submodule(self._model, path)
        weight = weight_of(module)
        if weight is None:
            raise ValueError(
                f"{self.name}: {path} must have a plain weight, got {type(module).__name__}; load "
                "the model without quantisation"
            )
        return weight.detach()

    def _values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def _snapshot(self) -> Any:
        return self._values()

    def _restore(self, snapshot: Any) -> None:
        self._set(snapshot)

    def _disable(self) -> None:
        self._edited = self._values()
        self._set(self._original)

    def _enable(self) -> None:
        self._set(self._edited)
        self._edited = []

    def _close(self) -> None:
        self._set(self._original)
