"""Models of other builds: a norm or a scale between MLP and residual, blocks with experts."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers

from coachhook import EditConfig, Editor, collect_statistics
from coachhook.bundled import texts
from coachhook.editing.encoding import encode_requests
from coachhook.editing.problem import Earlier
from coachhook.editing.reading import answered
from coachhook.editing.targets import optimise_targets
from coachhook.evaluation import oracle
from coachhook.models import describe, get_submodule
from tests.models.families import EXPERTS, INDIRECT, tiny

# Outputs alone and in a tuple, a first block without experts, a norm behind them.
OTHERS = [*INDIRECT, "mixtral", "gpt_oss", "deepseek_v3", "flex_olmo"]
# One of each kind.
WRITTEN = ("gemma3", "olmo2", "granite-scaled", "mixtral", "gpt_oss", "deepseek_v3", "flex_olmo")
CONTEXTS = ("{}", "Some say that {}", "It was in the paper of today: {}")
PLAIN = dict(target_stop=0.0, target_progress=0.0, target_kl=0.0, target_weight_decay=0.0)


def model_of(family, dtype=torch.float64, **changes):
    """Knows the tokens of the bundled model's tokenizer; sees the whole of every prompt."""
    if not hasattr(transformers, (INDIRECT | EXPERTS)[family][0]):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    sizes = dict(vocab_size=1792, max_position_embeddings=128, sliding_window=128)
    model = tiny(family, lambda arguments: arguments.update(sizes | changes)).to(dtype)
    if family in EXPERTS and dtype == torch.float64:
        if not hasattr(model, "set_experts_implementation"):
            pytest.skip(f"experts know no float64 in transformers {transformers.__version__}")
        model.set_experts_implementation("eager")
    return model


def config_of(model, **changes):
    options = dict(layers=[1], places=("subject_last",), contexts=CONTEXTS, rewordings=0) | changes
    return EditConfig.for_model(model, **options)


@cache
def down_of(model, layer):
    return get_submodule(model, describe(model).layers[layer].path)


@contextmanager
def answering(model, layer, change):
    """``change`` applied to the outputs of a down-projection, or of a block's experts."""

    def changed(_module, _args, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = down_of(model, layer).register_forward_hook(changed)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def losses(model, request, layer, change):
    """``-log P(target)`` of each context, by the whole network, the subject's token changed."""
    found = []
    for prompt in request.contexts:

        def at_subject(output, column=prompt.lookup):
            output = output.clone()
            output[0, column] = change(output[0, column])
            return output

        with answering(model, layer, at_subject):
            logits = model(torch.tensor([prompt.ids + request.target])).logits[0]
        chosen = logits.double().log_softmax(-1)[len(prompt.ids) - 1 : -1]
        found.append(-chosen[range(len(request.target)), request.target].mean())
    return torch.stack(found)


@pytest.mark.parametrize("family", OTHERS)
def test_losses_are_those_of_the_model_with_the_corrections_in(bundled, requests, family):
    model = model_of(family)
    config = config_of(model, target_steps=6, **PLAIN)
    batch = encode_requests(bundled[1], requests[:4], CONTEXTS, None)
    found = optimise_targets(model, describe(model), batch, config, pad_id=0)
    for i, request in enumerate(batch):
        before = losses(model, request, 1, lambda own: own).mean()
        after = losses(model, request, 1, lambda own, i=i: own + found.deltas[i, 0]).mean()
        assert found.losses[i] == pytest.approx(float(after), rel=1e-5)
        assert after < before - 0.05
        if describe(model).layers[1].adds_directly:
            continue
        # v* is an absolute output, in the bare prompt.
        written = losses(model, request, 1, lambda _, i=i: found.values[:, i])[0]
        added = losses(model, request, 1, lambda own, i=i: own + found.deltas[i, 0])[0]
        torch.testing.assert_close(written, added, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma3", "granite-scaled"])
def test_a_correction_takes_the_place_of_an_earlier_one(bundled, requests, family):
    """Of one that is said in these prompts, and that the new one starts from."""
    model = model_of(family)
    config = config_of(model, target_steps=1, **PLAIN)
    (request,) = encode_requests(bundled[1], requests[:1], CONTEXTS, None)
    value = torch.randn(32, generator=torch.Generator().manual_seed(0)).double()
    known = {("subject_last", 0): Earlier(value, value.expand(len(CONTEXTS) + 1, -1))}
    with answering(model, 1, lambda output: output + value):
        found = optimise_targets(
            model, describe(model), [request], config, pad_id=0, earlier=[known]
        )
        # One forward, no step: the loss is that of the correction it starts from.
        torch.testing.assert_close(found.deltas[0, 0], value)
        same = losses(model, request, 1, lambda own: own)
        assert found.losses[0] == pytest.approx(float(same.mean()), rel=1e-5)
        config = config.with_(target_steps=5)
        found = optimise_targets(
            model, describe(model), [request], config, pad_id=0, earlier=[known]
        )
        change = losses(model, request, 1, lambda own: own - value + found.deltas[0, 0])
        assert found.losses[0] == pytest.approx(float(change.mean()), rel=1e-5)
        assert found.losses[0] < float(same.mean()) - 0.1


def test_facts_about_one_subject_share_a_correction(bundled, requests):
    model = model_of("gemma3")
    config = config_of(model, target_steps=6, **PLAIN)
    (first,) = encode_requests(bundled[1], requests[:1], CONTEXTS, None)
    (other,) = encode_requests(bundled[1], requests[1:2], CONTEXTS, None)
    second = replace(first, target=other.target)
    found = optimise_targets(model, describe(model), [first, second], config, pad_id=0, ties=[0, 0])
    assert torch.equal(found.deltas[0], found.deltas[1])
    for i, request in enumerate((first, second)):
        after = losses(model, request, 1, lambda own: own + found.deltas[0, 0])
        assert found.losses[i] == pytest.approx(float(after.mean()), rel=1e-5)


def test_a_scale_in_between_is_a_scale_of_the_weights(bundled, requests):
    """The same model written in both ways has the same targets, steps and losses."""
    scaled, plain = model_of("granite-scaled"), model_of("granite-scaled", residual_multiplier=1.0)
    with torch.no_grad():
        for block, other in zip(scaled.model.layers, plain.model.layers, strict=True):
            other.load_state_dict(block.state_dict())
            other.mlp.down_proj.weight *= 0.5
            other.self_attn.o_proj.weight *= 0.5
    batch = encode_requests(bundled[1], requests[:4], CONTEXTS, None)
    ids = torch.tensor([batch[0].contexts[0].ids])
    torch.testing.assert_close(scaled(ids).logits, plain(ids).logits)
    assert describe(plain).layers[1].adds_directly and not describe(scaled).layers[1].adds_directly
    found = [
        optimise_targets(
            model, describe(model), batch, config_of(model, target_progress=0.0), pad_id=0
        )
        for model in (scaled, plain)
    ]
    assert found[0].steps == found[1].steps
    torch.testing.assert_close(found[0].deltas * 0.5, found[1].deltas, rtol=1e-6, atol=1e-6)
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-6)


@pytest.fixture(scope="module")
def some_texts():
    return texts()[:1000]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in WRITTEN),
        *((family, torch.bfloat16) for family in ("gemma3", "gpt_oss", "deepseek_v3")),
    ],
)
def test_edits_write_facts_and_are_taken_back(
    bundled, some_texts, requests, family, dtype, tmp_path
):
    tokenizer = bundled[1]
    model = model_of(family, dtype)
    statistics = collect_statistics(
        model, tokenizer, some_texts, layers=[0, 1], max_tokens=4_000, progress=False
    )
    # A narrow layer with random weights has no room for many keys.
    config = EditConfig.for_model(model, contexts=("{}",), rewordings=0)
    assert config.layers == [0]
    ids = torch.tensor([[5, 9, 20, 31, 7]])
    plain = model(ids).logits
    batch = encode_requests(tokenizer, requests[:5], ("{}",), None)
    asked = [(request.contexts[0].ids, request.target) for request in batch]
    assert not any(answered(model, asked))
    editor = Editor(model, tokenizer, statistics=statistics, config=config)
    result = editor.edit(requests[:5])
    assert sum(result.converged) >= 2 and sum(answered(model, asked)) >= 2
    editor.edit([replace(requests[0], target_new=requests[1].target_new)])
    editor.save(tmp_path / "edits")
    wanted = [model(torch.tensor([prompt])).logits for prompt, _ in asked]
    editor.detach()
    assert torch.equal(model(ids).logits, plain)
    editor = Editor.load(model, tokenizer, tmp_path / "edits")
    for (prompt, _), logits in zip(asked, wanted, strict=True):
        torch.testing.assert_close(model(torch.tensor([prompt])).logits, logits)
    for number in (1, 2):
        editor.revert(number)
    assert torch.equal(model(ids).logits, plain)
    editor.detach()


def test_the_oracle_writes_targets_where_they_were_found(bundled, requests):
    model = model_of("gemma3", torch.float32)
    # "Velmora" -> "Velmora Everfell": the subject is all there is to attend to.
    some = [replace(request, prompt="{}", paraphrases=()) for request in requests]
    batch = encode_requests(bundled[1], some, ("{}",), None)
    options = dict(contexts=("{}",), target_ends_word=False)
    found = optimise_targets(model, describe(model), batch, config_of(model, **options), pad_id=0)
    assert all(len(request.target) == 1 for request in batch) and sum(found.converged) >= 2
    reached = oracle(model, bundled[1], some, found.values, 1)
    assert reached["reliability"] == pytest.approx(sum(found.converged) / len(some))


def test_such_layers_are_edited_one_at_a_time():
    model = model_of("gemma2", num_hidden_layers=6)
    assert EditConfig.for_model(model).layers == [0]
    assert len(EditConfig.paper(model).layers) == 1
    for build in (EditConfig.for_model, EditConfig.paper):
        with pytest.raises(ValueError, match=r"layers must be one layer, got \[0, 2\]"):
            build(model, layers=[0, 2])
