"""Which linear layers of a model can be edited, where they are, and how models are loaded."""

from __future__ import annotations

from coachhook.models.description import KEY_SITES, EditableLayer, ModelDescription
from coachhook.models.discovery import describe
from coachhook.models.fused import fused_activations, planless_attention
from coachhook.models.loading import (
    check_padding,
    end_tokens,
    load_model,
    prepare_tokenizer,
    usable_device,
)
from coachhook.models.modules import (
    check_finite,
    check_gradients,
    evaluating,
    get_submodule,
    is_linear_like,
    linear_shape,
    passage,
    plain_parts,
    set_submodule,
    weight_of,
)
from coachhook.models.partial import ForwardEnded, partial_forward, skipped
from coachhook.models.sharded import check_gatherable, check_whole, is_sharded

__all__ = [
    "KEY_SITES",
    "EditableLayer",
    "ForwardEnded",
    "ModelDescription",
    "check_finite",
    "check_gatherable",
    "check_gradients",
    "check_padding",
    "check_whole",
    "describe",
    "end_tokens",
    "evaluating",
    "fused_activations",
    "get_submodule",
    "is_linear_like",
    "is_sharded",
    "linear_shape",
    "load_model",
    "partial_forward",
    "passage",
    "plain_parts",
    "planless_attention",
    "prepare_tokenizer",
    "set_submodule",
    "skipped",
    "usable_device",
    "weight_of",
]
