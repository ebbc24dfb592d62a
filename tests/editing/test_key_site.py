"""Hooks over whole MLPs: statistics, edits, folders and commands with ``key_site="mlp"``."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import coachhook as ch
from coachhook import bundled as world
from coachhook.cli import main
from coachhook.editing import load_state
from coachhook.errors import FormatError
from coachhook.evaluation import evaluate
from coachhook.evaluation.baselines import BASELINES
from coachhook.integrations import export_edits
from coachhook.statistics import Statistics


@pytest.fixture(scope="module")
def narrow(bundled):
    """Statistics of what the MLPs of the bundled model read."""
    model, tokenizer, _ = bundled
    return ch.collect_statistics(
        model, tokenizer, world.texts(), layers=[0, 1], max_tokens=20_000, progress=False,
        key_site="mlp",
    )  # fmt: skip


@pytest.fixture
def make(bundled, narrow):
    """Makes editors over the MLPs of fresh copies of the bundled model."""
    made = []

    def editor(build=None, **overrides):
        model, tokenizer, _ = bundled
        model = copy.deepcopy(model)
        config = None
        if overrides or build is not None:
            build = build or ch.EditConfig.for_model
            config = build(model, key_site="mlp", **overrides)
        made.append(ch.Editor(model, tokenizer, statistics=narrow, config=config))
        return made[-1], model, tokenizer

    yield editor
    for one in made:
        one.detach()


def logits(model, tokenizer, requests):
    batch = tokenizer([r.text for r in requests], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**batch).logits


def test_statistics_are_those_of_what_the_mlp_reads(bundled, tmp_path):
    model, tokenizer, _ = bundled
    texts = world.texts()[:20]
    statistics = ch.collect_statistics(
        model, tokenizer, texts, layers=[1], progress=False, key_site="mlp"
    )
    keys = []
    handle = model.transformer.h[1].mlp.register_forward_pre_hook(
        lambda _m, args: keys.append(args[0][0].double())
    )
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    read = torch.cat(keys)
    assert statistics.tokens == len(read)
    wanted = read.T @ read / len(read)
    torch.testing.assert_close(statistics.covariances[1], wanted, rtol=1e-5, atol=1e-5)
    assert statistics.samples[1].shape == (len(read), model.config.hidden_size)
    statistics.save(tmp_path / "stats")
    loaded = Statistics.load(tmp_path / "stats")
    assert loaded.key_site == "mlp"
    loaded.check(model)
    given = Statistics.from_covariances({1: wanted}, len(read), key_site="mlp")
    given.check(model)
    with pytest.raises(ValueError, match=r"must be \[768, 768\] for this model"):
        Statistics.from_covariances({1: wanted}, len(read)).check(model)
    with pytest.raises(ValueError, match="key_site must be one of down_proj, mlp, got 'norm'"):
        Statistics.from_covariances({1: wanted}, len(read), key_site="norm")


def test_folders_of_before_are_of_down_projections(narrow, tmp_path):
    narrow.save(tmp_path / "stats")
    file = tmp_path / "stats" / "manifest.json"
    content = json.loads(file.read_text())
    for change, wanted in (({}, "mlp"), ({"key_site": None}, "down_proj"), ({"key_site": "x"}, "")):
        manifest = {k: v for k, v in (content | change).items() if v is not None}
        del manifest["checksum"]
        file.write_text(json.dumps(manifest))
        if wanted:
            assert Statistics.load(tmp_path / "stats").key_site == wanted
    with pytest.raises(FormatError, match="key_site of down_proj, mlp, got 'x'"):
        Statistics.load(tmp_path / "stats")
    record = ch.EditConfig([0], key_site="mlp").to_dict()
    assert ch.EditConfig.from_dict(record).key_site == record.pop("key_site") == "mlp"
    assert ch.EditConfig.from_dict(record).key_site == "down_proj"


def test_facts_are_written_taken_back_and_served(make, requests, tmp_path):
    requests = requests[:8]
    editor, model, tokenizer = make()
    d = model.config.hidden_size
    assert editor.config.key_site == "mlp", "that of the statistics"
    plain = logits(model, tokenizer, requests)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    half = len(requests) // 2
    assert all(editor.edit(requests[:half]).converged)
    first = logits(model, tokenizer, requests)
    assert all(editor.edit(requests[half:]).converged)
    found = evaluate(model, tokenizer, requests, hooks=editor.hooks, progress=False)
    edited = found["teacher_forced"]["after"]
    assert edited["reliability"] == 1.0 and edited["generality"] > 0.9 and edited["locality"] > 0.9
    assert found["generated"]["after"]["reliability"] == 1.0
    layer = editor.config.layers[0]
    assert editor.hooks[layer].delta().shape == (d, d)
    editor.save(tmp_path / "edits")
    both = logits(model, tokenizer, requests)
    editor.revert(2)
    torch.testing.assert_close(logits(model, tokenizer, requests), first, rtol=1e-4, atol=1e-4)
    editor.detach()
    assert torch.equal(logits(model, tokenizer, requests), plain)
    after = model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in weights.items())
    with ch.attach(model, tmp_path / "edits"):
        assert torch.equal(logits(model, tokenizer, requests), both)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled, tokenizer, requests), both)
    again = ch.Editor.load(model, tokenizer, tmp_path / "edits")
    assert torch.equal(logits(model, tokenizer, requests), both)
    again.revert(1)
    again.detach()


@pytest.mark.parametrize("scope", ["sequence", "population"])
def test_gates_by_norms_and_several_layers(make, requests, scope):
    editor, model, tokenizer = make(
        ch.EditConfig.paper, layers=[0, 1], scope=scope, state_dtype="float64",
        covariance_weight=15.0, include_padding=False,
    )  # fmt: skip
    requests = requests[:5]
    editor.edit(requests)
    found = evaluate(model, tokenizer, requests, hooks=editor.hooks, progress=False, generate=False)
    assert found["teacher_forced"]["before"]["reliability"] == 0
    assert found["teacher_forced"]["after"]["reliability"] >= 0.5
    assert sorted(editor.hooks) == [0, 1]


def test_settings_that_do_not_go_together_are_refused(make, bundled, narrow, requests, tmp_path):
    model, tokenizer, wide = bundled
    for config, statistics, wanted in (
        (ch.EditConfig.for_model(model), narrow, "'down_proj', that of config, got 'mlp'"),
        (ch.EditConfig.for_model(model, key_site="mlp"), wide, "'mlp', that of config, got 'down"),
    ):
        with pytest.raises(ValueError, match=f"statistics must be of key_site {wanted}"):
            ch.Editor(model, tokenizer, statistics=statistics, config=config)
    with pytest.raises(ValueError, match="must have a plain weight for state_dtype 'float32'"):
        make(ch.EditConfig.paper, layers=[0])
    with pytest.raises(ValueError, match="key_site must be one of down_proj, mlp, got 'norm'"):
        ch.EditConfig([0], key_site="norm")
    memit = BASELINES["memit"]
    with pytest.raises(ValueError, match="memit: statistics must be of key_site 'down_proj'"):
        memit(model, tokenizer, statistics=narrow)
    with pytest.raises(ValueError, match="memit: config.edit.key_site must be 'down_proj'"):
        memit(
            model, tokenizer, statistics=wide, config=memit.configure(
                model, preset="default", key_site="mlp"
            ),
        )  # fmt: skip
    editor, other, _ = make()
    editor.edit(requests[:2])
    editor.save(tmp_path / "whole")
    editor.detach()
    with pytest.raises(ValueError, match="nor have .* whole MLPs that edits of key_site 'mlp'"):
        export_edits(other, tokenizer, tmp_path / "whole", tmp_path / "out")
    usual = ch.Editor(other, tokenizer, statistics=wide)
    usual.edit(requests[:2])
    usual.save(tmp_path / "down")
    usual.detach()
    with ch.attach(other, tmp_path / "down") as handle:
        before = logits(other, tokenizer, requests)
        with pytest.raises(
            ValueError, match=r"layers \[0\] at down_proj, got \[0\] at mlp; detach"
        ):
            handle.swap(tmp_path / "whole")
        assert torch.equal(logits(other, tokenizer, requests), before)


def test_the_commands(tmp_path, capsys):
    text, facts = tmp_path / "text.txt", tmp_path / "facts.jsonl"
    text.write_text("\n".join(world.texts()[:800]), encoding="utf-8")
    facts.write_text("\n".join(map(json.dumps, world.facts()[::200])), encoding="utf-8")
    stats, edits, model = tmp_path / "stats", tmp_path / "edits", world.model_path()

    def call(*argv):
        return main([str(a) for a in argv])

    measure = ["stats", model, "--text", text, "--out", stats, "--key-site", "mlp", "--layers", "0"]
    assert call(*measure, "--json") == 0
    assert json.loads(capsys.readouterr().out)["key_site"] == "mlp"
    assert call("inspect", stats) == 0
    assert "keys are inputs of whole MLPs" in capsys.readouterr().out
    assert call("edit", model, facts, "--stats", stats, "--out", edits) == 0
    assert load_state(edits).config.key_site == "mlp"
    capsys.readouterr()
    # Of the folder's own preset nothing differs; the site is that of the folder.
    assert call("edit", model, facts, "--out", edits, "--resume", "--preset", "default") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert call("eval", model, facts, "--edits", edits, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    export = ["export", edits, "--model", model, "--out", tmp_path / "merged"]
    assert found["teacher_forced"]["after"]["reliability"] == 1.0
    assert call(*export, "--format", "merged") == 2
    assert "the whole MLPs that edits of key_site 'mlp' lie over" in capsys.readouterr().err
