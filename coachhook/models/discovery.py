"""Finding the editable layers of a model: the family table first, then a routine by shape.

The routine looks for the list of ``num_hidden_layers`` equal blocks, in a block for the one module
outside attention that maps some width to the residual width, or for the one that holds the block's
experts, next to the blocks for the final norm, and asks transformers for the head. Then it adds a
vector to the output of the first down-projection, and of the first module with experts, and accepts
the model only if the block's output moves by just that vector (where a norm or a scale lies
between, by what these make of it), and the logits are what norm and head give, or that times a
number, or capped as the configuration says. Whether attention and MLP lie beside each other shows
in the first MLP's input: then it does not depend on the tokens before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from coachhook.errors import UnsupportedModelError
from coachhook.models.description import KEY_SITES, EditableLayer, ModelDescription
from coachhook.models.families import FAMILIES, Family
from coachhook.models.modules import get_submodule, is_linear_like, linear_shape, passage
from coachhook.models.partial import ForwardEnded, partial_forward, skipped

_EXPERT_NAMES = frozenset({"experts", "block_sparse_moe", "router", "shared_expert"})
_POST_MLP_NORMS = (
    "post_feedforward_layernorm",
    "post_ffn_layernorm",
    "post_mlp_layernorm",
    "post_feed_forward_norm",
    "ffn_layernorm_output",
)
_ATTENTION_NAMES = ("attn", "attention")
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "ff")
_DOWN_NAMES = ("down_proj", "c_proj", "fc_out", "fc2", "dense_4h_to_h", "w2", "wo")
_NORM_NAMES = (
    "norm",
    "ln_f",
    "final_layernorm",
    "final_layer_norm",
    "final_norm",
    "norm_f",
    "embedding_norm",
)
# The block's output may round once more than the vector added, and logits than the head's output; a
# norm or a cap in between is far off.
_PROBE_TOLERANCE = 0.05


def describe(model: nn.Module, key_site: str = "down_proj") -> ModelDescription:
    """Find the editable down-projection of every block of a causal language model.

    A block with experts has many; the module that holds them all is taken in their place.
    With ``key_site`` "mlp" the module of every MLP is.

    A model whose family is not in the table is run for one block on two tokens, to verify how the
    down-projection's output is added to the residual and to see whether attention and MLP lie
    beside each other, and without its blocks, to see what it makes of its head's output.

    Args:
        model: a transformers causal language model, hooks attached or not.
        key_site: "down_proj" or "mlp".

    Raises:
        TypeError: ``model`` is not a module, has no transformers configuration, or is compiled.
        UnsupportedModelError: no editable down-projection was found, or its output is not added to
            the residual as it is or through one known norm or scale, or the logits are not the
            head's output times a number, or blocks have no MLP module for ``key_site`` "mlp"; the
            message names what was looked for and what was found.
        ValueError: another ``key_site``.
    """
    if key_site not in KEY_SITES:
        raise ValueError(
            f"describe: key_site must be one of {', '.join(KEY_SITES)}, got {key_site!r}"
        )
    config = _text_config(model)
    family = FAMILIES.get(config.model_type) or _discover(model, config)
    blocks = _blocks(model, family)
    _refuse_norm_after(model, config)
    layers = [
        _editable_layer(model, family, index, config, key_site) for index in range(len(blocks))
    ]
    norm = _require(model, family.norm)
    head = _head_path(model, config.hidden_size)
    scale, cap = 1.0, None
    parallel = family.parallel
    if isinstance(parallel, str):
        parallel = getattr(config, parallel)
    if config.model_type not in FAMILIES:
        rest, cap = _probe(model, layers[0]), getattr(config, "final_logit_softcapping", None)
        other = next((layer for layer in layers if layer.experts != layers[0].experts), None)
        if other is not None:
            _probe(model, other)
        scale = _logit_scale(model, blocks, rest, norm, get_submodule(model, head), cap)
        parallel = _is_parallel(model, layers[0])
    return ModelDescription(
        family=config.model_type,
        layers=layers,
        blocks_path=family.blocks,
        final_norm_path=family.norm,
        lm_head_path=head,
        base_model_path=family.blocks.rpartition(".")[0],
        hidden_size=config.hidden_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        parallel_residual=bool(parallel),
        logit_scale=scale,
        logit_cap=cap,
    )


def _text_config(model: nn.Module) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(f"describe: model must be a torch module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "describe: model must be the model itself, got the result of torch.compile; "
            "pass the model you compiled, and compile after attaching"
        )
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise TypeError(
            "describe: model must be a transformers model with a config, "
            f"got {type(model).__name__}"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"describe: model must be decoder-only, got {type(model).__name__} (encoder-decoder)"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _blocks(model: nn.Module, family: Family) -> nn.ModuleList:
    blocks = _require(model, family.blocks)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UnsupportedModelError(
            f"describe: {family.blocks} must be a list of blocks, got {type(blocks).__name__}"
        )
    return blocks


def _require(model: nn.Module, path: str) -> nn.Module:
    try:
        return get_submodule(model, path)
    except ValueError as error:
        children = ", ".join(name for name, _ in model.named_children())
        raise UnsupportedModelError(
            f"describe: model must be a causal language model with {path!r}, got "
            f"{type(model).__name__} with {children}"
        ) from error


def _expert_layer(block: nn.Module) -> str | None:
    """Name of the module of a block that holds its experts; None where it has none."""
    holders = [
        name
        for name, child in block.named_children()
        if not any(part in name for part in _ATTENTION_NAMES)
        and any(
            _EXPERT_NAMES.intersection((name, *path.split(".")))
            for path, _ in child.named_modules()
        )
    ]
    if len(holders) > 1:
        raise UnsupportedModelError(
            "describe: the experts of a block must lie in one module, got "
            f"{', '.join(holders)} in {type(block).__name__}"
        )
    return holders[0] if holders else None


def _refuse_norm_after(model: nn.Module, config: Any) -> None:
    if not getattr(config, "do_layer_norm_before", True):
        raise UnsupportedModelError(
            "describe: a block must add its MLP's output last, got a norm after the addition "
            f"(config.do_layer_norm_before is False) in {type(model).__name__}"
        )


def _editable_layer(
    model: nn.Module, family: Family, index: int, config: Any, key_site: str
) -> EditableLayer:
    hidden, block_path = config.hidden_size, f"{family.blocks}.{index}"
    block = get_submodule(model, block_path)
    experts = _expert_layer(block)
    path = f"{block_path}.{experts or family.down}"
    n = m = hidden
    if experts is None:
        module = _require(model, path)
        if not is_linear_like(module):
            raise UnsupportedModelError(
                f"describe: {path} must map the last dimension linearly and say its shape "
                f"(in_features, out_features), got {type(module).__name__}"
            )
        n, m = linear_shape(module)
    if m != hidden:
        raise UnsupportedModelError(
            f"describe: {path} must map to the residual width {hidden}, got {n} -> {m}"
        )
    if experts is None and key_site == "mlp":
        down, path, n = path, path.rpartition(".")[0], hidden
        if path == block_path:
            raise UnsupportedModelError(
                "describe: blocks must hold their MLP in a module of its own for key_site 'mlp', "
                f"got {down} in {type(block).__name__} itself; use key_site='down_proj'"
            )
    inside = block._modules
    norm = next((f"{block_path}.{name}" for name in _POST_MLP_NORMS if name in inside), None)
    scale = float(getattr(config, "residual_multiplier", 1.0))
    return EditableLayer(index, path, block_path, n, m, norm, scale, experts is not None)


def _discover(model: nn.Module, config: Any) -> Family:
    hidden = config.hidden_size
    lists: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        # Within a block there may be as many experts.
        inside = any(path.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            if len(module) == config.num_hidden_layers:
                lists.append((path, module))
    if len(lists) != 1:
        found = ", ".join(path for path, _ in lists) or "none"
        raise UnsupportedModelError(
            f"describe: {type(model).__name__} must hold one list of {config.num_hidden_layers} "
            f"blocks (config.num_hidden_layers), got {found}. Known families: "
            f"{', '.join(FAMILIES)}"
        )
    blocks_path, blocks = lists[0]
    _refuse_norm_after(model, config)
    dense = next((block for block in blocks if _expert_layer(block) is None), None)
    down = "" if dense is None else _find_down(model, dense, hidden)
    parent_path = blocks_path.rpartition(".")[0]
    parent = get_submodule(model, parent_path)
    norm = next((name for name in _NORM_NAMES if name in parent._modules), None)
    if norm is None:
        raise UnsupportedModelError(
            f"describe: {type(model).__name__} must have a final norm beside its blocks "
            f"({', '.join(_NORM_NAMES)}), got {', '.join(parent._modules)} in {parent_path!r}"
        )
    return Family(
        blocks=blocks_path,
        down=down,
        norm=f"{parent_path}.{norm}" if parent_path else norm,
        parallel=None,
    )


def _head_path(model: nn.Module, hidden: int) -> str:
    find = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    path = next((path for path, module in model.named_modules() if module is head), None)
    if path is None:
        raise UnsupportedModelError(
            "describe: model must be a causal language model with output embeddings, "
            f"got {type(model).__name__} without"
        )
    width, _ = linear_shape(get_submodule(model, path))
    if width != hidden:
        raise UnsupportedModelError(
            f"describe: {path} must read the residual width {hidden}, got {width} (a projection in "
            f"between) in {type(model).__name__}"
        )
    return path


def _find_down(model: nn.Module, block: nn.Module, hidden: int) -> str:
    mlp = next((name for name in _MLP_NAMES if name in block._modules), None)
    # Blocks without an MLP module (OPT's) hold its two linears themselves.
    inside = block.named_children() if mlp is None else block.named_modules()
    candidates = {
        path: linear_shape(module)
        for path, module in inside
        if (mlp is None or path.startswith(f"{mlp}.")) and is_linear_like(module)
    }
    down = [path for path, (_, m) in candidates.items() if m == hidden]
    if len(down) > 1:
        named = [path for path in down if path.rpartition(".")[2] in _DOWN_NAMES]
        down = named or down
    if len(down) != 1:
        found = ", ".join(f"{path} {n}->{m}" for path, (n, m) in candidates.items()) or "none"
        raise UnsupportedModelError(
            f"describe: a block must hold one linear layer that maps to the residual width "
            f"{hidden}, in its {' / '.join(_MLP_NAMES)} or directly, got {found} in "
            f"{type(block).__name__} of {type(model).__name__}. Known families: "
            f"{', '.join(FAMILIES)}"
        )
    return down[0]


def _probe(model: nn.Module, layer: EditableLayer) -> tuple[Any, ...] | None:
    """Checks how the layer's output is added; gives what a block gives besides it."""
    plain, own, rest = _block_output(model, layer, None)
    if plain.shape != (1, 2, layer.out_features):
        raise UnsupportedModelError(
            "describe: a block must give one residual stream, [1, 2, "
            f"{layer.out_features}] for two tokens, got {list(plain.shape)} from "
            f"{layer.block_path} ({type(model).__name__})"
        )
    # The vector is as large as the stream, so that rounding cannot hide it nor a norm swallow it.
    signs = torch.arange(layer.out_features, device=plain.device) % 2 * 2 - 1
    vector = signs.to(plain.dtype) * plain.abs().mean()
    passed = passage(model, layer)
    with torch.no_grad():
        expected = passed(own + vector.to(own)) - passed(own)
    moved = _block_output(model, layer, vector)[0] - plain - expected.to(plain)
    if not bool(moved.norm(dim=-1).max() <= _PROBE_TOLERANCE * expected.norm(dim=-1).min()):
        how = "as it is"
        if not layer.adds_directly:
            how = f"times {layer.residual_scale}" if layer.residual_scale != 1 else ""
            how = " ".join(filter(None, [f"through {layer.post_norm_path}", how]))
        raise UnsupportedModelError(
            f"describe: the MLP's output must be added to the residual {how}, but a vector added "
            f"to the output of {layer.path} does not move the output of {layer.block_path} by that "
            f"({type(model).__name__})"
        )
    return rest


def _block_output(
    model: nn.Module, layer: EditableLayer, vector: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Any, ...] | None]:
    """A block's output, that of its down-projection, and what the block gives besides."""
    answers: list[Any] = []

    def add(_module: nn.Module, _args: object, output: Any) -> Any:
        own, *others = output if isinstance(output, tuple) else (output,)
        answers.append(own.detach())
        moved = own if vector is None else own + vector.to(own)
        return (moved, *others) if isinstance(output, tuple) else moved

    def stop(_module: nn.Module, _args: object, output: Any) -> None:
        answers.append(output)
        raise ForwardEnded  # once the block has answered

    down = get_submodule(model, layer.path).register_forward_hook(add)
    block = get_submodule(model, layer.block_path).register_forward_hook(stop)
    with partial_forward(down, block), torch.no_grad(), _evaluating(model):
        model(input_ids=_two_tokens(model), use_cache=False)
    own, output = answers
    if isinstance(output, Tensor):
        return output.float(), own, None
    return output[0].float(), own, tuple(output[1:])


def _is_parallel(model: nn.Module, layer: EditableLayer) -> bool:
    """Whether the first MLP reads a token in no context, as it does beside its attention."""
    inputs: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0].reshape(2, -1)[-1])
        raise ForwardEnded

    tokens = _two_tokens(model)
    down = get_submodule(model, layer.path)
    for given in (tokens, tokens[:, [1, 1]]):
        handle = down.register_forward_pre_hook(stop)
        with partial_forward(handle), torch.no_grad(), _evaluating(model):
            model(input_ids=given, use_cache=False)
    return torch.equal(*inputs)


def _logit_scale(
    model: nn.Module,
    blocks: nn.ModuleList,
    rest: tuple[Any, ...] | None,
    norm: nn.Module,
    head: nn.Module,
    cap: float | None,
) -> float:
    """What the model multiplies its head's output by, seen in a run without the blocks."""
    states: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    last = blocks[-1].register_forward_hook(keep)
    with torch.no_grad(), _evaluating(model):
        with partial_forward(last), skipped(list(blocks), rest):
            logits = model(input_ids=_two_tokens(model), use_cache=False).logits.double()
        plain = head(norm(states[0])).double()
    if cap is not None:
        plain = cap * torch.tanh(plain / cap)
    if torch.equal(logits, plain):
        return 1.0
    scale = float((logits * plain).sum() / plain.square().sum())
    if not bool((logits - scale * plain).norm() <= _PROBE_TOLERANCE * logits.norm()):
        raise UnsupportedModelError(
            "describe: the logits must be what the final norm and the head give, or that times a "
            f"number, got others from {type(model).__name__} (another map in between)"
        )
    return scale


def _two_tokens(model: nn.Module) -> Tensor:
    # Two that differ: the embedding of a padding token may be zero.
    device = cast(Any, model).get_input_embeddings().weight.device
    return torch.tensor([[1, 2]], device=device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
