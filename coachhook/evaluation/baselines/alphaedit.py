"""AlphaEdit: the update is projected onto the null space of the keys to be preserved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from coachhook.evaluation.baselines.closed_form import Batch, ClosedForm, ClosedFormConfig


@dataclass(frozen=True)
class AlphaEditConfig(ClosedFormConfig):
    """Settings of :class:`AlphaEdit`.

    Args:
        edit: see :class:`~coachhook.evaluation.baselines.closed_form.ClosedFormConfig`;
            ``covariance_weight`` and ``ridge`` are not used.
        threshold: eigenvectors of Cov with an eigenvalue below it span the null space. It is in
            units of the squared keys, and so belongs to a model.
        ridge_weight: what is added to the diagonal; 1 in the paper, 10 in its published settings.

    Raises:
        ValueError: a field is not positive.
    """

    threshold: float = 2e-2
    ridge_weight: float = 10.0

    def __post_init__(self) -> None:
        for name in ("threshold", "ridge_weight"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"alphaedit: {name} must be positive and finite, got {value!r}")


class AlphaEdit(ClosedForm):
    """``Delta W = R K^T P (S P + K K^T P + r I)^-1``, P onto the null space, S of earlier batches.

    With an orthonormal basis U of the null space, ``P = U U^T``, and keys ``k = U^T K`` in it this
    is ``R k^T (s + k k^T + r I)^-1 U^T``, a symmetric system of the size of the null space.
    As in the published code S takes the keys that the edited model has after the batch.
    """

    name: ClassVar[str] = "alphaedit"
    reference: ClassVar[str] = (
        "Fang et al. 2025, AlphaEdit: Null-Space Constrained Knowledge Editing for Language "
        "Models, ICLR"
    )
    config_type: ClassVar[type] = AlphaEditConfig

    def _prepare(self) -> None:
        self._basis: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        for layer in self.config.edit.layers:
            eigenvalues, vectors = torch.linalg.eigh(self._covariance(layer))
            size = int((eigenvalues < self.config.threshold).sum())
            if not size:
                raise ValueError(
                    "alphaedit: threshold must lie above the smallest eigenvalue of the key "
                    f"covariance of layer {layer}, {float(eigenvalues[0]):.3g}, got "
                    f"{self.config.threshold}; no update is possible without a null space (the "
                    f"median eigenvalue is {float(eigenvalues.median()):.3g})"
                )
            self._basis[layer] = vectors[:, :size].contiguous()
            self._sums[layer] = vectors.new_zeros(size, size)

    def null_space(self) -> dict[int, float]:
        """Layer index -> share of the directions of the key space that may be written to."""
        return {layer: basis.shape[1] / basis.shape[0] for layer, basis in self._basis.items()}

    def _change(self, layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
        basis = self._basis[layer]
        inside = basis.T @ keys
        system = self._sums[layer] + inside @ inside.T
        system.diagonal().add_(self.config.ridge_weight)
        solved = torch.cholesky_solve(inside, torch.linalg.cholesky(system))
        return residuals @ solved.T @ basis.T

    def _finish(self, batch: Batch) -> None:
        for layer, basis in self._basis.items():
            inside = basis.T @ batch.read(layer, 1)[0]
            self._sums[layer] = self._sums[layer] + inside @ inside.T

    def _snapshot(self) -> Any:
        return super()._snapshot(), dict(self._sums)

    def _restore(self, snapshot: Any) -> None:
        values, sums = snapshot
        super()._restore(values)
        self._sums = sums
