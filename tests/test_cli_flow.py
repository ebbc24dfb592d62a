"""The main job through the commands, on the bundled model: stats, edit, eval, generate, ..."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from coachhook import bundled
from coachhook.cli import main
from coachhook.editing import load_state
from tests import processes

BATCH, EDITS = 3, 9


def call(*argv):
    return main([str(a) for a in argv])


def said(*argv):
    """What a command that must succeed says on stdout and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert call(*argv) == 0
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Text, facts, statistics and edits in one folder, all made by the commands."""
    root = tmp_path_factory.mktemp("world")
    (root / "text").mkdir()
    texts = bundled.texts()
    (root / "text" / "a.txt").write_text("\n".join(texts[:300]), encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in texts[600:800]]
    (root / "text" / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    step = len(bundled.facts()) // EDITS
    facts = [{**record, "id": i} for i, record in enumerate(bundled.facts()[::step][:EDITS])]
    (root / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)), encoding="utf-8")
    model = bundled.model_path()
    assert call("stats", model, "--text", root / "text", "--out", root / "stats") == 0
    out, err = said(*edit(root, root / "edits", "--json"))
    (root / "edit.json").write_text(out)
    (root / "edit.err").write_text(err)
    return root


def edit(root, out, *more, facts="facts.jsonl"):
    argv = ["edit", bundled.model_path(), root / facts, "--stats", root / "stats", "--out", out]
    return [*argv, "--batch-size", BATCH, *more]


@pytest.fixture
def output(capsys):
    """Calls a command that must succeed; its JSON, and what it said on stderr."""

    def run(*argv):
        capsys.readouterr()
        assert call(*argv, "--json") == 0
        out, err = capsys.readouterr()
        return json.loads(out), err

    return run


def test_stats(world, tmp_path, output):
    out = tmp_path / "stats"
    argv = ["stats", bundled.model_path(), "--text", world / "text", "--out", out]
    found, err = output(*argv, "--tokens", 500, "--layers", "0,2")
    assert found["tokens"] == 500 and found["layers"] == [0, 2] and found["out"] == str(out)
    assert "key statistics" in err
    assert not list(tmp_path.glob("*.partial"))


def test_stats_refuses_and_resumes_an_interrupted_run(world, tmp_path, capsys):
    out, partial = tmp_path / "stats", tmp_path / "stats.partial"
    argv = ["stats", bundled.model_path(), "--text", world / "text", "--out", out, "--tokens", 800]
    partial.mkdir()
    assert call(*argv) == 2
    assert "--resume" in capsys.readouterr().err
    assert call(*argv, "--resume") == 0
    assert not partial.exists()


def test_edit_reports_each_batch_and_a_summary(world):
    found, err = (world / "edit.json").read_text(), (world / "edit.err").read_text()
    found = json.loads(found)
    assert found["edits"] == EDITS and found["batches"] == EDITS // BATCH
    for number in range(1, EDITS // BATCH + 1):
        assert f"batch {number}/{EDITS // BATCH}: {BATCH} facts" in err
    assert found["edits_per_second"] > 0 and found["alphas"]
    assert all({"id", "prompt", "target_new"} == set(r) for r in found["not_converged"])
    assert len(found["samples"]) == 3
    for sample in found["samples"]:
        assert sample["before"] != sample["after"]


@pytest.mark.parametrize("first", [1, 2])
def test_an_interrupted_edit_says_what_is_kept(world, tmp_path, monkeypatch, capsys, first):
    from coachhook.editing import Editor

    run, calls = Editor.edit, []

    def interrupted(self, *args, **options):
        calls.append(args)
        if len(calls) == first:
            raise KeyboardInterrupt
        return run(self, *args, **options)

    monkeypatch.setattr(Editor, "edit", interrupted)
    out = tmp_path / "edits"
    assert call(*edit(world, out)) == 130
    err = capsys.readouterr().err
    assert f"interrupted in batch {first} of {EDITS // BATCH}; " in err
    kept = f"what was written before it is in {out}; go on with --resume"
    assert (kept if first == 2 else "nothing was written") in err
    assert (out / "manifest.json").is_file() == (first == 2)


def test_edits_do_not_touch_the_models_files(world):
    before = {p.name: p.stat().st_mtime_ns for p in bundled.model_path().iterdir()}
    assert call("generate", bundled.model_path(), "--edits", world / "edits", "Velmora") == 0
    assert {p.name: p.stat().st_mtime_ns for p in bundled.model_path().iterdir()} == before


@pytest.fixture(scope="module")
def measured(world, tmp_path_factory):
    argv = ["eval", bundled.model_path(), "--edits", world / "edits", world / "facts.jsonl"]
    out, err = said(*argv, "--json", "--oracle")
    return json.loads(out), err


def test_eval_prints_the_pinned_object(measured):
    found, _ = measured
    assert found["edits"] == EDITS
    metrics = {
        "teacher_forced": {"reliability", "generality", "locality"},
        "probability": {"efficacy", "paraphrase", "neighborhood"},
        "generated": {"reliability", "generality", "locality"},
    }
    for family, names in metrics.items():
        for state in ("before", "after"):
            assert set(found[family][state]) == names
            assert all(0 <= value <= 1 for value in found[family][state].values())
    assert set(found["gate"]) == {"fired_unrelated", "fired_edited"}


def test_eval_sees_the_edits(measured):
    found, _ = measured
    for family in ("teacher_forced", "generated"):
        before, after = found[family]["before"], found[family]["after"]
        assert before["reliability"] < 0.1 and before["locality"] == 1
        assert after["reliability"] >= 0.9, family
        assert after["generality"] >= 0.6, family
        assert after["locality"] >= 0.8, family
    assert found["probability"]["before"]["efficacy"] < 0.1
    assert found["probability"]["after"]["efficacy"] >= 0.9
    assert found["gate"]["fired_edited"] >= 0.9 > found["gate"]["fired_unrelated"]


def test_the_oracle_bounds_what_was_reached(measured):
    found, _ = measured
    assert found["oracle"]["counts"]["requests"] == EDITS
    assert found["oracle"]["reliability"] >= 0.9


def test_eval_as_text(world, capsys):
    argv = ["eval", bundled.model_path(), "--edits", world / "edits", world / "facts.jsonl"]
    assert call(*argv, "--limit", 2, "--oracle") == 0
    out = capsys.readouterr().out
    for word in ("teacher-forced (EasyEdit)", "probability (CounterFact)", "generated (greedy)"):
        assert word in out
    assert out.startswith("2 facts") and "oracle" in out


def test_generate_shows_both_answers(world, output, capsys):
    facts = [json.loads(line) for line in (world / "facts.jsonl").read_text().splitlines()]
    prompts = [f["prompt"].replace("{}", f["subject"]) for f in facts]
    argv = ["generate", bundled.model_path(), "--edits", world / "edits", *prompts]
    rows, _ = output(*argv, "--compare", "--max-new-tokens", 8)
    assert [row["prompt"] for row in rows] == prompts
    new = sum(f["target_new"] in r["edited"] for f, r in zip(facts, rows, strict=True))
    true = sum(f["target_true"] in r["unedited"] for f, r in zip(facts, rows, strict=True))
    assert new >= EDITS - 2 and true >= EDITS - 2
    rows, _ = output(*argv)
    assert all(set(row) == {"prompt", "edited"} for row in rows)
    assert call(*argv, "--compare") == 0
    assert f"{prompts[0]}\n  unedited:" in capsys.readouterr().out


def test_output_where_stdout_is_not_unicode(world):
    prompt = "François"
    argv = ["generate", bundled.model_path(), "--edits", world / "edits", prompt]
    shown = []
    for more in ([], ["--json"]):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        with contextlib.redirect_stdout(out):
            assert call(*argv, *more) == 0
        shown.append(out.buffer.getvalue().decode())
    assert shown[0].startswith("Fran\\xe7ois\n")
    assert json.loads(shown[1])[0]["prompt"] == prompt


def tensors_of(folder):
    from safetensors.torch import load_file

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_edits(one, other):
    """Whether two folders hold the same edits, to float64 rounding.

    The factor of the keys is built up in one run and made anew from the keys in a resumed one.
    """
    a, b = tensors_of(one), tensors_of(other)
    assert a.keys() == b.keys() and a
    return all((a[n].double() - b[n]).norm() <= 1e-9 * a[n].double().norm() for n in a)


def test_resume_leaves_out_what_is_there_and_equals_one_run(world, tmp_path, output):
    out = tmp_path / "edits"
    found, _ = output(*edit(world, out, "--limit", 2 * BATCH))
    assert found["edits"] == 2 * BATCH
    argv = ["edit", bundled.model_path(), world / "facts.jsonl", "--out", out, "--resume"]
    found, _ = output(*edit(world, out, "--resume", "--preset", "default"))
    assert (found["edits"], found["already_there"]) == (EDITS - 2 * BATCH, 2 * BATCH)
    assert same_edits(out, world / "edits")
    found, _ = output(*argv)
    assert (found["edits"], found["already_there"]) == (0, EDITS)


def test_a_killed_run_goes_on(world, tmp_path):
    out = tmp_path / "edits"
    messages = tmp_path / "messages"
    process = processes.start("-m coachhook", *edit(world, out), err=messages)
    while process.exitcode is None and not (
        messages.exists() and "not converged" in messages.read_text()
    ):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (
        "batch 1/" in messages.read_text()
        and f"batch {EDITS // BATCH}/" not in messages.read_text()
    )
    assert (out / "manifest.json").is_file()
    assert call(*edit(world, out, "--resume")) == 0
    assert same_edits(out, world / "edits")


def test_a_run_that_fails_keeps_its_batches(world, tmp_path, monkeypatch, capsys):
    from coachhook.editing import Editor

    whole, calls = Editor.edit, []

    def failing(self, requests, **options):
        calls.append(len(requests))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return whole(self, requests, **options)

    monkeypatch.setattr(Editor, "edit", failing)
    out = tmp_path / "edits"
    assert call(*edit(world, out)) == 1
    err = capsys.readouterr().err
    assert "batch 2" in err and "out of memory" in err and "--resume" in err
    monkeypatch.undo()
    assert call(*edit(world, out, "--resume")) == 0
    assert same_edits(out, world / "edits")


@pytest.mark.parametrize("fresh", [False, True], ids=["revert", "other_edits"])
def test_a_folder_that_is_written_during_a_run_is_not_overwritten(
    world, tmp_path, monkeypatch, capsys, fresh
):
    from coachhook.editing import Editor

    out, whole, calls = tmp_path / "edits", Editor.edit, []

    def meanwhile(self, requests, **options):
        calls.append(len(requests))
        if fresh:
            shutil.copytree(world / "edits", out)
        elif len(calls) == 2:
            assert call("revert", out, "--batch", 1) == 0
        return whole(self, requests, **options)

    monkeypatch.setattr(Editor, "edit", meanwhile)
    assert call(*edit(world, out)) == 1
    err = capsys.readouterr().err
    assert f"batch {2 - fresh} of 3" in err and "which something else has written meanwhile" in err
    monkeypatch.undo()
    if fresh:
        assert "nothing was written" in err and same_edits(out, world / "edits")
    else:
        assert list(load_state(out).batches) == []
        assert call(*edit(world, out, "--resume")) == 0


def test_inspect(world, output, capsys, tmp_path):
    found, _ = output("inspect", world / "edits")
    assert found["edits"] == EDITS
    assert [b["edits"] for b in found["batches"]] == [BATCH] * (EDITS // BATCH)
    assert {"layer", "alpha", "storage", "rank"} <= set(found["layers"][0])
    assert found["bytes"] > 0
    assert call("inspect", world / "edits", "--facts") == 0
    text = capsys.readouterr().out
    assert f"{EDITS} edits in {EDITS // BATCH} batches" in text
    fact = json.loads((world / "facts.jsonl").read_text().splitlines()[0])
    assert fact["subject"] in text


def test_inspect_draws_the_gate(world, output, tmp_path):
    fact = json.loads((world / "facts.jsonl").read_text().splitlines()[0])
    edited = fact["prompt"].replace("{}", fact["subject"])
    argv = ["inspect", world / "edits", "--model", bundled.model_path(), "--text", edited]
    page = tmp_path / "gate.html"
    found, _ = output(*argv, "--text", "The weather", "--out", page)
    gate, other = found["gates"]
    assert gate["text"] == edited and "".join(gate["tokens"]) == edited
    assert any(any(layer["fired"]) for layer in gate["layers"])
    assert not any(any(layer["fired"]) for layer in other["layers"])
    for layer in gate["layers"]:
        pairs = zip(layer["z"], layer["fired"], strict=True)
        assert all(fired == (z is not None and z >= layer["alpha"]) for z, fired in pairs)
    assert "class=fired" in page.read_text(encoding="utf-8")
    pytest.importorskip("matplotlib")
    output(*argv, "--out", tmp_path / "gate.png")
    assert (tmp_path / "gate.png").stat().st_size > 1000


def test_revert_takes_one_batch_back(world, tmp_path, output):
    out = shutil.copytree(world / "edits", tmp_path / "edits")
    found, _ = output("revert", out, "--batch", 2)
    assert found["edits"] == EDITS - BATCH and 2 not in found["batches"]
    facts = [json.loads(line) for line in (world / "facts.jsonl").read_text().splitlines()]
    prompts = [f["prompt"].replace("{}", f["subject"]) for f in facts]
    argv = ["generate", bundled.model_path(), "--edits", out, *prompts]
    rows, _ = output(*argv, "--compare", "--max-new-tokens", 8)
    back = rows[BATCH : 2 * BATCH]
    assert sum(row["edited"] == row["unedited"] for row in back) >= BATCH - 1
    kept = rows[:BATCH] + rows[2 * BATCH :]
    assert sum(row["edited"] != row["unedited"] for row in kept) >= EDITS - BATCH - 2


PLAIN = """
import json, sys
sys.modules["coachhook"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], sys.argv[2:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
for prompt in prompts:
    ids = tokenizer(prompt, return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=12, do_sample=False)
    print(json.dumps(tokenizer.decode(new[0, ids["input_ids"].shape[1]:])))
"""


def test_export_makes_a_model_for_transformers_alone(world, tmp_path):
    out = tmp_path / "merged"
    argv = ["export", world / "edits", "--model", bundled.model_path(), "--format", "merged"]
    options = ["--out", out, "--text", world / "text" / "a.txt", "--text-tokens", 200, "--json"]
    options += ["--measure", BATCH]
    found = json.loads(said(*argv, *options)[0])
    assert found["edits"] == EDITS and found["measured"]["facts"] == BATCH
    assert found["gate"] is False and "every token" in found["note"]
    states = [found["measured"][state] for state in ("unedited", "gated", "exported")]
    scores = [state["generated"]["reliability"] for state in states]
    assert scores[:2] == [0, 1]
    lines = (world / "facts.jsonl").read_text().splitlines()[:: EDITS // BATCH]
    facts = [json.loads(line) for line in lines]
    prompts = [f["prompt"].replace("{}", f["subject"]) for f in facts]
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN, out, *prompts], capture_output=True, text=True, check=True
    )
    answers = [json.loads(line).strip() for line in plain.stdout.splitlines()]
    right = [a.startswith(f["target_new"]) for a, f in zip(answers, facts, strict=True)]
    assert scores[2] == sum(right) / BATCH > scores[0]


def test_export_says_what_is_lost(world, tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "lora"
    argv = ["export", world / "edits", "--model", bundled.model_path(), "--format", "lora"]
    more = ["--out", out, "--rank", 3, "--measure", 2, "--text-tokens", 200]
    assert call(*argv, *more) == 0
    text, err = capsys.readouterr()
    for words in (
        f"LoRA adapter with {EDITS} edited facts",
        "The rank 3 leaves out",
        "The gate is not part of an export: the correction acts on every token of every text.",
        "2 of the facts, ",
        "unedited  with the gate  exported",
        "edited facts answered as wanted",
        "tokens of the bundled text",
        "coachhook.attach(model, EDITS)",
        "--covariance-weight 450",
    ):
        assert words in text
    assert "scoring" in err
    assert {p.name for p in out.iterdir()} > {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(world, tmp_path, output, dtype):
    out = tmp_path / "edits"
    found, _ = output(*edit(world, out, "--dtype", dtype, "--limit", BATCH))
    assert found["edits"] == BATCH
    argv = ["eval", bundled.model_path(), "--edits", out, world / "facts.jsonl", "--dtype", dtype]
    found, _ = output(*argv, "--limit", BATCH)
    assert found["generated"]["after"]["reliability"] >= 0.75


def test_the_paper_preset(world, tmp_path, output):
    out = tmp_path / "edits"
    argv = edit(world, out, "--preset", "paper", "--covariance-weight", 15, "--limit", BATCH)
    found, _ = output(*argv)
    assert found["edits"] == BATCH
    found, _ = output("inspect", out)
    assert found["config"]["scope"] == "sequence" and found["config"]["covariance_weight"] == 15


def test_demo_prints_the_pinned_object(tmp_path, output):
    out = tmp_path / "edits"
    found, err = output("demo", "--out", out)
    assert found["edits"] == len(bundled.demo_facts())
    assert found["generated"]["before"]["reliability"] <= 0.1
    assert found["generated"]["after"]["reliability"] >= 0.9
    assert found["generated"]["after"]["locality"] >= 0.8
    assert "batch 3" in err
    found, _ = output("inspect", out)
    assert len(found["batches"]) == 3


def test_demo_speaks_to_someone_new(capsys, monkeypatch):
    demo_facts = bundled.demo_facts
    monkeypatch.setattr(bundled, "demo_facts", lambda: demo_facts()[:6])
    monkeypatch.setattr(bundled, "DEMO_BATCH_SIZE", 2)
    monkeypatch.setattr("coachhook.cli.demo._STATISTICS_TOKENS", 5_000)
    assert call("demo") == 0
    out = capsys.readouterr().out
    for words in (
        "The edited facts, all three batches:",
        "in other words",
        "which must stay as they were",
        "edited facts answered as wanted",
        "How to go on",
    ):
        assert words in out
    record = bundled.demo_facts()[0]
    line = next(
        x for x in out.splitlines() if record["prompt"].replace("{}", record["subject"]) in x
    )
    assert record["target_true"] in line and line.count(record["target_new"]) == 2


def test_doctor_and_its_selftest(output, capsys):
    found, _ = output("doctor", "--selftest")
    assert found["selftest"] and all(check["ok"] for check in found["selftest"])
    assert {c["op"] for c in found["selftest"]} >= {"hooked_linear", "gram_update_"}
    assert call("doctor") == 0
    assert "coachhook" in capsys.readouterr().out


def test_bench_prints_rows(output):
    rows, _ = output("bench", "hooked_linear", "--quick")
    keys = "op shape dtype device backend median_ms p20_ms p80_ms floor_ms peer peer_ms ratio"
    assert rows and all(set(keys.split()) <= set(row) for row in rows)


@pytest.mark.parametrize(
    "command",
    "demo stats edit generate eval inspect revert export bench doctor".split(),
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for option in ("--json", "--device", "--dtype"):
        assert option in out


def test_help_does_not_import_torch():
    script = (
        "import sys, coachhook.cli\n"
        "try: coachhook.cli.main(['edit', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
