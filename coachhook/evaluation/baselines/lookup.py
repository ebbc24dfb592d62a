"""The nearest of many keys, for the baselines that look every token up in a memory."""

from __future__ import annotations

import torch
from torch import Tensor


class NearestKey:
    """``argmin_i ||q - k_i||`` for many queries by one matrix product; keys are not changed later.

    The product ranks the keys, ``||k||^2 / 2 - q.k``. It is in float64: in the keys' own float32 it
    would lose half the digits where a query meets its key, and TF32 more. The distance is that of
    the difference to the key found, so it is 0 where they are the same.

    Args:
        keys: ``[N, n]``, float32 or float64; at least one where queries are asked.
    """

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys
        self._wide = keys.double().T
        self._half = self._wide.square().sum(0) / 2

    @torch.no_grad()
    def __call__(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to the nearest key and its number, for queries ``[Q, n]``; both ``[Q]``."""
        queries = queries.to(self._keys.dtype)
        ranks = torch.addmm(self._half, queries.double(), self._wide, alpha=-1)
        numbers = ranks.argmin(dim=1)
        return torch.linalg.vector_norm(queries - self._keys[numbers], dim=1), numbers
