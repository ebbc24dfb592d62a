"""SERAC against its paper's equations, and what it learns from facts of the bundled model."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from transformers import DynamicCache

from coachhook import EditRequest
from coachhook.bundled import demo_facts, facts, model_path
from coachhook.evaluation import evaluate
from coachhook.evaluation.baselines import make_baseline
from coachhook.evaluation.baselines.serac import Memory, _windows
from coachhook.evaluation.baselines.serac_networks import ScopeClassifier, scope_loss
from coachhook.evaluation.scoring import Row
from coachhook.models import load_model
from tests.evaluation.baselines.support import (
    BATCHES,
    LEARNING,
    double,
    logits_of,
    same,
    tiny_llama,
    unchanged,
    whole,
)

QUICK = {**LEARNING, "classifier_steps": 2, "counterfactual_steps": 2}
FAR = ["The sky above the harbour was", "She opened the door and", "In the evening they"]


@pytest.fixture(scope="module")
def bundled():
    return load_model(model_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def demo():
    return [EditRequest.from_dict(fact) for fact in demo_facts()[:5]]


@pytest.fixture(scope="module")
def learned(bundled, demo, tmp_path_factory):
    """Networks trained on facts about other subjects, and the losses on the way."""
    pool = [EditRequest.from_dict(fact) for fact in facts()]
    subjects = {fact.subject for fact in demo}
    pool = [fact for fact in pool if fact.subject not in subjects]
    random.Random(0).shuffle(pool)
    path = tmp_path_factory.mktemp("serac") / "networks.safetensors"
    with make_baseline(
        "serac", *bundled, train_requests=pool[:100], classifier_steps=150,
        counterfactual_steps=160, counterfactual_batch=12, blocks=3, progress=False,
    ) as serac:  # fmt: skip
        serac.save_networks(path)
        return path, serac.losses


@pytest.fixture
def serac(bundled, demo, learned):
    """The trained baseline with the demo facts in its memory."""
    with make_baseline("serac", *bundled, networks=learned[0], blocks=3) as baseline:
        baseline.edit(demo)
        yield baseline


def _memory(*embeddings):
    n = len(embeddings)
    return Memory(
        tuple(f"prompt {i}" for i in range(n)), (Row((1, 2), 1),) * n,
        torch.tensor(embeddings, dtype=torch.float64),
    )  # fmt: skip


def test_the_nearest_edit_by_the_formula():
    memory = _memory((0.0, 1.0), (2.0, 0.0), (0.3, 0.4))
    queries = torch.randn(2, 3, 2, dtype=torch.float64)
    values, numbers = memory.nearest(queries)
    for i in range(2):
        for j in range(3):
            g = [
                math.exp(-sum((a - b) ** 2 for a, b in zip(z, queries[i, j].tolist(), strict=True)))
                for z in memory.embeddings.tolist()
            ]
            assert values[i, j].item() == pytest.approx(max(g), rel=1e-12)
            assert numbers[i, j].item() == g.index(max(g))


def test_the_scope_loss_is_cross_entropy_over_all_pairs():
    entries, queries = torch.randn(3, 4).double(), torch.randn(5, 4).double()
    owner = torch.tensor([0, 2, -1, 1, -1])
    inside, outside = [], []
    for q, own in zip(queries, owner.tolist(), strict=True):
        for j, z in enumerate(entries):
            g = math.exp(-float((z - q).square().sum()))
            (inside if j == own else outside).append(-math.log(g if j == own else 1 - g))
    wanted = sum(inside) / 3 + sum(outside) / 5
    assert scope_loss(entries, queries, owner).item() == pytest.approx(wanted, rel=1e-9)


def test_the_classifier_reads_what_came_before_and_no_padding():
    torch.manual_seed(0)
    classifier = ScopeClassifier(6, heads=2, width=4).double()
    middle, last = torch.randn(1, 5, 6).double(), torch.randn(1, 5, 6).double()
    mask = torch.ones(1, 5, dtype=torch.bool)
    whole_text = classifier(middle, last, mask)
    for t in range(5):
        prefix = classifier(middle[:, : t + 1], last[:, t : t + 1], mask[:, : t + 1])
        torch.testing.assert_close(prefix[:, 0], whole_text[:, t], rtol=1e-12, atol=1e-12)
    pad = torch.randn(1, 3, 6).double()
    padded = classifier(
        torch.cat((pad, middle), 1), torch.cat((pad, last), 1),
        torch.cat((torch.zeros(1, 3, dtype=torch.bool), mask), 1),
    )  # fmt: skip
    torch.testing.assert_close(padded[:, 3:], whole_text, rtol=1e-12, atol=1e-12)
    assert padded.isfinite().all()


def test_a_hit_lasts_as_long_as_its_target():
    hits = torch.tensor([[-1, 1, 0, 0, 0, -1, 1], [0, -1, -1, 1, 1, 1, 1]])
    #                        1  1  1  0      1         0          1  1  1  1
    assert _windows(hits, (1, 3)).tolist() == [[-1, 1, 1, 1, 0, -1, 1], [0, -1, -1, 1, 1, 1, 1]]
    assert _windows(hits, (2, 1)).tolist() == [[-1, 1, 0, 0, 0, 0, 1], [0, 0, -1, 1, 1, 1, 1]]


def test_both_networks_learn(learned):
    losses = learned[1]
    classifier, counterfactual = (torch.tensor(losses[k]) for k in ("classifier", "counterfactual"))
    assert classifier[-20:].mean() < 0.3 * classifier[:5].mean()
    assert counterfactual[-20:].mean() < 0.3 * counterfactual[:5].mean()


def test_it_edits_facts_it_has_not_seen(serac, bundled, demo):
    model, tokenizer = bundled
    report = evaluate(model, tokenizer, demo, hooks=serac, progress=False, max_new_tokens=6)
    after, before = (report["teacher_forced"][when] for when in ("after", "before"))
    assert before["reliability"] == 0
    assert after["reliability"] >= 0.6
    assert after["generality"] >= 0.4
    assert after["locality"] >= 0.8


def test_out_of_scope_the_base_model_answers_bit_for_bit(serac, bundled):
    model, tokenizer = bundled
    edited = logits_of(model, tokenizer, FAR)
    with serac.disabled():
        assert same(edited, logits_of(model, tokenizer, FAR))


def test_in_scope_the_counterfactual_model_answers(serac, bundled, demo):
    model, tokenizer = bundled
    counterfactual = serac._counterfactual
    for fact in demo:
        ids = tokenizer(fact.text)["input_ids"]
        target = tokenizer(f" {fact.target_new}")["input_ids"]
        end = tokenizer.eos_token_id
        joined = torch.tensor([[*target, end, *ids, end, *ids]])
        with torch.no_grad():
            found = model(torch.tensor([ids])).logits[0, -1]
            wanted = counterfactual(joined).logits[0, -1]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        last = model(torch.tensor([ids]), logits_to_keep=1).logits
        torch.testing.assert_close(last[0, 0], found, rtol=1e-4, atol=1e-4)


def test_generation_with_and_without_a_cache_alone_and_padded(serac, bundled, demo):
    model, tokenizer = bundled
    prompts = [fact.text for fact in demo[:3]] + [FAR[0]]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    alone = []
    for text in prompts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, **options, use_cache=False))
        beams = model.generate(ids, **options, num_beams=3)
        assert torch.equal(beams, model.generate(ids, **options, num_beams=3, use_cache=False))
        alone.append(tokenizer.decode(cached[0], skip_special_tokens=True))
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    padded = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options
    )
    assert tokenizer.batch_decode(padded, skip_special_tokens=True) == alone


def test_the_later_target_of_a_prompt_wins(bundled, demo, learned):
    with make_baseline("serac", *bundled, networks=learned[0], blocks=3) as serac:
        later = EditRequest(demo[0].prompt, demo[0].subject, "Marlow")
        serac.edit([demo[0], demo[1]])
        serac.edit([later])
        assert serac.memory.prompts == (demo[1].text, later.text)
        tokenizer = bundled[1]
        assert tokenizer.decode(serac.memory.statements[-1].ids).endswith("Marlow")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_multi_token_targets_are_answered_to_their_end(family, model, tokenizer):
    """Whatever the networks learned: the counterfactual model's logits at every target token."""
    request = EditRequest("The capital of {} is", "France", "Dutch in Italy")
    model = double(model if family == "gpt2" else tiny_llama(tokenizer))
    with make_baseline("serac", model, tokenizer, **QUICK) as serac:
        result = serac.edit([request])
        prompt = tokenizer(request.text)["input_ids"]
        full = tokenizer(f"{request.text} {request.target_new}")["input_ids"]
        size = len(full) - len(prompt)
        assert size > 2
        end = tokenizer.eos_token_id
        joined = torch.tensor([[*full[-size:], end, *prompt, end, *full]])
        with torch.no_grad():
            wanted = serac._counterfactual(joined).logits[0, -size - 1 : -1]
            found = model(torch.tensor([full])).logits[0, -size - 1 : -1]
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        loss = torch.nn.functional.cross_entropy(wanted, torch.tensor(full[-size:]))
        assert result.losses == pytest.approx([loss.item()], rel=1e-9)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_tuple_is_given_where_one_is_asked_for(use_cache, model, tokenizer):
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    options = {"use_cache": use_cache, "return_dict": False}
    with torch.no_grad(), make_baseline("serac", model, tokenizer, **QUICK) as serac:
        plain = model(ids).logits
        serac.edit(BATCHES[0])
        wanted = model(ids).logits
        assert not torch.equal(wanted, plain)
        found = model(ids, **options)
        assert torch.equal(found[0], wanted)
        assert len(found) == 1 + use_cache
        if use_cache:  # and the cache is followed
            more = model(ids[:, -1:], past_key_values=found[1], return_dict=False)[0]
            longer = torch.cat((ids, ids[:, -1:]), dim=1)
            torch.testing.assert_close(more[:, 0], model(longer).logits[:, -1])


def test_a_cache_may_be_cropped(model, tokenizer):
    model = double(model)
    ids = torch.tensor([tokenizer("The capital of France is Paris and")["input_ids"]])
    request = EditRequest("The capital of {} is", "France", "Dutch in Italy")
    with make_baseline("serac", model, tokenizer, **QUICK) as serac:
        serac.edit([request])
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        cache.crop(3 - ids.shape[1])
        found = model(ids[:, 3:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids).logits[:, 3:], rtol=1e-9, atol=1e-9)


def test_what_it_cannot_follow_is_refused(model, tokenizer):
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with make_baseline("serac", model, tokenizer, **QUICK) as serac:
        serac.edit(BATCHES[0])
        with pytest.raises(ValueError, match="without labels"):
            model(ids, labels=ids)
        with pytest.raises(ValueError, match="must be input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
        cache = DynamicCache()
        with serac.disabled():
            model(ids[:, :-1], past_key_values=cache)
        with pytest.raises(ValueError, match="filled without it"):
            model(ids[:, -1:], past_key_values=cache)
        cache = DynamicCache()
        model(ids[:, :2], past_key_values=cache)
        with serac.disabled():
            model(ids[:, 2:-1], past_key_values=cache)
        with pytest.raises(ValueError, match="filled without it"):
            model(ids[:, -1:], past_key_values=cache)


def test_the_same_seed_gives_the_same_networks_and_a_file_keeps_them(model, tokenizer, tmp_path):
    model, found = copy.deepcopy(model), []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))  # which must not matter, nor must the model's mode
        model.train(len(found) == 1)
        with make_baseline("serac", model, tokenizer, **QUICK, seed=seed) as serac:
            found.append(list(serac._tensors().values()))
            serac.edit(BATCHES[0])
            if len(found) == 1:
                serac.save_networks(tmp_path / "networks.safetensors")
                edited = logits_of(model, tokenizer)
    assert same(found[0], found[1])
    assert not same(found[0], found[2])
    with make_baseline(
        "serac", model, tokenizer, networks=tmp_path / "networks.safetensors"
    ) as serac:
        serac.edit(BATCHES[0])
        assert same(logits_of(model, tokenizer), edited)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"train_requests": []}, ValueError, "at least two facts"),
        ({"train_requests": "facts"}, TypeError, "must be a list of EditRequest"),
        ({"threshold": 1.0}, ValueError, "threshold must lie between 0 and 1"),
        ({"heads": 0}, ValueError, "heads must be at least 1"),
        ({"blocks": 0}, ValueError, "blocks must be at least 1 or None"),
        ({"classifier_lr": 0.0}, ValueError, "classifier_lr must be positive"),
        ({"counterfactual_steps": -1}, ValueError, "counterfactual_steps must not be negative"),
        (
            {"train_requests": [EditRequest("{} " + "and " * 30, "Bob", "Spain")] * 2},
            ValueError,
            "context window of 64 tokens twice",
        ),
    ],
)
def test_bad_settings(options, kind, message, model, tokenizer):
    state, plain = whole(model), logits_of(model, tokenizer)
    with pytest.raises(kind, match=message):
        make_baseline("serac", model, tokenizer, **{**QUICK, **options})
    assert unchanged(state, whole(model))
    assert same(logits_of(model, tokenizer), plain)
    assert not model._forward_hooks and not model.transformer.h[0]._forward_hooks


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_shorter_copy(family, blocks, model, tokenizer):
    model = double(model if family == "gpt2" else tiny_llama(tokenizer))
    state = whole(model)
    with make_baseline("serac", model, tokenizer, **QUICK, blocks=blocks) as serac:
        serac.edit(BATCHES[0])
        assert serac._counterfactual.config.num_hidden_layers == blocks
        assert sum(p.numel() for p in serac._counterfactual.parameters()) < sum(
            p.numel() for p in model.parameters()
        )
    assert unchanged(state, whole(model))
