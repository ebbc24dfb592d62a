"""One process's share of a collection, and what all processes do together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")


@dataclass(frozen=True)
class Share:
    """Every batch whose number is `rank` modulo `processes`.

    The methods that exchange something must be called by all processes, in the same order. Alone,
    they give back what they are given.
    """

    rank: int = 0
    processes: int = 1

    @classmethod
    def of_default_group(cls) -> Share:
        """The share of this process in torch's default process group; all without a group."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def takes(self, batch: int) -> bool:
        """Whether the batch of this number is this process's."""
        return batch % self.processes == self.rank

    def add_(self, tensor: Tensor) -> None:
        """Replace `tensor` by the sum over the processes, in float32 or float64."""
        if self.processes == 1 or not tensor.numel():
            return
        # One summand is not zero wherever a 16-bit tensor is added up here, so nothing is rounded.
        wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
        exchanged = wide.to(_exchange_device(tensor.device))
        dist.all_reduce(exchanged)
        if exchanged is not tensor:
            tensor.copy_(exchanged)

    def total(self, counts: Sequence[int]) -> list[int]:
        """The sums of counts over the processes."""
        return [sum(values) for values in zip(*self.gather(list(counts)), strict=True)]

    def first(self, value: _T | None) -> _T | None:
        """The value of the first process that has one."""
        return next((found for found in self.gather(value) if found is not None), None)

    def check_equal(self, values: Mapping[str, Any]) -> None:
        """Check that all processes were given the same.

        Raises:
            ValueError: naming what differs; in every process.
        """
        given = self.gather(dict(values))
        for name in values:
            if any(other[name] != given[0][name] for other in given):
                shown = ", ".join(str(other[name]) for other in given)
                raise ValueError(
                    f"collect_statistics: {name} must be the same in all processes, got {shown}"
                )

    def gather(self, value: _T) -> list[_T]:
        """The values of all processes, by rank."""
        if self.processes == 1:
            return [value]
        found: list[Any] = [None] * self.processes
        dist.all_gather_object(found, value)
        return found


def _exchange_device(device: torch.device) -> torch.device:
    """Where the default group can add up: NCCL on GPUs only, gloo from the CPU."""
    if dist.get_backend() == "nccl":
        return device if device.type == "cuda" else torch.device("cuda")
    return torch.device("cpu")
