"""Layer choice by probing: on a tiny model against plain loops, on the bundled one for sense."""

from __future__ import annotations

import json

import pytest
import torch

from coachhook import bundled
from coachhook.cli import main
from coachhook.cli.suggest import spread
from coachhook.editing import EditConfig, EditRequest
from coachhook.editing.encoding import encode_requests
from coachhook.editing.targets import optimise_targets
from coachhook.evaluation import oracle, suggest_layers
from coachhook.evaluation.layers import _addressed
from coachhook.hooks import attach_hooks
from coachhook.models import describe


@pytest.fixture
def facts():
    return [
        EditRequest("The capital of {} is", "France", "Dutch", paraphrases=["France, whose", "It"]),
        EditRequest("{} speaks", "Ann Art", "Madrid", paraphrases=["So Ann Art speaks"]),
        EditRequest("{} lives in", "Cid", "Spain"),
    ]


def test_probes_follow_their_definitions(model, tokenizer, facts):
    plain = [p.clone() for p in model.parameters()]
    advice = suggest_layers(model, tokenizer, facts, target_steps=6, progress=False)
    assert [p.layer for p in advice.probes] == [0, 1, 2]
    # "It" does not name its subject.
    assert (advice.facts, advice.paraphrases) == (3, 2)
    description = describe(model)
    for probe in advice.probes:
        config = EditConfig.for_model(
            model, layers=[probe.layer], target_steps=6, places=("subject_last",)
        )
        config = config.with_(contexts=config.contexts[:2])
        encoded = encode_requests(tokenizer, facts, config.contexts, 64)
        targets = optimise_targets(model, description, encoded, config, pad_id=0)
        wanted = oracle(model, tokenizer, facts, targets.values, probe.layer)
        assert probe.reliability == pytest.approx(wanted["reliability"])
        assert probe.generality == pytest.approx(wanted["generality"])
        assert probe.converged == sum(targets.converged) / 3
        parts = (probe.reliability, probe.generality, probe.addressed)
        assert probe.score == pytest.approx(sum(parts) / 3)
        assert probe.interval[0] <= probe.reliability <= probe.interval[1]
    best = max(p.score for p in advice.probes)
    good = [p.layer for p in advice.probes if p.score >= best - 0.02]
    assert advice.layer == good[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, model.parameters(), strict=True))


def test_keys_are_addressed_by_their_centred_direction():
    own = torch.tensor([[10.0, 1.0], [10.0, -1.0]])
    keys = torch.tensor([[12.0, 0.5], [9.0, -0.2], [10.0, 0.1]])
    # Around the centre (10, 0) the keys point up, down and up.
    assert _addressed(own, keys, [0, 1, 1], ["a", "b"]) == pytest.approx(2 / 3)
    assert _addressed(own, keys, [0, 1, 0], ["a", "b"]) == 1.0


@pytest.mark.parametrize("key_site", ["down_proj", "mlp"])
def test_keys_are_read_where_they_would_be_edited(model, tokenizer, facts, key_site, monkeypatch):
    widths = []

    def noted(own, keys, owners, subjects):
        widths.append((own.shape[1], keys.shape[1]))
        return _addressed(own, keys, owners, subjects)

    monkeypatch.setattr("coachhook.evaluation.layers._addressed", noted)
    settings = {"target_steps": 2, "key_site": key_site}
    suggest_layers(model, tokenizer, facts, layers=[1], progress=False, **settings)
    assert widths == [(describe(model, key_site).layer(1).in_features,) * 2]


def test_facts_about_one_subject_may_share_its_key(model, tokenizer, facts):
    # A subject at the start of the text has the same key in every prompt.
    first = EditRequest("{} speaks", "Ann Art", "Dutch", paraphrases=["Ann Art says"])
    second = EditRequest("{} lives in", "Ann Art", "Spain", paraphrases=["Ann Art stays at"])
    other = EditRequest("{} lives in", "Cid", "Spain", paraphrases=["Cid stays at"])
    options = {"layers": [0], "target_steps": 1, "progress": False}
    (probe,) = suggest_layers(model, tokenizer, [first, second, other], **options).probes
    assert probe.addressed == 1.0
    (probe,) = suggest_layers(model, tokenizer, [first, second], **options).probes
    assert probe.addressed is None


def test_without_paraphrases_only_reliability_counts(model, tokenizer, facts):
    advice = suggest_layers(
        model, tokenizer, facts[2:], layers=[2, 1, 2], target_steps=2, progress=False
    )
    assert [p.layer for p in advice.probes] == [1, 2]
    assert all(p.generality is None and p.addressed is None for p in advice.probes)
    assert all(p.score == p.reliability for p in advice.probes)


def test_bad_calls(model, tokenizer, facts):
    with pytest.raises(ValueError, match="requests must not be empty"):
        suggest_layers(model, tokenizer, [])
    with pytest.raises(ValueError, match="at least one layer"):
        suggest_layers(model, tokenizer, facts, layers=[])
    with pytest.raises(ValueError, match="from 0 to 2"):
        suggest_layers(model, tokenizer, facts, layers=[9])
    with attach_hooks(model, [1]), pytest.raises(ValueError, match="must have no hooks"):
        suggest_layers(model, tokenizer, facts)


@pytest.fixture
def records(tmp_path):
    step = len(bundled.facts()) // 6
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, bundled.facts()[::step][:6])), encoding="utf-8")
    return path


def test_the_bundled_models_facts_are_found_in_its_low_layers(records, capsys):
    # Its facts are read from the subject before the last blocks: benchmarks/bundled_model.
    argv = ["suggest-layers", str(bundled.model_path()), str(records), "--layers", "0,5"]
    assert main([*argv, "--sample", "4", "--target-steps", "12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    low, high = found["layers"]
    assert (found["layer"], found["facts"], found["paraphrases"]) == (0, 4, 8)
    assert low["reliability"] >= 0.75 and low["generality"] >= 0.5
    assert high["reliability"] <= 0.25
    assert low["score"] > high["score"] + 0.2


def test_the_table_names_the_layer_to_edit(records, capsys):
    argv = ["suggest-layers", str(bundled.model_path()), str(records), "--layers", "1"]
    assert main([*argv, "--sample", "2", "--target-steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "2 facts, 4 paraphrases" in shown
    line = next(line for line in shown.splitlines() if "<- edit here" in line)
    assert line.split()[0] == "1" and "--layers 1" in shown


@pytest.mark.parametrize(
    ("change", "argv", "message"),
    [
        ({"paraphrases": []}, [], "must hold paraphrases"),
        ({}, ["--layers", "9"], "from 0 to 5"),
        ({"subject": "Nobody", "prompt": "The x"}, [], "Nobody"),
    ],
)
def test_bad_input_is_refused(tmp_path, capsys, change, argv, message):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{**bundled.facts()[0], **change}]), encoding="utf-8")
    assert main(["suggest-layers", str(bundled.model_path()), str(path), *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_sample_is_spread_over_the_facts():
    assert spread(47, 24) == [i * 47 // 24 for i in range(24)]
    assert spread(47, 24)[-1] == 45  # not the first half alone
    assert spread(5, 24) == [0, 1, 2, 3, 4]
    assert spread(100, 3) == [0, 33, 66] and spread(0, 3) == []
