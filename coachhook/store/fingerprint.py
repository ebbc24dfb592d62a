"""A fingerprint of a model's weights, by which statistics and edits know their model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.hooks import HookedLinear
from coachhook.models import check_gatherable, is_linear_like, plain_parts

_SCHEME = "coachhook fingerprint 1"
_BLOCKS = 64
_BLOCK = 1024
_TINY = 2.0**-16


def fingerprint(model: nn.Module) -> str:
    """Return a hexadecimal digest (128 bits of SHA-256) of the weights of `model`.

    It covers the model type, the numbers of heads, the activation, and the name, shape and a fixed
    sample of the values of every parameter, and of the buffers of linear layers without one: all of
    them up to 65,536 elements, else 64 evenly spaced runs of 1,024. Values are rounded to bfloat16
    and magnitudes up to 2^-16 count as zero before they are hashed, so one checkpoint has one
    fingerprint in float64, float32 and bfloat16, and a bfloat16 checkpoint also in float16. A
    float32 checkpoint cast to float16 is rounded twice and differs.

    Names are those of ``model.state_dict()``, where attached hooks do not show; tied weights
    appear under each of their names, whether the tie still holds or not. The device does not
    matter. A quantised model has another fingerprint than the one it was made from.

    Weights that several processes hold together as DTensors are gathered one after another, in all
    of these processes: the fingerprint is that of the whole model.

    Raises:
        UnsupportedModelError: the model is tensor-parallel and its weights are no DTensors.
        ValueError: a parameter is on the meta device and has no values.
    """
    check_gatherable("fingerprint", model)
    digest = hashlib.sha256(_SCHEME.encode())
    digest.update(json.dumps(_config_essentials(model), sort_keys=True).encode())
    # A quantised layer may keep its weight in buffers. A hook on experts says a shape that they do
    # not.
    modules = {
        path: module.base if isinstance(module, HookedLinear) else module
        for path, module in model.named_modules()
    }
    buffered = {
        path
        for path, module in modules.items()
        if is_linear_like(module) and not isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    entries = model.state_dict(keep_vars=True)
    for name in sorted(entries):
        value = entries[name]
        kept = isinstance(value, Tensor) and name.rpartition(".")[0] in buffered
        if not (kept or isinstance(value, nn.Parameter)):
            continue
        if value.is_meta:
            raise ValueError(
                f"fingerprint: model must hold its weights, got {name} on the meta device; "
                "load the model without offloading"
            )
        digest.update(f"{name} {list(value.shape)}".encode())
        for part in plain_parts(value.detach()):
            digest.update(_sampled_bytes(part))
    return digest.hexdigest()[:32]


def _config_essentials(model: nn.Module) -> dict[str, object]:
    """What changes the function without changing a parameter, under names all versions share."""
    config: Any = getattr(model, "config", None)

    def read(name: str) -> object:
        try:
            return getattr(config, name, None)
        except RuntimeError:  # as transformers says that its layers differ in that
            return [getattr(layer, name, None) for layer in config.per_layer_config]

    heads = read("num_attention_heads")
    return {
        "model_type": read("model_type"),
        "heads": heads,
        "key_value_heads": read("num_key_value_heads") or heads,
        "activation": read("hidden_act") or read("activation_function"),
    }


def _sampled_bytes(value: Tensor) -> bytes:
    flat = value.reshape(-1)
    if flat.numel() > _BLOCKS * _BLOCK:
        last = flat.numel() - _BLOCK
        starts = torch.tensor([last * i // (_BLOCKS - 1) for i in range(_BLOCKS)])
        index = (starts[:, None] + torch.arange(_BLOCK)).reshape(-1)
        flat = flat[index.to(flat.device)]
    if not flat.is_floating_point():
        return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    rounded = flat.to(torch.bfloat16)
    rounded = rounded.masked_fill(rounded.abs() <= _TINY, 0)
    return rounded.cpu().view(torch.int16).numpy().tobytes()
