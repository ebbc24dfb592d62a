"""The network above one block, run by itself on captured inputs.

Everything below the last edited layer is constant while targets are optimised, so it runs once;
only the blocks above are run again, and differentiated, at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.models import ModelDescription, get_submodule


def first_tensor(output: Any) -> Tensor:
    """A block's hidden state: blocks return it alone or first in a tuple, depending on version."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _select(value: Any, rows: Tensor, batch: int) -> Any:
    """``value`` for a subset of the batch rows; what has no batch dimension is left as it is."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() >= 2 and value.shape[0] == batch else value
    if isinstance(value, tuple | list):
        return type(value)(_select(v, rows, batch) for v in value)
    if isinstance(value, dict):
        return {k: _select(v, rows, batch) for k, v in value.items()}
    return value


@dataclass
class Captured:
    """One batch as it enters the suffix.

    Attributes:
        hidden: output of the block below, ``[B, T, d]``, model dtype.
        calls: positional (without the hidden state) and keyword arguments of each block above.
    """

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def select(self, rows: Tensor) -> Captured:
        """The rows given by an index tensor ``[R]``."""
        batch = self.hidden.shape[0]
        calls = [(_select(a, rows, batch), _select(k, rows, batch)) for a, k in self.calls]
        return Captured(self.hidden[rows], calls)


class Suffix:
    """Blocks ``layer + 1 ..``, final norm and head of a model."""

    def __init__(self, model: nn.Module, description: ModelDescription, layer: int) -> None:
        self._base = get_submodule(model, description.base_model_path)
        self._block = get_submodule(model, description.layers[layer].block_path)
        self._first = layer + 1
        self._above: list[nn.Module] = [
            get_submodule(model, entry.block_path) for entry in description.layers[layer + 1 :]
        ]
        self._norm = get_submodule(model, description.final_norm_path)
        self._head = get_submodule(model, description.lm_head_path)

    @torch.no_grad()
    def capture(self, ids: Tensor, mask: Tensor) -> Captured:
        """Runs the model once on ``ids``, ``mask`` (``[B, T]``), keeping what enters the suffix."""
        found: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        hidden: list[Tensor] = []

        def keep(index: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if args:
                    args = args[1:]
                else:
                    kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                found[index] = (args, kwargs)

            return hook

        handles: list[Any] = [
            block.register_forward_pre_hook(keep(i), with_kwargs=True)
            for i, block in enumerate(self._above)
        ]
        handles.append(
            self._block.register_forward_hook(
                lambda _module, _args, output: hidden.append(first_tensor(output).detach())
            )
        )
        with _hooks(handles):
            self._base(input_ids=ids, attention_mask=mask, use_cache=False)
        return Captured(hidden[0], [found[i] for i in range(len(self._above))])

    def run(
        self, captured: Captured, hidden: Tensor, loss_layer: int | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B, T, d]`` after block ``loss_layer`` (None: last) and at the end."""
        at_loss = hidden
        for index, (block, (args, kwargs)) in enumerate(
            zip(self._above, captured.calls, strict=True), start=self._first
        ):
            hidden = first_tensor(block(hidden, *args, **kwargs))
            if index == loss_layer:
                at_loss = hidden
        return (hidden if loss_layer is None else at_loss), hidden

    def log_probs(self, states: Tensor) -> Tensor:
        """Log-probabilities of the next token ``[..., V]``, float32 or better."""
        logits = self._head(self._norm(states))
        if logits.dtype != torch.float64:
            logits = logits.float()
        return torch.log_softmax(logits, dim=-1)
