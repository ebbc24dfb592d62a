"""The editable layers are found in every family, and adding to them adds to the residual."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from coachhook.errors import UnsupportedModelError
from coachhook.models import (
    describe,
    get_submodule,
    linear_shape,
    passage,
    set_submodule,
    weight_of,
)
from coachhook.models.families import default_layers

from .families import (
    DISCOVERED,
    EXPERTS,
    HIDDEN,
    INDIRECT,
    LAYERS,
    REFUSED,
    SUPPORTED,
    WIDTH,
    build,
    tiny,
)

FOUND = SUPPORTED | DISCOVERED


@pytest.mark.parametrize("name", FOUND)
def test_layers_are_found_with_their_shapes(name: str) -> None:
    config_class, _, path = FOUND[name]
    model = tiny(name)
    description = describe(model)
    assert description.family == getattr(transformers, config_class).model_type
    assert description.num_layers == LAYERS == len(description.layers)
    assert description.hidden_size == HIDDEN
    layer = description.layer(1)
    assert layer.path == path
    assert path.startswith(layer.block_path + ".")
    module = get_submodule(model, layer.path)
    assert (layer.in_features, layer.out_features) == linear_shape(module)
    assert layer.out_features == HIDDEN < layer.in_features
    weight = weight_of(module)
    assert weight is not None
    assert weight.shape == (layer.out_features, layer.in_features)
    x = torch.randn(2, layer.in_features)
    bias = getattr(module, "bias", None)
    torch.testing.assert_close(module(x), nn.functional.linear(x, weight, bias))
    assert get_submodule(model, description.lm_head_path) is model.get_output_embeddings()
    assert list(get_submodule(model, description.blocks_path).children())[1] is get_submodule(
        model, layer.block_path
    )
    calls = []
    base = get_submodule(model, description.base_model_path)
    base.register_forward_pre_hook(lambda _m, _a, kwargs: calls.append(kwargs), with_kwargs=True)
    mask = torch.ones(1, 4, dtype=torch.long)
    model(input_ids=torch.tensor([[3, 4, 5, 6]]), attention_mask=mask)
    assert len(calls) == 1
    assert "attention_mask" in calls[0]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_taken_together(name: str) -> None:
    config_class, _, path = EXPERTS[name]
    if not hasattr(transformers, config_class):
        pytest.skip(f"transformers {transformers.__version__} has no {config_class}")
    model = tiny(name)
    first, layer, _ = describe(model).layers
    assert layer.path == path.replace("mlp", _holder(model)) and layer.experts
    assert (layer.in_features, layer.out_features) == (HIDDEN, HIDDEN)
    read, given = [], []
    module = get_submodule(model, layer.path)
    module.register_forward_pre_hook(lambda _m, args: read.append(args[0]))
    module.register_forward_hook(lambda _m, _a, output: given.append(output))
    model(torch.tensor([[3, 4, 5]]))
    assert read[0].shape[-1] == HIDDEN
    output = given[0][0] if isinstance(given[0], tuple) else given[0]
    assert output.shape[-1] == HIDDEN
    # Where the first block has none, its own down-projection is taken.
    dense = name in ("deepseek_v3", "glm4_moe", "llama4", "jamba", "lfm2_moe", "glm_moe_dsa")
    assert first.experts is not dense
    assert (first.in_features == WIDTH) is dense


def _holder(model) -> str:
    """Versions of transformers differ in Mixtral's and MiniMax's name of it."""
    names = dict(model.model.layers[1].named_children())
    return "mlp" if "mlp" in names else "block_sparse_moe"


def test_as_many_experts_as_blocks_are_no_second_list_of_blocks() -> None:
    model = tiny("mixtral", lambda arguments: arguments.update(num_local_experts=LAYERS))
    assert describe(model).blocks_path == "model.layers"


@pytest.mark.parametrize("name", FOUND)
def test_the_whole_mlp_is_taken_for_its_key_site(name: str) -> None:
    model = tiny(name)
    if name == "opt":
        with pytest.raises(UnsupportedModelError, match="'mlp', got model.* use key_site='down_p"):
            describe(model, "mlp")
        return
    description, whole = describe(model), describe(model, "mlp")
    layer, down = whole.layer(1), description.layer(1)
    assert layer.path == down.path.rpartition(".")[0] and layer.path != layer.block_path
    assert (layer.in_features, layer.out_features) == (HIDDEN, HIDDEN) and not layer.experts
    assert layer.adds_directly is down.adds_directly
    assert whole.parallel_residual is description.parallel_residual
    read = []
    get_submodule(model, layer.path).register_forward_pre_hook(lambda _m, args: read.append(args))
    model(torch.tensor([[3, 4, 5]]))
    assert read[0][0].shape[-1] == HIDDEN
    with pytest.raises(ValueError, match="key_site must be one of down_proj, mlp, got 'attention'"):
        describe(model, "attention")


@pytest.mark.parametrize(
    ("name", "key_site"),
    [(name, "down_proj") for name in (*FOUND, *EXPERTS)]
    + [(name, "mlp") for name in FOUND if name != "opt"],
)
def test_a_vector_added_to_the_layer_is_added_to_the_block(name: str, key_site: str) -> None:
    if not hasattr(transformers, (FOUND | EXPERTS)[name][0]):
        pytest.skip(f"transformers {transformers.__version__} has no such model")
    model = tiny(name)
    layer = describe(model, key_site).layer(1)
    ids = torch.randint(3, 60, (2, 7))
    vector = torch.randn(HIDDEN)
    outputs, inner = [], []

    def keep(_module, _args, output):
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    with torch.no_grad():
        block = get_submodule(model, layer.block_path).register_forward_hook(keep)
        down = get_submodule(model, layer.path)
        handle = down.register_forward_hook(lambda _m, _a, output: inner.append(output))
        model(ids)
        handle.remove()

        def add(_module, _args, output):
            if isinstance(output, tuple):
                return (output[0] + vector, *output[1:])
            return output + vector

        handle = down.register_forward_hook(add)
        model(ids)
        handle.remove()
        block.remove()
    plain, moved = outputs
    # Elsewhere the vector passes a norm or a scale first.
    behind = name in (*INDIRECT, "granitemoe", "flex_olmo")
    assert layer.adds_directly is not behind
    change, own = vector.expand_as(plain), inner[0]
    own = own[0] if isinstance(own, tuple) else own
    if behind:
        passed = passage(model, layer)
        change = passed(own + vector) - passed(own)
    torch.testing.assert_close(moved - plain, change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_final_norm_is_the_one_before_the_head(name: str) -> None:
    model = tiny(name).double()
    description = describe(model)
    seen = []
    norm = get_submodule(model, description.final_norm_path)
    norm.register_forward_hook(lambda _m, _a, output: seen.append(output))
    with torch.no_grad():
        logits = model(torch.randint(3, 60, (1, 5))).logits
        head = get_submodule(model, description.lm_head_path)
        torch.testing.assert_close(head(seen[0]).to(logits.dtype), logits)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_edited_is_refused_with_the_reason(name: str) -> None:
    config_class, arguments, reason = REFUSED[name]
    if not hasattr(transformers, config_class):
        pytest.skip(f"transformers {transformers.__version__} has no {config_class}")
    model = build(config_class, arguments)
    with pytest.raises(UnsupportedModelError, match=reason):
        describe(model)


def test_the_routine_by_shape_agrees_with_the_table() -> None:
    from coachhook.models import discovery

    for name in SUPPORTED:
        model = tiny(name)
        by_table = describe(model)
        family = discovery._discover(model, model.config)
        assert family.blocks == by_table.blocks_path, name
        assert f"{family.blocks}.1.{family.down}" == by_table.layer(1).path, name
        assert family.norm == by_table.final_norm_path, name


def test_the_probe_refuses_a_block_that_scales_its_mlp() -> None:
    model = tiny("stablelm")
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda _m, _a, output: output * 0.5)
    with pytest.raises(UnsupportedModelError, match="does not move the output"):
        describe(model)


def test_the_probe_leaves_mode_and_weights_alone() -> None:
    model = tiny("stablelm").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    describe(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_the_logits_are_of_the_heads_output() -> None:
    expected = {"llama": (1.0, None), "cohere": (0.0625, None), "granite": (0.25, None)}
    for name, (scale, cap) in (expected | {"vaultgemma": (1.0, 3.0)}).items():
        for dtype in (torch.float32, torch.bfloat16):
            description = describe(tiny(name).to(dtype))
            assert description.logit_scale == pytest.approx(scale, rel=1e-3), name
            assert description.logit_cap == cap


def test_another_map_after_the_head_is_refused() -> None:
    model = tiny("stablelm")

    def square(_module, _args, output):
        output.logits = output.logits**2
        return output

    model.register_forward_hook(square)
    with pytest.raises(UnsupportedModelError, match="another map in between"):
        describe(model)


def test_parallel_residual() -> None:
    expected = {"gptj": True, "phi": True, "gpt_neox": True, "gpt_neox-sequential": False}
    expected |= {"gpt2": False, "llama": False, "cohere": True, "falcon": True}
    for name in ("stablelm", "starcoder2", "bloom", "mpt", "granite", "vaultgemma"):
        expected[name] = False
    for name, parallel in expected.items():
        assert describe(tiny(name)).parallel_residual is parallel, name
    beside = tiny("stablelm", lambda c: c.update(use_parallel_residual=True))
    assert describe(beside.to(torch.bfloat16)).parallel_residual


def test_the_routine_by_shape_sees_what_the_table_says_of_the_residual() -> None:
    from coachhook.models import discovery

    for name in SUPPORTED:
        model = tiny(name)
        by_table = describe(model)
        found = discovery._is_parallel(model, by_table.layer(0))
        assert found is by_table.parallel_residual, name


def test_a_base_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="transformer"):
        describe(tiny("gpt2").transformer)


def test_other_things_are_refused() -> None:
    with pytest.raises(TypeError, match="torch module, got str"):
        describe("gpt2")
    with pytest.raises(TypeError, match="with a config, got Linear"):
        describe(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"torch\.compile"):
        describe(torch.compile(tiny("gpt2")))
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        describe(transformers.T5ForConditionalGeneration(config))


@pytest.mark.parametrize("index", [-1, LAYERS, 1.0, True, "0"])
def test_an_unknown_layer_names_the_valid_range(index) -> None:
    with pytest.raises(ValueError, match=f"from 0 to {LAYERS - 1}"):
        describe(tiny("gpt2")).layer(index)


def test_default_layers() -> None:
    assert default_layers("gpt2", 48, 1600) == [13, 14, 15, 16, 17]
    assert default_layers("gptj", 28, 4096) == [3, 4, 5, 6, 7, 8]
    assert default_layers("llama", 32, 4096) == [4, 5, 6, 7, 8]
    assert default_layers("unheard_of", 32, 4096) == [4, 5, 6, 7, 8]
    assert default_layers("gpt2", 6, 320) == [0, 1, 2]
    assert default_layers("gpt2", 1, 8) == [0]
    for depth in range(1, 130):
        layers = default_layers("unheard_of", depth, 64)
        assert layers == list(range(layers[0], layers[0] + len(layers)))
        assert 1 <= len(layers) <= 5
        assert layers[-1] <= max(depth // 3, 2) < max(depth, 3)


def test_submodules_by_path() -> None:
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="transformer has no 'blocks'"):
        get_submodule(model, "transformer.blocks.0")
    with pytest.raises(ValueError, match="has no 'c_fc2'"):
        set_submodule(model, "transformer.h.0.mlp.c_fc2", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="below the model"):
        set_submodule(model, "", nn.Linear(2, 2))
    new = nn.Linear(2, 2)
    order = list(model.transformer.h[0].mlp._modules)
    set_submodule(model, "transformer.h.0.mlp.c_fc", new)
    assert model.transformer.h[0].mlp.c_fc is new
    assert model.transformer.h[1].mlp.c_fc is not new
    assert list(model.transformer.h[0].mlp._modules) == order


def test_shapes_and_weights_of_modules() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(3, 5)
    assert linear_shape(conv) == (5, 3)
    assert weight_of(conv).data_ptr() == conv.weight.data_ptr()
    linear = nn.Linear(5, 3)
    assert linear_shape(linear) == (5, 3)
    assert weight_of(linear) is linear.weight

    class Quantised(nn.Module):
        in_features, out_features = 5, 3

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.zeros(8, 1, dtype=torch.uint8)

    assert linear_shape(Quantised()) == (5, 3)
    assert weight_of(Quantised()) is None
    with pytest.raises(TypeError, match="got LayerNorm"):
        linear_shape(nn.LayerNorm(4))
