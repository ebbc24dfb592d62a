"""What every baseline promises, on a tiny real model."""

from __future__ import annotations

import copy

import pytest
import torch

from coachhook import EditRequest
from coachhook.evaluation import evaluate
from coachhook.evaluation.baselines import BASELINES, BaselineResult, make_baseline
from coachhook.hooks import attach_hooks
from coachhook.models import evaluating
from tests.evaluation.baselines.support import (
    BATCHES,
    SETTINGS,
    logits_of,
    make,
    same,
    statistics_of,
    unchanged,
    whole,
)


@pytest.fixture(scope="module")
def statistics(model, tokenizer):
    return statistics_of(model, tokenizer)


@pytest.fixture
def fresh(model):
    return copy.deepcopy(model)


def test_every_name_has_a_class_of_that_name():
    for name, kind in ((name, BASELINES[name]) for name in BASELINES):
        assert kind.name == name
        assert kind.reference


@pytest.mark.parametrize("key", SETTINGS)
def test_off_on_and_closed(key, fresh, tokenizer, statistics):
    state, plain = whole(fresh), logits_of(fresh, tokenizer)
    baseline = make(fresh, tokenizer, key, statistics)
    assert same(logits_of(fresh, tokenizer), plain)  # nothing is edited yet
    result = baseline.edit(BATCHES[0])
    assert isinstance(result, BaselineResult)
    assert result.seconds > 0
    assert len(result.converged) == len(result.losses) == 2
    edited = logits_of(fresh, tokenizer)
    assert not any(torch.equal(a, b) for a, b in zip(edited[:2], plain[:2], strict=True))
    with baseline.disabled():
        assert same(logits_of(fresh, tokenizer), plain)
        with baseline.disabled():
            pass
        assert same(logits_of(fresh, tokenizer), plain)
        with pytest.raises(RuntimeError, match="must be on"):
            baseline.edit(BATCHES[1])
        with pytest.raises(RuntimeError, match="must be on"):
            baseline.close()
    assert same(logits_of(fresh, tokenizer), edited)
    baseline.edit(BATCHES[1])
    baseline.close()
    assert unchanged(state, whole(fresh))
    assert same(logits_of(fresh, tokenizer), plain)
    baseline.close()
    with pytest.raises(RuntimeError, match="must be open"):
        baseline.edit(BATCHES[0])
    with pytest.raises(RuntimeError, match="must be open"), baseline.disabled():
        pass


class _StopError(Exception):
    pass


def _count_blocks(model, stop_at=None):
    """Counts forwards of the first block; raises at the one numbered ``stop_at``."""
    seen = [0]

    def hook(*_):
        seen[0] += 1
        if seen[0] == stop_at:
            raise _StopError

    return seen, model.transformer.h[0].register_forward_pre_hook(hook)


@pytest.mark.parametrize("key", SETTINGS)
def test_a_batch_broken_off_anywhere_leaves_no_trace(key, fresh, tokenizer, statistics):
    with make(fresh, tokenizer, key, statistics) as baseline:
        baseline.edit(BATCHES[0])
        edited = logits_of(fresh, tokenizer)
        seen, handle = _count_blocks(fresh)
        baseline.edit(BATCHES[1])
        handle.remove()
        both, forwards = logits_of(fresh, tokenizer), seen[0]
    with make(fresh, tokenizer, key, statistics) as baseline:
        baseline.edit(BATCHES[0])
        for stop_at in sorted({1, forwards // 2 + 1, forwards}):
            before = whole(fresh)
            _, handle = _count_blocks(fresh, stop_at)
            with pytest.raises(_StopError):
                baseline.edit(BATCHES[1])
            handle.remove()
            assert unchanged(before, whole(fresh))
            assert same(logits_of(fresh, tokenizer), edited)
        # Nor in what the baseline remembers: the batch then comes out as if nothing had happened.
        baseline.edit(BATCHES[1])
        assert same(logits_of(fresh, tokenizer), both)


@pytest.mark.parametrize("key", SETTINGS)
def test_training_mode_gradients_and_inference_mode(key, fresh, tokenizer, statistics):
    fresh.train()
    fresh.transformer.h[1].eval()  # as of a model whose lower part is frozen
    for parameter in fresh.parameters():
        parameter.requires_grad_(True)
    state = whole(fresh)
    modes = {path: m.training for path, m in fresh.named_modules()}
    with torch.inference_mode():
        baseline = make(fresh, tokenizer, key, statistics)
    with baseline:
        with torch.inference_mode():
            baseline.edit(BATCHES[0])
            with evaluating(fresh):
                edited = logits_of(fresh, tokenizer)
                with baseline.disabled():
                    assert not same(logits_of(fresh, tokenizer), edited)
        with evaluating(fresh):
            assert same(logits_of(fresh, tokenizer), edited)
        baseline.edit(BATCHES[1])
        # LoRA put modules in; all others are in the mode they were in.
        now = {path: m.training for path, m in fresh.named_modules()}
        assert {path: now[path] for path in modes} == modes
        assert all(p.grad is None for p in fresh.parameters())
    assert unchanged(state, whole(fresh))


@pytest.mark.parametrize("key", ["memit", "alphaedit", "fine-tuning", "lora", "retrieval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, key, fresh, tokenizer):
    fresh.to(dtype)
    state, plain = whole(fresh), logits_of(fresh, tokenizer)
    with make(fresh, tokenizer, key, statistics_of(fresh, tokenizer)) as baseline:
        result = baseline.edit(BATCHES[0])
        assert all(0 < loss < 30 for loss in result.losses)
        edited = logits_of(fresh, tokenizer)
        assert edited[0].dtype == dtype
        assert not torch.equal(edited[0], plain[0])
    assert unchanged(state, whole(fresh))


@pytest.mark.parametrize("steps", [1, 2])
def test_training_that_float16_cannot_hold_leaves_no_trace(steps, fresh, tokenizer):
    fresh.half()  # in which Adam's epsilon is 0
    state, plain = whole(fresh), logits_of(fresh, tokenizer)
    with make(fresh, tokenizer, "fine-tuning", None, steps=steps) as baseline:
        with pytest.raises(ValueError, match="must be finite, got NaN .* in float32"):
            baseline.edit(BATCHES[0])
        assert same(logits_of(fresh, tokenizer), plain)
    assert unchanged(state, whole(fresh))


@pytest.mark.parametrize("key", ["memit", "lora", "retrieval"])
def test_evaluate_takes_a_baseline(key, fresh, tokenizer, statistics, requests):
    plain = evaluate(fresh, tokenizer, requests, progress=False, generate=False)
    with make(fresh, tokenizer, key, statistics) as baseline:
        baseline.edit(requests)
        result = evaluate(
            fresh, tokenizer, requests, hooks=baseline, progress=False, generate=False
        )
    assert result["teacher_forced"]["before"] == plain["teacher_forced"]["after"]
    assert result["gate"] == {"fired_unrelated": None, "fired_edited": None}
    # No neighbour names an edited subject, so that no fact is put before it.
    assert (result["kl"]["neighborhood"] > 0) == (key != "retrieval")
    assert key != "retrieval" or result["probability"]["after"] != plain["probability"]["after"]


def test_requests_are_checked_before_anything_changes(fresh, tokenizer, statistics):
    state = whole(fresh)
    for key in SETTINGS:
        with make(fresh, tokenizer, key, statistics) as baseline:
            with pytest.raises(TypeError, match="got one EditRequest"):
                baseline.edit(BATCHES[0][0])
            with pytest.raises(TypeError, match="got a dict in it"):
                baseline.edit([{"prompt": "x"}])
            with pytest.raises(ValueError, match="at least one request"):
                baseline.edit([])
            long = EditRequest("{} " + "and so on " * 40, "Cid", "Paris")
            with pytest.raises(ValueError, match="context window of 6"):
                baseline.edit([BATCHES[0][0], long])
        assert unchanged(state, whole(fresh)), key


BAD = [
    ("memit", {"preset": "ours"}, ValueError, "preset must be one of paper, default"),
    ("memit", {"covariance_weight": 0}, ValueError, "covariance_weight must be positive"),
    ("memit", {"layers": [7]}, ValueError, "from 0 to 2"),
    ("memit", {"speed": 1}, TypeError, "speed"),
    ("accumulated", {"variant": "paper"}, ValueError, "variant must be one of exact, published"),
    ("alphaedit", {"threshold": 0}, ValueError, "threshold must be positive"),
    ("alphaedit", {"threshold": 1e-30}, ValueError, "no update is possible without a null space"),
    ("alphaedit", {"ridge_weight": -1}, ValueError, "ridge_weight must be positive"),
    ("fine-tuning", {"objective": "all"}, ValueError, "objective must be one of"),
    ("fine-tuning", {"norm_constraint": 0}, ValueError, "norm_constraint must be positive or None"),
    ("fine-tuning", {"steps": 0}, ValueError, "steps must be positive"),
    ("fine-tuning", {"layer": 9}, ValueError, "from 0 to 2"),
    ("lora", {"rank": 0}, ValueError, "rank must be positive"),
    ("lora", {"stop": -1}, ValueError, "stop must not be negative"),
    ("lora", {"modules": "c_attn"}, ValueError, "modules must be a list"),
    ("lora", {"modules": ["nothing"]}, ValueError, "nothing"),
    ("lora", {"rank": 2.5}, ValueError, "rank must be an integer"),
    # The embedding is adapted before the norm is found to be unsuitable.
    ("lora", {"modules": ["wpe", "ln_1"]}, ValueError, "LayerNorm"),
    ("retrieval", {"template": "Fact."}, ValueError, "exactly one '{}'"),
    ("retrieval", {"most": 0}, ValueError, "most must be at least 1"),
    ("elsewhere", {}, ValueError, "name must be one of memit, accumulated"),
]


@pytest.mark.parametrize(("name", "options", "kind", "message"), BAD)
def test_bad_settings(name, options, kind, message, fresh, tokenizer):
    state = whole(fresh)
    # A full covariance: an all but vanishing threshold finds no null space in it.
    eye = torch.eye(128, dtype=torch.float64)
    full = type(statistics_of(fresh, tokenizer)).from_covariances({0: eye, 1: eye}, tokens=9)
    options = {"layers": [0, 1], **options} if name in ("memit", "alphaedit") else options
    with pytest.raises(kind, match=message):
        make_baseline(name, fresh, tokenizer, statistics=full, **options)
    assert unchanged(state, whole(fresh))


def test_what_a_baseline_is_put_on_is_checked(fresh, tokenizer, statistics):
    with pytest.raises(ValueError, match="statistics must be given"):
        make_baseline("memit", fresh, tokenizer)
    with pytest.raises(TypeError, match="config must be a RetrievalConfig, got FineTuningConfig"):
        BASELINES["retrieval"](fresh, tokenizer, config=BASELINES["fine-tuning"].configure(fresh))
    with attach_hooks(fresh, [0]), pytest.raises(ValueError, match="detach"):
        make_baseline("retrieval", fresh, tokenizer)
    with pytest.raises(ValueError, match="layer must be one of"):
        missing = statistics_of(fresh, tokenizer, [0])
        make_baseline("memit", fresh, tokenizer, statistics=missing, layers=[0, 1], ridge=0.1)
    fresh.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        make_baseline("retrieval", fresh, tokenizer)
