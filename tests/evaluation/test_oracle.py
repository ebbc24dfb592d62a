"""The oracle: v* over the block's output at the last subject token, against a plain loop."""

from __future__ import annotations

import pytest
import torch

from coachhook.evaluation import oracle
from coachhook.evaluation.datasets import find_subject
from coachhook.hooks import attach_hooks

LAYER = 1


def patched_accuracy(model, tokenizer, text, subject, target, value):
    """Share of target tokens that are the most likely ones, one prompt, written out."""
    end = find_subject(text, subject) + len(subject)
    encoded = tokenizer(f"{text} {target}", return_offsets_mapping=True)
    ids, start = encoded["input_ids"], len(tokenizer(text)["input_ids"])
    place = max(i for i, (a, _) in enumerate(encoded["offset_mapping"]) if a < end)

    def write(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[0, place] = value
        return output

    handle = model.transformer.h[LAYER].register_forward_hook(write)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    handle.remove()
    hits = [int(logits[i - 1].argmax()) == ids[i] for i in range(start, len(ids))]
    return sum(hits) / len(hits)


@pytest.fixture
def targets(requests):
    generator = torch.Generator().manual_seed(5)
    return 3 * torch.randn(32, len(requests), generator=generator)


def test_the_oracle_follows_its_definition(model, tokenizer, requests, targets):
    edit, paraphrase, asked = [], [], 0
    for i, r in enumerate(requests):
        values = [
            patched_accuracy(model, tokenizer, p, r.subject, r.target_new, targets[:, i])
            for p in (r.text, *r.paraphrases)
        ]
        edit.append(values[0])
        if r.paraphrases:
            paraphrase.append(sum(values[1:]) / len(values[1:]))
            asked += len(values) - 1
    for size in (1, 64):
        found = oracle(model, tokenizer, requests, targets, LAYER, batch_size=size)
        assert found["reliability"] == pytest.approx(sum(edit) / len(edit))
        assert found["generality"] == pytest.approx(sum(paraphrase) / len(paraphrase))
        assert found["counts"] == {"requests": len(requests), "paraphrases": asked}


def test_the_models_own_states_change_nothing(model, tokenizer, requests):
    columns = []
    for r in requests:
        ids = tokenizer(r.text, return_offsets_mapping=True)
        end = r.subject_span[1]
        place = max(i for i, (a, _) in enumerate(ids["offset_mapping"]) if a < end)
        with torch.no_grad():
            states = model(torch.tensor([ids["input_ids"]]), output_hidden_states=True)
        columns.append(states.hidden_states[LAYER + 1][0, place])
    own = torch.stack(columns, dim=1)
    bare = [r.__class__(r.prompt, r.subject, r.target_true or "Dutch") for r in requests]
    plain = [
        patched_accuracy(model, tokenizer, r.text, r.subject, r.target_new, own[:, i])
        for i, r in enumerate(bare)
    ]
    found = oracle(model, tokenizer, bare, own, LAYER)
    assert found["reliability"] == pytest.approx(sum(plain) / len(plain))
    assert found["generality"] is None


def test_edits_are_off_meanwhile(model, tokenizer, requests, targets):
    expected = oracle(model, tokenizer, requests, targets, LAYER)
    hooks = attach_hooks(model, [2])
    hooks[2].set_scope("population", population=(0.0, 1.0))
    hooks[2].set_alpha(-1.0)
    hooks[2].set_delta(torch.randn(32, 128))
    hooks.set_state("validated")
    try:
        assert oracle(model, tokenizer, requests, targets, LAYER, hooks=hooks) == expected
    finally:
        hooks.detach()


def test_paraphrases_without_the_subject_are_left_out(model, tokenizer, requests, targets):
    request = requests[0].__class__(
        "The capital of {} is", "France", "Lyon", paraphrases=["Its capital is"]
    )
    found = oracle(model, tokenizer, [request], targets[:, :1], LAYER)
    assert found["generality"] is None and found["counts"]["paraphrases"] == 0


def test_bad_calls(model, tokenizer, requests, targets):
    with pytest.raises(ValueError, match=r"targets must be of shape \(32, 3\), got \(3, 32\)"):
        oracle(model, tokenizer, requests, targets.T, LAYER)
    with pytest.raises(ValueError, match="from 0 to 2"):
        oracle(model, tokenizer, requests, targets, 7)
