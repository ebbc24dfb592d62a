"""Corrections added to the weights of a model, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from coachhook.integrations.corrections import Correction, matrix, relative_error


class MergedWeights:
    """A model whose edited layers hold ``W0 + Delta``; a context manager that puts W0 back.

    The sum is taken in float64 and rounded once to the dtype of the weight.

    Args:
        weights: W0 ``[m, n]`` by layer, views of the model's parameters (of ``Conv1D`` transposed).
        corrections: by layer.

    Attributes:
        errors: by layer what rounding changes, as a share of Delta.
    """

    def __init__(
        self, weights: Mapping[int, Tensor], corrections: Mapping[int, Correction]
    ) -> None:
        self._weights = {layer: weight.detach() for layer, weight in weights.items()}
        self._plain = {layer: weight.clone() for layer, weight in self._weights.items()}
        self._merged: dict[int, Tensor] = {}
        self.errors: dict[int, float] = {}
        for layer, weight in self._weights.items():
            delta = matrix(corrections[layer])
            # On the CPU: not every device has float64.
            total = weight.cpu().double() + delta
            self._merged[layer] = total.to(weight.dtype).to(weight.device)
            self.errors[layer] = relative_error(self._merged[layer].cpu(), total, delta)

    def __enter__(self) -> MergedWeights:
        self._set(self._merged)
        return self

    def __exit__(self, *_: object) -> None:
        self._set(self._plain)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A block in which the model answers without the corrections."""
        self._set(self._plain)
        try:
            yield
        finally:
            self._set(self._merged)

    @torch.no_grad()
    def _set(self, values: Mapping[int, Tensor]) -> None:
        for layer, value in values.items():
            self._weights[layer].copy_(value)
