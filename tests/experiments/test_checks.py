"""Bad input is refused in one line, before a folder is made or a system started."""

from __future__ import annotations

import json

import pytest

from benchmarks.experiments import checks, plan
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.systems import configure, known_systems, setting_types
from coachhook import bundled
from coachhook.editing import EditConfig
from coachhook.models import load_model
from coachhook.statistics import Statistics
from tests.experiments.conftest import parse, words


def refused(capsys, argv, out):
    """What the command says of bad input."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    assert not out.exists()
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def test_scores_are_those_of_a_gate(world, tmp_path, capsys):
    out = tmp_path / "new"
    argv = [*words(world, "zscores", out), "--systems", "ours,memit,no-gate"]
    line = refused(capsys, argv, out)
    assert "must have a gate (ours, ours-mlp, paper), got ['memit', 'no-gate']" in line


def test_prompts_that_nobody_could_ask_are_refused(world, tmp_path, capsys):
    facts, out = tmp_path / "facts.jsonl", tmp_path / "new"
    record = {"prompt": "{} is in", "subject": "Lyon", "target_new": "Spain", "target_true": "Gaul"}
    facts.write_text(json.dumps({**record, "neighborhood": ["far " * 300 + "away is"]}))
    argv = words(world, "consecutive", out)
    argv[argv.index(str(world / "facts.jsonl"))] = str(facts)
    line = refused(capsys, argv, out)
    assert "FACTS must hold prompts that the model can be asked, got 1 that are too long" in line
    assert "context window of 128 tokens" in line


def test_a_folder_that_is_not_there_has_no_run(tmp_path, capsys):
    line = refused(capsys, ["run", tmp_path / "new"], tmp_path / "new")
    assert line.startswith("run: FOLDER must be that of a run, got ")


@pytest.mark.parametrize("experiment", plan.DEFAULTS)
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stats", "nosuch"], "--stats must be a folder of `coachhook stats`, got nosuch"),
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--set", "memit.nosuch=1"], "--set memit.NAME must be one of alpha, "),
    ],
)
def test_every_experiment_refuses_it_at_once(world, tmp_path, capsys, experiment, argv, message):
    out = tmp_path / "new"
    line = refused(capsys, [*words(world, experiment, out), *argv], out)
    assert line.startswith(f"{experiment}: {message}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--systems", "ours,magic"], "got ['magic']"),
        (["--batch-sizes", ","], "--batch-sizes must be positive integers"),
        (["--sample", "0"], "--sample must be at least 1, got 0"),
        (["--first", "-1"], "--first must be at least 1, got -1"),
        (["--text-tokens", "0"], "--text-tokens must be at least 1, got 0"),
        (["--evaluation-batch", "0"], "--evaluation-batch must be at least 1, got 0"),
        (["--count", "100000"], "--count must be at most the 12 facts"),
        (["--known", "nosuch"], "nosuch"),
        (["--text", "nosuch"], "nosuch"),
        (["--device", "abacus"], "device must be a torch device"),
        (["--text-tokens", "1"], "--text must hold two tokens in a row"),
    ],
)
def test_what_cannot_be_run_is_refused(world, tmp_path, capsys, argv, message):
    out = tmp_path / "new"
    assert message in refused(capsys, [*words(world, "consecutive", out), *argv], out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ours.nosuch=1", "--set ours.NAME must be one of"),
        ("no-gate.alpha=abc", "--set no-gate.alpha must be a number, got 'abc'"),
        ("ours.alpha=NaN", "--set ours.alpha must be a number, got nan"),
        ("ours.cues=1", "--set ours.cues must be true or false, got 1"),
        ("ours.target_steps=2.5", "--set ours.target_steps must be an integer, got 2.5"),
        ("ours.layers=1", "must be a JSON list, each item an integer, got 1"),
        ("ours.layers=[99]", "got 99"),
        ("ours.ridge=-1", "--set ours: EditConfig: ridge must not be negative, got -1"),
        ("paper.scope=membership", "state_dtype must be 'float64' for the membership scope"),
        ("paper.max_rank=x", "--set paper.max_rank must be an integer or null, got 'x'"),
        ("memit.edit={}", "--set memit.NAME must be one of"),
        ("accumulated.variant=other", "variant must be one of exact, published, got 'other'"),
        ("alphaedit.preset=other", "preset must be one of paper, default, got 'other'"),
        ("fine-tuning.layer=99", "got 99"),
        ("lora.rank=0", "lora: rank must be positive, got 0"),
        ("retrieval.template=x", "template must have exactly one '{}'"),
        ("retrieval.retriever=x", "--set retrieval.NAME must be one of most, template, got"),
        ("grace.value_init=hot", "value_init must be one of"),
        ("mend.layers=[99]", "got 99"),
        ("mend.rank=0", "rank must be at least 1, got 0"),
        ("mend.networks=nosuch", "--set mend.networks must name a file, got 'nosuch'"),
        ("serac.threshold=2", "threshold must lie between 0 and 1"),
    ],
)
def test_a_bad_setting_is_refused(world, tmp_path, capsys, monkeypatch, change, message):
    # At once, so without loading the model.
    monkeypatch.setattr(plan, "open_model", None)
    out = tmp_path / "new"
    assert message in refused(capsys, [*words(world, "single", out), "--set", change], out)


@pytest.mark.parametrize("system", known_systems())
def test_every_setting_may_be_set_to_what_it_is(system):
    model, _ = load_model(bundled.model_path())
    config = configure(system, model, {})
    found = {**vars(getattr(config, "edit", config)), **vars(config), "preset": "paper"}
    names = setting_types(system)
    assert isinstance(config, EditConfig) or not {"train_requests", "retriever"} & names.keys()
    options = {n: list(v) if isinstance(v, tuple) else v for n, v in found.items() if n in names}
    assert options.keys() == names.keys()
    options.pop("networks", None)
    checks._check_types(system, options)
    assert configure(system, model, options) == config


def test_facts_that_are_all_bad_are_refused(world, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "No place for {}"}\n')
    argv = words(world, "single", tmp_path / "new")
    argv[2] = str(tmp_path / "bad.jsonl")
    line = refused(capsys, argv, tmp_path / "new")
    assert line.startswith("single: FACTS must hold a good record, got none in")


def test_a_file_in_the_place_of_the_folder_is_refused(world, tmp_path, capsys):
    out = tmp_path / "file"
    out.write_text("mine")
    assert main(words(world, "single", out)) == 2
    assert "--out must be a folder, got the file" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_statistics_that_do_not_serve_are_refused(world, tmp_path, capsys):
    given = Statistics.load(world / "stats-only" / "statistics")
    last = given.layers[-1]
    other = Statistics({last: given.covariances[last]}, 100, fingerprint=given.fingerprint)
    other.save(tmp_path / "one-layer")
    strange = Statistics(dict(given.covariances), 100, fingerprint="0" * 64)
    strange.save(tmp_path / "strange")
    argv = words(world, "single", tmp_path / "new", "--systems", "retrieval,paper")
    line = refused(capsys, [*argv, "--stats", tmp_path / "one-layer"], tmp_path / "new")
    assert f"that paper edits, got [{last}]" in line
    line = refused(capsys, [*argv, "--stats", tmp_path / "strange"], tmp_path / "new")
    assert "fingerprint must be" in line
    argv = words(world, "single", tmp_path / "new", "--systems", "retrieval,ours-mlp")
    line = refused(capsys, argv, tmp_path / "new")
    assert "--stats must be of key_site 'mlp', as ours-mlp is, got 'down_proj'" in line


@pytest.mark.parametrize("made", [False, True])
def test_a_report_of_no_experiment_is_refused(tmp_path, capsys, made):
    folder = tmp_path / "empty"
    if made:
        folder.mkdir()
    assert main(["report", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"report: DIR must hold an experiment, got {folder} without plan.json")
    assert not list(tmp_path.glob("*/*"))


def test_statistics_are_made_of_the_layers_that_settings_name(world, tmp_path):
    # Without --stats: words() adds those that are there.
    argv = words(world, "consecutive", tmp_path, "--count", 1, "--systems", "memit,grace")
    at = argv.index("--stats")
    args = parse([*argv[:at], *argv[at + 2 :], "--set", "memit.layers=[1,3]", "--tokens", "600"])
    shared = plan.prepare(args, plan.read_inputs(args))
    assert {1, 3} <= set(Statistics.load(shared["statistics"]).layers)
    (tmp_path / "both").mkdir()
    argv = words(
        world, "consecutive", tmp_path / "both", "--count", 1, "--systems", "ours,ours-mlp"
    )
    at = argv.index("--stats")
    args = parse([*argv[:at], *argv[at + 2 :], "--tokens", "600"])
    shared = plan.prepare(args, plan.read_inputs(args))
    sites = [Statistics.load(spec["statistics"]).key_site for spec in plan.specs(args, shared)]
    assert sites == ["down_proj", "mlp"]
    more = parse(words(world, "consecutive", tmp_path, "--count", 1, "--systems", "ours-mlp"))
    with pytest.raises(plan.ExperimentError, match="new folder for ours-mlp, got an experiment"):
        plan.specs(more, {"statistics": "there"})
