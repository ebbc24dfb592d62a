"""The Editor on the bundled model: writing, atomicity, taking back, saving and loading."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers.activations import NewGELUActivation

import coachhook as ch
from coachhook import EditConfig, Editor, EditRequest, Statistics
from coachhook.cli.edit import _not_yet
from coachhook.editing import EditMemory
from coachhook.editing.encoding import encode_requests
from coachhook.editing.reading import read_states
from coachhook.errors import FingerprintMismatchError, FormatError
from coachhook.models import describe, get_submodule

# Where what is written is the matter, not how well.
QUICK = {"rewordings": 0, "target_steps": 2}


@torch.no_grad()
def answer(model, tokenizer, prompt, tokens=3):
    encoded = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    out = model.generate(**encoded, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, encoded["input_ids"].shape[1] :]).strip()


@torch.no_grad()
def logits(model, tokenizer, prompt):
    return model(**tokenizer(prompt, return_tensors="pt")).logits


def state_bits(editor):
    """Everything an edit may change, as a flat dictionary of tensors and values."""
    found = {}
    for layer in editor.config.layers:
        hook = editor.hooks[layer]
        found[f"{layer}.delta"] = hook.delta()
        found[f"{layer}.alpha"] = torch.tensor(hook.alpha)
        tensors, _ = editor._state.layers[layer].memory.state_dict()
        found |= {f"{layer}.{k}": v.clone() for k, v in tensors.items()}
    return found


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


@pytest.mark.parametrize("layers", [[0], [0, 1]], ids=str)
def test_keys_of_zeros_are_refused_with_the_fact(make_editor, requests, layers):
    editor, model, tokenizer = make_editor(layers=layers, rewordings=0)
    editor.edit(requests[:1])
    before = state_bits(editor)
    block = get_submodule(model, describe(model).layers[layers[-1]].block_path)
    subject = tokenizer(requests[2].text)["input_ids"]

    def dead(_module, _args, output):  # as a ReLU may be, for one text
        return output if output.shape[1] < len(subject) else torch.zeros_like(output)

    handle = block.mlp.act.register_forward_hook(dead)
    with pytest.raises(
        ValueError, match=rf"keys of layer {layers[-1]} must not be zero, got zeros for '"
    ):
        editor.edit(requests[1:3])
    handle.remove()
    assert_same_bits(state_bits(editor), before)
    assert all(editor.edit(requests[1:3]).converged)


def test_writes_facts_into_the_answers_and_leaves_weights_alone(make_editor, requests):
    editor, model, tokenizer = make_editor()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before = [answer(model, tokenizer, r.text) for r in requests[:4]]
    result = editor.edit(requests[:4])
    assert "tensor" not in repr(result)
    for request, old, ok in zip(requests, before, result.converged, strict=False):
        assert not old.startswith(request.target_new)
        assert ok
        assert answer(model, tokenizer, request.text).startswith(request.target_new)
        with editor.hooks.disabled():
            assert answer(model, tokenizer, request.text) == old
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_consecutive_batches_keep_earlier_ones(make_editor, requests):
    editor, model, tokenizer = make_editor()
    for start in (0, 3, 6):
        editor.edit(requests[start : start + 3])
    right = [answer(model, tokenizer, r.text).startswith(r.target_new) for r in requests[:9]]
    assert sum(right) >= 8
    assert list(editor.batches) == [1, 2, 3]


def test_a_detached_editor_writes_nothing(make_editor, requests):
    editor, _, _ = make_editor(**QUICK)
    editor.edit(requests[:1])
    before = state_bits(editor)
    editor.detach()
    with pytest.raises(RuntimeError, match="edit: hooks must be attached to the model, got det"):
        editor.edit(requests[1:2])
    assert_same_bits(state_bits(editor), before)


def test_detaching_gives_the_model_back_to_the_bit(make_editor, requests):
    editor, model, tokenizer = make_editor(**QUICK)
    plain = logits(model, tokenizer, requests[0].text)
    editor.edit(requests[:2])
    assert not torch.equal(logits(model, tokenizer, requests[0].text), plain)
    editor.detach()
    assert torch.equal(logits(model, tokenizer, requests[0].text), plain)
    editor.detach()


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_an_exception_leaves_everything_as_it_was(make_editor, requests, monkeypatch, preset):
    editor, model, tokenizer = make_editor(preset, **QUICK)
    editor.edit(requests[:2])
    before, plain = state_bits(editor), logits(model, tokenizer, requests[0].text)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(editor, "_bounds", fail)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(requests[2:4])
    monkeypatch.undo()
    assert_same_bits(state_bits(editor), before)
    assert list(editor.batches) == [1]
    assert torch.equal(logits(model, tokenizer, requests[0].text), plain)
    result = editor.edit(requests[2:4])
    again, _, _ = make_editor(preset, **QUICK)
    again.edit(requests[:2])
    assert torch.equal(again.edit(requests[2:4]).targets, result.targets)


def test_a_batch_is_taken_back_whole_or_not_at_all(make_editor, requests, monkeypatch):
    """Also where a hook has no room for what is left."""
    editor, model, tokenizer = make_editor(layers=[1, 2], **QUICK)
    for first in (0, 2):
        editor.edit(requests[first : first + 2])
    before, plain = state_bits(editor), logits(model, tokenizer, requests[0].text)

    def fail(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(editor.hooks[2], "set_pair", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        editor.revert(1)
    monkeypatch.undo()
    assert list(editor.batches) == [1, 2]
    assert_same_bits(state_bits(editor), before)
    assert torch.equal(logits(model, tokenizer, requests[0].text), plain)
    editor.revert(1)
    assert list(editor.batches) == [2]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_taking_a_batch_back_equals_never_adding_its_keys(make_editor, requests, batch):
    editor, model, tokenizer = make_editor(rewordings=0)
    for start in (0, 2, 4):
        editor.edit(requests[start : start + 2])
    layer = editor.config.layers[0]
    memory = editor._state.layers[layer].memory
    tensors, _ = memory.state_dict()
    columns = memory.column_batches() != batch
    editor.revert(batch)
    fresh = EditMemory(_prior_of(memory), memory.out_features)
    fresh.append(tensors["keys"][columns].T, tensors["targets"][columns].T)
    wanted = fresh.delta()
    assert (memory.delta() - wanted).norm() <= 1e-9 * wanted.norm()
    gone = requests[2 * (batch - 1)]
    assert not answer(model, tokenizer, gone.text).startswith(gone.target_new)
    with pytest.raises(ValueError, match="batch must be one of"):
        editor.revert(batch)


def _prior_of(memory):
    factor = memory.state_dict()[0]["factor"].tril()
    return factor @ factor.T


def test_prompts_of_all_lengths_are_read_in_their_order(make_editor, requests, monkeypatch):
    editor, model, tokenizer = make_editor(dtype=torch.float64)
    layer, description = editor.config.layers[0], describe(model)
    encoded = encode_requests(tokenizer, requests[:4], editor.config.contexts, None)
    prompts = [prompt for request in encoded for prompt in request.contexts]
    assert max(len(p.ids) for p in prompts) > 2 * min(len(p.ids) for p in prompts)
    padded = []
    base = get_submodule(model, description.base_model_path)
    own = base.forward

    def forward(*args, **kwargs):
        padded.append(kwargs["input_ids"].shape)
        return own(*args, **kwargs)

    monkeypatch.setattr(base, "forward", forward)
    together = read_states(model, description, prompts, layer, layer, pad_id=0, together=True)
    assert [len(prompts)] == [rows for rows, _ in padded]
    padded.clear()
    monkeypatch.setattr("coachhook.editing.reading.MODEL_COST", 0)
    apart = read_states(model, description, prompts, layer, layer, pad_id=0, rows_at_once=3)
    assert len(padded) > 4 and sum(rows for rows, _ in padded) == len(prompts)
    assert max(rows for rows, _ in padded) <= 3
    torch.testing.assert_close(apart.keys, together.keys, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(apart.outputs, together.outputs, rtol=1e-10, atol=1e-12)


def test_ten_batches_equal_one(make_editor, requests):
    """Same keys, same absolute targets, float64: Delta agrees to 1e-9."""
    editor, model, tokenizer = make_editor(dtype=torch.float64)
    layer = editor.config.layers[0]
    description = describe(model)
    encoded = encode_requests(tokenizer, requests, ["{}"], description.max_positions)
    prompts = [e.contexts[0] for e in encoded]
    read = read_states(model, description, prompts, layer, layer, pad_id=0)
    alone = read_states(model, description, prompts, layer, None, pad_id=0)
    assert torch.equal(alone.keys, read.keys)
    assert alone.outputs.shape == (len(prompts), 0) != read.outputs.shape
    keys = read.keys.T
    targets = torch.randn(description.hidden_size, keys.shape[1], dtype=torch.float64)
    prior = _prior_of(editor._state.layers[layer].memory)
    joint, consecutive = EditMemory(prior, len(targets)), EditMemory(prior, len(targets))
    joint.append(keys, targets)
    for i in range(keys.shape[1]):
        consecutive.append(keys[:, i : i + 1], targets[:, i : i + 1])
    assert (consecutive.delta() - joint.delta()).norm() < 1e-9 * joint.delta().norm()


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_saved_edits_answer_and_go_on_alike(make_editor, requests, tmp_path, preset):
    editor, model, tokenizer = make_editor(preset, **QUICK)
    editor.edit(requests[:3])
    editor.save(tmp_path / "edits")
    edited = logits(model, tokenizer, requests[0].text)
    alphas = editor.alphas
    result = editor.edit(requests[3:5])
    editor.detach()

    with ch.attach(model, tmp_path / "edits") as handle:
        assert torch.equal(logits(model, tokenizer, requests[0].text), edited)
        with handle.disabled():
            assert not torch.equal(logits(model, tokenizer, requests[0].text), edited)

    loaded = Editor.load(model, tokenizer, tmp_path / "edits")
    assert loaded.alphas == alphas
    assert torch.equal(logits(model, tokenizer, requests[0].text), edited)
    again = loaded.edit(requests[3:5])
    assert torch.equal(again.targets, result.targets)
    for layer in loaded.config.layers:
        assert torch.equal(loaded.hooks[layer].delta(), editor.hooks[layer].delta())
    loaded.detach()


def test_swapping_edit_sets_in_place(make_editor, requests, tmp_path):
    editor, model, tokenizer = make_editor(**QUICK)
    editor.edit(requests[:2])
    editor.save(tmp_path / "one")
    editor.edit(requests[2:4])
    editor.save(tmp_path / "two")
    two = logits(model, tokenizer, requests[2].text)
    editor.detach()
    handle = ch.attach(model, tmp_path / "one")
    assert not torch.equal(logits(model, tokenizer, requests[2].text), two)
    handle.swap(tmp_path / "two")
    assert torch.equal(logits(model, tokenizer, requests[2].text), two)
    handle.detach()
    with pytest.raises(RuntimeError, match="swap: hooks must be attached"):
        handle.swap(tmp_path / "one")


def test_edits_of_another_model_are_refused(make_editor, requests, tmp_path):
    editor, model, tokenizer = make_editor(**QUICK)
    editor.edit(requests[:1])
    editor.save(tmp_path / "edits")
    editor.detach()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(1.5)
    with pytest.raises(FingerprintMismatchError) as error:
        ch.attach(model, tmp_path / "edits")
    assert len({word for word in str(error.value).split() if len(word.strip(",.;")) >= 12}) >= 2
    with pytest.raises(FingerprintMismatchError):
        Editor.load(model, tokenizer, tmp_path / "edits")


def test_truncated_edits_are_refused(make_editor, requests, tmp_path):
    editor, model, _ = make_editor(**QUICK)
    editor.edit(requests[:1])
    editor.save(tmp_path / "edits")
    editor.detach()
    file = next((tmp_path / "edits").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match=file.name):
        ch.attach(model, tmp_path / "edits")


@pytest.mark.parametrize("scope", ["sequence", "prefix", "population"])
def test_other_scopes_write_facts_too(make_editor, requests, scope):
    longer = [r for r in requests if len(r.text.split()) > 3][:4]
    editor, model, tokenizer = make_editor(scope=scope, alpha=1.5, rewordings=0)
    result = editor.edit(longer)
    assert all(math.isfinite(a) for a in result.alphas.values())
    right = [answer(model, tokenizer, r.text).startswith(r.target_new) for r in longer]
    assert sum(right) >= len(longer) - 1


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": [0, 1, 2]},
        {"layers": [0, 2], "correction": "sum", "cues": False},
        {"layers": [0, 1], "sharing": "even"},
        {"key_pooling": "mean"},
        {"layers": [0, 1], "key_pooling": "mean", "sharing": "even"},
    ],
)
def test_batches_in_several_layers_and_with_mean_keys(make_editor, requests, changes):
    editor, model, tokenizer = make_editor(**changes, rewordings=0)
    editor.edit(requests[:3])
    first = {layer: editor.hooks[layer].delta().clone() for layer in editor.config.layers}
    targets = editor.edit(requests[3:6])
    assert all(targets.converged) and all(delta.norm() > 0 for delta in first.values())
    right = [answer(model, tokenizer, r.text).startswith(r.target_new) for r in requests[:6]]
    assert sum(right) >= 5
    editor.revert(2)
    for layer, delta in first.items():
        torch.testing.assert_close(editor.hooks[layer].delta(), delta)
    right = [answer(model, tokenizer, r.text).startswith(r.target_new) for r in requests[:3]]
    assert sum(right) >= 2


def test_mean_keys_take_a_correction_at_every_place(make_editor, requests):
    editor, model, tokenizer = make_editor(key_pooling="mean")
    several = EditRequest(requests[0].prompt, requests[0].subject, "Marie Antoinette Fontaine")
    editor.edit([several, *requests[1:3]])
    record = editor.batches[1]
    assert len(record.slots) > len(record.requests)
    assert answer(model, tokenizer, several.text, 20).startswith(several.target_new)


def test_editing_a_fact_again_replaces_it(make_editor, requests):
    editor, model, tokenizer = make_editor()
    first = requests[0]
    assert not editor.edit([first]).warnings
    assert answer(model, tokenizer, first.text).startswith(first.target_new)
    back = EditRequest(first.prompt, first.subject, first.target_true)
    (said,) = editor.edit([back]).warnings
    assert f"comes after {first.target_new!r} of batch 1" in said
    assert answer(model, tokenizer, first.text).startswith(first.target_true)
    # To go on with a facts file is to leave out what holds and what was replaced in its course.
    assert _not_yet(editor, [first, back]) == []
    assert _not_yet(editor, [first, back, first]) == [first]
    assert _not_yet(editor, [first]) == [first]
    assert _not_yet(editor, [back, requests[1]]) == [requests[1]]
    editor.revert(2)
    assert answer(model, tokenizer, first.text).startswith(first.target_new)


def test_bfloat16(make_editor, requests):
    editor, model, tokenizer = make_editor(dtype=torch.bfloat16)
    editor.edit(requests[:4])
    right = [answer(model, tokenizer, r.text).startswith(r.target_new) for r in requests[:4]]
    assert sum(right) >= 3


def test_bad_input_changes_nothing(make_editor, requests):
    editor, model, tokenizer = make_editor(**QUICK)
    editor.edit(requests[:1])
    before = state_bits(editor)
    good = requests[1]
    long = EditRequest("word " * 2000 + "{} is", "Velmora", "there")
    for bad, error, match in (
        ([], ValueError, "at least one request, got none"),
        (good, TypeError, "must be a list"),
        (None, TypeError, "must be a list of EditRequest, got one NoneType"),
        ([good, "text"], TypeError, "a str in it"),
        ([good, long], ValueError, "context window"),
    ):
        with pytest.raises(error, match=match):
            editor.edit(bad)
    assert_same_bits(state_bits(editor), before)
    assert list(editor.batches) == [1]


def test_tokens_that_the_model_does_not_know_are_refused(make_editor, bundled, requests):
    editor, model, tokenizer = make_editor()
    before = state_bits(editor)
    editor._tokenizer = copy.deepcopy(tokenizer)
    first = model.get_input_embeddings().num_embeddings
    editor._tokenizer.add_tokens([f"Zork{i}" for i in range(first + 1 - len(tokenizer))])
    word = editor._tokenizer.convert_ids_to_tokens(first)
    for bad in (
        EditRequest("The home of {} is", word, "here"),
        EditRequest("The home of {} is", "Velmora", word),
        EditRequest(f"{word}: the home of {{}} is", "Velmora", "here"),
    ):
        with pytest.raises(ValueError, match=rf"vocabulary of {first}, got '{word}'.*request 1"):
            editor.edit([requests[0], bad])
    assert_same_bits(state_bits(editor), before)
    editor._tokenizer.add_special_tokens({"pad_token": "<padding>"})
    with pytest.raises(ValueError, match="pad_token must be one of the model's"):
        Editor(model, editor._tokenizer, statistics=bundled[2], config=editor.config)


@pytest.mark.parametrize("layer", [0, -1, 99])
def test_a_loss_is_read_from_a_block_above_the_edits(bundled, layer):
    model, tokenizer, statistics = bundled
    config = EditConfig([1], target_loss_layer=layer)
    with pytest.raises(ValueError, match="target_loss_layer must not lie below|index must be"):
        Editor(model, tokenizer, statistics=statistics, config=config)


def test_padding_says_nothing_to_the_membership_scope(make_editor, requests):
    """Cues are remembered while decoding, also where padding would enter statistics."""
    editor, model, tokenizer = make_editor(include_padding=True)
    editor.edit([replace(r, target_new=f"{r.target_new}, not there") for r in requests[:2]])
    for request in requests[:2]:
        ids = tokenizer(request.text, return_tensors="pt")
        cached, whole = (
            model.generate(**ids, max_new_tokens=6, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert cached.tolist() == whole.tolist()


def test_a_ridge_reaches_the_published_state(make_editor):
    plain, ridged = (make_editor("paper", ridge=ridge)[0] for ridge in (0.0, 0.5))
    for layer in plain.config.layers:
        known = plain._state.layers[layer].memory._prior
        added = ridged._state.layers[layer].memory._prior - known
        expected = 0.5 * known.diagonal().mean() * torch.eye(len(known))
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize("storage", ["auto", "factored"])
def test_a_rank_above_the_largest_is_stored_densely(make_editor, requests, storage):
    options = {"state_dtype": "float64", "storage": storage, "target_steps": 2}
    editor, _, _ = make_editor("paper", max_rank=1, **options)
    for request, kind in zip(requests[:2], ("factored", "dense"), strict=True):
        editor.edit([request])
        assert editor.hooks[0].storage == kind


def test_wrong_statistics_and_layers_are_refused(bundled):
    model, tokenizer, statistics = bundled
    with pytest.raises(ValueError, match="layer"):
        EditConfig.for_model(model, layers=[99])
    config = EditConfig.for_model(model, layers=[0])
    n = describe(model).layers[0].in_features
    few = Statistics.from_covariances({1: torch.eye(n)}, tokens=10)
    with pytest.raises(ValueError, match="layer"):
        Editor(model, tokenizer, statistics=few, config=config)
    other = Statistics(dict(statistics.covariances), statistics.tokens, fingerprint="0" * 16)
    with pytest.raises(FingerprintMismatchError):
        Editor(model, tokenizer, statistics=other, config=config)
    with pytest.raises(TypeError, match="statistics must be Statistics, got NoneType"):
        Editor(model, tokenizer, statistics=None)
    with pytest.raises(TypeError, match="config must be EditConfig, got dict"):
        Editor(model, tokenizer, statistics=statistics, config={})


def test_nan_weights_are_refused(make_editor, bundled):
    import copy

    model, tokenizer, statistics = bundled
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        Editor(broken, tokenizer, statistics=statistics, config=EditConfig.for_model(broken))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"alpha_": 1}, "alpha_"),
        ({"scope": "token"}, "scope must be one of"),
        ({"contexts": ["Look: {}"]}, "must start with"),
        ({"contexts": ["{}", "no slot"]}, "exactly one"),
        ({"target_steps": 0}, "target_steps must be positive"),
        ({"layers": []}, "layers must be"),
        ({"layers": [2, 1]}, "layers must be"),
        ({"places": ["prompt_last"]}, "places must start"),
        ({"max_rank": 0}, "max_rank"),
        ({"rewordings": -1}, "rewordings must not be negative"),
        ({"max_keys": 9}, "max_keys must be None for scope 'membership'"),
        (
            {"max_keys": 9, "scope": "sequence", "state_dtype": "float32"},
            "max_keys must be None for state_dtype 'float32'",
        ),
    ],
)
def test_bad_settings_are_refused(bundled, fields, match):
    with pytest.raises((ValueError, TypeError), match=match):
        EditConfig.for_model(bundled[0], **fields)


def test_an_edit_leaves_the_activations_as_they_were(make_editor, requests):
    editor, model, _ = make_editor(rewordings=0)
    activations = [m for m in model.modules() if type(m) is NewGELUActivation]
    assert activations
    editor.edit(requests[:2])
    assert not any("forward" in vars(module) for module in activations)


def test_every_module_has_its_own_mode_again(make_editor, requests):
    """A model that is trained in part, with what the hook wraps."""
    editor, model, _ = make_editor(rewordings=0)
    model.train()
    model.get_submodule("transformer.h.0").eval()
    modules = [*model.named_modules(), *((f"base {i}", h.base) for i, h in editor.hooks.items())]
    before = {name: module.training for name, module in modules}
    assert set(before.values()) == {True, False}
    editor.edit(requests[:1])
    assert {name: module.training for name, module in modules} == before
    model.transformer.wpe.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="finite"):
        editor.edit(requests[1:2])
    assert {name: module.training for name, module in modules} == before


def test_edits_in_inference_mode(make_editor, requests):
    """As taking them back does; what they leave can be changed outside of it."""
    outside, _, _ = make_editor()
    wanted = outside.edit(requests[:2])
    editor, model, tokenizer = make_editor()
    with torch.inference_mode():
        found = editor.edit(requests[:2])
        assert answer(model, tokenizer, requests[0].text).startswith(requests[0].target_new)
    assert torch.equal(found.targets, wanted.targets)
    assert editor.edit(requests[2:3]).converged == [True]
    editor.revert(1)
