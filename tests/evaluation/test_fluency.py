"""n-gram entropy, consistency and cached decoding against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from coachhook.editing.requests import EditRequest
from coachhook.evaluation import cache_agreement, consistency, evaluate, ngram_entropy
from coachhook.evaluation.observations import contains
from coachhook.evaluation.scoring import encode_prompts, greedy
from coachhook.hooks import attach_hooks


def test_entropy_of_small_texts():
    # a b a b a: bigrams ab ba ab ba (1/2, 1/2): 1 bit; trigrams aba bab aba: 2/3, 1/3.
    h3 = math.log2(3) - 2 / 3
    assert ngram_entropy("a b a b a") == pytest.approx((2 / 3 * 1 + 4 / 3 * h3) / 2)
    assert ngram_entropy("x x x x") == 0.0
    # Five different words: 4 bigrams, 3 trigrams, each once.
    assert ngram_entropy("one two, three.") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    assert ngram_entropy("") == ngram_entropy("one") == 0.0
    # One bigram only, no trigram.
    assert ngram_entropy("one two") == 0.0


def test_consistency_of_small_texts():
    assert consistency(["red fox"], [["red fox"]]) == pytest.approx([1.0])
    assert consistency(["red fox"], [["blue whale"]]) == [0.0]
    assert consistency(["", "a"], [["x"], []]) == [0.0, 0.0]
    # Three documents; "fox" stands in all of them, "red" in one: idf 1 and 1 + ln 2.
    texts, references = ["Red"], [["red fox", "fox", "fox fox"]]
    rare = 1 + math.log(2)
    wanted = rare * rare / (rare * math.hypot(rare, 4.0))
    assert consistency(texts, references) == pytest.approx([wanted])
    with pytest.raises(ValueError, match="one list for each of 1 texts, got 0"):
        consistency(["a"], [])


def test_fluency_of_what_the_model_writes(model, tokenizer):
    requests = [
        EditRequest("{} speaks", "Bob", "Dutch", generation_prompts=["Bob", "Bob lives in"]),
        EditRequest("{} speaks", "Ann Art", "Dutch"),
    ]
    result = evaluate(model, tokenizer, requests, fluency_tokens=24, progress=False)["fluency"]
    values = []
    for prompt in ("Bob", "Bob lives in", "Ann Art speaks"):
        (row,) = encode_prompts(tokenizer, [prompt])
        (new,) = greedy(model, tokenizer, [row], max_new_tokens=24 - len(row))
        values.append(ngram_entropy(tokenizer.decode(row + new)))
    assert result["prompts"] == 3
    expected = ((values[0] + values[1]) / 2 + values[2]) / 2
    assert expected > 0
    assert result["before"] == result["after"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("continuation", "target", "found"),
    [
        (" in the town of Lyon, France", "Lyon", True),
        (" Lyon", " Lyon ", True),
        (" Lyons and lyon", "Lyon", False),
        (" xLyon", "Lyon", False),
        (" Lyon_2 a Lyon2", "Lyon", True),
        (" C++.", "C++", True),
        ("", "Lyon", False),
    ],
)
def test_what_counts_as_contained(continuation, target, found):
    assert contains(continuation, target) is found


@pytest.fixture
def hooks(model):
    hooks = attach_hooks(model, [1])
    hooks[1].set_delta(2 * torch.randn(32, 128, generator=torch.Generator().manual_seed(2)))
    hooks.set_state("validated")
    yield hooks
    hooks.detach()


PROMPTS = [
    "The capital of Spain is",
    "Bob writes in",
    "Cid lives",
    "France, whose",
    "Ann Art",
    "Italy and",
]


def test_a_gate_of_single_tokens_agrees_with_itself(model, tokenizer, hooks):
    hooks[1].set_scope("population", population=(0.0, 1.0))
    hooks[1].set_alpha(3.0)
    found = cache_agreement(model, tokenizer, PROMPTS, gates=hooks, max_new_tokens=10)
    assert found["same"] == 1.0 and found["differences"] == [] and found["causes"] == {}
    assert found["interval"][1] == 1.0 > found["interval"][0] > 0


def test_a_gate_of_the_sequence_does_not_and_is_named(model, tokenizer, hooks):
    hooks[1].set_scope("sequence")
    hooks[1].set_alpha(2.0)
    found = cache_agreement(model, tokenizer, PROMPTS, gates=hooks, max_new_tokens=10)
    rows = encode_prompts(tokenizer, PROMPTS)
    texts = {}
    for use_cache in (True, False):
        new = greedy(model, tokenizer, rows, max_new_tokens=10, use_cache=use_cache)
        texts[use_cache] = [tokenizer.decode(row) for row in new]
    differ = [p for p, a, b in zip(PROMPTS, texts[True], texts[False], strict=True) if a != b]
    assert 0 < len(differ) <= len(PROMPTS)
    assert [d["prompt"] for d in found["differences"]] == differ
    assert found["same"] == pytest.approx(1 - len(differ) / len(PROMPTS))
    assert found["causes"] == {"gate": len(differ)}
    for record in found["differences"]:
        assert record["cached"] != record["uncached"] and record["margin"] >= 0
        at = PROMPTS.index(record["prompt"])
        assert (record["cached"], record["uncached"]) == (texts[True][at], texts[False][at])
    with pytest.raises(ValueError, match="prompts must not be empty"):
        cache_agreement(model, tokenizer, [])
