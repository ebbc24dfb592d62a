"""Activations in one kernel while a model is read many times."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from transformers.activations import NewGELUActivation

from coachhook.models import fused_activations, planless_attention
from tests.models.families import tiny

IDS = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))


def activations(model):
    return [module for module in model.modules() if type(module) is NewGELUActivation]


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_the_model_says_the_same_to_rounding(family):
    model = tiny(family).double()
    assert activations(model)
    plain = model(IDS).logits
    with fused_activations(model):
        assert all("forward" in vars(module) for module in activations(model))
        torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-12, atol=1e-12)
    assert torch.equal(model(IDS).logits, plain)
    assert not any("forward" in vars(module) for module in model.modules())


def test_models_of_16_bits_and_other_forwards_stay_as_they_are():
    model = tiny("gpt2")
    first, *others = activations(model)

    def own(x):
        return x

    first.forward = own
    with fused_activations(model):
        assert first.forward is own and all("forward" in vars(module) for module in others)
    assert first.forward is own
    half = copy.deepcopy(tiny("gpt2")).bfloat16()
    with fused_activations(half):
        assert not any("forward" in vars(module) for module in half.modules())


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("before", [True, False])
def test_attention_is_as_it_was_when_the_last_thread_has_left(before, first):
    """Edits of two models may overlap, and the first to begin may be the first to end."""
    setting = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with ExitStack() as rest:
            blocks = [ExitStack(), ExitStack()]
            for block in blocks:
                rest.enter_context(block).enter_context(planless_attention())
            blocks[first].close()
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            blocks[1 - first].close()
            assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(setting)
