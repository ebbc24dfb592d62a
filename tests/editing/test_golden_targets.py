"""The value optimisation alone against the published implementation, in float64."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from coachhook.editing.config import EditConfig
from coachhook.editing.encoding import encode_requests
from coachhook.editing.requests import EditRequest
from coachhook.editing.targets import optimise_targets
from coachhook.models import describe


@pytest.fixture(scope="module")
def golden(shared_dir):
    folder = shared_dir / "golden"
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny_gpt2").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny_gpt2")
    cases = json.loads((folder / "zopt.json").read_text())
    return model, tokenizer, cases, load_file(folder / "zopt.safetensors")


def _config(case, templates):
    bare_only = case["key"].split(".")[0] in ("onectx", "early", "known")
    return EditConfig(
        layers=[case["layer"]],
        places=["subject_last"],
        contexts=["{}"] if bare_only else templates,
        target_steps=case["v_num_grad_steps"],
        target_lr=case["v_lr"],
        target_scaling="coordinate",
        target_betas=(0.9, 0.999),
        target_progress=0,
        target_clamp=case["clamp_norm_factor"],
        target_kl=case["kl_factor"],
        target_weight_decay=case["v_weight_decay"],
        target_loss_layer=case["v_loss_layer"],
    )


def _request(case):
    request = case["request"]
    return EditRequest(
        prompt=request["prompt"],
        subject=request["subject"],
        target_new=request["target_new"].strip(),
    )


def test_each_case_alone_matches(golden):
    model, tokenizer, cases, expected = golden
    templates = [c for group in cases["context_templates"] for c in group]
    description = describe(model)
    assert len(cases["cases"]) > 5
    for case in cases["cases"]:
        config = _config(case, templates)
        encoded = encode_requests(tokenizer, [_request(case)], config.contexts, 48)
        assert encoded[0].target == case["target_ids"], case["key"]
        assert encoded[0].contexts[0].lookup == case["lookup_index"], case["key"]
        found = optimise_targets(model, description, encoded, config, pad_id=0)
        wanted = expected[f"{case['key']}.z"]
        error = (found.values[:, 0] - wanted).norm() / wanted.norm()
        assert error < 1e-6, (case["key"], float(error))
        assert found.steps == [case["adam_steps"]], case["key"]


def test_a_batch_equals_its_requests_alone(golden):
    model, tokenizer, cases, _ = golden
    templates = [c for group in cases["context_templates"] for c in group]
    chosen = [c for c in cases["cases"] if c["key"].startswith("default")]
    config = _config(chosen[0], templates)
    requests = [_request(c) for c in chosen]
    encoded = encode_requests(tokenizer, requests, config.contexts, 48)
    description = describe(model)
    together = optimise_targets(model, description, encoded, config, pad_id=0)
    for i, one in enumerate(encoded):
        alone = optimise_targets(model, description, [one], config, pad_id=0)
        torch.testing.assert_close(together.values[:, i], alone.values[:, 0], rtol=1e-9, atol=1e-9)
