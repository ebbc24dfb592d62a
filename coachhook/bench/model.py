"""Whole models with random weights: reading a prompt and decoding, hooked against unhooked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coachhook.bench.hooked_linear import ALPHA
from coachhook.bench.runner import Case, benchmark
from coachhook.hooks import HookSet, attach_hooks
from coachhook.hooks.cache_state import cache_argument, returned_cache

_RANK = 128
_PROMPT = 2048
_CONTEXT = 512  # tokens in the cache of a decoding step


class Shape(NamedTuple):
    """A model's sizes.

    Attributes:
        name: for a reader.
        kind: ``model_type`` of transformers.
        sizes: fields of its configuration.
        layers: blocks that are hooked.
        rank: rank of each hook.
        prompt: tokens of the prompt that is read.
        context: tokens in the cache when one is decoded.
        captured: whether its forward can be captured in a CUDA graph. That of transformers' GPT-J
            copies something from host to GPU (5.17), and a capture that fails spoils the process.
    """

    name: str
    kind: str
    sizes: dict[str, int]
    layers: list[int]
    rank: int = _RANK
    prompt: int = _PROMPT
    context: int = _CONTEXT
    captured: bool = True


# Hooked where the published experiments hook GPT-J, and as many blocks as they take of Llama.
GPT_J = Shape("GPT-J 6B", "gptj", {}, [3, 4, 5, 6, 7, 8], captured=False)
_LLAMA = Shape(
    "Llama 3 8B",
    "llama",
    {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    [4, 5, 6, 7, 8],
)
# The same code at the size of a processor.
SMALL_GPT_J = Shape(
    "GPT-J, small",
    "gptj",
    {
        "vocab_size": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "n_positions": 128,
        "n_embd": 64,
        "n_layer": 8,
        "n_head": 4,
        "rotary_dim": 8,
    },
    [1, 2, 3, 4, 5, 6],
    rank=8,
    prompt=64,
    context=16,
)
_SMALL_LLAMA = Shape(
    "Llama, small",
    "llama",
    {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    [1, 2, 3, 4, 5],
    rank=8,
    prompt=64,
    context=16,
)


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model of these sizes, with the initial weights of its class."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(shape.kind, **shape.sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(device, dtype).eval()


def add_hooks(model: nn.Module, shape: Shape, ids: Tensor) -> HookSet:
    """Random hooks, judged against the norms that they have on ``ids [1, T]``."""
    hooks = attach_hooks(model, shape.layers)
    seen: dict[int, Tensor] = {}
    handles = []
    for index, layer in hooks.items():
        generator = torch.Generator(ids.device).manual_seed(index)
        draw = partial(torch.randn, generator=generator, device=ids.device)
        q = torch.linalg.qr(draw(layer.out_features, shape.rank))[0]
        layer.set_factored(q, draw(shape.rank, layer.in_features))

        def keep(_: nn.Module, inputs: tuple[Any, ...], index: int = index) -> None:
            seen[index] = inputs[0]

        handles.append(layer.base.register_forward_pre_hook(keep))
    with torch.inference_mode(), hooks.disabled():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    for index, layer in hooks.items():
        s = layer.operand()[1]
        norms = torch.linalg.vector_norm(seen[index].to(s.dtype) @ s.T, dim=-1)
        layer.set_scope("population", population=(float(norms.mean()), float(norms.std())))
        layer.set_alpha(ALPHA)
        layer.state = "validated"
    return hooks


def _decoding(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """One more token after ``ids [1, T]``, with a cache that stays as it is.

    A layer of a cache replaces its tensors by longer ones, which a CUDA graph would go on to read
    when they are gone: every call has layers of its own, around the same tensors.
    """
    with torch.inference_mode():
        cache = copy.deepcopy(returned_cache(model(ids, use_cache=True)))
    token = ids[:, -1:].clone()

    def step() -> Tensor:
        own = copy.copy(cache)
        own.layers = [copy.copy(layer) for layer in cache.layers]
        logits: Tensor = model(token, use_cache=True, **cache_argument(model, own)).logits
        return logits

    return step


def _prefill(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: model.base_model(ids, use_cache=False).last_hidden_state


def _unhooked(hooks: HookSet, function: Callable[[], Tensor]) -> Tensor:
    with hooks.disabled():
        return function()


def model_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Decoding one token and reading a prompt; the floor is the model with its hooks off."""
    model = random_model(shape, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (1, shape.prompt), generator=generator, device=device)
    hooks = add_hooks(model, shape, ids)
    sizes = f"{shape.name}, {len(hooks)} hooks r={shape.rank}"
    for op, what, function in (
        ("model.decode", f"T=1 after {shape.context}", _decoding(model, ids[:, : shape.context])),
        ("model.prefill", f"T={shape.prompt}", _prefill(model, ids)),
    ):
        yield Case(
            op=op,
            shape=f"{sizes}, B=1 {what}",
            dtype=dtype,
            backend="auto",
            run=function,
            floor=partial(_unhooked, hooks, function),
            graphs=("op", "floor") if shape.captured else (),
        )


@benchmark("model", share=2.0)
def cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    """Two families; on a processor, and when quick, small ones."""
    small = quick or device.type != "cuda"
    for shape in (SMALL_GPT_J, _SMALL_LLAMA) if small else (_LLAMA, GPT_J):
        yield from model_cases(shape, dtype or torch.bfloat16, device)
