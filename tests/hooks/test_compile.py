"""Compiled models: the same numbers in one graph, and batches swapped in without a new one."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

from .support import SCOPES, fill, hooked, padded, prompts, shallow

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5),
    reason="torch 2.4 cannot trace the attention of transformers",
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# What is kept beside a cache is the statistics of "prefix" or the cues; all other scopes, and no
# cache, come below.
@pytest.mark.parametrize(
    ("name", "scope"), [("llama", "prefix"), ("llama", "cued"), ("gpt2", "population")]
)
def test_one_graph_with_the_same_numbers(name: str, scope: str) -> None:
    model = shallow(name)
    hooks = hooked(model, scope)
    batch = padded(prompts(), "left")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        expected = model(**batch, use_cache=True)
        with hooks.disabled():
            assert not torch.equal(expected.logits, model(**batch).logits)
        out = compiled(**batch, use_cache=True)
        torch.testing.assert_close(out.logits, expected.logits)
        assert counter.frame_count == 1
        step = {
            "input_ids": torch.full((4, 1), 9),
            "attention_mask": torch.cat([batch["attention_mask"], torch.ones(4, 1).long()], 1),
        }
        after = model(**step, past_key_values=expected.past_key_values).logits
        again = compiled(**step, past_key_values=out.past_key_values).logits
        torch.testing.assert_close(again, after)


@pytest.mark.parametrize("scope", SCOPES)
def test_batches_are_swapped_in_without_a_new_graph(scope: str) -> None:
    model = shallow("llama")
    hooks = hooked(model, scope)
    hooks.reserve(16, cues=scope == "cued")
    batch = padded(prompts(), "right")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    answers = []
    with torch.no_grad():
        for rank, alpha in ((4, 0.5), (4, 1.2), (9, 0.1), (1, 0.1), (0, 0.1)):
            for layer in hooks.values():
                q, _ = torch.linalg.qr(torch.randn(32, rank, dtype=torch.float64))
                if scope == "membership":
                    layer.set_pair(q * 20, torch.randn(rank, 48))
                elif scope == "cued":
                    apart = torch.arange(rank, dtype=torch.int32) % 3
                    cues = torch.randn(rank, 48), torch.rand(rank) - 0.3, apart + 3, apart
                    cues = cues if rank != 9 else ()
                    layer.set_pair(q * 20, torch.randn(rank, 48), None, "own", *cues)
                else:
                    layer.set_factored(q, torch.randn(rank, 48) * 5)
                layer.set_alpha(alpha)
            expected = model(**batch, use_cache=False).logits
            answers.append(expected)
            torch.testing.assert_close(compiled(**batch, use_cache=False).logits, expected)
        assert counter.frame_count == 1
        with hooks.disabled():
            torch.testing.assert_close(model(**batch).logits, answers[-1])
    assert all(not torch.allclose(a, b) for a, b in pairwise(answers))


@pytest.mark.parametrize("scope", ["sequence", "cued"])
def test_one_graph_for_prompts_and_one_for_steps_of_every_size(scope: str) -> None:
    """Neither the number of sequences nor a length, nor that of the cache, makes a new graph."""
    model = shallow("llama", 1)
    hooks = hooked(model, scope, (0,))
    hooks.reserve(16, cues=scope == "cued")
    counter, graphs = CompileCounter(), []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for rows, length in ((4, 12), (3, 9)):
            given = {"input_ids": torch.randint(3, 60, (rows, length))}
            mask = torch.ones(rows, length, dtype=torch.long)
            mask[0, :3] = 0
            caches = [None, None]
            for _ in range(3):
                given["attention_mask"] = mask
                outs = [
                    run(**given, past_key_values=cache, use_cache=True)
                    for run, cache in zip((model, compiled), caches, strict=True)
                ]
                torch.testing.assert_close(outs[1].logits, outs[0].logits)
                graphs.append(counter.frame_count)
                caches = [out.past_key_values for out in outs]
                given["input_ids"] = outs[0].logits[:, -1:].argmax(-1)
                mask = torch.cat([mask, torch.ones(rows, 1, dtype=torch.long)], 1)
    assert graphs == [1, 2, 2, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
def test_inductor(scope: str) -> None:
    model = shallow("llama")
    hooked(model, scope)
    batch = padded(prompts(), "left")
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        # Llama's norm and rotation are in float32 even in a float64 model, and the compiler
        # contracts them its own way.
        logits = compiled(**batch, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["sequence", "prefix", "cued"])
def test_compiled_decoding_with_a_static_cache(scope: str) -> None:
    model = shallow("llama")
    hooked(model, scope)
    batch = padded(prompts(), "left")
    mask = batch["attention_mask"]
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)

    def decode(step) -> list[torch.Tensor]:
        sizes = {"max_cache_len": 24, "max_batch_size": 4, "dtype": model.dtype}
        known = inspect.signature(transformers.StaticCache).parameters
        sizes = {name: size for name, size in sizes.items() if name in known}
        cache = transformers.StaticCache(config=model.config, **sizes)
        seen = mask
        inputs = batch["input_ids"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = []
        for i in range(5):
            full = torch.zeros(4, 24, dtype=torch.long)
            full[:, : seen.shape[1]] = seen
            width = inputs.shape[1]
            own = torch.arange(seen.shape[1] - width, seen.shape[1])
            four = (torch.arange(24) <= own[:, None])[None, None] & full[:, None, None].bool()
            call = model if i == 0 else step
            given = {"position_ids": positions, "past_key_values": cache}
            if "cache_position" in inspect.signature(model.forward).parameters:
                given["cache_position"] = own
            logits = call(input_ids=inputs, attention_mask=four, **given).logits
            out.append(logits[:, -1])
            inputs = logits[:, -1:].argmax(-1)
            seen = torch.cat([seen, torch.ones(4, 1, dtype=torch.long)], 1)
            positions = positions[:, -1:] + 1
        return out

    with torch.no_grad():
        expected = decode(model)
        for got, wanted in zip(decode(compiled), expected, strict=True):
            torch.testing.assert_close(got, wanted)
    assert counter.frame_count <= 2


def test_filling_after_compiling_is_seen() -> None:
    """Without a reservation a new rank is a new graph, but never an old answer."""
    model = shallow("llama", 1)
    hooks = hooked(model, "population", (0,))
    batch = padded(prompts(), "left")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for scope in ("population", "sequence", "cued"):
            fill(hooks, scope)
            expected = model(**batch, use_cache=False).logits
            torch.testing.assert_close(compiled(**batch, use_cache=False).logits, expected)
        hooks.set_state("off")
        off = compiled(**batch, use_cache=False).logits
        with hooks.disabled():
            torch.testing.assert_close(off, model(**batch, use_cache=False).logits)
