"""MEMIT: every batch is solved for by itself and written into the weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from coachhook.editing.prior import factor_prior, regularized_prior
from coachhook.evaluation.baselines.closed_form import ClosedForm


def solve_keys(factor: Tensor, keys: Tensor) -> Tensor:
    """``(L L^T + K K^T)^-1 K`` for the lower factor L ``[n, n]`` and keys K ``[n, k]``.

    By the Woodbury identity it is ``Y (I + K^T Y)^-1`` with ``Y = (L L^T)^-1 K``, so that the prior
    is factored once and not in every batch.
    """
    solved = torch.cholesky_solve(keys, factor)
    inner = keys.T @ solved
    inner.diagonal().add_(1)
    return torch.cholesky_solve(solved.T, torch.linalg.cholesky(inner)).T


class Memit(ClosedForm):
    """``Delta W = R K^T (lambda Cov + K K^T)^-1`` with the keys of the batch alone.

    Keys of earlier batches are protected no better than any other text.
    """

    name: ClassVar[str] = "memit"
    reference: ClassVar[str] = (
        "Meng et al. 2023, Mass-Editing Memory in a Transformer, ICLR; equations 14, 15 and 20"
    )

    def _prepare(self) -> None:
        config = self.config.edit
        self._factors = {
            layer: factor_prior(
                regularized_prior(self._covariance(layer), config.covariance_weight, config.ridge),
                torch.float64,
            )
            for layer in config.layers
        }

    def _change(self, layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
        return residuals @ solve_keys(self._factors[layer], keys).T
