"""GRACE against its paper's rules, and what it does to the bundled model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coachhook import EditRequest
from coachhook.bundled import demo_facts, model_path
from coachhook.evaluation import evaluate
from coachhook.evaluation.baselines import make_baseline
from coachhook.evaluation.baselines.grace import Codebook
from coachhook.evaluation.scoring import encode_pairs
from coachhook.models import load_model
from tests.evaluation.baselines.support import double, logits_of, same, unchanged, whole


@pytest.fixture(scope="module")
def bundled():
    return load_model(model_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def facts():
    return [EditRequest.from_dict(fact) for fact in demo_facts()]


def _book(n=2, m=1):
    empty = torch.zeros(0, dtype=torch.float64)
    return Codebook(empty.reshape(0, n), empty.reshape(0, m), empty, ())


def _point(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_encode_expand_and_split():
    value = _point(7.0)
    book, at = _book().place(_point(0, 0), value, 1.0, (5,))
    assert at == 0
    # Farther than both radii together: a new entry, nothing else moves.
    book, at = book.place(_point(3, 0), value, 1.5, (6,))
    assert at == 1
    assert book.radii.tolist() == [1.0, 1.5]
    # Near the second, same label: its radius grows to reach the query, and never shrinks.
    grown, at = book.place(_point(3, 2), value, 1.0, (6,))
    assert at == 1
    assert grown.radii.tolist() == [1.0, 2.0]
    again, at = grown.place(_point(3, 0.5), value, 1.0, (6,))
    assert at == 1
    assert again.radii.tolist() == [1.0, 2.0]
    # Near the first, another label: both radii become half the distance.
    split, at = book.place(_point(0, 1.2), value, 1.0, (9,))
    assert at == 2
    assert split.radii.tolist() == [0.6, 1.5, 0.6]
    assert split.labels == ((5,), (6,), (9,))
    assert book.radii.tolist() == [1.0, 1.5]  # codebooks are not changed in place


def test_a_key_that_is_there_already_is_taken_over():
    book, _ = _book().place(_point(3, 4), _point(1.0), 0.5, (5,))
    book, at = book.place(_point(3, 4 + 1e-6), _point(2.0), 0.5, (6,))
    assert (at, book.labels, book.radii.tolist()) == (0, ((6,),), [0.5])
    assert book.values.tolist() == [[2.0]]


@pytest.mark.parametrize("replacement", ["replace_last", "replace_prompt"])
def test_the_layer_answers_as_the_formula_says(replacement, model, tokenizer):
    model = double(model)
    layer = model.transformer.h[2].mlp.c_proj
    ids = torch.tensor([tokenizer("The capital of France is Paris and")["input_ids"]])
    seen = []
    handle = layer.register_forward_hook(lambda _m, args, out: seen.append((args[0][0], out[0])))
    model(ids)
    ((inputs, plain),) = seen
    handle.remove()
    with make_baseline("grace", model, tokenizer, layer=2, replacement=replacement) as grace:
        # One key beside token 3, inside its radius, one at token 6 exactly, one out of reach.
        keys = torch.stack((inputs[3] + 0.01, inputs[6], inputs[1] + 10))
        values = torch.randn(3, 32, dtype=torch.float64)
        grace.codebook = Codebook(keys, values, _point(0.2, 0.0, 0.5), ((1,), (2,), (3,)))
        handle = layer.register_forward_hook(lambda _m, args, out: seen.append((args[0], out[0])))
        model(ids)
        handle.remove()
    wanted = plain.clone()
    fired = {}
    for t, h in enumerate(inputs):
        distances = [float((h - k).pow(2).sum().sqrt()) for k in keys]
        i = min(range(3), key=distances.__getitem__)
        if distances[i] <= [0.2, 0.0, 0.5][i]:
            fired[t] = i
    assert 3 in fired and 6 in fired and len(fired) < len(inputs)
    for t in range(len(inputs)):
        if replacement == "replace_last" and t in fired:
            wanted[t] = values[fired[t]]
        if replacement == "replace_prompt" and any(s >= t for s in fired):
            wanted[t] = values[fired[min(s for s in fired if s >= t)]]
    torch.testing.assert_close(seen[-1][1], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("replacement", ["replace_last", "replace_prompt"])
def test_the_value_is_that_of_plain_gradient_descent(replacement, model, tokenizer):
    model = double(model)
    request = EditRequest("The capital of {} is", "France", "Dutch in Italy")
    (row,) = encode_pairs(tokenizer, [(request.text, request.target_new)])
    at, layer = len(row.ids) - row.target - 1, model.transformer.h[1].mlp.c_proj
    options = {"layer": 1, "steps": 6, "lr": 0.3, "stop": 0.0, "replacement": replacement}
    with make_baseline("grace", model, tokenizer, **options) as grace:
        result = grace.edit([request])
        value, key = grace.codebook.values[0].clone(), grace.codebook.keys[0].clone()
    # The whole network, the value put in by hand.
    seen = []
    handle = layer.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    ids = torch.tensor([row.ids])
    model(ids)
    handle.remove()
    assert torch.equal(key, seen[0][0][0, at])
    by_hand = seen[0][1][0, at].detach().clone().requires_grad_(True)
    first = 0 if replacement == "replace_prompt" else at

    def put(_module, _args, out):
        return torch.cat(
            (out[:, :first], by_hand.expand(1, at + 1 - first, -1), out[:, at + 1 :]), 1
        )

    optimiser = torch.optim.Adam([by_hand], lr=0.3)
    handle = layer.register_forward_hook(put)
    losses = []
    for _ in range(7):
        logits = model(ids).logits[0, -row.target - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, -row.target :])
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        if len(losses) < 7:
            optimiser.step()
    handle.remove()
    torch.testing.assert_close(value, by_hand.detach(), rtol=1e-9, atol=1e-9)
    assert result.losses == pytest.approx([losses[-1]], rel=1e-9)


def test_edits_together_are_edits_one_by_one(bundled, facts):
    model, tokenizer = double(bundled[0]), bundled[1]
    books = []
    for batch in ([facts[:4]], [[fact] for fact in facts[:4]]):
        with make_baseline("grace", model, tokenizer, steps=20) as grace:
            for requests in batch:
                grace.edit(requests)
            books.append(grace.codebook)
    assert books[0].labels == books[1].labels
    assert len(books[0].labels) == 4
    torch.testing.assert_close(books[0].radii, books[1].radii, rtol=1e-12, atol=0)
    torch.testing.assert_close(books[0].values, books[1].values, rtol=1e-6, atol=1e-6)


def test_it_learns_the_demo_facts_and_leaves_the_rest(bundled, facts):
    model, tokenizer = bundled
    other = ["The sky above the harbour was", "She opened the door and"]
    state, plain = whole(model), logits_of(model, tokenizer, other)
    with make_baseline("grace", model, tokenizer) as grace:
        for start in (0, 5, 10):
            assert all(grace.edit(facts[start : start + 5]).converged)
        assert same(logits_of(model, tokenizer, other), plain)
        result = evaluate(model, tokenizer, facts, hooks=grace, progress=False, max_new_tokens=6)
    # Its edits hold and disturb little; few of them reach a paraphrase.
    assert result["teacher_forced"]["after"]["reliability"] == 1
    assert result["generated"]["after"]["reliability"] == 1
    assert result["teacher_forced"]["before"]["reliability"] == 0
    assert result["teacher_forced"]["after"]["locality"] > 0.8
    assert unchanged(state, whole(model))


def test_generation_with_and_without_a_cache(bundled, facts):
    model, tokenizer = bundled
    with make_baseline("grace", model, tokenizer) as grace:
        grace.edit(facts[:5])
        for fact in facts[:5]:
            ids = torch.tensor([tokenizer(fact.text)["input_ids"]])
            cached, plain = (
                model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache)
                for cache in (True, False)
            )
            assert torch.equal(cached, plain)
            assert tokenizer.decode(cached[0, ids.shape[1] :]).strip().startswith(fact.target_new)


def test_the_later_target_of_a_prompt_wins(bundled, facts):
    model, tokenizer = bundled
    fact = facts[0]
    later = EditRequest(fact.prompt, fact.subject, "Marlow")
    same_batch, two_batches = [[fact, later]], [[fact], [later]]
    for batches in (same_batch, two_batches):
        with make_baseline("grace", model, tokenizer) as grace:
            for batch in batches:
                converged = grace.edit(batch).converged
            assert converged[-1] and (len(converged) == 1 or not converged[0])
            assert len(grace.codebook.labels) == 1


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 1e-6), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)]
)
def test_a_prompt_is_known_again_within_the_rounding_of_the_dtype(dtype, share, facts):
    """A split there would leave radii as small as the noise, and either target would come out."""
    model, tokenizer = load_model(model_path(), dtype=dtype)
    later = EditRequest(facts[0].prompt, facts[0].subject, "Marlow")
    with make_baseline("grace", model, tokenizer) as grace:
        grace.edit([facts[0]])
        # As the key comes out of a batch of another shape.
        noise = torch.randn(grace.codebook.keys.shape, generator=torch.Generator().manual_seed(0))
        noise *= share * grace.codebook.keys.norm() / noise.norm()
        grace.codebook = replace(grace.codebook, keys=grace.codebook.keys + noise)
        assert grace.edit([later]).converged == [True]
        assert len(grace.codebook.labels) == 1


def test_the_same_seed_gives_the_same_values(model, tokenizer):
    request = EditRequest("{} speaks", "Ann Art", "Dutch")
    values = []
    for seed in (3, 3, 4):
        with make_baseline(
            "grace", model, tokenizer, value_init="cold", seed=seed, steps=3
        ) as grace:
            grace.edit([request])
            values.append(grace.codebook.values)
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0.0}, "radius must be positive or None"),
        ({"radius_share": -1.0}, "radius_share must be positive"),
        ({"replacement": "all"}, "replacement must be one of replace_last, replace_prompt"),
        ({"value_init": "hot"}, "value_init must be one of warm, cold"),
        ({"steps": -1}, "steps must not be negative"),
        ({"layer": 3}, "from 0 to 2"),
    ],
)
def test_bad_settings(options, message, model, tokenizer):
    state = whole(model)
    with pytest.raises(ValueError, match=message):
        make_baseline("grace", model, tokenizer, **options)
    assert unchanged(state, whole(model))


def test_values_that_run_away_are_refused(model, tokenizer):
    plain = logits_of(model, tokenizer)
    with make_baseline("grace", model, tokenizer, lr=1e30, steps=3) as grace:
        with pytest.raises(ValueError, match="lower lr"):
            grace.edit([EditRequest("{} speaks", "Ann Art", "Dutch")])
        assert grace.codebook.labels == ()
        assert same(logits_of(model, tokenizer), plain)
