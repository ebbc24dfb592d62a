"""Corrections as a LoRA adapter, made and saved by peft."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from coachhook.models import get_submodule, set_submodule

_ADAPTER = "default"


def import_peft() -> Any:
    """The module.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "export: format 'lora' must have peft installed, got none; run: "
            "pip install 'coachhook[lora]', or take format 'merged'"
        ) from error
    return peft


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """In which peft keeps an adapter beside a weight: as wide as it is, float32 at least."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class LoraAdapter:
    """A model with an adapter in it, made by :func:`adapter_in`.

    Args:
        model: peft's model around it.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def disabled(self) -> AbstractContextManager[None]:
        """A block in which the model answers without the adapter."""
        return cast("AbstractContextManager[None]", self._model.disable_adapter())

    def save(self, folder: Path) -> None:
        """Writes the adapter for ``peft.PeftModel.from_pretrained``."""
        # By itself peft asks the hub whether the model's vocabulary has grown.
        self._model.save_pretrained(folder, save_embedding_layers=False)


@contextmanager
def adapter_in(
    model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> Iterator[LoraAdapter]:
    """A block in which a model has an adapter ``x -> W0 x + B A x`` at some of its modules.

    Args:
        model: left as it was.
        factors: B ``[m, r]`` and A ``[r, n]`` by dotted path of the module, of one r.
    """
    peft = import_peft()
    from transformers.pytorch_utils import Conv1D

    (rank,) = {len(a) for _, a in factors.values()}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = set(vars(model))
    modules = {path: get_submodule(model, path) for path in factors}
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,  # peft scales by lora_alpha / r
        lora_dropout=0.0,
        target_modules=list(factors),
        fan_in_fan_out=all(isinstance(module, Conv1D) for module in modules.values()),
        inference_mode=True,
    )
    try:
        # The first values, which are drawn at random, are written over.
        with torch.random.fork_rng(), torch.inference_mode(False):
            adapted = peft.get_peft_model(model, settings, adapter_name=_ADAPTER)
        _fill(model, factors)
        name = os.fspath(cast("Any", model).config._name_or_path or "")
        # A relative path would be looked up where the adapter is loaded.
        base = str(Path(name).resolve()) if name and Path(name).is_dir() else name
        adapted.peft_config[_ADAPTER].base_model_name_or_path = base or None
        yield LoraAdapter(adapted)
    finally:
        # Not by peft's unload: there is nothing to call it on where peft itself failed half-way.
        for path, module in modules.items():
            set_submodule(model, path, module)
        for added in vars(model).keys() - attributes:
            delattr(model, added)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@torch.no_grad()
def _fill(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for path, (b, a) in factors.items():
        module: Any = get_submodule(model, path)
        module.lora_A[_ADAPTER].weight.copy_(a)
        module.lora_B[_ADAPTER].weight.copy_(b)
