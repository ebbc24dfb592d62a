"""Hooks on whole models: attaching, detaching, switching, recording, packing."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn

from coachhook.errors import UnsupportedModelError
from coachhook.hooks import HookedLinear, attach_hooks, attached_hooks
from coachhook.models import describe, get_submodule, weight_of

from ..models.families import DISCOVERED, REFUSED, SUPPORTED, build, tiny
from .support import SCOPES, fill, fired, hooked, padded, prompts

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(2))


def answer(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**({"input_ids": IDS} | inputs)).logits


def traces(model: nn.Module) -> list[object]:
    return [
        *(type(module) for module in model.modules()),
        *(id(module) for module in model.modules()),
        *(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    ]


@pytest.mark.parametrize("name", SUPPORTED | DISCOVERED)
def test_attach_and_detach_leave_no_trace(name: str) -> None:
    model = tiny(name)
    expected, before = answer(model), traces(model)
    names = [n for n, _ in model.named_parameters()]
    entries = list(model.state_dict())
    hooks = attach_hooks(model, [0, 2])
    assert list(hooks) == [0, 2]
    assert all(hooks[index].index == index for index in hooks)
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == entries
    assert torch.equal(answer(model), expected)
    fill(hooks, "sequence")
    hooks.set_state("temporary")
    assert not torch.allclose(answer(model), expected)
    hooks.detach()
    assert not hooks.attached
    assert torch.equal(answer(model), expected)
    assert traces(model) == before
    hooks.detach()
    assert attached_hooks(model) is None


@pytest.mark.parametrize("name", SUPPORTED)
def test_temporary_is_writing_delta_into_the_weights(name: str) -> None:
    model = tiny(name).double()
    written = copy.deepcopy(model)
    hooks = attach_hooks(model, [0, 1])
    fill(hooks, "sequence", size=0.5)
    hooks.set_state("temporary")
    for index, layer in hooks.items():
        weight = weight_of(get_submodule(written, describe(written).layer(index).path))
        with torch.no_grad():
            weight += layer.delta()
    batch = padded(prompts(), "right")
    with hooks.record() as records:
        moved = answer(model, **batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(moved[real], answer(written, **batch)[real])
    assert all(flags.all() and z.isnan().all() for _, z, flags in records)


def test_default_layers() -> None:
    hooks = attach_hooks(tiny("gpt2", lambda c: c.update(n_layer=6)))
    assert list(hooks) == [0, 1, 2]
    assert "HookSet(layers [0, 1, 2] attached to GPT2LMHeadModel)" == repr(hooks)


def test_attaching_is_refused_before_anything_is_changed() -> None:
    model = tiny("gpt2")
    before = traces(model)
    for layers, message in (
        ([0, 3], "from 0 to 2"),
        ([-1], "from 0 to 2"),
        (["0"], "got '0'"),
        ([1, 1], "distinct layer indices"),
        ([], "distinct layer indices"),
    ):
        with pytest.raises(ValueError, match=message):
            attach_hooks(model, layers)
    assert traces(model) == before
    hooks = attach_hooks(model, [0, 1])
    before = traces(model)
    with pytest.raises(ValueError, match=r"got hooks at layers \[0, 1\]; detach them"):
        attach_hooks(model, [2])
    assert traces(model) == before
    hooks.detach()
    attach_hooks(model, [2]).detach()
    config_class, arguments, _ = REFUSED["mamba"]
    with pytest.raises(UnsupportedModelError):
        attach_hooks(build(config_class, arguments), [0])
    model.compile()
    with pytest.raises(TypeError, match="compile after attaching"):
        attach_hooks(model, [0])


def test_two_models_do_not_meet() -> None:
    first, second = tiny("gpt2"), tiny("gpt2")
    expected = answer(second)
    hooks = attach_hooks(first, [0])
    fill(hooks, "sequence")
    hooks.set_state("temporary")
    assert torch.equal(answer(second), expected)
    others = attach_hooks(second, [0])
    with others.disabled():
        assert not torch.equal(answer(first), expected)


def test_a_context_manager_detaches() -> None:
    model = tiny("gpt2")
    with pytest.raises(RuntimeError, match="stop"), attach_hooks(model, [0]) as hooks:
        raise RuntimeError("stop")
    assert not hooks.attached
    assert attached_hooks(model) is None


def test_detaching_waits_for_what_lies_on_top() -> None:
    model = tiny("gpt2")
    expected = answer(model)
    hooks = attach_hooks(model, [0, 1])
    mlp = model.transformer.h[1].mlp
    mine = mlp.c_proj
    mlp.c_proj = nn.Sequential(mine)
    with pytest.raises(RuntimeError, match=r"h\.1\.mlp\.c_proj must hold the hook .* Sequential"):
        hooks.detach()
    assert hooks.attached
    assert isinstance(model.transformer.h[0].mlp.c_proj, HookedLinear)
    mlp.c_proj = mine
    other = attached_hooks(model)
    other.detach()
    hooks.detach()
    assert torch.equal(answer(model), expected)


def test_disabled_blocks_nest_and_survive_errors() -> None:
    model = tiny("llama").double()
    expected = answer(model)
    hooks = hooked(model, "sequence")
    edited = answer(model)
    assert not torch.equal(edited, expected)
    with hooks.disabled():
        assert torch.equal(answer(model), expected)
        with hooks.disabled(), hooks.record() as records:
            assert torch.equal(answer(model), expected)
        assert not records
        assert torch.equal(answer(model), expected)
        with pytest.raises(RuntimeError, match="stop"), hooks.disabled():
            raise RuntimeError("stop")
        assert torch.equal(answer(model), expected)
    assert torch.equal(answer(model), edited)


def test_a_failed_forward_leaves_nothing_behind() -> None:
    model = tiny("llama").double()
    hooks = hooked(model, "sequence")
    edited = answer(model)
    handle = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    mask = torch.ones_like(IDS)
    mask[:, :5] = 0
    with pytest.raises(ZeroDivisionError):
        answer(model, attention_mask=mask)
    handle.remove()
    context = hooks[0].context
    assert (context.forward.shape, context.forward.mask) == (None, None)
    assert torch.equal(answer(model), edited)


def test_records() -> None:
    model = tiny("opt").double()
    hooks = hooked(model, "sequence")
    with hooks.record() as outer:
        answer(model)
        with hooks.record() as inner:
            answer(model)
            hooks[1].state = "off"
            answer(model)
    answer(model)
    assert [index for index, _, _ in outer] == [0, 1, 0, 1, 0]
    assert [index for index, _, _ in inner] == [0, 1, 0]
    for (_, z, flags), (_, z_inner, flags_inner) in zip(outer[2:], inner, strict=True):
        assert torch.equal(z, z_inner)
        assert torch.equal(flags, flags_inner)
    for index, z, flags in outer:
        assert (z.shape, z.dtype) == (IDS.shape, torch.float32)
        assert (flags.shape, flags.dtype) == (IDS.shape, torch.bool)
        assert torch.equal(flags, z >= hooks[index].alpha)
        assert not z.requires_grad
    assert fired(outer) > 0


@pytest.mark.parametrize("scope", SCOPES)
def test_packed_rows_are_judged_one_by_one(scope: str) -> None:
    model = tiny("opt").double()
    hooks = hooked(model, scope)
    rows = prompts()
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    packed = torch.cat(rows)[None]
    inputs = []
    hooks[0].base.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with hooks.packed(ends), hooks.record() as records:
        answer(model, input_ids=packed)
    _, z, flags = records[0]
    assert z.shape == packed.shape
    assert flags.any()
    x = inputs[0]
    for start, stop in pairwise(ends):
        with hooks.record() as alone:
            hooks[0](x[start:stop][None])
        torch.testing.assert_close(alone[0][1][0], z[0, start:stop], equal_nan=True)
        assert torch.equal(alone[0][2][0], flags[0, start:stop])
    assert hooks[0].context.packing is None


def test_packed_rows_must_fit() -> None:
    model = tiny("llama")
    hooks = hooked(model, "sequence")
    for bad, message in (
        (torch.tensor([0.0, 4.0]), "must be integers"),
        (torch.tensor([[0, 4]]), "must be integers"),
        (torch.tensor([0]), "must be integers"),
        (torch.tensor([1, 4]), "must start at 0"),
        (torch.tensor([0, 4, 3]), "not decrease"),
    ):
        with pytest.raises(ValueError, match=message), hooks.packed(bad):
            pass
    with pytest.raises(ValueError, match="one row of the 4 tokens"), hooks.packed([0, 2, 4]):
        answer(model)
    assert hooks[0].context.packing is None


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_model_is_hooked_by_itself(how) -> None:
    model = tiny("gpt2").double()
    plain = answer(model)
    hooks = hooked(model, "sequence")
    edited = answer(model)
    twin = how(model)
    assert torch.equal(answer(twin), edited)
    theirs = attached_hooks(twin)
    assert list(theirs) == [0, 1]
    assert theirs[0] is not hooks[0]
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    assert torch.equal(answer(twin, attention_mask=mask), answer(model, attention_mask=mask))
    theirs.detach()
    assert torch.equal(answer(twin), plain)
    assert torch.equal(answer(model), edited)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())


def test_saving_a_hooked_model_saves_the_base(tmp_path) -> None:
    model = tiny("gpt2")
    plain = answer(model)
    hooked(model, "sequence")
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(type(model).from_pretrained(tmp_path)), plain)


def test_the_model_is_freed_with_its_last_reference() -> None:
    model = tiny("gpt2")
    hooks = hooked(model, "sequence")
    answer(model)
    gc.collect()
    gone = weakref.ref(hooks[0].base)
    gc.disable()
    try:
        del model, hooks
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scope", SCOPES)
def test_dtypes(dtype: torch.dtype, scope: str) -> None:
    model = tiny("llama").to(dtype)
    hooks = hooked(model, scope)
    wide = dtype == torch.float64
    assert hooks[0].delta().dtype == (torch.float64 if wide else torch.float32)
    with hooks.disabled():
        plain = answer(model)
    with hooks.record() as records:
        logits = answer(model)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert 0 < fired(records) < sum(z.numel() for _, z, _ in records)
    assert not torch.equal(logits, plain)
    # A token whose past holds no fired token says what the model says without hooks, to the bit.
    flags = torch.stack([flags for _, _, flags in records]).any(0)
    untouched = flags.cumsum(-1) == 0
    assert untouched.any()
    assert torch.equal(logits[untouched], plain[untouched])


def test_masks_in_other_forms() -> None:
    model = tiny("llama").double()
    hooks = hooked(model, "sequence")
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with hooks.record() as expected:
        answer(model, attention_mask=mask)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    four = causal & mask[:, None, None].bool()
    added = torch.zeros(four.shape, dtype=torch.float64)
    added = added.masked_fill(~four, torch.finfo(torch.float64).min)
    for form in (mask.bool(), mask.double(), four, added):
        with hooks.record() as records:
            answer(model, attention_mask=form)
        for (_, z, flags), (_, z_expected, flags_expected) in zip(records, expected, strict=True):
            torch.testing.assert_close(z, z_expected, equal_nan=True)
            assert torch.equal(flags, flags_expected)


def test_masks_that_cannot_be_read_are_refused() -> None:
    from coachhook.hooks.context import token_mask

    shape = (2, 5)
    assert token_mask(None, shape, None) is None
    assert token_mask({"full_attention": None}, shape, None) is None
    with pytest.raises(TypeError, match="got object; pass the mask"):
        token_mask(object(), shape, None)
    with pytest.raises(ValueError, match=r"must be \[2, K\]"):
        token_mask(torch.ones(3, 5), shape, None)
    with pytest.raises(ValueError, match="must cover the 5 tokens"):
        token_mask(torch.ones(2, 4), shape, None)
    with pytest.raises(ValueError, match="must cover the 5 tokens"):
        token_mask(torch.ones(2, 1, 4, 5), shape, None)
    with pytest.raises(ValueError, match=r"must be \[2, K\]"):
        token_mask(torch.ones(5), shape, None)
    one_row = torch.tensor([[0, 1, 1, 1, 1]])
    assert torch.equal(token_mask(one_row, shape, None), one_row.bool().expand(2, 5))
    sliding = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    padded_full = sliding & (torch.arange(5) > 0)
    masks = {"sliding_attention": sliding, "full_attention": padded_full}
    assert token_mask(masks, shape, None).tolist() == [[False, True, True, True, True]] * 2


def test_a_layer_called_with_other_rows_than_the_model_is_refused() -> None:
    model = tiny("llama").double()
    hooks = hooked(model, "sequence")
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda _m, args: args[0][:1])
    with pytest.raises(ValueError, match=r"must hold the \[2, 9\] tokens of the model's input"):
        answer(model, attention_mask=torch.ones_like(IDS))
    handle.remove()
    assert len(hooks) == 2


def test_inputs_embeds_and_positional_arguments() -> None:
    model = tiny("gpt2").double()
    hooks = hooked(model, "sequence")
    expected = answer(model)
    embeds = model.transformer.wte(IDS).detach()
    mask = torch.ones_like(IDS)
    torch.testing.assert_close(
        answer(model, input_ids=None, inputs_embeds=embeds, attention_mask=mask), expected
    )
    with torch.no_grad(), hooks.record() as records:
        mask[:, -2:] = 0
        names = list(inspect.signature(model.transformer.forward).parameters)
        between = [None] * (names.index("attention_mask") - 1)
        model.transformer(IDS, *between, mask)
    assert records[0][1][:, -2:].isnan().all()
    assert not records[0][1][:, :-2].isnan().any()


@pytest.mark.parametrize("key_site", ["down_proj", "mlp"])
def test_an_offloaded_model(key_site: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny("gpt2")
    plain = answer(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.transformer.h[0].mlp.c_proj.weight.is_meta
    hooks = attach_hooks(model, [0, 1], key_site=key_site)
    assert hooks[0]._store.alpha.device.type == "cpu"
    assert torch.equal(answer(model), plain)
    fill(hooks, "sequence")
    hooks.set_state("temporary")
    moved = answer(model)
    resident = tiny("gpt2")
    others = attach_hooks(resident, [0, 1], key_site=key_site)
    fill(others, "sequence")
    others.set_state("temporary")
    torch.testing.assert_close(moved, answer(resident))
    hooks.detach()
    assert torch.equal(answer(model), plain)


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_a_model_offloaded_after_attaching(way: str, tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama")
    plain = answer(model)
    hooks = attach_hooks(model, [0, 1])
    fill(hooks, "sequence")
    hooks.set_state("temporary")
    changed = answer(model)
    if way == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert torch.equal(answer(model), changed)
    with hooks.disabled():
        assert torch.equal(answer(model), plain)
    hooks.detach()
    assert model.model.layers[0].mlp.down_proj.weight.is_meta, "it stays offloaded"
    assert torch.equal(answer(model), plain)
    again = attach_hooks(model, [1])
    fill(again, "sequence")
    again.set_state("temporary")
    assert not torch.equal(answer(model), plain)
    again.detach()
    assert torch.equal(answer(model), plain)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(answer(model), plain)
