"""MEMIT with accumulated keys and no hook: the ablation of the CoachHooK paper, in two variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from coachhook.evaluation.baselines.closed_form import ClosedFormConfig
from coachhook.evaluation.baselines.memit import Memit, solve_keys
from coachhook.ops import cholesky_update_, cholesky_update_solve_

VARIANTS = ("exact", "published")


@dataclass(frozen=True)
class AccumulatedConfig(ClosedFormConfig):
    """Settings of :class:`Accumulated`.

    Args:
        edit: see :class:`~coachhook.evaluation.baselines.closed_form.ClosedFormConfig`.
        variant: "exact" weighs the prior alone with lambda; "published" does as the published code
            of the ablation, where lambda multiplies the keys of earlier batches too.

    Raises:
        ValueError: ``variant`` is not known.
    """

    variant: str = "exact"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(
                f"accumulated: variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}"
            )


class Accumulated(Memit):
    """``Delta W = R K^T C^-1`` with the keys of all batches in C, written into the weights.

    With S the sum of ``K K^T`` over the batches before,

        exact:      C = lambda Cov + S + K K^T        (block recursive least squares)
        published:  C = lambda (Cov + S) + K K^T

    The published variant holds earlier keys lambda times as firmly as the present ones, so that a
    later fact about the same subject can hardly be written.
    """

    name: ClassVar[str] = "accumulated"
    reference: ClassVar[str] = (
        "Li et al. 2024, Consecutive Batch Model Editing with HooK Layers, EMNLP; ablation without "
        "hook layers"
    )
    config_type: ClassVar[type] = AccumulatedConfig

    def _change(self, layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
        factor = self._factors[layer]
        if self.config.variant == "exact":
            return residuals @ cholesky_update_solve_(factor, keys).T
        solved = solve_keys(factor, keys)
        cholesky_update_(factor, self.config.edit.covariance_weight**0.5 * keys)
        return residuals @ solved.T

    def _snapshot(self) -> Any:
        factors = {layer: factor.clone() for layer, factor in self._factors.items()}
        return super()._snapshot(), factors

    def _restore(self, snapshot: Any) -> None:
        values, factors = snapshot
        super()._restore(values)
        self._factors = factors
