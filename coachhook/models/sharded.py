"""Weights that several processes hold together, as DTensors: tensor parallelism and FSDP2.

A DTensor is known by what it can do: torch.distributed.tensor takes a while to import.
"""

from __future__ import annotations

from torch import Tensor, nn

from coachhook.errors import UnsupportedModelError


def is_sharded(value: object) -> bool:
    """Whether ``value`` is a DTensor, a tensor that several processes hold together."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def check_whole(op: str, model: object) -> None:
    """Check that this process holds every weight of ``model`` whole.

    Raises:
        UnsupportedModelError: several processes hold it together (tensor parallelism, FSDP2).
    """
    if not isinstance(model, nn.Module):
        return  # which describe has words for
    sharded = (name for name, value in model.named_parameters() if is_sharded(value))
    # FSDP2 may leave weights whole after a forward, until the next: its modules have a way back.
    fsdp = (name or "model" for name, module in model.named_modules() if hasattr(module, "unshard"))
    name = next(sharded, None) or _plain_slice(model) or next(fsdp, None)
    if name is not None:
        raise UnsupportedModelError(
            f"{op}: model must be whole in this process, got one of which several processes hold "
            f"{name} together (tensor parallelism or FSDP2). Load it without, with "
            "device_map='auto' if one GPU is too small; edits that were made and saved so can be "
            "attached to a model of DTensors"
        )


def check_gatherable(op: str, model: nn.Module) -> None:
    """Check that slices of weights are DTensors, which know the whole they are slices of.

    Raises:
        UnsupportedModelError: the model is tensor-parallel and holds them as plain tensors.
    """
    name = _plain_slice(model)
    if name is not None:
        raise UnsupportedModelError(
            f"{op}: weights of a tensor-parallel model must be DTensors, got a plain tensor for "
            f"{name}, as some versions of transformers give; load the model with one that gives "
            "DTensors (4.57 and 5.17 do), or without tp_plan"
        )


def _plain_slice(model: nn.Module) -> str | None:
    """Name of a weight that transformers has sliced without a DTensor; None where there is none."""
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        # The mark is of versions without DTensors, and of 4.57; a norm is marked but whole.
        if getattr(module, "_hf_tp_plan", None) and weight is not None and weight.dim() > 1:
            if not is_sharded(weight):
                return f"{path}.weight"
    return None
