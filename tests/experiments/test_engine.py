"""The engine on the bundled model: a killed run goes on, and every number has its source."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import shutil
import signal
import time

import pytest
import torch

from benchmarks.experiments import measure, plan, tables, worker
from benchmarks.experiments.__main__ import build_parser, main
from benchmarks.experiments.facts import (
    gather,
    load_written,
    unrelated,
    write_facts,
    write_passages,
)
from coachhook import bundled
from coachhook.editing import EditConfig, Editor, EditRequest
from coachhook.editing.folder import load_state
from coachhook.evaluation import evaluate
from coachhook.models import load_model
from coachhook.statistics import Statistics, read_texts
from tests import processes
from tests.experiments.conftest import parse, run, words

COUNT, BATCH, STEPS = 5, 2, 8
CONSECUTIVE = (
    "--count",
    COUNT,
    "--batch-sizes",
    BATCH,
    "--checkpoints",
    "2,3",
    "--systems",
    "ours",
    "--set",
    f"ours.target_steps={STEPS}",
)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def killed(world, tmp_path_factory):
    """A run killed after its first batch, and the experiment finished by its command."""
    out = tmp_path_factory.mktemp("killed") / "out"
    argv = words(world, "consecutive", out, *CONSECUTIVE, "--save-every", 0)
    args = parse(argv)
    out.mkdir()
    (spec,) = plan.specs(args, plan.prepare(args, plan.read_inputs(args)))
    folder = plan.run_folder(out, spec)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    process = processes.start("-m benchmarks.experiments", "run", folder)
    while process.exitcode is None and not (folder / "state" / "manifest.json").is_file():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (folder / "final.json").exists()
    before = len(lines(folder / "edits.jsonl"))
    said, printed = io.TextIOWrapper(io.BytesIO(), write_through=True), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        status = main(argv)
    messages = said.buffer.getvalue().decode()
    assert status == 0, messages
    return out, before, messages, printed.getvalue()


def test_an_interrupted_experiment_says_how_to_go_on_and_ends_its_run(world, tmp_path):
    argv = [str(w) for w in words(world, "consecutive", tmp_path / "out", *CONSECUTIVE)]
    # What is started in the background may have been told to ignore the signal.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = "import sys; from benchmarks.experiments.__main__ import main; sys.exit(main())"
    messages = tmp_path / "said"
    process = processes.start(f"{heed}; {start}", *argv, err=messages)
    # Printed by the run itself.
    while process.exitcode is None and not (messages.exists() and "ours: " in messages.read_text()):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    said = messages.read_text()
    assert process.exitcode == 130
    assert "Traceback" not in said
    assert said.endswith(f"is in {tmp_path / 'out'}; give the same command again to go on\n")
    # Nobody holds the folder of the run any longer.
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    with plan.locked(folder):
        pass


def test_a_killed_run_goes_on_where_it_was(killed):
    out, before, messages, printed = killed
    assert 1 <= before <= 3
    assert "ours: goes on after" in messages
    log = lines(out / "runs" / f"ours-{BATCH}" / "edits.jsonl")
    assert [line["edits"] for line in log] == [2, 4, 5]
    assert [line["facts"] for line in log] == [2, 2, 1]
    assert all(line["seconds"] > 0 and line["cpu_seconds"] > 0 for line in log)
    assert printed.strip() == str(out / "report.html")


def test_and_ends_where_one_without_a_kill_does(killed, world, tmp_path):
    out, *_ = killed
    model, tokenizer = load_model(bundled.model_path(), dtype="float32")
    statistics = Statistics.load(world / "stats-only" / "statistics")
    requests = load_written(out / "facts.jsonl")
    config = EditConfig.for_model(model, target_steps=STEPS)
    editor = Editor(model, tokenizer, statistics=statistics, config=config)
    for start in range(0, COUNT, BATCH):
        editor.edit(requests[start : start + BATCH])
    editor.save(tmp_path / "whole")
    whole = load_state(tmp_path / "whole")
    state = load_state(out / "runs" / f"ours-{BATCH}" / "state")
    assert state.num_requests == COUNT and list(state.batches) == list(whole.batches)
    for layer in config.layers:
        found, wanted = (s.layers[layer].memory.delta() for s in (state, whole))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    result = evaluate(model, tokenizer, requests, hooks=editor.hooks, progress=False)
    final = json.loads((out / "runs" / f"ours-{BATCH}" / "final.json").read_text())
    for family in ("teacher_forced", "generated", "contained", "probability"):
        assert final["all"][family]["after"] == pytest.approx(result[family]["after"])
    editor.detach()


def test_checkpoints_hold_all_facts_so_far_and_the_first(killed):
    out, *_ = killed
    points = lines(out / "runs" / f"ours-{BATCH}" / "checkpoints.jsonl")
    # The checkpoint 3 lies within the second batch.
    assert [p["edits"] for p in points] == [2, 4]
    rows = list(csv.DictReader((out / "checkpoints.csv").open()))
    assert [int(r["edits"]) for r in rows] == [2, 4, 5]
    assert [int(r["first_facts"]) for r in rows] == [2, 4, 5]
    assert all(0 <= float(r["first_tf_reliability"]) <= 1 for r in rows)
    assert {r["system"] for r in rows} == {"ours"}


def test_the_results_have_every_column(killed):
    out, *_ = killed
    (row,) = csv.DictReader((out / "results.csv").open())
    for column in (
        "tf_reliability", "tf_reliability_low", "tf_reliability_high", "tf_mean",
        "gen_generality", "cont_reliability", "prob_score", "kl_neighborhood", "ppl_ratio",
        "ppl_ratio_low", "kl_text", "text_fired", "entropy_after", "cache_same",
        "oracle_reliability", "share_generality", "edits_per_second", "edits_per_cpu_second",
        "peak_mib", "gate_fired_unrelated",
    ):  # fmt: skip
        assert float(row[column]) == float(row[column]), column
    # The statistics were given, so nobody knows what they cost.
    assert row["statistics_seconds"] == "" and row["edits_per_second_with_preparation"] == ""
    assert int(row["edits"]) == COUNT and row["error"] == ""
    assert lines(out / "results.jsonl")[0]["system"] == "ours"
    low, mid, high = (float(row[f"tf_reliability{s}"]) for s in ("_low", "", "_high"))
    assert low <= mid <= high


def test_a_line_that_a_kill_cut_short_is_dropped_and_written_again(killed, tmp_path):
    out, *_ = killed
    folder = tmp_path / "run"
    shutil.copytree(out / "runs" / f"ours-{BATCH}", folder)
    log = folder / "edits.jsonl"
    text = log.read_text()
    log.write_text(text[:-20])
    kept = plan.read_run(folder)["edits"]
    assert [line["edits"] for line in kept] == [2, 4]
    begun = worker.Run(folder)
    begun.add("edits.jsonl", json.loads(text.splitlines()[-1]))
    assert log.read_text() == text
    begun.add("new.jsonl", {"a": 1})
    assert begun.lines("new.jsonl") == [{"a": 1}]


_ON_A_FULL_DISK = """
import json, resource, sys
from pathlib import Path
from benchmarks.experiments import plan
spec = json.loads(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # as a disk with 100 bytes left
try:
    plan.run_all(Path(sys.argv[1]), [spec])
except OSError as error:
    sys.exit(error.errno)
"""


def test_a_spec_outlives_a_disk_that_is_full(killed, world, tmp_path):
    out, *_ = killed
    shutil.copytree(out, tmp_path / "out")
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    spec = json.loads((folder / "spec.json").read_text())
    assert processes.run(_ON_A_FULL_DISK, tmp_path / "out", json.dumps(spec)) == errno.EFBIG
    assert plan.read_run(folder)["spec"] == spec


def test_a_model_that_diverged_leaves_rows_that_every_reader_takes(tmp_path):
    rows = [{"system": "mend", "ppl_ratio": math.inf, "kl_text": math.nan, "edits": 3}]
    tables.write(tmp_path / "results.csv", rows)
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert line == '{"system": "mend", "ppl_ratio": null, "kl_text": null, "edits": 3}'
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert (row["ppl_ratio"], row["kl_text"]) == ("inf", "nan")


def test_a_report_that_cannot_be_written_is_said(killed, tmp_path, capsys):
    out, *_ = killed
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "results.csv").unlink()
    (tmp_path / "out" / "results.csv").mkdir()
    assert main(["report", str(tmp_path / "out")]) == 2
    assert "results.csv" in capsys.readouterr().err


def test_work_that_a_disk_ends_is_a_failure(killed, world, tmp_path, capsys):
    out, *_ = killed
    argv = words(world, "consecutive", out, *CONSECUTIVE)
    page, kept = out / "report.html", tmp_path / "report.html"
    page.rename(kept)
    page.mkdir()  # cannot be written
    assert main(argv) == 1
    said = capsys.readouterr().err
    page.rmdir()
    kept.rename(page)
    assert said.startswith("consecutive: failed: [Errno") and "report.html" in said
    assert said.endswith(f"what is done is in {out}; give the same command again to go on\n")


def test_a_finished_folder_is_not_run_again_and_another_plan_is_refused(killed, world, capsys):
    out, *_ = killed
    final = out / "runs" / f"ours-{BATCH}" / "final.json"
    written = final.stat().st_mtime_ns
    assert main(words(world, "consecutive", out, *CONSECUTIVE)) == 0
    assert final.stat().st_mtime_ns == written
    assert main(words(world, "consecutive", out, *CONSECUTIVE, "--seed", 5)) == 2
    assert "another seed" in capsys.readouterr().err
    assert main(words(world, "consecutive", out, *CONSECUTIVE, "--set", "ours.alpha=0.6")) == 2
    assert "begun with another options" in capsys.readouterr().err
    (folder,) = (out / "runs").iterdir()
    with plan.locked(folder):  # by a run whose experiment was killed
        assert main(["run", str(folder)]) == 2
    assert capsys.readouterr().err == f"run: {folder} is in use by another process\n"
    with plan.locked(out):
        assert main(words(world, "consecutive", out, *CONSECUTIVE)) == 2
    assert "in use by another process" in capsys.readouterr().err


def test_a_system_that_fails_is_named_and_the_others_are_run(world, tmp_path, capsys, monkeypatch):
    systems = ("--systems", "alphaedit", "--set", "alphaedit.target_steps=2")
    argv = words(world, "consecutive", tmp_path, "--count", 1, *systems)
    # What a threshold is worth depends on the statistics, so that only the run finds out.
    assert main([*argv, "--set", "alphaedit.threshold=1e-30"]) == 1
    assert "alphaedit: failed:" in capsys.readouterr().err
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert "threshold must lie above" in row["error"]
    assert "threshold must lie above" in (tmp_path / "report.html").read_text()
    # It has done nothing, so the folder takes the corrected command.
    monkeypatch.setattr(plan, "_run_one", worker.main)
    assert main([*argv, "--set", "alphaedit.threshold=1e9"]) == 0
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert row["error"] == "" and int(row["edits"]) == 1


def test_single_rounds_start_from_the_unedited_model(world, tmp_path):
    more = ("--count", 3, "--batch-sizes", 2, "--systems", "ours")
    quick = ("--set", f"ours.target_steps={STEPS}")
    shared = run(world, "single", tmp_path, *more, *quick)
    (found,) = plan.read_all(tmp_path)
    final = found["final"]
    assert len(final["records"]) == final["facts_measured"] == 3
    assert [line["edits"] for line in found["edits"]] == [2, 3]
    model, tokenizer = load_model(bundled.model_path(), dtype="float32")
    editor = Editor(
        model,
        tokenizer,
        statistics=Statistics.load(shared["statistics"]),
        config=EditConfig.for_model(model, target_steps=STEPS),
    )
    last = load_written(tmp_path / "facts.jsonl")[2:]
    editor.edit(last)
    (alone,) = evaluate(model, tokenizer, last, hooks=editor.hooks, details=True, progress=False)[
        "records"
    ]
    editor.detach()
    assert final["records"][2]["values"] == alone["values"]
    assert final["language"]["tokens"] > 0
    row = tables.result_row(found, shared)
    assert row["tf_reliability"] == final["all"]["teacher_forced"]["after"]["reliability"]
    # What edits do to other text is that of a whole batch, not of the fact that was left over.
    rounds = lines(tmp_path / "runs" / "ours-2" / "rounds.jsonl")
    assert ["extra" in r for r in rounds] == [True, False]
    assert final["language"] == rounds[0]["extra"]["language"]
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Side effects are those after the first round." in page
    assert "first facts" not in page  # there are no checkpoints


def test_passages_longer_than_the_context_window_are_cut(world, tmp_path, monkeypatch):
    facts = [json.loads(line) for line in (world / "facts.jsonl").read_text().splitlines()]
    subjects = {fact["subject"] for fact in facts}
    other = [t for t in bundled.texts()[:200] if not any(s in t for s in subjects)]
    (tmp_path / "text.txt").write_text(" ".join(other), encoding="utf-8")
    argv = words(world, "consecutive", tmp_path / "out", "--count", 1, "--systems", "ours")
    argv[argv.index("--text") + 1] = str(tmp_path / "text.txt")
    argv += ["--set", f"ours.target_steps={STEPS}"]
    monkeypatch.setattr(plan, "_run_one", worker.main)
    assert main(argv) == 0
    (found,) = plan.read_all(tmp_path / "out")
    assert found["final"]["language"]["tokens"] in (399, 400)
    (picture,) = [p for p in found["final"]["pictures"] if p["kind"] == "unrelated text"]
    assert abs(len(picture["tokens"]) - measure.PICTURE_TOKENS) < 5
    assert " ".join(other).startswith(picture["text"])


def test_a_smaller_last_round_weighs_less():
    def one(kl, fired):
        gate = {"fired_unrelated": fired / 2, "fired_edited": fired}
        answers = {"edit": [{}], "paraphrase": [], "neighborhood": [{}]}
        record = {"values": {"before": {}, "after": {}}, "answers": answers, "kl": kl}
        return {"records": [record], "gate": gate, "extra": {}}

    whole, left = one(0.0, 1.0), one(0.0, 0.0)
    whole["records"] *= 3
    merged = measure.merge_rounds([whole, left])
    assert merged["gate"] == {"fired_unrelated": 0.375, "fired_edited": 0.75}


def test_facts_are_mixed_and_known_ones_are_chosen(tmp_path, shared_dir):
    data = shared_dir / "data"
    paths = [data / "counterfact_dev.json", data / "zsre_dev.json"]
    known = shared_dir / "models" / "known_ids.json"
    edited, spare = gather(paths, known=known, model="factlm-gpt2", count=None, seed=0)
    listing = json.loads(known.read_text())["factlm-gpt2"]
    assert len(edited) <= len(listing["counterfact_case_ids"]) + len(listing["zsre_index"])
    assert len(edited) > 1900
    # Mixed: the first hundred hold both kinds.
    kinds = {r.id is None for r in edited[:100]}
    assert kinds == {True, False}
    again, _ = gather(paths, known=known, model="factlm-gpt2", count=50, seed=0)
    assert again == edited[:50]
    other, _ = gather(paths, known=known, model="factlm-gpt2", count=50, seed=1)
    assert other != again
    subjects = {r.subject for r in edited}
    assert spare and not any(r.subject in subjects for r in spare)
    with pytest.raises(ValueError, match="--count must be at most"):
        gather(paths[:1], known=None, model="x", count=5000, seed=0)
    with pytest.raises(ValueError, match="entry 'x'"):
        gather(paths[:1], known=known, model="x", count=None, seed=0)


@pytest.mark.parametrize(
    ("written", "match"),
    [
        ("{", "must be JSON like .* got .*known.json: Expecting"),
        ("[1]", "must be JSON like .* got a list"),
        ("{}", r"must have an entry 'm', got \[\]"),
        ('{"m": [3]}', "no list of integers 'counterfact_case_ids' for 'm'"),
        ('{"m": {"counterfact_case_ids": ["3"]}}', "no list of integers 'counterfact_case_ids'"),
        ('{"m": {"zsre_index": 3}}', "no list of integers 'zsre_index' for 'm'"),
        ('{"m": {"zsre_index": [0, 2]}}', "by their place below 2, got 2"),
        ('{"m": {"zsre_index": [-1]}}', "by their place below 2, got -1"),
        ('{"m": {"counterfact_case_ids": [3]}}', "a good record that --known names"),
    ],
)
def test_what_a_model_knows_must_be_told_as_documented(tmp_path, written, match):
    known, facts = tmp_path / "known.json", tmp_path / "facts.json"
    known.write_text(written)
    record = {
        "subject": "Watts Humphrey",
        "src": "What university did Watts Humphrey attend?",
        "rephrase": "Which university did Watts Humphrey go to?",
        "alt": "Illinois Institute of Technology",
        "answers": ["Trinity College"],
        "loc": "nq question: who played desmond doss father",
        "loc_ans": "Hugo Weaving",
    }
    other = record | {"src": "Where did Watts Humphrey study?"}
    facts.write_text(json.dumps([record, other]))
    with pytest.raises(ValueError, match=match):
        gather([facts], known=known, model="m", count=None, seed=0)
    known.write_text('{"m": {"zsre_index": [1]}}')
    edited, spare = gather([facts], known=known, model="m", count=None, seed=0)
    assert [r.text for r in edited] == [other["src"]] and not spare


def test_nothing_is_learned_from_the_prompts_that_are_measured(tmp_path):
    """Facts with one relation share their neighbours, as CounterFact's do."""
    near = {"neighborhood": ["Oslo is in", "Rome is in"], "neighborhood_targets": ["N", "I"]}
    requests = [
        EditRequest("{} is in", "Lyon", "Spain", paraphrases=["Where is Lyon?"], **near),
        EditRequest("{} is in", "Bari", "Spain", paraphrases=["Oslo is in", "So Bari is in"]),
        EditRequest(
            "{} is in", "Cork", "Spain",
            neighborhood=["Rome is in", "Faro is in"], neighborhood_targets=["I", "P"],
        ),
        EditRequest("{} is in", "Oslo", "Spain"),
    ]  # fmt: skip
    facts = tmp_path / "facts.jsonl"
    write_facts(facts, requests)
    pairs = (gather([facts], known=None, model="m", count=1, seed=seed) for seed in range(100))
    spare = next(spare for (edited,), spare in pairs if edited.subject == "Lyon")
    found = {r.subject: (r.paraphrases, r.neighborhood, r.neighborhood_targets) for r in spare}
    assert found == {
        "Bari": (("So Bari is in",), (), ()),
        "Cork": ((), ("Faro is in",), ("P",)),
    }


@pytest.mark.parametrize("form", ["bom", "lines", "object"])
def test_known_records_are_found_in_every_form_of_a_file(tmp_path, form):
    record = {"subject": "Ada", "rephrase": "Where was Ada?", "alt": "Rome", "answers": ["Oslo"]}
    records = [{**record, "src": f"Where {verb} Ada?"} for verb in ("is", "lives", "works")]
    records[0]["alt"] = ""  # bad, and left out
    text = {
        "bom": "\ufeff" + json.dumps(records),
        "lines": "\n".join(map(json.dumps, records)),
        "object": json.dumps({"records": records}),
    }[form]
    facts, known = tmp_path / "facts.json", tmp_path / "known.json"
    facts.write_text(text, encoding="utf-8")
    known.write_text('\ufeff{"m": {"zsre_index": [2]}}', encoding="utf-8")
    edited, spare = gather([facts], known=known, model="m", count=None, seed=0)
    assert [r.text for r in edited] == ["Where works Ada?"] and not spare
    known.write_text('{"m": {"zsre_index": [3]}}')
    with pytest.raises(ValueError, match="by their place below 3, got 3"):
        gather([facts], known=known, model="m", count=None, seed=0)


def test_what_is_written_is_read_again(tmp_path):
    # Separators that are no end of a line in JSON, and a passage of several lines.
    request = EditRequest("The city\u2028of {} is", "Ada\x85", "Rome")
    write_facts(tmp_path / "facts.jsonl", [request, request])
    assert load_written(tmp_path / "facts.jsonl") == [request, request]
    passages = ["One\nand two.", "Three\u2028four."]
    write_passages(tmp_path / "text.jsonl", passages)
    assert list(read_texts(tmp_path / "text.jsonl")) == passages


def test_unrelated_text_names_no_edited_subject(world):
    _, tokenizer = load_model(bundled.model_path())
    requests = load_written(world / "stats-only" / "facts.jsonl")
    subject = requests[0].subject
    text = [f"{subject} is far.", *bundled.texts()[:50], f"On {subject}.", "The end of it."]
    chosen = unrelated(text, requests, tokenizer, 60)
    assert chosen[0] == "The end of it." and not any(subject in passage for passage in chosen)
    tokens = [len(tokenizer(passage)["input_ids"]) for passage in chosen]
    assert sum(tokens[:-1]) < 60 <= sum(tokens)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--set", "nobody.x=1"], "must be SYSTEM.NAME=VALUE"),
        (["--batch-sizes", "0"], "must be positive"),
        (["--batch-sizes", "x"], "must be integers such as 1,10, got 'x'"),
    ],
)
def test_bad_arguments(world, capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args([*words(world, "single", "x"), *argv])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
