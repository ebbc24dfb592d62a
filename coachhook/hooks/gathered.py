"""The input of a row-parallel layer, which its processes give in slices.

Each process of a tensor-parallel model multiplies its slice of ``x``, and the layer adds up what
they get. The gate needs one decision for all: either the processes score their slices and add up
the scores, or they gather ``x`` and each scores the whole. Gathering moves n numbers for each token
in the dtype of the model, however many edits there are, and the ops stay what they are. Adding up
moves a float32 number for each row of the hook, in the middle of the ops' kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from coachhook.errors import UnsupportedModelError
from coachhook.models import EditableLayer, is_sharded
from coachhook.ops._registry import is_plain_eager


class GatheredInput:
    """The input of a row-parallel layer, whole, from the slice that each process gives the layer.

    Args:
        weight: the layer's weight, a DTensor on a mesh of one dimension, in whose order the
            processes hold their slices.
        in_features: n, the width of the whole.
    """

    def __init__(self, weight: Any, in_features: int) -> None:
        # Its own class: where torch keeps it depends on the version.
        self._from_local = type(weight).from_local
        self._placements = [type(weight.placements[0])(-1)]
        self._mesh = weight.device_mesh
        self._group = self._mesh.get_group()
        self._processes = self._mesh.size()
        self._in_features = in_features

    @classmethod
    def of(cls, op: str, layer: EditableLayer, module: nn.Module) -> GatheredInput | None:
        """What gathers the input of ``module``, that of ``layer``; None where it is given whole.

        Raises:
            UnsupportedModelError: its processes form a mesh of several dimensions.
        """
        weight: Any = getattr(module, "weight", None)
        if not is_sharded(weight):
            return None
        if not any(placement.is_shard(1) for placement in weight.placements):
            return None
        if weight.device_mesh.ndim != 1:
            raise UnsupportedModelError(
                f"{op}: processes must form a mesh of one dimension for tensor parallelism, got "
                f"{weight.device_mesh.ndim} for {layer.path}.weight; use tensor parallelism alone"
            )
        return cls(weight, layer.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        """``[.., n]`` from this process's slice ``[.., about n / P]`` of P; differentiable.

        All processes of the mesh must call this. One that is whole already is given back.
        """
        if x.shape[-1] == self._in_features:
            return x
        # A DTensor has gradients and can be compiled, but takes the host longer than the exchange.
        if x.requires_grad or not is_plain_eager(x):
            return self._through_dtensor(x)
        *leading, width = x.shape
        widest = -(-self._in_features // self._processes)
        own = x.reshape(-1, width)
        if width < widest:  # the last slices may be narrower
            own = nn.functional.pad(own, (0, widest - width))
        parts = own.new_empty(self._processes * own.shape[0], widest)
        dist.all_gather_into_tensor(parts, own.contiguous(), group=self._group)
        rows = parts.view(self._processes, -1, widest).transpose(0, 1).flatten(1)
        return rows[:, : self._in_features].reshape(*leading, self._in_features)

    def _through_dtensor(self, x: Tensor) -> Tensor:
        shape = torch.Size((*x.shape[:-1], self._in_features))
        stride = torch.empty(shape, device="meta").stride()
        # The shape is needed where the slices are not equally wide.
        whole = self._from_local(
            x, self._mesh, self._placements, run_check=False, shape=shape, stride=stride
        )
        return whole.full_tensor()
