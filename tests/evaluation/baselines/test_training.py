"""Fine-tuning and LoRA against their formulas, in float64."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from coachhook.evaluation.baselines import make_baseline
from tests.evaluation.baselines.support import BATCHES, double, logits_of, same


def _loss(model, tokenizer):
    with torch.no_grad():
        return float(_likelihood(model, tokenizer, "target").mean())


def _likelihood(model, tokenizer, objective):
    """Mean over facts of the mean over target tokens of -log P, one sequence at a time."""
    losses = []
    for request in BATCHES[1]:
        prompt = tokenizer(request.text)["input_ids"]
        target = tokenizer(" " + request.target_new)["input_ids"]
        if objective == "prompt_last":
            log_probs = model(input_ids=torch.tensor([prompt])).logits[0, -1:].log_softmax(-1)
            chosen = [log_probs[0, token] for token in target]
        else:
            logits = model(input_ids=torch.tensor([prompt + target])).logits[0].log_softmax(-1)
            chosen = [logits[len(prompt) - 1 + i, token] for i, token in enumerate(target)]
        losses.append(-torch.stack(chosen).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("objective", ["prompt_last", "target"])
def test_one_projected_step_of_adam(objective, model, tokenizer):
    wide = double(model)
    twin = double(model)
    names = ["transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.bias"]
    parameters = [twin.get_parameter(name).requires_grad_(True) for name in names]
    losses = _likelihood(twin, tokenizer, objective)
    gradients = torch.autograd.grad(losses.mean(), parameters)
    lr, epsilon = 1e-3, 7e-4
    with make_baseline(
        "fine-tuning",
        wide,
        tokenizer,
        layer=1,
        objective=objective,
        steps=1,
        lr=lr,
        norm_constraint=epsilon,
    ) as baseline:
        result = baseline.edit(BATCHES[1])
        assert result.losses == pytest.approx(losses.tolist(), rel=1e-9)
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
            # Adam's first step (Kingma and Ba 2015): both moments are those of one gradient.
            step = -lr * gradient / (gradient.abs() + 1e-8)
            wanted = parameter.detach() + step.clamp(-epsilon, epsilon)
            torch.testing.assert_close(wide.get_parameter(name), wanted, rtol=1e-9, atol=1e-12)
        changed = {
            n for n, p in wide.named_parameters() if not torch.equal(p, twin.get_parameter(n))
        }
        assert changed == set(names)


def test_the_layer_is_at_two_thirds_of_the_depth_unless_named(model, tokenizer):
    model, plain = copy.deepcopy(model), model
    with make_baseline("fine-tuning", model, tokenizer, steps=2) as baseline:
        baseline.edit(BATCHES[0])
        changed = {
            n for n, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(n))
        }
    assert changed == {"transformer.h.2.mlp.c_proj.weight", "transformer.h.2.mlp.c_proj.bias"}


def test_the_box_is_around_the_weights_before_the_batch(model, tokenizer):
    model = copy.deepcopy(model)
    weight = model.transformer.h[0].mlp.c_proj.weight
    first = weight.clone()
    epsilon = 1e-3
    with make_baseline(
        "fine-tuning", model, tokenizer, layer=0, steps=8, norm_constraint=epsilon, lr=5e-3
    ) as baseline:
        baseline.edit(BATCHES[0])
        second = weight.clone()
        baseline.edit(BATCHES[1])
        for before, after in ((first, second), (second, weight)):
            assert float((after - before).abs().max()) == pytest.approx(epsilon, rel=1e-3)
        assert float((weight - first).abs().max()) > 1.5 * epsilon


def test_training_stops_at_its_goal(model, tokenizer):
    model = copy.deepcopy(model)
    with make_baseline(
        "fine-tuning",
        model,
        tokenizer,
        objective="target",
        norm_constraint=None,
        lr=1e-2,
        steps=200,
        stop=0.5,
    ) as baseline:
        result = baseline.edit(BATCHES[0])
        assert sum(result.losses) / 2 < 0.5
        assert all(result.converged)
        edited = logits_of(model, tokenizer)
        baseline.edit(BATCHES[0])  # good enough already: no step is made
        assert same(logits_of(model, tokenizer), edited)


def test_lora_adds_the_scaled_product(model, tokenizer):
    pytest.importorskip("peft")
    wide = double(model)
    plain = {name: p.clone() for name, p in wide.named_parameters()}
    rank, scaling = 3, 5.0
    with make_baseline(
        "lora", wide, tokenizer, rank=rank, scaling=scaling, steps=3, modules=["c_fc"]
    ) as baseline:
        first = _loss(wide, tokenizer)
        result = baseline.edit(BATCHES[1])
        assert _loss(wide, tokenizer) < first
        assert sum(result.losses) / 2 < first
        for i in range(3):
            layer = wide.transformer.h[i].mlp.c_fc
            a, b = layer.lora_A["coachhook"].weight, layer.lora_B["coachhook"].weight
            assert a.shape[0] == b.shape[1] == rank
            assert bool(b.any())
            x = torch.randn(2, 5, a.shape[1], dtype=torch.float64)
            name = f"transformer.h.{i}.mlp.c_fc"
            weight = plain[f"{name}.weight"].T + scaling / rank * b @ a  # equation 3
            wanted = x @ weight.T + plain[f"{name}.bias"]
            torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-7)
            assert torch.equal(layer.base_layer.weight, plain[f"{name}.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lora_trains_in_float32_beside_a_16_bit_model(dtype, model, tokenizer):
    """As peft's get_peft_model does; in float16 Adam's epsilon would be 0."""
    pytest.importorskip("peft")
    model = copy.deepcopy(model).to(dtype)
    with make_baseline("lora", model, tokenizer, steps=8, lr=1e-2) as baseline:
        assert {p.dtype for p in baseline._parameters} == {torch.float32}
        first = baseline.edit(BATCHES[0]).losses
        again = baseline.edit(BATCHES[0]).losses
        assert sum(again) < 0.5 * sum(first) < 5
        assert logits_of(model, tokenizer)[0].dtype == dtype


def test_lora_adapts_the_layer_at_two_thirds_of_the_depth_unless_named(model, tokenizer):
    pytest.importorskip("peft")
    model = copy.deepcopy(model)
    adapted = r"transformer\.h\.2\.mlp\.c_proj\.lora_[AB]\.coachhook\.weight"
    with make_baseline("lora", model, tokenizer):
        names = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert len(names) == 2 and all(re.fullmatch(adapted, name) for name in names)


def test_lora_is_the_same_in_every_run_and_leaves_the_generator_alone(model, tokenizer):
    pytest.importorskip("peft")
    found = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        with make_baseline("lora", copy.deepcopy(model), tokenizer, steps=2) as baseline:
            baseline.edit(BATCHES[0])
            found.append(logits_of(baseline._model, tokenizer))
        after = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(3), after)
    assert same(*found)


def test_lora_refuses_a_model_with_adapters(model, tokenizer):
    pytest.importorskip("peft")
    model = copy.deepcopy(model)
    with make_baseline("lora", model, tokenizer):
        with pytest.raises(ValueError, match="must have no adapters"):
            make_baseline("lora", model, tokenizer)


def test_lora_without_peft_says_what_to_install(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'coachhook\[baselines\]'"):
        make_baseline("lora", model, tokenizer)


def test_linear_layers_of_a_llama(tokenizer):
    """Weights stored ``[m, n]`` without a bias, and the attention's projections apart."""
    pytest.importorskip("peft")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    plain = logits_of(model, tokenizer)
    for name, options in (("fine-tuning", {}), ("lora", {})):
        with make_baseline(name, model, tokenizer, steps=2, **options) as baseline:
            baseline.edit(BATCHES[0])
            assert not torch.equal(logits_of(model, tokenizer)[0], plain[0])
            assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
        assert same(logits_of(model, tokenizer), plain)
