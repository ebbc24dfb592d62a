"""Weights that several processes hold together, as DTensors: tensor parallelism and FSDP2.

torch.distributed.tensor takes a while to import, so a DTensor is known by what it can do, and the
module is imported only beside one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coachhook.errors import UnsupportedModelError
from coachhook.models.description import EditableLayer


def is_sharded(value: object) -> bool:
    """Whether ``value`` is a DTensor, a tensor that several processes hold together."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def check_whole(op: str, model: nn.Module) -> None:
    """Check that this process holds every weight of ``model`` whole.

    Raises:
        UnsupportedModelError: it holds slices, of tensor parallelism or FSDP2.
    """
    name = next((name for name, value in model.named_parameters() if is_sharded(value)), None)
    if name is None and not _is_tensor_parallel(model):
        return
    what = "slices of its weights" if name is None else f"{name} as a DTensor"
    raise UnsupportedModelError(
        f"{op}: model must be whole in this process, got {what} (tensor parallelism or FSDP2). "
        "Load it without, device_map='auto' if one GPU is too small; edits that were made and "
        "saved so can be attached to a model of DTensors"
    )


def check_gatherable(op: str, model: nn.Module) -> None:
    """Check that slices of weights are DTensors, which know the whole they are slices of.

    Raises:
        UnsupportedModelError: the model is tensor-parallel and holds plain tensors.
    """
    if _is_tensor_parallel(model) and not any(is_sharded(value) for value in model.parameters()):
        raise _plain_slices(op, "its weights")


class GatheredInput:
    """The input of a row-parallel layer, whole, from the slice that each process gives the layer.

    Args:
        mesh: the processes, one-dimensional, in the order of their slices.
        in_features: n, the width of the whole.
    """

    def __init__(self, mesh: Any, in_features: int) -> None:
        from torch.distributed.tensor import DTensor, Shard

        self._from_local = DTensor.from_local
        self._placements = [Shard(-1)]
        self._mesh = mesh
        self._in_features = in_features

    @classmethod
    def of(
        cls, op: str, model: nn.Module, layer: EditableLayer, module: nn.Module
    ) -> GatheredInput | None:
        """What gathers the input of ``module``, that of ``layer``; None where it is given whole.

        Raises:
            UnsupportedModelError: the model is tensor-parallel and the layer's weight is a plain
                tensor, or its processes form a mesh of several dimensions.
        """
        weight: Any = getattr(module, "weight", None)
        if not is_sharded(weight):
            if _is_tensor_parallel(model):
                raise _plain_slices(op, f"{layer.path}.weight")
            return None
        placements, mesh = weight.placements, weight.device_mesh
        if not any(placement.is_shard(1) for placement in placements):
            return None
        if mesh.ndim != 1:
            raise UnsupportedModelError(
                f"{op}: processes must form a mesh of one dimension for tensor parallelism, got "
                f"{mesh.ndim} for {layer.path}.weight; use tensor parallelism alone"
            )
        return cls(mesh, layer.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        """``[.., n]`` from this process's slice ``[.., about n / P]`` of P; differentiable.

        All processes of the mesh must call this. One that is whole already is given back.
        """
        if x.shape[-1] == self._in_features:
            return x
        shape = torch.Size((*x.shape[:-1], self._in_features))
        stride = torch.empty(shape, device="meta").stride()
        # The shape is needed where the slices are not equally wide.
        parts = self._from_local(
            x, self._mesh, self._placements, run_check=False, shape=shape, stride=stride
        )
        return parts.full_tensor()


def _is_tensor_parallel(model: nn.Module) -> bool:
    """Whether transformers has loaded the model with a plan for tensor parallelism."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def _plain_slices(op: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{op}: weights of a tensor-parallel model must be DTensors, got {what} as plain tensors, "
        "as some versions of transformers give; load the model without tp_plan, or with a version "
        "that gives DTensors (4.57 and 5.17 do)"
    )
