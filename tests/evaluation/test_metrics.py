"""The metrics against their definitions, written out plainly, one prompt at a time."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from coachhook.editing.requests import EditRequest
from coachhook.errors import FactsError
from coachhook.evaluation import evaluate
from coachhook.evaluation.intervals import harmonic_mean, wilson
from coachhook.evaluation.observations import Pass, Prompts, begins_with, contains, families_of
from coachhook.evaluation.scoring import Score, encode_pairs, encode_prompts, greedy, score
from coachhook.hooks import attach_hooks

ALPHA = 3.0


@pytest.fixture
def hooks(model):
    """Real hooks with random corrections, which fire where ``||Delta x|| >= ALPHA``."""
    hooks = attach_hooks(model, [1, 2])
    generator = torch.Generator().manual_seed(1)
    for layer, hook in hooks.items():
        hook.set_scope("population", population=(0.0, 1.0))
        hook.set_alpha(ALPHA)
        scale = 0.25 if layer == 1 else 0.2
        hook.set_delta(scale * torch.randn(32, 128, generator=generator))
    hooks.set_state("validated")
    yield hooks
    hooks.detach()


class Off:
    """The model with its hooks off."""

    def __init__(self, model, hooks):
        self.model, self.hooks, self.config = model, hooks, model.config

    def __call__(self, ids):
        with self.hooks.disabled():
            return self.model(ids)


def fired_tokens(model, tokenizer, hooks, prompt):
    """Per token, whether the correction of any layer is at least ALPHA: from the hooks' inputs."""
    norms = {}

    def note(module, args, output):
        norms[module.index] = (args[0] @ module.delta().T).norm(dim=-1)[0]

    handles = [hook.register_forward_hook(note) for hook in hooks.values()]
    with torch.no_grad():
        model(torch.tensor([tokenizer(prompt)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return [max(at) >= ALPHA for at in zip(*(n.tolist() for n in norms.values()), strict=True)]


def naive_pair(model, tokenizer, prompt, target):
    """Target tokens, argmax there, mean NLL: EasyEdit's and CounterFact's loops for one text."""
    ids = tokenizer(f"{prompt} {target}")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    tokens = ids[start:]
    argmax = [int(logits[start - 1 + j].argmax()) for j in range(len(tokens))]
    nll = [-logits[start - 1 + j].log_softmax(0)[t].item() for j, t in enumerate(tokens)]
    return tokens, argmax, sum(nll) / len(nll)


def naive_greedy(model, tokenizer, prompt, limit):
    """Greedy decoding without a cache."""
    ids = list(tokenizer(prompt)["input_ids"])
    new = []
    while len(new) < limit and len(ids) < model.config.n_positions:
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
        new.append(token)
    return tuple(new)


def mean(values):
    return sum(values) / len(values) if values else None


def naive(before, after, tokenizer, requests, limit, locality_tokens):
    """The nine numbers of the state ``after``, straight from their definitions."""
    out = {name: [] for name in ("tr", "tg", "tl", "pe", "pp", "pn", "gr", "gg", "gl")}
    for r in requests:
        asked = {"r": [r.text], "g": list(r.paraphrases)}
        for kind, prompts in asked.items():
            accuracy, prefers, answers = [], [], []
            for p in prompts:
                tokens, argmax, new = naive_pair(after, tokenizer, p, r.target_new)
                accuracy.append(mean([float(a == t) for a, t in zip(argmax, tokens, strict=True)]))
                if r.target_true is not None:
                    true = naive_pair(after, tokenizer, p, r.target_true)[2]
                    prefers.append(float(new < true))
                text = tokenizer.decode(naive_greedy(after, tokenizer, p, limit)).lstrip()
                rest = text.removeprefix(r.target_new)
                answers.append(float(rest != text and not rest[:1].isalnum()))
            if prompts:
                out[f"t{kind}"].append(mean(accuracy))
                out[f"g{kind}"].append(mean(answers))
            if prefers:
                out["pe" if kind == "r" else "pp"].append(mean(prefers))
        same, keeps, same_text = [], [], []
        targets = r.neighborhood_targets or [r.target_true] * len(r.neighborhood)
        for p, target in zip(r.neighborhood, targets, strict=True):
            _, a, true = naive_pair(after, tokenizer, p, target)
            _, b, _ = naive_pair(before, tokenizer, p, target)
            same.append(mean([float(x == y) for x, y in zip(a, b, strict=True)]))
            keeps.append(float(true < naive_pair(after, tokenizer, p, r.target_new)[2]))
            a = naive_greedy(after, tokenizer, p, limit)[:locality_tokens]
            b = naive_greedy(before, tokenizer, p, limit)[:locality_tokens]
            same_text.append(float(a == b))
        if r.neighborhood:
            out["tl"].append(mean(same))
            out["pn"].append(mean(keeps))
            out["gl"].append(mean(same_text))
    return {name: mean(values) for name, values in out.items()}


def test_every_number_follows_its_definition(model, hooks, tokenizer, requests):
    plain, edited = Off(model, hooks), model
    # With an answer the edited model really gives, no number is trivially zero.
    given = tokenizer.decode(naive_greedy(edited, tokenizer, requests[1].text, 12)).split()[0]
    requests[1] = EditRequest(
        prompt="{} speaks", subject="Ann Art", target_new=given, paraphrases=["Ann Art says"]
    )
    expected = {
        "before": naive(plain, plain, tokenizer, requests, 12, 3),
        "after": naive(plain, edited, tokenizer, requests, 12, 3),
    }
    assert 0 < expected["after"]["tl"] < 1 and 0 < expected["after"]["gl"] < 1
    assert expected["after"]["tr"] > 0 and expected["after"]["gr"] > 0
    result = evaluate(
        model,
        tokenizer,
        requests,
        hooks=hooks,
        batch_size=2,
        max_new_tokens=12,
        locality_tokens=3,
        progress=False,
    )
    for state, wanted in expected.items():
        for family, keys in (
            ("teacher_forced", "tr tg tl"),
            ("probability", "pe pp pn"),
            ("generated", "gr gg gl"),
        ):
            values = list(result[family][state].values())
            assert values == pytest.approx([wanted[k] for k in keys.split()], abs=1e-12), (
                state,
                family,
            )
    assert result["teacher_forced"]["before"]["locality"] == 1.0
    assert result["generated"]["before"]["locality"] == 1.0
    near = [fired_tokens(model, tokenizer, hooks, p) for r in requests for p in r.neighborhood]
    edited = [fired_tokens(model, tokenizer, hooks, r.text) for r in requests]
    share = sum(map(sum, near)) / sum(map(len, near))
    assert 0 < share < 1
    assert result["gate"]["fired_unrelated"] == pytest.approx(share)
    assert result["gate"]["fired_edited"] == sum(map(any, edited)) / len(edited)


def test_the_pinned_keys_and_extras(model, tokenizer, requests):
    result = evaluate(model, tokenizer, requests, progress=False, max_new_tokens=4)
    assert result["edits"] == 3
    metrics = {
        "teacher_forced": ["reliability", "generality", "locality"],
        "probability": ["efficacy", "paraphrase", "neighborhood"],
        "generated": ["reliability", "generality", "locality"],
    }
    for family, names in metrics.items():
        for state in ("before", "after"):
            assert list(result[family][state]) == names
            for name in names:
                low, high = result[family]["intervals"][state][name]
                assert 0 <= low <= result[family][state][name] <= high <= 1
    assert set(result["gate"]) == {"fired_unrelated", "fired_edited"}
    assert result["counts"] == {"requests": 3, "paraphrases": 3, "neighborhood": 4}


def test_a_model_in_training_mode_is_measured_without_dropout(model, tokenizer, requests):
    expected = evaluate(model, tokenizer, requests, progress=False, max_new_tokens=4)
    model.train()
    try:
        assert evaluate(model, tokenizer, requests, progress=False, max_new_tokens=4) == expected
        assert all(module.training for module in model.modules())
        model.transformer.h[0].eval()  # a part of its own mode keeps it
        modes = [module.training for module in model.modules()]
        assert evaluate(model, tokenizer, requests, progress=False, max_new_tokens=4) == expected
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()


def test_hooks_without_edits_fire_nowhere(model, tokenizer, requests):
    hooks = attach_hooks(model, [0, 1])  # as after the last batch was taken back
    try:
        result = evaluate(
            model, tokenizer, requests, hooks=hooks, progress=False, max_new_tokens=2,
            text=["Spain has capitals"], cache_prompts=1,
        )  # fmt: skip
    finally:
        hooks.detach()
    assert result["gate"] == {"fired_unrelated": 0.0, "fired_edited": 0.0}
    assert result["language"]["fired"] == 0.0 and result["language"]["kl"] == 0.0
    assert result["teacher_forced"]["before"] == result["teacher_forced"]["after"]


def test_undefined_numbers_are_none(model, tokenizer):
    lone = EditRequest(prompt="{} speaks", subject="Ann Art", target_new="Dutch")
    result = evaluate(model, tokenizer, [lone], progress=False, max_new_tokens=2)
    after = {name: result[name]["after"] for name in ("teacher_forced", "probability", "generated")}
    assert after["teacher_forced"]["generality"] is None
    assert after["teacher_forced"]["locality"] is None
    assert after["probability"] == {"efficacy": None, "paraphrase": None, "neighborhood": None}
    assert after["generated"]["locality"] is None
    assert result["probability"]["score"]["after"] is None
    assert result["teacher_forced"]["mean"]["after"] is None
    assert result["probability"]["intervals"]["after"]["efficacy"] is None


@pytest.mark.parametrize("noise", [-1e-7, 0.0, 1e-7])
def test_an_answer_is_never_more_likely_than_itself(noise):
    """Its two scores may come from two batches, which round otherwise."""
    request = EditRequest(
        prompt="{} is in", subject="Lyon", target_new="France", target_true="France",
        paraphrases=["Lyon, in"], neighborhood=["Paris is in"],
    )  # fmt: skip
    prompts = Prompts.of([request])
    new, true = Score((1,), (1,), 1.0), Score((1,), (1,), 1.0 + noise)
    seen = Pass([new] * 3, [true] * 3, None)
    found = families_of(None, prompts, seen, seen, 10)["probability"]
    assert found == [[(0, 0.0)]] * 3


def test_bad_calls(model, tokenizer):
    with pytest.raises(ValueError, match="requests must not be empty"):
        evaluate(model, tokenizer, [])
    long = EditRequest(
        prompt="{} speaks", subject="Ann Art", target_new="Dutch", neighborhood=["Bob " * 90]
    )
    with pytest.raises(FactsError, match="context window of 64 tokens") as caught:
        evaluate(model, tokenizer, [long, long])
    assert len(caught.value.problems) == 2


def test_batches_do_not_change_scores(model, tokenizer, requests):
    pairs = [(r.text, r.target_new) for r in requests] + [("Bob", "x y z"), ("Bob", "Paris")]
    rows = encode_pairs(tokenizer, pairs)
    alone = [score(model, [row])[0] for row in rows]
    for size in (1, 2, 64):
        for one, many in zip(alone, score(model, rows, batch_size=size), strict=True):
            assert one.argmax == many.argmax and one.tokens == many.tokens
            assert one.nll == pytest.approx(many.nll, abs=1e-5)
    for row, one, (prompt, target) in zip(rows, alone, pairs, strict=True):
        tokens, argmax, nll = naive_pair(model, tokenizer, prompt, target)
        assert row.target == len(tokens)
        assert (one.tokens, one.argmax) == (tuple(tokens), tuple(argmax))
        assert one.nll == pytest.approx(nll, abs=1e-5)


def test_a_prompt_that_ends_in_a_space_keeps_its_target(model, tokenizer):
    (row,) = encode_pairs(tokenizer, [("Bob speaks ", "Dutch")])
    assert row.target >= 1
    assert tokenizer.decode(row.ids[-row.target :]).strip() == "Dutch"
    assert math.isfinite(score(model, [row])[0].nll)


def test_greedy_equals_decoding_without_a_cache(model, tokenizer):
    prompts = ["Bob", "Ann Art speaks", "The capital of Spain is", "Cid lives in", "Italy"]
    found = greedy(
        model,
        tokenizer,
        encode_prompts(tokenizer, prompts),
        max_new_tokens=9,
        max_positions=64,
        batch_size=2,
    )
    assert found == [naive_greedy(model, tokenizer, p, 9) for p in prompts]
    assert greedy(model, tokenizer, [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 5.0, "do_sample": True, "no_repeat_ngram_size": 1},
        {"num_beams": 4, "min_length": 40},
        {"suppress_tokens": "first"},
        {"bad_words_ids": "first"},
        {"stop_strings": ["a"]},
        {"max_time": 1e-9},
        {"return_dict_in_generate": True},
    ],
    ids=lambda own: next(iter(own)),
)
def test_greedy_ignores_the_models_own_generation_settings(model, tokenizer, own):
    prompts = encode_prompts(tokenizer, ["Bob", "Cid lives in"])
    plain = greedy(model, tokenizer, prompts, max_new_tokens=9)
    first = {"suppress_tokens": [plain[0][0]], "bad_words_ids": [[plain[0][0]]]}
    kept = model.generation_config
    model.generation_config = copy.deepcopy(kept)
    try:
        for name, value in own.items():
            setattr(model.generation_config, name, first[name] if value == "first" else value)
        mine = model.generation_config
        assert greedy(model, tokenizer, prompts, max_new_tokens=9) == plain
        assert model.generation_config is mine
    finally:
        model.generation_config = kept


def test_greedy_stops_at_the_end_of_text_and_at_the_window(model, tokenizer):
    prompt = encode_prompts(tokenizer, ["Bob"])
    (free,) = greedy(model, tokenizer, prompt, max_new_tokens=200, max_positions=64)
    assert 1 < len(free) <= 64 - len(prompt[0])
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = free[1]
    try:
        (stopped,) = greedy(model, tokenizer, prompt, max_new_tokens=9)
    finally:
        model.generation_config.eos_token_id = kept
    assert stopped == free[: free.index(free[1])]
    full = [tuple(range(1, 65))]
    assert greedy(model, tokenizer, full, max_new_tokens=3, max_positions=64) == [()]


@pytest.mark.parametrize(
    ("continuation", "target", "right"),
    [
        (" Lyon", "Lyon", True),
        ("\n Lyon, the", "Lyon", True),
        (" Lyon.", " Lyon ", True),
        (" Lyons", "Lyon", False),
        (" Lyon2", "Lyon", False),
        (" lyon", "Lyon", False),
        (" the Lyon", "Lyon", False),
        ("", "Lyon", False),
        (" Ly", "Lyon", False),
        (" New York City", "New York", True),
        (" Élan", "Él", False),
        (" U.S.A", "U.S.", False),
        # Scripts that set no space between words, alone and beside others.
        ("里昂是法国的城市", "里昂", True),
        (" 里昂。", "里昂", True),
        (" 巴黎", "里昂", False),
        ("กรุงเทพเป็นเมือง", "กรุงเทพ", True),
        ("Lyon是法国的城市", "Lyon", True),
        ("2010年", "2010", True),
        ("20105", "2010", False),
        # An accent that is a character of its own.
        ("Zoe\u0308 speaks", "Zoe", False),
        ("Zoe\u0308 speaks", "Zoe\u0308", True),
    ],
)
def test_what_counts_as_an_answer(continuation, target, right):
    assert begins_with(continuation, target) is right
    # Whole words anywhere are judged alike.
    assert contains(f"({continuation})", target) is (right or continuation == " the Lyon")


@pytest.mark.parametrize(
    ("continuation", "target", "right"),
    [
        ("Lyonaise, then Lyon", "Lyon", True),
        ("OldLyon", "Lyon", False),
        ("他住在里昂市", "里昂", True),
        ("在Lyon住", "Lyon", True),
        ("aa", "a", False),
        ("e\u0308Lyon", "Lyon", False),
        ("snake_Lyon_case", "Lyon", True),
    ],
)
def test_what_counts_as_contained(continuation, target, right):
    assert contains(continuation, target) is right


def test_wilson_interval():
    # Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(hits / count, count) == pytest.approx([low, high], abs=5e-5)
    assert wilson(1.0, 10)[1] == 1.0
    with pytest.raises(ValueError, match="count must be at least 1"):
        wilson(0.5, 0)


def test_harmonic_mean():
    assert harmonic_mean([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert harmonic_mean([1.0, 0.0, 1.0]) == 0.0
    assert harmonic_mean([1.0, None]) is None
    assert harmonic_mean([]) is None
