"""What the network holds at the last subject token: keys of a layer, outputs of a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.editing.live import first_tensor
from coachhook.editing.packing import MODEL_COST, group_cost, pack
from coachhook.editing.prompts import EncodedPrompt, pad_right
from coachhook.hooks import HookedLinear
from coachhook.models import ForwardEnded, ModelDescription, get_submodule, partial_forward
from coachhook.ops import Membership, Population, Prefix, Scope, gate_scores
from coachhook.ops import Sequence as SequenceScope


@dataclass(frozen=True)
class States:
    """States at the last subject token of R prompts, compute dtype.

    Attributes:
        keys: inputs of the layer's down-projection ``[R, n]``.
        outputs: what targets are compared with, outputs of the last edited block ``[R, d]``, or of
            its down-projection where that is not added to the residual as it is; ``[R, 0]`` where
            none were wanted.
    """

    keys: Tensor
    outputs: Tensor


@torch.no_grad()
def read_states(
    model: nn.Module,
    description: ModelDescription,
    prompts: Sequence[EncodedPrompt],
    layer: int,
    last_layer: int | None,
    *,
    pad_id: int,
    together: bool = False,
    rows_at_once: int = 512,
) -> States:
    """Runs ``prompts`` through the model, hooks as they are, up to the block ``last_layer``.

    Args:
        model: the model.
        description: its description.
        prompts: R prompts.
        layer: whose keys are wanted.
        last_layer: whose outputs are wanted; not below ``layer``. None: only the keys are.
        pad_id: id used for padding.
        together: pad up to ``rows_at_once`` prompts together, for gates that look at padding. If
            not, only those of about one length.
        rows_at_once: bounds the memory.
    """
    base = get_submodule(model, description.base_model_path)
    down = get_submodule(model, description.layers[layer].path)
    above = layer if last_layer is None else last_layer
    block = get_submodule(model, description.layers[above].target_path)
    device = next(model.parameters()).device
    keys: list[Tensor] = []
    outputs: list[Tensor] = []
    groups = [list(range(len(prompts)))]
    if not together:
        groups = pack([len(p.ids) for p in prompts], MODEL_COST * group_cost(device))
    chunks = [
        group[start : start + rows_at_once]
        for group in groups
        for start in range(0, len(group), rows_at_once)
    ]
    for numbers in chunks:
        chunk = [prompts[number] for number in numbers]
        ids, mask = pad_right([p.ids for p in chunk], pad_id, device)
        rows = torch.arange(len(chunk), device=device)
        lookup = torch.tensor([p.lookup for p in chunk], device=device)

        def at_lookup(
            states: Tensor, ids: Tensor = ids, r: Tensor = rows, c: Tensor = lookup
        ) -> Tensor:
            # OPT flattens batch and time before its second linear.
            states = states.reshape(*ids.shape, states.shape[-1])
            picked = states[r.to(states.device), c.to(states.device)]
            return picked if picked.dtype == torch.float64 else picked.float()

        def take_key(_module: nn.Module, args: tuple[Any, ...], at: Any = at_lookup) -> None:
            keys.append(at(args[0]))
            if last_layer is None:
                raise ForwardEnded

        def take_output(_module: nn.Module, _args: Any, output: Any, at: Any = at_lookup) -> None:
            outputs.append(at(first_tensor(output)))
            raise ForwardEnded

        handles = [
            down.register_forward_pre_hook(take_key),
            block.register_forward_hook(take_output),
        ]
        with partial_forward(*handles):
            base(input_ids=ids, attention_mask=mask, use_cache=False)
    order = torch.tensor([number for numbers in chunks for number in numbers]).argsort()
    found = torch.cat(keys)
    found = found[order.to(found.device)]
    if not outputs:
        return States(found, found.new_empty(len(found), 0))
    given = torch.cat(outputs)
    return States(found, given[order.to(given.device)])


@torch.no_grad()
def read_inputs(
    model: nn.Module,
    description: ModelDescription,
    prompts: Sequence[EncodedPrompt],
    layers: Sequence[int],
    *,
    pad_id: int,
) -> tuple[dict[int, Tensor], Tensor]:
    """Inputs ``[R, T, n]`` of the down-projections of ``layers``, and the mask ``[R, T]`` (bool).

    All prompts are padded together at the right.
    """
    base = get_submodule(model, description.base_model_path)
    ids, mask = pad_right([p.ids for p in prompts], pad_id, next(model.parameters()).device)
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            found[layer] = args[0].reshape(*ids.shape, args[0].shape[-1])
            if layer == max(layers):
                raise ForwardEnded

        return hook

    handles = [
        get_submodule(model, description.layers[i].path).register_forward_pre_hook(keep(i))
        for i in layers
    ]
    with partial_forward(*handles):
        base(input_ids=ids, attention_mask=mask, use_cache=False)
    return found, mask.bool()


def read_up_to(
    model: nn.Module,
    description: ModelDescription,
    prompts: Sequence[EncodedPrompt],
    layer: int,
    *,
    pad_id: int,
) -> Tensor:
    """Inputs ``[R, T, n]`` of a layer up to the token looked up, which is last; zeros before them.

    Prompts of about one length are run together.
    """
    prompts = [EncodedPrompt(p.ids[: p.lookup + 1], p.first, p.lookup) for p in prompts]
    lengths = torch.tensor([prompt.lookup + 1 for prompt in prompts])
    cost = MODEL_COST * group_cost(next(model.parameters()).device)
    found: Tensor | None = None
    for group in pack(lengths.tolist(), cost):
        some = [prompts[i] for i in group]
        read, _ = read_inputs(model, description, some, [layer], pad_id=pad_id)
        x = read[layer]
        if found is None:
            found = x.new_zeros(len(prompts), int(lengths.max()), x.shape[2])
        rows, width = torch.tensor(group), x.shape[1]
        at = torch.arange(width) - width + lengths[rows, None]
        rows, at, before = (t.to(x.device) for t in (rows, at.clamp_min(0), at < 0))
        moved = x[torch.arange(len(some), device=x.device)[:, None], at]
        found[rows, -width:] = moved.masked_fill_(before[..., None], 0)
    if found is None:
        raise ValueError("read_up_to: prompts must hold at least one, got none")
    return found


@torch.no_grad()
def answered(model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
    """Whether the model, hooks as they are, answers each prompt with its target.

    Every token of the target is asked for with those before it given.

    Args:
        model: the model.
        pairs: ids of each prompt and of its target.
    """
    found = []
    device = next(model.parameters()).device
    for prompt, target in pairs:  # few, and of any length: logits of all at once would be large
        ids = torch.tensor([prompt + target[:-1]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        found.append(logits.argmax(-1).tolist() == target)
    return found


def mean_keys(keys: Tensor) -> Tensor:
    """Half the bare prompt's key and half the mean over the other contexts; ``[R, C, n]``."""
    if keys.shape[1] == 1:
        return keys[:, 0]
    return (keys[:, 0] + keys[:, 1:].mean(dim=1)) / 2


def whole_scores(hook: HookedLinear, x: Tensor, mask: Tensor | None) -> Tensor:
    """Scores ``[B, T]`` of inputs ``[B, T, n]`` as the hook would judge whole sequences."""
    scopes: dict[str, Scope] = {
        "sequence": SequenceScope(),
        "prefix": Prefix(),
        "population": Population(*hook.population),
        "membership": Membership(correction=hook.correction, **hook.cues()),
    }
    return gate_scores(x, hook.operand(), mask=mask, scope=scopes[hook.scope])
