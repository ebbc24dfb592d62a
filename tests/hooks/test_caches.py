"""Caches that are cut back, made in another mode or preallocated."""

from __future__ import annotations

import pytest
import torch
import transformers

from coachhook.hooks.cache_state import cache_argument, state_of

from ..models.families import tiny
from .support import fired, hooked, padded, prompts

KEPT = ("prefix", "cued")
VERSION = transformers.__version__


def _ids(rows: int, columns: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, 60, (rows, columns), generator=generator)


def _static(model) -> transformers.StaticCache:
    return transformers.StaticCache(config=model.config, max_cache_len=32)


@pytest.mark.parametrize("scope", KEPT)
@pytest.mark.parametrize("make", [_static, lambda _: transformers.DynamicCache()])
def test_a_cache_cut_back_knows_what_one_knows_that_was_never_longer(scope: str, make) -> None:
    model = tiny("llama").double()
    hooked(model, scope)
    ids = _ids(2)
    longer, shorter = make(model), make(model)
    with torch.no_grad():
        model(ids[:, :4], **cache_argument(model, longer))
        model(ids[:, 4:], **cache_argument(model, longer))
        if not all(hasattr(layer, "crop") for layer in longer.layers):
            pytest.skip(f"no crop of {type(longer).__name__}, transformers {VERSION}")
        longer.crop(-6)
        model(ids[:, :4], **cache_argument(model, shorter))
        model(ids[:, 4:10], **cache_argument(model, shorter))
    assert int(longer.get_seq_length()) == 10
    for key, expected in state_of(shorter).moments.items():
        torch.testing.assert_close(state_of(longer).moments[key], expected)


@pytest.mark.parametrize("scope", KEPT)
def test_a_cache_filled_in_inference_mode_is_read_on_outside_of_it(scope: str) -> None:
    model = tiny("llama").double()
    hooked(model, scope)
    ids = _ids(2)
    with torch.no_grad():
        expected = model(ids).logits
    for mode in (torch.inference_mode, torch.no_grad):
        cache = transformers.DynamicCache()
        with torch.inference_mode():
            model(ids[:, :12], **cache_argument(model, cache))
            cache.reorder_cache(torch.tensor([0, 1]))
        with mode():
            cache.crop(-4)
            found = model(ids[:, 8:], **cache_argument(model, cache)).logits
        torch.testing.assert_close(found, expected[:, 8:])


@pytest.mark.parametrize("scope", KEPT)
def test_what_was_read_while_disabled_is_taken_back(scope: str) -> None:
    model = tiny("llama").double()
    hooks = hooked(model, scope)
    ids = _ids(2)
    with torch.no_grad():
        expected = model(ids).logits
        cache = transformers.DynamicCache()
        model(ids[:, :8], **cache_argument(model, cache))
        with hooks.disabled():
            model(ids[:, 8:12], **cache_argument(model, cache))
        cache.crop(-4)
        found = model(ids[:, 8:], **cache_argument(model, cache)).logits
    torch.testing.assert_close(found, expected[:, 8:])


@pytest.mark.parametrize("scope", ["sequence", "population", "cued"])
def test_a_mask_may_be_as_long_as_a_preallocated_cache(scope: str) -> None:
    model = tiny("llama").double()
    hooks = hooked(model, scope)
    batch = padded(prompts(), "left")
    width = batch["input_ids"].shape[1]
    real = batch["attention_mask"].bool()
    whole = torch.ones(4, 32, dtype=torch.long)
    whole[:, :width] = batch["attention_mask"]
    token = torch.full((4, 1), 9)
    answers = []
    for mask in (whole, None):
        cache = _static(model)
        with torch.no_grad(), hooks.record() as records:
            prompt, step = (
                model(
                    ids,
                    attention_mask=whole[:, :end] if mask is None else mask,
                    **cache_argument(model, cache),
                ).logits
                for ids, end in ((batch["input_ids"], width), (token, width + 1))
            )
        answers.append((prompt[real], step, fired(records)))
    (prompt, step, count), (prompt_cut, step_cut, count_cut) = answers
    assert count == count_cut > 0
    torch.testing.assert_close(prompt, prompt_cut)
    torch.testing.assert_close(step, step_cut)
