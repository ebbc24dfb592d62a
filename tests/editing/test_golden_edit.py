"""A whole consecutive edit against the published implementation, in float64 and float32."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from coachhook import EditConfig, Editor, EditRequest, Statistics


@pytest.fixture(scope="module")
def golden(shared_dir):
    folder = shared_dir / "golden"
    return (
        folder,
        json.loads((folder / "edit.json").read_text()),
        load_file(folder / "edit.safetensors"),
    )


def _editor(golden, dtype):
    folder, info, tensors = golden
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny_gpt2").to(dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny_gpt2")
    hparams = info["hparams"]
    layers = hparams["layers"]
    config = EditConfig.paper(
        model,
        layers=layers,
        covariance_weight=hparams["mom2_update_weight"],
        alpha=hparams["alpha_init"],
        contexts=[c for group in info["context_templates"] for c in group],
        target_steps=hparams["v_num_grad_steps"],
        target_lr=hparams["v_lr"],
        target_loss_layer=hparams["v_loss_layer"],
        target_weight_decay=hparams["v_weight_decay"],
        target_clamp=hparams["clamp_norm_factor"],
        target_kl=hparams["kl_factor"],
    )
    statistics = Statistics.from_covariances(
        {layer: tensors[f"cov.{layer}"] for layer in layers}, tokens=info["covariance"]["tokens"]
    )
    return Editor(model, tokenizer, statistics=statistics, config=config), model, tokenizer


def _requests(info, batch):
    return [
        EditRequest(prompt=r["prompt"], subject=r["subject"], target_new=r["target_new"])
        for r in (info["requests"][i] for i in batch)
    ]


def _relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture(scope="module")
def edited(golden):
    _, info, _ = golden
    editor, model, tokenizer = _editor(golden, torch.float64)
    steps = []
    for batch in info["batches"]:
        before = {layer: editor.hooks[layer].delta() for layer in editor.config.layers}
        result = editor.edit(_requests(info, batch))
        change = {i: editor.hooks[i].delta() - before[i] for i in before}
        steps.append((result, change))
    return editor, model, tokenizer, steps


def test_targets_changes_and_alphas_of_every_batch(golden, edited):
    _, info, tensors = golden
    editor, _, _, steps = edited
    for number, (result, change) in enumerate(steps):
        assert _relative(result.targets, tensors[f"b{number}.z"]) < 1e-6
        for position, layer in enumerate(editor.config.layers):
            assert _relative(change[layer], tensors[f"b{number}.l{layer}.delta"]) < 1e-6
            assert result.alphas[layer] == pytest.approx(info["alphas"][number][position], abs=1e-6)


def test_answers_of_the_edited_and_the_unedited_model(golden, edited):
    _, info, tensors = golden
    editor, model, tokenizer, _ = edited
    prompts = info["singles"]
    fired = info["fired_single"]
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            text = prompt["prompt"] if isinstance(prompt, dict) else prompt
            encoded = tokenizer(text, return_tensors="pt")
            with editor.hooks.record() as record:
                logits = model(**encoded).logits[0, -1]
            torch.testing.assert_close(
                logits, tensors["logits.single_last"][i].double(), rtol=0, atol=1e-5
            )
            wanted = fired[i]["fired"] if isinstance(fired[i], dict) else fired[i]
            for position, (_, _, found) in enumerate(record):
                assert found[0].int().tolist() == list(wanted[position])
            with editor.hooks.disabled():
                plain = model(**encoded).logits[0, -1]
            torch.testing.assert_close(
                plain, tensors["logits.single_last_unedited"][i].double(), rtol=0, atol=1e-4
            )


def test_a_padded_batch_and_a_cached_step(golden, edited):
    _, info, tensors = golden
    editor, model, tokenizer, _ = edited
    with torch.no_grad():
        mask = tensors["padded_batch.attention_mask"]
        with editor.hooks.record() as record:
            logits = model(input_ids=tensors["padded_batch.input_ids"], attention_mask=mask).logits
        torch.testing.assert_close(
            logits, tensors["logits.padded_batch"].double(), rtol=0, atol=1e-5
        )
        for layer, z, found in record:
            wanted = tensors[f"padded_batch.z.l{layer}"]
            torch.testing.assert_close(z.double(), wanted, rtol=1e-5, atol=1e-5)
            assert torch.equal(found.to(torch.uint8), tensors[f"padded_batch.mask.l{layer}"])
        step = info["cache_step"]
        first = model(**tokenizer(step["prompt"], return_tensors="pt"), use_cache=True)
        second = model(
            input_ids=torch.tensor([[step["token"]]]), past_key_values=first.past_key_values
        )
    torch.testing.assert_close(
        first.logits, tensors["logits.cache_prefill"].double(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        second.logits, tensors["logits.cache_step"].double(), rtol=0, atol=1e-5
    )


def test_float32_stays_near(golden):
    _, info, tensors = golden
    editor, _, _ = _editor(golden, torch.float32)
    change = dict.fromkeys(editor.config.layers, 0.0)
    for number, batch in enumerate(info["batches"]):
        result = editor.edit(_requests(info, batch))
        assert _relative(result.targets, tensors[f"b{number}.z"]) < 1e-4
        for position, layer in enumerate(editor.config.layers):
            change[layer] = change[layer] + tensors[f"b{number}.l{layer}.delta"]
            assert result.alphas[layer] == pytest.approx(info["alphas"][number][position], abs=1e-4)
    for layer in editor.config.layers:
        assert _relative(editor.hooks[layer].delta(), change[layer]) < 1e-4
