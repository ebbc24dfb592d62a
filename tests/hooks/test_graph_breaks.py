"""Compiled models that fall into several graphs, with eager parts between: the eager answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

from .support import LAYERS, SCOPES, generate, hooked, padded, prompts, shallow

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5),
    reason="torch 2.4 cannot trace what is kept beside a cache",
)

PLACES = ("around the base model", "attention", "around a hook", "in a hook", "eager block")
QUICK = [("attention", "sequence")]  # what generates below has cues
THOROUGH = [case for case in product(PLACES, SCOPES) if case not in QUICK]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _break(*_: Any) -> None:
    torch._dynamo.graph_break()


def break_graphs(model: Any, place: str) -> None:
    """Let a Llama with hooks fall into several graphs."""
    if place == "around the base model":
        model.model.register_forward_pre_hook(_break, prepend=True)
        model.model.register_forward_pre_hook(_break)
        model.model.register_forward_hook(_break, prepend=True)
    for block in list(model.model.layers)[: len(LAYERS)]:
        hook = block.mlp.down_proj
        parts = {"attention": block.self_attn, "around a hook": hook, "in a hook": hook.base}
        if place in parts:
            parts[place].register_forward_pre_hook(_break)
            parts[place].register_forward_hook(_break)
        elif place == "eager block":
            block.mlp.forward = torch.compiler.disable(block.mlp.forward)
            break


def answers(run: Callable[..., Any], cache: Any = None) -> list[torch.Tensor]:
    """Logits for a padded prompt and for two more tokens, with a cache."""
    given = padded(prompts(), "left")
    mask = given["attention_mask"]
    found = []
    with torch.no_grad():
        for token in (7, 23, 41):
            out = run(**given, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            width = given["input_ids"].shape[1]
            found.append(out.logits[mask[:, -width:].bool()])
            mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
            given = {"input_ids": torch.full((4, 1), token), "attention_mask": mask}
    return found


def static_cache(model: Any) -> Any:
    sizes = {"max_cache_len": 24, "max_batch_size": 4, "dtype": model.dtype}
    known = inspect.signature(transformers.StaticCache).parameters
    sizes = {name: size for name, size in sizes.items() if name in known}
    return transformers.StaticCache(config=model.config, **sizes)


@pytest.mark.parametrize(
    ("place", "scope"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in THOROUGH)],
)
def test_answers_are_those_of_the_eager_model(place: str, scope: str) -> None:
    model = shallow("llama")
    hooks = hooked(model, scope)
    wanted = answers(model)
    with hooks.disabled():
        plain = answers(model)
    assert all(not torch.allclose(a, b) for a, b in zip(plain, wanted, strict=True))
    break_graphs(model, place)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for _ in range(2):
        torch.testing.assert_close(answers(compiled), wanted)
    assert counter.frame_count > 1


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["sequence", "prefix", "cued"])
def test_static_caches(scope: str) -> None:
    model = shallow("llama")
    hooked(model, scope)
    wanted = answers(model, static_cache(model))
    break_graphs(model, "attention")
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(answers(compiled, static_cache(model)), wanted)


@pytest.mark.parametrize(
    ("family", "scope"),
    [
        ("gpt2", "cued"),
        ("llama", "sequence"),
        ("llama", "prefix"),
        *(
            pytest.param("llama", scope, marks=pytest.mark.slow)
            for scope in ("population", "membership", "cued")
        ),
    ],
)
def test_blocks_compiled_one_by_one(family: str, scope: str) -> None:
    model = shallow(family)
    hooked(model, scope)
    wanted = answers(model)
    for block in model.model.layers if family == "llama" else model.transformer.h:
        block.compile(backend="eager")
    torch.testing.assert_close(answers(model), wanted)


@pytest.mark.parametrize("scope", ["sequence", "cued"])
def test_generate_that_compiles_its_steps(scope: str) -> None:
    model = shallow("llama")
    hooked(model, scope)
    batch = padded(prompts(), "left")
    wanted = generate(model, batch)
    break_graphs(model, "attention")
    settings = transformers.CompileConfig(backend="eager", fullgraph=False, mode=None)
    settings._compile_all_devices = True
    got = generate(model, batch, cache_implementation="static", compile_config=settings)
    assert torch.equal(got, wanted)
    assert hasattr(model, "_compiled_call")


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["sequence", "cued"])
def test_threads(scope: str) -> None:
    model = shallow("llama")
    hooked(model, scope)
    batches = [padded(prompts(seed=seed), "left") for seed in range(12)]

    def answer(run: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return run(**batch, use_cache=True).logits[batch["attention_mask"].bool()]

    wanted = [answer(model, batch) for batch in batches]
    break_graphs(model, "attention")
    compiled = torch.compile(model, backend="eager", dynamic=True)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda batch: answer(compiled, batch), batches))
    torch.testing.assert_close(got, wanted)


@pytest.mark.slow
def test_calls_make_no_new_graphs() -> None:
    model = shallow("llama")
    hooked(model, "cued")
    break_graphs(model, "in a hook")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    answers(compiled)
    made = counter.frame_count
    for _ in range(3):
        answers(compiled)
    assert counter.frame_count == made
