"""A model with experts that knows real facts, edited as any other."""

from __future__ import annotations

import json

import pytest
import torch

import coachhook as ch
from coachhook.errors import UnsupportedModelError
from coachhook.evaluation import evaluate
from coachhook.evaluation.baselines import BASELINES
from coachhook.evaluation.datasets import load_facts
from coachhook.integrations import export_edits
from coachhook.models import describe, load_model
from tests.editing.upcycled import upcycle

FACTS = 4


@pytest.fixture(scope="module")
def made(shared_dir, tmp_path_factory):
    """The model, its tokenizer, facts that it knows and statistics of its first block."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    dense = shared_dir / "models" / "factlm-llama"
    upcycle(dense, folder)
    model, tokenizer = load_model(folder, dtype=torch.float32)
    known = json.loads((shared_dir / "models" / "known_ids.json").read_text())
    ids = set(known[dense.name]["counterfact_case_ids"])
    facts = [f for f in load_facts(shared_dir / "data" / "counterfact_dev.json") if f.id in ids]
    statistics = ch.collect_statistics(
        model, tokenizer, shared_dir / "data" / "corpus.txt", layers=[0], max_tokens=4_000,
        progress=False,
    )  # fmt: skip
    return model, tokenizer, facts[:FACTS], statistics


def test_facts_are_written_and_taken_back(made, tmp_path):
    model, tokenizer, facts, statistics = made
    layer = describe(model).layers[0]
    assert layer.experts and layer.in_features == layer.out_features == model.config.hidden_size
    assert statistics.covariances[0].shape == (layer.in_features, layer.in_features)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([tokenizer(facts[0].text)["input_ids"]])
    plain = model(ids).logits
    editor = ch.Editor(model, tokenizer, statistics=statistics)
    for start in range(0, FACTS, 2):
        assert all(editor.edit(facts[start : start + 2]).converged)
    found = evaluate(model, tokenizer, facts, hooks=editor.hooks, progress=False)
    unedited, edited = (found["teacher_forced"][state] for state in ("before", "after"))
    assert unedited["reliability"] < 0.2
    assert edited["reliability"] == 1.0 and edited["generality"] > 0.8 and edited["locality"] > 0.9
    assert found["generated"]["after"]["reliability"] == 1.0
    assert editor.hooks[0].delta().shape == (layer.out_features, layer.in_features)
    editor.save(tmp_path / "edits")
    wanted = model(ids).logits
    editor.detach()
    assert torch.equal(model(ids).logits, plain)
    with ch.attach(model, tmp_path / "edits"):
        assert torch.equal(model(ids).logits, wanted)
        # A batch padded at the left, and a cache, say the same.
        texts = [fact.text for fact in facts]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        width = batch["input_ids"].shape[1]
        together = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, width:]
        for text, tokens in zip(texts, together, strict=True):
            alone = tokenizer(text, return_tensors="pt")
            out = model.generate(**alone, max_new_tokens=4, do_sample=False)[0]
            new = out[alone["input_ids"].shape[1] :]
            assert torch.equal(new, tokens[: len(new)])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_several_layers_and_the_published_algorithm(made, shared_dir):
    model, tokenizer, facts, _ = made
    statistics = ch.collect_statistics(
        model, tokenizer, shared_dir / "data" / "corpus.txt", layers=[0, 1], max_tokens=4_000,
        progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="must have a plain weight.*state_dtype='float64'"):
        ch.Editor(
            model, tokenizer, statistics=statistics,
            config=ch.EditConfig.paper(model, layers=[0, 1]),
        )  # fmt: skip
    config = ch.EditConfig.paper(
        model, layers=[0, 1], state_dtype="float64", covariance_weight=15.0
    )
    editor = ch.Editor(model, tokenizer, statistics=statistics, config=config)
    editor.edit(facts[:2])
    found = evaluate(
        model, tokenizer, facts[:2], hooks=editor.hooks, generate=False, progress=False
    )
    assert found["teacher_forced"]["after"]["reliability"] >= 0.5
    editor.detach()


def test_what_cannot_be_done_with_experts_says_so(made, tmp_path):
    model, tokenizer, facts, statistics = made
    for name, baseline in BASELINES.items():
        if baseline.needs_projections:
            with pytest.raises(UnsupportedModelError, match=f"^{name}: .* got experts in model"):
                baseline(model, tokenizer, statistics=statistics)
    with BASELINES["retrieval"](model, tokenizer) as retrieval:
        assert retrieval.edit(facts[:2]).converged
    editor = ch.Editor(model, tokenizer, statistics=statistics)
    editor.edit(facts[:2])
    editor.save(tmp_path / "edits")
    editor.detach()
    with pytest.raises(ValueError, match="nor have .* the experts of a block"):
        export_edits(model, tokenizer, tmp_path / "edits", tmp_path / "out")
