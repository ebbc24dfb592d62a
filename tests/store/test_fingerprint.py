from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from coachhook.hooks import attach_hooks
from coachhook.store import fingerprint
from tests.models.families import EXPERTS, tiny


def _gpt2(**changes):
    config = GPT2Config(
        **{"vocab_size": 101, "n_positions": 32, "n_embd": 48, "n_layer": 3, "n_head": 4} | changes
    )
    torch.manual_seed(3)
    return GPT2LMHeadModel(config).eval()


def _llama(**changes):
    defaults = {
        "vocab_size": 101,
        "hidden_size": 320,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**defaults | changes)).eval()


@pytest.mark.parametrize("build", [_gpt2, _llama])
def test_the_same_weights_have_one_fingerprint_whatever_their_dtype(build):
    model = build()
    expected = fingerprint(model)
    assert len(expected) == 32
    assert fingerprint(build()) == expected
    assert fingerprint(copy.deepcopy(model).double()) == expected
    assert fingerprint(copy.deepcopy(model).bfloat16()) == expected
    assert fingerprint(copy.deepcopy(model).bfloat16().double()) == expected


def test_a_bfloat16_checkpoint_may_run_in_float16(shared_dir):
    from coachhook.models import load_model

    found = {
        fingerprint(load_model(shared_dir / "models" / "factlm-gpt2", dtype=dtype)[0])
        for dtype in ("float32", "bfloat16", "float16", "float64")
    }
    assert len(found) == 1


def test_hooks_do_not_show():
    model = _gpt2()
    expected = fingerprint(model)
    hooks = attach_hooks(model, layers=[0, 2])
    assert fingerprint(model) == expected
    hooks[0].set_delta(torch.randn(48, 192))
    hooks.set_state("temporary")
    assert fingerprint(model) == expected
    hooks.detach()
    assert fingerprint(model) == expected


@pytest.mark.parametrize("family", EXPERTS)
def test_hooks_on_experts_do_not_show(family):
    if not hasattr(transformers, EXPERTS[family][0]):
        pytest.skip(f"transformers {transformers.__version__} has no {EXPERTS[family][0]}")
    model = tiny(family)
    expected = fingerprint(model)
    attach_hooks(model, layers=[1])
    assert fingerprint(model) == expected


def test_layers_may_differ_in_their_heads():
    if not hasattr(transformers.PretrainedConfig, "per_layer_config"):
        pytest.skip(f"transformers {transformers.__version__} has no such configurations")
    found = set()
    for heads in (2, 4):
        model = tiny("llama")
        model.config.per_layer_config = {0: {"num_attention_heads": heads}, 1: {}}
        found.add(fingerprint(model))
    assert len(found) == 2


def test_tied_weights_count_by_value():
    model = _gpt2()
    untied = copy.deepcopy(model)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    assert fingerprint(untied) == fingerprint(model)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
)
def test_a_rank_one_edit_of_any_layer_shows(name):
    # 512 x 320 values, of which a sample is hashed: an edit of rank one reaches them all.
    model = _llama()
    expected = fingerprint(model)
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight += 1e-3 * torch.outer(torch.randn(weight.shape[0]), torch.randn(weight.shape[1]))
    assert fingerprint(model) != expected


def test_other_weights_shapes_and_configs_differ():
    found = [
        fingerprint(_gpt2()),
        fingerprint(_gpt2(n_head=2)),
        fingerprint(_gpt2(activation_function="relu")),
        fingerprint(_gpt2(n_layer=2)),
        fingerprint(_llama()),
        fingerprint(_llama(hidden_act="gelu")),
    ]
    small = _gpt2()
    with torch.no_grad():
        small.transformer.h[1].ln_1.bias[5] = 0.5
    found.append(fingerprint(small))
    assert len(set(found)) == len(found)


def test_a_buffer_is_no_weight():
    model = _gpt2()
    expected = fingerprint(model)
    model.register_buffer("steps", torch.tensor(3.0))
    assert fingerprint(model) == expected


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match="meta device"):
        fingerprint(model)
