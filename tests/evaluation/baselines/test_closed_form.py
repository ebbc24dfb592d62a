"""The closed-form baselines against the equations of their papers, in float64."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from coachhook import EditConfig, Editor, EditRequest, Statistics
from coachhook.evaluation.baselines import make_baseline
from tests.evaluation.baselines.support import BATCHES, QUICK, double, make, statistics_of

LAYERS = QUICK["layers"]


def _weights(model):
    return {i: model.transformer.h[i].mlp.c_proj.weight.detach().T.clone() for i in LAYERS}


def _recorded(baseline, monkeypatch):
    """What each layer of each batch was solved from: (layer, keys, residuals, change)."""
    steps = []
    change = baseline._change

    def record(layer, keys, residuals):
        found = change(layer, keys, residuals)
        steps.append((layer, keys, residuals, found))
        return found

    monkeypatch.setattr(baseline, "_change", record)
    return steps


def _keys_by_hand(model, tokenizer, layer, contexts):
    """Inputs of the down-projection at the last subject token, by transformers alone."""
    found = []
    module = model.transformer.h[layer].mlp.c_proj
    handle = module.register_forward_pre_hook(lambda _module, args: found.append(args[0][0]))
    keys = []
    for request in BATCHES[0]:
        mine = []
        for context in contexts:
            text = context.format(request.text)
            end = text.rindex(request.subject) + len(request.subject)
            encoded = tokenizer(text, return_offsets_mapping=True)
            with torch.no_grad():
                model(input_ids=torch.tensor([encoded["input_ids"]]))
            last = max(i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end <= b)
            mine.append(found.pop()[last])
        keys.append(mine[0] / 2 + torch.stack(mine[1:]).mean(0) / 2)
    handle.remove()
    return torch.stack(keys, dim=1)


def _prior(statistics, layer):
    covariance = statistics.covariances[layer]
    eye = torch.eye(len(covariance), dtype=torch.float64)
    return QUICK["covariance_weight"] * (
        covariance + QUICK["ridge"] * covariance.diagonal().mean() * eye
    )


@pytest.fixture
def wide(model):
    return double(model)


@pytest.fixture(scope="module")
def statistics(model, tokenizer):
    return statistics_of(double(model), tokenizer)


def test_memit_solves_for_each_batch_alone(wide, tokenizer, statistics, monkeypatch):
    before = _weights(wide)
    by_hand = _keys_by_hand(wide, tokenizer, LAYERS[0], QUICK["contexts"])
    baseline = make(wide, tokenizer, "memit", statistics)
    steps = _recorded(baseline, monkeypatch)
    for batch in BATCHES:
        baseline.edit(batch)
    assert [layer for layer, *_ in steps] == LAYERS * 2
    torch.testing.assert_close(steps[0][1], by_hand, rtol=1e-9, atol=1e-12)
    for layer, keys, residuals, change in steps:
        # equation 14 with C0 = lambda E[k k^T], equation 15
        wanted = residuals @ keys.T @ torch.linalg.inv(_prior(statistics, layer) + keys @ keys.T)
        torch.testing.assert_close(change, wanted, rtol=1e-7, atol=1e-10)
    after = _weights(wide)
    for layer in LAYERS:
        total = sum(change for i, _, _, change in steps if i == layer)
        torch.testing.assert_close(after[layer] - before[layer], total, rtol=1e-9, atol=1e-13)


def test_residuals_are_shared_by_the_layers_still_to_come(wide, tokenizer, statistics, monkeypatch):
    """Equation 20: half of the way in the first of two layers, all that is left in the second."""
    baseline = make(wide, tokenizer, "memit", statistics, covariance_weight=1e12)
    steps = _recorded(baseline, monkeypatch)
    baseline.edit(BATCHES[0])
    (_, _, first, _), (_, _, second, _) = steps
    # Under so strong a prior the first layer writes nothing: all is left.
    torch.testing.assert_close(second, 2 * first, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("variant", ["exact", "published"])
def test_accumulated_keys(variant, wide, tokenizer, statistics, monkeypatch):
    baseline = make(wide, tokenizer, f"accumulated-{variant}", statistics)
    steps = _recorded(baseline, monkeypatch)
    for batch in [*BATCHES, BATCHES[0]]:
        baseline.edit(batch)
    assert len(steps) == 3 * len(LAYERS)
    sums = {layer: torch.zeros_like(_prior(statistics, layer)) for layer in LAYERS}
    weight = 1.0 if variant == "exact" else QUICK["covariance_weight"]
    for layer, keys, residuals, change in steps:
        covariance = _prior(statistics, layer) + weight * sums[layer] + keys @ keys.T
        wanted = residuals @ keys.T @ torch.linalg.inv(covariance)
        torch.testing.assert_close(change, wanted, rtol=1e-7, atol=1e-10)
        sums[layer] += keys @ keys.T


def test_accumulated_exactly_is_the_editor_without_its_gate(wide, tokenizer, statistics):
    """The weights are W0 + Delta of an Editor whose hooks take every token."""
    twin = double(wide)
    options = {**QUICK, "layers": LAYERS[:1]}
    # With z >= -inf every token takes the hook, wherever the score is defined.
    config = EditConfig.paper(
        twin, **{**options, "include_padding": False, "state_dtype": "float64", "alpha": -1e9}
    )
    editor = Editor(twin, tokenizer, statistics=statistics, config=config)
    before = _weights(wide)[LAYERS[0]]
    baseline = make_baseline("accumulated", wide, tokenizer, statistics=statistics, **options)
    for batch in BATCHES:
        editor.edit(batch)
        baseline.edit(batch)
    change = _weights(wide)[LAYERS[0]] - before
    torch.testing.assert_close(change, editor.hooks[LAYERS[0]].delta(), rtol=1e-6, atol=1e-9)


def test_alphaedit_projects_onto_the_null_space(wide, tokenizer, statistics, monkeypatch):
    baseline = make(wide, tokenizer, "alphaedit", statistics)
    steps = _recorded(baseline, monkeypatch)
    projectors, sums = {}, {}
    for layer in LAYERS:
        # As in the paper: singular vectors of the covariance with singular values below it.
        left, values, _ = torch.linalg.svd(statistics.covariances[layer])
        kept = left[:, values < baseline.config.threshold]
        assert 0 < kept.shape[1] < len(left)
        assert baseline.null_space()[layer] == kept.shape[1] / len(left)
        projectors[layer] = kept @ kept.T
        sums[layer] = torch.zeros_like(left)
    for batch in BATCHES:
        baseline.edit(batch)
        for layer, keys, residuals, change in steps[-len(LAYERS) :]:
            p = projectors[layer]
            # The closed form of the paper, its identity weighted as in the published code.
            inner = sums[layer] @ p + keys @ keys.T @ p
            inner.diagonal().add_(baseline.config.ridge_weight)
            wanted = residuals @ keys.T @ p @ torch.linalg.inv(inner)
            torch.testing.assert_close(change, wanted, rtol=1e-7, atol=1e-10)
            # What is preserved: unrelated keys in the span that was kept out.
            outside = torch.eye(len(p), dtype=torch.float64) - p
            assert float((change @ outside).norm()) < 1e-10 * float(change.norm())
        if batch is BATCHES[0]:  # the keys that the edited model has after the batch
            for layer in LAYERS:
                after = _keys_by_hand(wide, tokenizer, layer, QUICK["contexts"])
                sums[layer] = after @ after.T


def test_default_preset_keeps_a_key_for_every_context(wide, tokenizer, statistics, monkeypatch):
    baseline = make(wide, tokenizer, "memit-default", statistics)
    steps = _recorded(baseline, monkeypatch)
    baseline.edit(BATCHES[0])
    assert steps[0][1].shape[1] == len(BATCHES[0]) * len(QUICK["contexts"])
    plain = EditConfig.for_model(wide)
    assert baseline.config.edit.target_clamp == 2.0
    assert baseline.config.edit.target_lr == plain.target_lr
    assert baseline.config.edit.places == ("subject_last",)
    # The settings say what is done: the targets are asked for in the contexts alone.
    assert baseline.config.edit.rewordings == 0
    assert not baseline.config.edit.target_ends_word


def _relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def golden(shared_dir):
    folder = shared_dir / "golden"
    return (
        folder,
        json.loads((folder / "edit.json").read_text()),
        load_file(folder / "edit.safetensors"),
    )


def _golden_run(golden, name, batches, **options):
    folder, info, tensors = golden
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny_gpt2").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny_gpt2")
    hparams = info["hparams"]
    layers = hparams["layers"]
    statistics = Statistics.from_covariances(
        {layer: tensors[f"cov.{layer}"] for layer in layers}, tokens=info["covariance"]["tokens"]
    )
    baseline = make_baseline(
        name,
        model,
        tokenizer,
        statistics=statistics,
        layers=layers,
        covariance_weight=hparams["mom2_update_weight"],
        contexts=[c for group in info["context_templates"] for c in group],
        target_steps=hparams["v_num_grad_steps"],
        target_lr=hparams["v_lr"],
        target_loss_layer=hparams["v_loss_layer"],
        target_weight_decay=hparams["v_weight_decay"],
        target_clamp=hparams["clamp_norm_factor"],
        target_kl=hparams["kl_factor"],
        **options,
    )
    blocks = {layer: model.transformer.h[layer].mlp.c_proj for layer in layers}
    before = {layer: block.weight.detach().T.clone() for layer, block in blocks.items()}
    for batch in batches:
        baseline.edit(
            [
                EditRequest(r["prompt"], r["subject"], r["target_new"])
                for r in (info["requests"][i] for i in batch)
            ]
        )
    return before, {layer: block.weight.detach().T for layer, block in blocks.items()}


def test_published_variant_gives_the_published_weights(golden):
    _, info, tensors = golden
    before, after = _golden_run(golden, "accumulated", info["batches"], variant="published")
    for layer, weight in after.items():
        wanted = tensors[f"nohook.W_final.{layer}"].double()
        # The published code rounds the weight to float32 after every batch.
        assert _relative(weight - before[layer], wanted - before[layer]) < 1e-4


def test_first_layer_of_memit_is_that_of_the_published_code(golden):
    """Of the first batch; above it the published run with hooks has its gate on already."""
    _, info, tensors = golden
    before, after = _golden_run(golden, "memit", info["batches"][:1])
    layer = min(after)
    # The published code rounds the covariance to float32.
    assert _relative(after[layer] - before[layer], tensors[f"b0.l{layer}.delta"]) < 1e-5
