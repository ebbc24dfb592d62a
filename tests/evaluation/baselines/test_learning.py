"""Each baseline learns facts of the bundled model, and forgets them when it is closed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coachhook import EditRequest, collect_statistics
from coachhook.bundled import demo_facts, model_path, texts
from coachhook.evaluation import evaluate
from coachhook.evaluation.baselines import make_baseline
from coachhook.models import load_model

# One context and few steps: a test of whether it works, not of how well.
TARGETS = {"layers": [0, 1], "covariance_weight": 15.0, "contexts": ["{}"], "target_steps": 12}
LEARNERS = {
    "memit": ("memit", TARGETS),
    "accumulated-exact": ("accumulated", TARGETS),
    "accumulated-published": ("accumulated", {**TARGETS, "variant": "published"}),
    # Keys of this model are shorter than those the published settings were made for.
    "alphaedit": ("alphaedit", {**TARGETS, "threshold": 5e-2, "ridge_weight": 1.0}),
    "fine-tuning": ("fine-tuning", {"norm_constraint": 1e-2, "lr": 5e-3, "steps": 10}),
    "lora": ("lora", {"lr": 1e-3, "batch_size": 2, "steps": 15}),
}


@pytest.fixture(scope="module")
def bundled():
    model, tokenizer = load_model(model_path(), dtype=torch.float32)
    statistics = collect_statistics(
        model, tokenizer, texts(), layers=[0, 1], max_tokens=6000, progress=False
    )
    facts = [EditRequest.from_dict(fact) for fact in demo_facts()[:4]]
    return (
        model,
        tokenizer,
        statistics,
        [replace(f, neighborhood=f.neighborhood[:1]) for f in facts],
    )


@pytest.mark.parametrize("key", LEARNERS)
def test_two_batches_are_learnt(key, bundled):
    model, tokenizer, statistics, facts = bundled
    name, options = LEARNERS[key]
    with make_baseline(name, model, tokenizer, statistics=statistics, **options) as baseline:
        for batch in (facts[:2], facts[2:]):
            baseline.edit(batch)
        found = evaluate(model, tokenizer, facts, hooks=baseline, generate=False, progress=False)[
            "teacher_forced"
        ]
    assert found["before"]["reliability"] == 0.0
    assert found["after"]["reliability"] >= 0.75
    again = evaluate(model, tokenizer, facts, generate=False, progress=False)["teacher_forced"]
    assert again["after"] == found["before"]


def test_the_published_box_of_fine_tuning_is_too_small_for_this_model(bundled):
    """5e-4 per entry is what GPT-2 XL needs; FT+L's box must be set for the model at hand."""
    model, tokenizer, _, facts = bundled
    box = {"layer": 0, "norm_constraint": 5e-4, "objective": "prompt_last", "steps": 6}
    with make_baseline("fine-tuning", model, tokenizer, **box) as baseline:
        result = baseline.edit(facts[:2])
    assert not any(result.converged)


def test_retrieval_leaves_other_subjects_alone(bundled):
    """This model was trained on single sentences and reads no context, so it learns nothing."""
    model, tokenizer, _, facts = bundled
    with make_baseline("retrieval", model, tokenizer) as baseline:
        baseline.edit(facts)
        found = evaluate(model, tokenizer, facts, hooks=baseline, generate=False, progress=False)
    assert found["teacher_forced"]["after"]["locality"] == 1.0
    assert found["kl"]["neighborhood"] == 0.0
