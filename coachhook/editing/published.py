"""The state of one layer as the published code keeps it: in float32, solved anew for every batch.

    C' = C + K K^T,  W <- fp32(W + R (C'^-1 K)^T),  C <- fp32(C')

with C starting at ``fp32(lambda Cov)`` and W at the frozen weight; the solve itself is in float64.
The roundings move Delta by about ``eps_32 cond(C)``, which is why this class exists: to give the
published figures digit by digit. :class:`~coachhook.editing.EditMemory` is exact and far faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coachhook.errors import NotPositiveDefiniteError


class PublishedMemory:
    """Drop-in for :class:`~coachhook.editing.EditMemory` with the published roundings.

    Args:
        covariance: Cov ``[n, n]``, any floating dtype.
        weight: lambda.
        frozen: W0 ``[m, n]``.

    Raises:
        NotPositiveDefiniteError: an append finds the accumulated covariance singular.
    """

    num_folded = 0
    _batches: dict[int, tuple[Tensor, Tensor]]

    def __init__(self, covariance: Tensor, weight: float, frozen: Tensor) -> None:
        self._prior = covariance.detach().float() * weight
        self._frozen = frozen.detach().float()
        self._replay({})
        self._next = 1

    @property
    def out_features(self) -> int:
        """Length m of a target."""
        return self._frozen.shape[0]

    @property
    def device(self) -> torch.device:
        """Of the state."""
        return self._prior.device

    @property
    def num_keys(self) -> int:
        """Keys of all batches."""
        return sum(keys.shape[1] for keys, _ in self._batches.values())

    @property
    def batches(self) -> list[int]:
        """Numbers of the batches, oldest first."""
        return list(self._batches)

    def append(self, keys: Tensor, targets: Tensor) -> int:
        """Adds keys ``[n, k]`` with targets ``[m, k]`` relative to the frozen layer.

        Raises:
            NotPositiveDefiniteError: the covariance with these keys is singular.
            ValueError: keys or targets are not finite.
        """
        if not bool(torch.isfinite(keys).all() and torch.isfinite(targets).all()):
            raise ValueError("append: keys and targets must be finite, got NaN or Inf")
        self._step(keys, targets)
        number = self._next
        self._batches = {**self._batches, number: (keys.clone(), targets.clone())}
        self._next += 1
        return number

    def remove(self, batch: int) -> None:
        """Takes a batch back by editing all the others again from the start.

        Raises:
            ValueError: there is no such batch.
        """
        if batch not in self._batches:
            raise ValueError(f"remove: batch must be one of {self.batches}, got {batch!r}")
        self._replay({k: v for k, v in self._batches.items() if k != batch})

    def pair(self) -> tuple[Tensor, Tensor]:
        """Not available: rounding the weight leaves no exact pair.

        Raises:
            ValueError: always.
        """
        raise ValueError("pair: state_dtype must be 'float64' for a pair, got 'float32'")

    def contents(self) -> tuple[object, ...]:
        """As :meth:`EditMemory.contents`."""
        return self._covariance, self._weight, self._batches

    def keys(self) -> Tensor:
        """All keys K ``[n, N]``, oldest batch first."""
        return torch.cat([keys for keys, _ in self._batches.values()], dim=1)

    def delta(self) -> Tensor:
        """Delta ``[m, n]``, float64, a new tensor."""
        return self._weight.double() - self._frozen.double()

    def snapshot(self) -> tuple[Any, ...]:
        """The present state; updates replace tensors, so references are enough."""
        return self._covariance, self._weight, self._batches, self._next

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Brings a :meth:`snapshot` back bit for bit."""
        self._covariance, self._weight, self._batches, self._next = snapshot

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors for safetensors and values for JSON."""
        tensors = {
            "prior": self._prior,
            "frozen": self._frozen,
            "covariance": self._covariance,
            "weight": self._weight,
        }
        for number, (keys, targets) in self._batches.items():
            tensors |= {f"{number}.keys": keys, f"{number}.targets": targets}
        return tensors, {"next": self._next, "batches": self.batches}

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> PublishedMemory:
        """The inverse of :meth:`state_dict`.

        Raises:
            KeyError: something is missing.
        """
        memory = cls.__new__(cls)
        memory._prior, memory._frozen = tensors["prior"], tensors["frozen"]
        memory._covariance, memory._weight = tensors["covariance"], tensors["weight"]
        memory._batches = {
            int(b): (tensors[f"{b}.keys"], tensors[f"{b}.targets"]) for b in values["batches"]
        }
        memory._next = int(values["next"])
        return memory

    def _replay(self, batches: dict[int, tuple[Tensor, Tensor]]) -> None:
        self._covariance, self._weight = self._prior, self._frozen
        self._batches = batches
        for keys, targets in batches.values():
            self._step(keys, targets)

    def _step(self, keys: Tensor, targets: Tensor) -> None:
        residual = targets - self.delta() @ keys
        covariance = self._covariance.double() + keys @ keys.T
        solved, info = torch.linalg.solve_ex(covariance, keys)
        if int(info):
            raise NotPositiveDefiniteError(
                "append: the key covariance must be invertible, got a singular matrix; collect "
                "statistics over more tokens"
            )
        self._weight = (self._weight.double() + residual @ solved.T).float()
        self._covariance = covariance.float()
