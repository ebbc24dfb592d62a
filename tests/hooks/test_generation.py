"""Batches, padding, caches and beams answer as one prompt at a time, in every scope."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from itertools import cycle

import pytest
import torch
import transformers

from coachhook.hooks import attach_hooks
from coachhook.hooks.cache_state import CACHE_NAMES, state_of

from ..models.families import SUPPORTED, tiny
from .support import SCOPES, fired, generate, hooked, padded, prompts

CARRIED = ("prefix", "population", "membership", "cued")
# What a scope keeps beside a cache: the statistics of a prompt or of all tokens, or the cues read.
# Families differ in how the mask and the cache reach a layer, which is one way for each of these.
KEPT = ("sequence", "prefix", "cued")


def pairs(names: Iterable[str], scopes: tuple[str, ...]) -> list[tuple[str, str]]:
    """A Llama with every scope; of the others each with one that keeps something, and with cues."""
    found = [("llama", scope) for scope in scopes]
    others = [name for name in names if name != "llama"]
    kept = [scope for scope in KEPT if scope in scopes and scope != "cued"]
    for name, scope in zip(others, cycle(kept)):
        found += [(name, scope), (name, "cued")]
    return found


def _needs_cache(name: str, scope: str) -> None:
    old = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (4, 52)
    if name == "gpt2" and old and scope in ("sequence", "prefix", "cued"):
        pytest.skip("GPT-2 has tuples for a cache before transformers 4.52")


def _needs_padding(model, rows) -> torch.Tensor:
    """What the model says without hooks, if it can tell padding from text at all."""
    together = generate(model, padded(rows, "left"))
    if not torch.equal(together, _one_by_one(model, rows)):
        pytest.skip(f"{type(model).__name__} itself answers differently when padded")
    return together


def _one_by_one(model, rows, **settings) -> torch.Tensor:
    return torch.cat([generate(model, padded([row], "left"), **settings) for row in rows])


@pytest.mark.parametrize(("name", "scope"), pairs(SUPPORTED, SCOPES))
def test_a_left_padded_batch_answers_as_one_prompt_at_a_time(name: str, scope: str) -> None:
    _needs_cache(name, scope)
    model = tiny(name).double()
    rows = prompts()
    plain = _needs_padding(model, rows)
    hooks = hooked(model, scope)
    alone = _one_by_one(model, rows)
    with hooks.record() as records:
        together = generate(model, padded(rows, "left"))
    assert fired(records) > 0
    assert not torch.equal(together, plain), "the hooks must change something"
    assert torch.equal(together, alone)
    hooks.detach()
    assert torch.equal(generate(model, padded(rows, "left")), plain)


@pytest.mark.parametrize(("name", "scope"), pairs(["gpt2", "opt"], SCOPES))
def test_beam_search(name: str, scope: str) -> None:
    _needs_cache(name, scope)
    model = tiny(name).double()
    hooks = hooked(model, scope)
    rows = prompts()
    alone = _one_by_one(model, rows, num_beams=3)
    with hooks.record() as records:
        together = generate(model, padded(rows, "left"), num_beams=3)
    decoded = [flags for _, z, flags in records if z.shape[1] == 1]
    assert sum(int(flags.sum()) for flags in decoded) > 0, "some decoded tokens must fire"
    assert torch.equal(together, alone)
    assert not torch.equal(together, generate(model, padded(rows, "left")))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "scope"), pairs(SUPPORTED, SCOPES))
def test_a_padded_forward_scores_each_row_as_if_alone(name: str, scope: str, side: str) -> None:
    model = tiny(name).double()
    rows = prompts()
    _needs_padding(model, rows)
    hooks = hooked(model, scope)
    batch = padded(rows, side)
    mask = batch["attention_mask"].bool()
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), hooks.record() as together:
        logits = model(**batch, position_ids=positions).logits
    for i, row in enumerate(rows):
        with torch.no_grad(), hooks.record() as alone:
            expected = model(row[None]).logits[0]
        torch.testing.assert_close(logits[i][mask[i]], expected, rtol=1e-6, atol=1e-6)
        for (_, z, flags), (_, z_alone, flags_alone) in zip(together, alone, strict=True):
            assert torch.equal(flags[i][mask[i]], flags_alone[0])
            assert not flags[i][~mask[i]].any()
            torch.testing.assert_close(z[i][mask[i]], z_alone[0], equal_nan=True)
    assert fired(together) > 0


@pytest.mark.parametrize(("name", "scope"), pairs(["gpt2", "opt", "gpt_neox"], CARRIED))
def test_with_and_without_a_cache(name: str, scope: str) -> None:
    _needs_cache(name, scope)
    model = tiny(name).double()
    hooks = hooked(model, scope)
    batch = padded(prompts(), "left")
    with hooks.record() as records:
        cached = generate(model, batch, use_cache=True)
    assert torch.equal(cached, generate(model, batch, use_cache=False))
    assert any(int(flags.sum()) for _, z, flags in records if z.shape[1] == 1)


@pytest.mark.parametrize("cut", [1, 3, 7])
@pytest.mark.parametrize(("name", "scope"), pairs(["gpt2", "opt"], CARRIED))
def test_a_prompt_in_chunks_is_the_prompt(name: str, scope: str, cut: int) -> None:
    _needs_cache(name, scope)
    model = tiny(name).double()
    hooks = hooked(model, scope)
    batch = padded(prompts(), "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), hooks.record() as records:
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        cache = transformers.DynamicCache()
        first, second = (
            model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions[:, part],
                past_key_values=cache,
            )
            for part in (slice(0, cut), slice(cut, ids.shape[1]))
        )
    assert fired(records[:2]) == fired(records[2:]) > 0
    chunked = torch.cat([first.logits, second.logits], 1)
    real = mask.bool()
    torch.testing.assert_close(chunked[real], whole[real], rtol=1e-6, atol=1e-6)


def test_decoding_in_the_sequence_scope_is_judged_by_the_prompt() -> None:
    """Prompt-frozen statistics; without a cache every forward is a new sequence of its own."""
    model = tiny("llama").double()
    hooks = hooked(model, "sequence")
    ids = torch.randint(3, 60, (2, 9))
    token = torch.randint(3, 60, (2, 1))
    inputs = []
    hooks[0].base.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad(), hooks.record() as records:
        prompt = model(ids)
        model(token, past_key_values=prompt.past_key_values)
        model(torch.cat([ids, token], 1))
    x_prompt, x_token, x_whole = inputs
    (_, _, _), (_, _, _), (_, z_token, _), _, (_, z_whole, _), _ = records

    def norms(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(x @ hooks[0].delta().T, dim=-1)

    of_prompt, of_whole = norms(x_prompt), norms(x_whole)
    frozen = (norms(x_token) - of_prompt.mean(-1, True)) / of_prompt.std(-1, keepdim=True)
    torch.testing.assert_close(z_token, frozen.float())
    fresh = (of_whole - of_whole.mean(-1, True)) / of_whole.std(-1, keepdim=True)
    torch.testing.assert_close(z_whole, fresh.float())
    assert not torch.allclose(z_whole[:, -1:], z_token)


@pytest.mark.parametrize("scope", SCOPES)
def test_include_padding_is_the_published_gate(scope: str) -> None:
    """Pads enter the statistics and may fire, and one decoded token alone is undefined."""
    model = tiny("llama").double()
    hooks = hooked(model, scope)
    for layer in hooks.values():
        layer.set_scope(layer.scope, include_padding=True)
    batch = padded(prompts(), "right")
    with torch.no_grad(), hooks.record() as records:
        out = model(**batch)
        more = torch.cat([batch["attention_mask"], torch.ones(4, 1, dtype=torch.long)], 1)
        model(torch.full((4, 1), 9), attention_mask=more, past_key_values=out.past_key_values)
    (_, z, _), _, (_, z_decoded, _), _ = records
    if scope == "sequence":
        assert not z.isnan().any()
        torch.testing.assert_close(z.mean(-1), torch.zeros(4), atol=1e-6, rtol=0)
        torch.testing.assert_close(z.std(-1), torch.ones(4))
    if scope in ("sequence", "prefix"):
        assert z_decoded.isnan().all()
    else:
        assert not z_decoded.isnan().any()


@pytest.mark.parametrize(("name", "scope"), pairs(["gpt2", "mistral"], SCOPES))
def test_a_static_cache(name: str, scope: str) -> None:
    """Here the mask of the current tokens has to be read off a four-dimensional one."""
    _needs_cache(name, scope)
    model = tiny(name).double()
    if not getattr(model, "_supports_static_cache", True):
        pytest.skip(f"{name} has no static cache in transformers {transformers.__version__}")
    hooked(model, scope)
    batch = padded(prompts(), "left")
    expected = generate(model, batch)
    assert torch.equal(generate(model, batch, cache_implementation="static"), expected)


def test_a_sliding_window() -> None:
    model = tiny("mistral", lambda c: c.update(sliding_window=4)).double()
    rows = prompts()
    for scope in SCOPES:
        hooks = hooked(model, scope)
        alone = _one_by_one(model, rows)
        assert torch.equal(generate(model, padded(rows, "left")), alone)
        static = generate(model, padded(rows, "left"), cache_implementation="static")
        assert torch.equal(static, alone)
        hooks.detach()


@pytest.mark.parametrize("scope", CARRIED)
def test_speculative_decoding_takes_rejected_tokens_back(scope: str) -> None:
    model = tiny("llama").double()
    hooks = hooked(model, scope)
    repeated = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]])
    inputs = {"input_ids": repeated, "attention_mask": torch.ones_like(repeated)}
    expected = generate(model, inputs, max_new_tokens=16)
    with hooks.record() as records:
        guessed = generate(model, inputs, max_new_tokens=16, prompt_lookup_num_tokens=4)
    assert any(1 < z.shape[1] < 9 for _, z, _ in records), "no guess was made"
    assert torch.equal(guessed, expected)


@pytest.mark.parametrize("scope", ["prefix", "cued"])
def test_what_was_cropped_goes_on_as_if_never_longer(scope: str) -> None:
    model = tiny("llama").double()
    hooks = hooked(model, scope)
    ids = torch.randint(3, 60, (3, 16))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def step(cache, start: int, stop: int):
        return model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
        )

    with torch.no_grad():
        whole = step(None, 0, 16).logits
        cache = transformers.DynamicCache()
        step(cache, 0, 8)
        step(cache, 8, 9)
        step(cache, 9, 14)
        cache.crop(-3)
        torch.testing.assert_close(step(cache, 11, 16).logits, whole[:, 11:])
        cache.crop(-8)
        assert cache.get_seq_length() == 8
        torch.testing.assert_close(step(cache, 8, 16).logits, whole[:, 8:])
        cache.crop(-11)
        torch.testing.assert_close(step(cache, 5, 16).logits, whole[:, 5:])
        cache.crop(-8)
        for column in range(8, 13):
            step(cache, column, column + 1)
        cache.reorder_cache(torch.arange(3))
        cache.crop(-6)
        torch.testing.assert_close(step(cache, 7, 16).logits, whole[:, 7:])
        unseen = step(None, 0, 8).past_key_values
        if scope == "prefix":
            with pytest.raises(ValueError, match="pass an empty DynamicCache"):
                unseen.crop(-4)
        else:
            unseen.crop(-4)
            torch.testing.assert_close(step(unseen, 4, 16).logits, whole[:, 4:])
    hooks.detach()


def test_an_emptied_cache_starts_anew() -> None:
    for scope in ("sequence", "prefix", "cued"):
        model = tiny("llama").double()
        hooks = hooked(model, scope)
        ids, other = torch.randint(3, 60, (2, 2, 9))
        with torch.no_grad():
            expected = model(other).logits
            cache = model(ids).past_key_values
            cache.crop(-9)
            assert torch.equal(model(other, past_key_values=cache).logits, expected)
            if hasattr(cache, "reset"):
                cache.reset()
                assert not state_of(cache).moments
        hooks.detach()


@pytest.mark.parametrize("scope", ["sequence", "prefix", "cued"])
def test_the_statistics_follow_the_rows_of_the_cache(scope: str) -> None:
    model = tiny("llama").double()
    hooked(model, scope)
    ids = torch.randint(3, 60, (4, 9))
    token = torch.randint(3, 60, (4, 1))
    index = torch.tensor([2, 2, 0, 3])
    with torch.no_grad():
        cache = model(ids).past_key_values
        expected = model(token, past_key_values=copy.deepcopy(cache)).logits
        chosen = copy.deepcopy(cache)
        chosen.reorder_cache(index)
        logits = model(token[index], past_key_values=chosen).logits
        torch.testing.assert_close(logits, expected[index])
        few = copy.deepcopy(cache)
        few.batch_select_indices(torch.tensor([1, 3]))
        logits = model(token[[1, 3]], past_key_values=few).logits
        torch.testing.assert_close(logits, expected[[1, 3]])
        many = copy.deepcopy(cache)
        many.batch_repeat_interleave(2)
        logits = model(token.repeat_interleave(2, 0), past_key_values=many).logits
        torch.testing.assert_close(logits, expected.repeat_interleave(2, 0))
        pickled = pickle.loads(pickle.dumps(cache))
        pickled.reorder_cache(index)
        logits = model(token[index], past_key_values=pickled).logits
        torch.testing.assert_close(logits, expected[index])
        torch.testing.assert_close(model(token, past_key_values=cache).logits, expected)


def test_a_cache_of_other_rows_is_refused() -> None:
    model = tiny("llama").double()
    hooked(model, "sequence")
    with torch.no_grad():
        cache = model(torch.randint(3, 60, (4, 9))).past_key_values
        type(cache).batch_select_indices(cache, torch.tensor([0]))
        with pytest.raises(ValueError, match="4 rows its cache was filled with, got 1"):
            model(torch.tensor([[5]]), past_key_values=cache)


def test_the_cache_is_freed_with_its_last_reference() -> None:
    import gc
    import weakref

    model = tiny("llama").double()
    hooked(model, "prefix")
    gc.disable()
    try:
        with torch.no_grad():
            cache = model(torch.randint(3, 60, (2, 9))).past_key_values
        assert state_of(cache).moments
        gone = weakref.ref(cache)
        del cache
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_tuple_for_a_cache_is_refused_where_it_cannot_carry_statistics(name: str) -> None:
    model = tiny("llama").double()
    hooks = attach_hooks(model, [0])
    hooks[0].context.enter(
        model.model, (), {"input_ids": torch.zeros(1, 1).long(), name: ((1, 2),)}
    )
    with pytest.raises(TypeError, match="must be a transformers Cache .*edits with cues"):
        hooks[0].context.gate_state()
