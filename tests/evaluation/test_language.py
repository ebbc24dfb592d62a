"""Drift and perplexity on unrelated text against plain loops and values worked out by hand."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from coachhook.evaluation import evaluate, measure_language, render_evaluation
from coachhook.evaluation.intervals import effective_count, ratio_interval
from coachhook.evaluation.language import prompt_drift, token_drift, unrelated_rows
from coachhook.hooks import attach_hooks
from tests.evaluation.tiny import SENTENCES

ALPHA = 7.0


@pytest.fixture
def hooks(model):
    hooks = attach_hooks(model, [1])
    hooks[1].set_scope("population", population=(0.0, 1.0))
    hooks[1].set_alpha(ALPHA)
    hooks[1].set_delta(0.6 * torch.randn(32, 128, generator=torch.Generator().manual_seed(1)))
    hooks.set_state("validated")
    yield hooks
    hooks.detach()


@torch.no_grad()
def log_probs(model, ids):
    """``[T, V]`` in float64, one text at a time."""
    return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def both(model, hooks, ids):
    with hooks.disabled():
        before = log_probs(model, ids)
    return before, log_probs(model, ids)


def test_every_number_follows_its_definition(model, tokenizer, hooks):
    texts = [*SENTENCES, "Bob", "Paris and Madrid"]
    kl, old, new, same, fired, tokens = 0.0, 0.0, 0.0, 0, 0, 0
    rows = [tokenizer(t)["input_ids"] for t in texts]
    for ids in rows:
        before, after = both(model, hooks, ids)
        kl += float((before.exp() * (before - after)).sum())
        same += int((before.argmax(-1) == after.argmax(-1)).sum())
        for t in range(1, len(ids)):
            old -= float(before[t - 1, ids[t]])
            new -= float(after[t - 1, ids[t]])
        with hooks.record() as records:
            log_probs(model, ids)
        fired += int(records[0][2].sum())
        tokens += len(ids)
    followed = tokens - len(rows)
    assert 0 < fired < tokens and 0 < same < tokens
    for size in (1, 32):
        found = measure_language(model, tokenizer, texts, hooks=hooks, gates=hooks, batch_size=size)
        assert (found["texts"], found["tokens"]) == (len(texts), tokens)
        assert found["kl"] == pytest.approx(kl / tokens, rel=1e-4)
        assert found["perplexity"]["before"] == pytest.approx(math.exp(old / followed), rel=1e-5)
        assert found["perplexity"]["after"] == pytest.approx(math.exp(new / followed), rel=1e-5)
        assert found["perplexity"]["ratio"] == pytest.approx(
            math.exp((new - old) / followed), rel=1e-5
        )
        assert found["unchanged"] == same / tokens
        assert found["fired"] == fired / tokens
        for name, value in (
            ("kl", found["kl"]),
            ("ratio", found["perplexity"]["ratio"]),
            ("unchanged", found["unchanged"]),
            ("fired", found["fired"]),
        ):
            low, high = found["intervals"][name]
            assert low < value < high


def test_drift_after_prompts(model, tokenizer, hooks):
    prompts = ["The capital of Spain is", "Italy borders", "Bob"]
    expected = []
    for prompt in prompts:
        before, after = both(model, hooks, tokenizer(prompt)["input_ids"])
        expected.append(float((before[-1].exp() * (before[-1] - after[-1])).sum()))
    assert max(expected) > 1e-3
    found = prompt_drift(model, tokenizer, prompts, hooks, batch_size=2)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert prompt_drift(model, tokenizer, [], hooks) == []


def test_kl_of_two_known_distributions(tokenizer):
    """A model of one table: P = (1/2, 1/2) before and (1/4, 3/4) after."""

    class Coin(torch.nn.Module):
        edited = True

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(2, 2)

        def get_input_embeddings(self):
            return self.table

        get_output_embeddings = get_input_embeddings

        def disabled(self):
            return Off(self)

        def forward(self, input_ids, attention_mask, use_cache):
            p = torch.tensor([0.25, 0.75] if self.edited else [0.5, 0.5])
            return type("Output", (), {"logits": p.log().expand(*input_ids.shape, 2)})

    class Off:
        def __init__(self, coin):
            self.coin = coin

        def __enter__(self):
            self.coin.edited = False

        def __exit__(self, *_):
            self.coin.edited = True

    coin = Coin()
    (drift,) = token_drift(coin, [(0, 1, 1)], coin)
    # KL = 1/2 ln(1/2 / 1/4) + 1/2 ln(1/2 / 3/4); the tokens after the first are 1 and 1.
    assert drift.kl.tolist() == pytest.approx([0.5 * math.log(4 / 3)] * 3, rel=1e-6)
    assert drift.nll[0].tolist() == pytest.approx([math.log(2)] * 2)
    assert drift.nll[1].tolist() == pytest.approx([-math.log(0.75)] * 2)


def test_long_texts_are_cut_into_windows_and_the_limit_holds(tokenizer):
    text = " ".join(SENTENCES * 3)
    ids = tuple(tokenizer(text)["input_ids"])
    rows = unrelated_rows(tokenizer, [text], 10_000, 16)
    assert sum(rows, ()) == ids[: len(ids) - len(ids) % 16 if len(ids) % 16 == 1 else None]
    assert max(map(len, rows)) == 16
    assert sum(map(len, unrelated_rows(tokenizer, [text] * 9, 50, 16))) in (49, 50)
    assert unrelated_rows(tokenizer, ["a"], 100, 64) == []


def test_without_edits_nothing_drifts(model, tokenizer, requests):
    result = evaluate(model, tokenizer, requests, text=SENTENCES, max_new_tokens=2, progress=False)
    assert result["kl"]["neighborhood"] == 0.0
    language = result["language"]
    assert language["kl"] == 0.0 and language["perplexity"]["ratio"] == 1.0
    assert language["unchanged"] == 1.0 and language["fired"] is None


def test_evaluate_gives_and_shows_it(model, tokenizer, requests, hooks):
    result = evaluate(
        model,
        tokenizer,
        requests,
        hooks=hooks,
        text=SENTENCES,
        text_tokens=40,
        fluency_tokens=20,
        cache_prompts=3,
        max_new_tokens=2,
        progress=False,
    )
    alone = measure_language(model, tokenizer, SENTENCES, hooks=hooks, gates=hooks, max_tokens=40)
    assert result["language"] == alone and 0 < alone["tokens"] <= 40
    shown = render_evaluation(result)
    assert f"{alone['perplexity']['ratio']:.5f}" in shown
    assert "bits (3 prompts)" in shown and "KV cache: 100.0 % of 3 prompts" in shown
    drifts = prompt_drift(model, tokenizer, [p for r in requests for p in r.neighborhood], hooks)
    # Three prompts of the first request, one of the third; each request counts once.
    wanted = (sum(drifts[:3]) / 3 + drifts[3]) / 2
    assert result["kl"]["neighborhood"] == pytest.approx(wanted)


def test_no_text_is_refused(model, tokenizer, hooks, requests):
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match="at least two tokens in a row, got none within 1 tokens"):
        evaluate(model, tokenizer, requests, text=SENTENCES, text_tokens=1, progress=False)
    handle.remove()
    assert forwards == []  # refused before anything was measured
    with pytest.raises(ValueError, match="at least two tokens"):
        measure_language(model, tokenizer, ["a"], hooks=hooks)
    with pytest.raises(ValueError, match="no-such"):
        measure_language(model, tokenizer, "no-such.txt", hooks=hooks)


def test_interval_of_a_ratio():
    # r = 6 / 4; deviations 1 - 1.5 = -.5 and 5 - 4.5 = .5; var = 2 / 1 * .5 / 16.
    low, high = ratio_interval([1.0, 5.0], [1, 3])
    half = 12.706204736 * 0.25  # Student, 1 degree of freedom
    assert (low, high) == pytest.approx((1.5 - half, 1.5 + half))
    # Groups of one value: the usual interval of a mean.
    values = [0.1, 0.4, 0.2, 0.9]
    low, high = ratio_interval(values, [1] * 4)
    spread = torch.tensor(values, dtype=torch.float64).std().item() / 2
    assert high - low == pytest.approx(2 * 3.182446305 * spread, rel=2e-3)
    assert ratio_interval([1.0], [3]) is None
    # A divergence of 0.5 on average, but not below 0; what has diverged has no interval.
    assert ratio_interval([0.0, 1.0], [1, 1], lowest=0.0)[0] == 0.0
    assert ratio_interval([0.0, math.nan, 1.0], [1, 1, 1], lowest=0.0) is None


def test_intervals_of_few_texts_hold_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    for groups in (2, 3, 6, 30):
        draws = torch.randn(4000, groups, generator=generator, dtype=torch.float64).tolist()
        bounds = [ratio_interval(values, [1] * groups) for values in draws]
        held = sum(low <= 0 <= high for low, high in bounds) / len(bounds)
        assert held == pytest.approx(0.95, abs=0.012)


def test_texts_of_different_lengths_count_as_fewer():
    assert effective_count([7, 7, 7]) == pytest.approx(3)
    assert effective_count([1000, *[1] * 100]) == pytest.approx(1.21, abs=0.01)


def test_a_model_that_has_diverged_is_measured(model, tokenizer):
    head = torch.nn.Parameter(1e6 * model.lm_head.weight, requires_grad=False)

    class Diverged:
        @contextlib.contextmanager
        def disabled(self):
            own, model.lm_head.weight = model.lm_head.weight, plain
            try:
                yield
            finally:
                model.lm_head.weight = own

    plain, model.lm_head.weight = model.lm_head.weight, head
    try:
        found = measure_language(model, tokenizer, ["Spain has capitals"], hooks=Diverged())
    finally:
        model.lm_head.weight = plain
    assert found["perplexity"]["before"] < math.inf == found["perplexity"]["after"]
