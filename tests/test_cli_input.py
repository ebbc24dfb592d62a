"""Bad usage and bad input: a clear message on stderr, status 2, and nothing written or changed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from coachhook.cli import main
from tests import processes
from tests.evaluation.tiny import SENTENCES, tiny_model, tiny_tokenizer

FACT = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model, its statistics, a facts file and edits, made by the commands."""
    root = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer()
    for name, seed in (("model", 3), ("other", 4)):
        tiny_model(tokenizer, seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "text.txt").write_text("\n".join(SENTENCES * 40))
    facts = [FACT, {"prompt": "{} speaks", "subject": "Ann Art", "target_new": "Dutch"}]
    (root / "facts.json").write_text(json.dumps(facts, indent=1))
    for model in ("model", "other"):
        argv = [
            "stats",
            root / model,
            "--text",
            root / "text.txt",
            "--out",
            root / f"stats-{model}",
        ]
        assert call(*argv) == 0
    argv = ["edit", root / "model", root / "facts.json", "--stats", root / "stats-model"]
    assert call(*argv, "--out", root / "edits", "--target-steps", 5) == 0
    return root


def call(*argv):
    """The exit status of the command, in this process."""
    try:
        return main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def refused(world, capsys):
    """Calls the command and checks that it is refused, says so, and leaves every file as it was."""

    def check(*argv, message):
        before = contents(world)
        capsys.readouterr()
        assert call(*argv) == 2
        out, err = capsys.readouterr()
        assert message in err, err
        assert "Traceback" not in err
        assert out == ""
        assert contents(world) == before

    return check


def edit(world, facts, *more, out="new", stats="stats-model", model="model"):
    return [
        *("edit", world / model, facts, "--stats", world / stats, "--out", world / out),
        *("--target-steps", 2, *more),
    ]


BAD_FACTS = {
    "empty file": ("", "got an empty file"),
    "empty list": ("[]", "got an empty list"),
    "not JSON": ("[{", "must be JSON or JSON Lines"),
    "missing field": (
        [FACT, {"prompt": "x", "subject": "x"}],
        "record 1 (line 7): field 'target_new' is missing",
    ),
    "subject not in prompt": (
        [FACT, {**FACT, "prompt": "The capital of Spain is"}],
        "record 1 (line 7): field 'prompt' must have a '{}' or contain the subject 'France'",
    ),
    "two slots": ([{**FACT, "prompt": "{} or {}"}], "field 'prompt' must have exactly one '{}'"),
    "empty target": ([{**FACT, "target_new": ""}], "field 'target_new' must not be empty"),
    "blank target": ([{**FACT, "target_new": " \n"}], "field 'target_new' must not be empty"),
    "wrong type": ([{**FACT, "target_new": 3}], "field 'target_new' must be a string, got int"),
    "half a character": (
        [FACT, {**FACT, "paraphrases": ["a \ud83d b"]}],
        "record 1 (line 7): EditRequest: paraphrases must be Unicode text, got 'a \\ud83d b'",
    ),
}


@pytest.mark.parametrize("name", BAD_FACTS)
@pytest.mark.parametrize("command", ["edit", "eval"])
def test_bad_facts(world, refused, tmp_path, name, command):
    content, message = BAD_FACTS[name]
    facts = tmp_path / "facts.json"
    facts.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    if command == "edit":
        refused(*edit(world, facts), message=message)
    else:
        refused("eval", world / "model", "--edits", world / "edits", facts, message=message)


def test_every_bad_record_is_named_and_can_be_left_out(world, refused, tmp_path, capsys):
    facts = tmp_path / "facts.jsonl"
    records = [FACT, {**FACT, "target_new": ""}, {"prompt": "{}"}]
    facts.write_text("\n".join(map(json.dumps, records)))
    argv = edit(world, facts)
    for message in (
        "line 2: field 'target_new' must not be empty",
        "line 3: field 'subject' is missing",
        "line 3: field 'target_new' is missing",
        "--skip-bad",
    ):
        refused(*argv, message=message)
    argv[argv.index(world / "new")] = tmp_path / "edits"
    assert call(*argv, "--skip-bad", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["edits"] == 1
    assert "left out" in err and "line 2" in err


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json"])
def test_a_limit_leaves_out_what_is_wrong_behind_it(world, refused, tmp_path, capsys, name):
    facts = tmp_path / name
    good = [{**FACT, "id": i} for i in range(2)]
    lines = [json.dumps(r) for r in (good[0], {**FACT, "target_new": ""}, good[1], good[1], 5)]
    if name == "facts.json":
        facts.write_text(f"[{', '.join(lines)}]")
    else:
        facts.write_text("\n".join([*lines, "{"]))
    argv = edit(world, facts)
    refused(*argv, "--limit", 2, message="field 'target_new' must not be empty")
    argv[argv.index(world / "new")] = tmp_path / "edits"
    assert call(*argv, "--limit", 1) == 0
    assert "warning" not in capsys.readouterr().err
    assert call(*argv, "--limit", 2, "--skip-bad", "--resume", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["edits"] == 1 and err.count("left out") == 1


def test_a_facts_file_that_is_not_there(world, refused):
    message = "none.json must be a file, got: No such file"
    refused(*edit(world, world / "none.json"), message=message)
    refused(*edit(world, world / "model"), message="model must be a file, got: Is a directory")


LONG = "Spain " * 70


def test_a_prompt_longer_than_the_context_window(world, refused, tmp_path):
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([FACT, {**FACT, "prompt": LONG + "{} is", "id": "far"}]))
    refused(*edit(world, facts), message="context window")
    refused(*edit(world, facts), message="id far")
    facts.write_text(json.dumps([{**FACT, "neighborhood": [LONG], "target_true": "Paris"}]))
    argv = ["eval", world / "model", "--edits", world / "edits", facts]
    refused(*argv, message="context window of 64 tokens")
    argv = ["generate", world / "model", "--edits", world / "edits", LONG]
    refused(*argv, message="context window of 64 tokens")
    argv = ["inspect", world / "edits", "--model", world / "model", "--text", LONG]
    refused(*argv, message="context window of 64 tokens")


def test_a_prompt_that_only_a_context_makes_too_long(world, refused, tmp_path):
    tokenizer = tiny_tokenizer()
    prompt = "Spain " * 20 + "{}"
    while len(tokenizer(prompt.format("France") + " Lyon")["input_ids"]) < 64:
        prompt = f"x {prompt}"
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([{**FACT, "prompt": prompt}]))
    # What stands before a prompt may lose words, what stands after it may not.
    refused(*edit(world, facts), "--context", "{} he said", message="context window")
    assert call(*edit(world, facts), "--out", tmp_path / "long", "--target-steps", 2) == 0


def test_a_target_longer_than_the_context_window(world, refused, tmp_path):
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([{**FACT, "target_new": LONG}]))
    refused(*edit(world, facts), message="target_new must fit the context window of 64 tokens")
    # Neither is too long alone.
    half = "Spain " * 40
    facts.write_text(json.dumps([{**FACT, "prompt": half + "{}", "target_new": half}]))
    message = "prompt and target_new must fit the context window of 64 tokens"
    refused(*edit(world, facts), message=message)


@pytest.mark.parametrize("command", ["edit", "eval", "suggest-layers"])
def test_records_longer_than_the_context_window_can_be_left_out(
    world, refused, tmp_path, capsys, command
):
    facts = tmp_path / "facts.jsonl"
    good = {**FACT, "paraphrases": ["France, whose"]}
    long = {"prompt": LONG + "{}"} if command == "edit" else {"paraphrases": [f"{LONG} France"]}
    records = [good, {**good, **long, "id": "far"}, {**good, "target_new": ""}]
    facts.write_text("\n".join(map(json.dumps, records[:2])))
    argv = {
        "edit": edit(world, facts, "--json", out=tmp_path / "edits"),
        "eval": ["eval", world / "model", "--edits", world / "edits", facts, "--json"],
        "suggest-layers": [
            *("suggest-layers", world / "model", facts, "--layers", 0, "--target-steps", 1),
            "--json",
        ],
    }[command]
    for message in ("got 1 problem", "line 2: ", "context window of 64 tokens", "--skip-bad"):
        refused(*argv, message=message)
    facts.write_text(json.dumps(records[1]))
    refused(*argv, "--skip-bad", message="holds no good record")
    facts.write_text("\n".join(map(json.dumps, records)))
    assert call(*argv, "--skip-bad") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["facts" if command == "suggest-layers" else "edits"] == 1
    assert "left out" in err and "line 2: " in err and "line 3: " in err


def test_prompts_that_are_not_text(world, refused):
    model, edits = world / "model", world / "edits"
    message = "must be Unicode text, got 'caf\\udce9'"
    refused("generate", model, "--edits", edits, "Bob", "caf\udce9", message=message)
    refused("inspect", edits, "--model", model, "--text", "caf\udce9", message=message)


def test_nan_weights(world, refused, tmp_path):
    model = tiny_model(tiny_tokenizer())
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    tiny_tokenizer().save_pretrained(broken)
    message = "transformer.h.0.mlp.c_fc.weight"
    argv = ["stats", broken, "--text", world / "text.txt", "--out", world / "new"]
    refused(*argv, message=message)
    argv = edit(world, world / "facts.json")
    argv[1] = broken
    refused(*argv, message=message)
    refused("generate", broken, "--edits", world / "edits", "x", message=message)


def fingerprint_of(folder):
    return json.loads((folder / "manifest.json").read_text())["fingerprint"]


def test_statistics_of_another_model(world, refused):
    argv = edit(world, world / "facts.json", stats="stats-other")
    refused(*argv, message=fingerprint_of(world / "stats-model"))
    refused(*argv, message=fingerprint_of(world / "stats-other"))


@pytest.mark.parametrize("command", ["generate", "eval", "inspect", "resume"])
def test_edits_of_another_model(world, refused, command):
    other, edits = world / "other", world / "edits"
    argv = {
        "generate": ["generate", other, "--edits", edits, "Bob"],
        "eval": ["eval", other, "--edits", edits, world / "facts.json"],
        "inspect": ["inspect", edits, "--model", other, "--text", "Bob"],
        "resume": ["edit", other, world / "facts.json", "--out", edits, "--resume"],
    }[command]
    refused(*argv, message=fingerprint_of(world / "stats-model"))
    refused(*argv, message=fingerprint_of(world / "stats-other"))


def damaged(folder, tmp_path, suffix=".safetensors"):
    """A copy of a folder with one file cut in half."""
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    file = next(p for p in copy.rglob("*") if p.suffix == suffix)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return copy


def test_truncated_files(world, refused, tmp_path):
    stats = damaged(world / "stats-model", tmp_path)
    refused(*edit(world, world / "facts.json", stats=stats), message="truncated")
    edits = damaged(world / "edits", tmp_path)
    model = world / "model"
    refused("generate", model, "--edits", edits, "Bob", message="truncated")
    refused("eval", model, "--edits", edits, world / "facts.json", message="truncated")
    argv = ["edit", model, world / "facts.json", "--out", edits, "--resume"]
    refused(*argv, message="truncated")
    refused("revert", edits, "--batch", 1, message="truncated")
    argv = edit(world, world / "facts.json")
    argv[1] = damaged(model, tmp_path)
    refused(*argv, message="whole safetensors")


def test_a_damaged_manifest(world, refused, tmp_path):
    edits = damaged(world / "edits", tmp_path, ".json")
    refused("inspect", edits, message="manifest.json")
    refused("generate", world / "model", "--edits", edits, "Bob", message="manifest.json")


@pytest.mark.parametrize("layers", ["0,7", "9"])
def test_an_unknown_layer(world, refused, layers):
    message = "from 0 to 2"
    argv = ["stats", world / "model", "--text", world / "text.txt", "--out", world / "new"]
    refused(*argv, "--layers", layers, message=message)
    refused(*edit(world, world / "facts.json", "--layers", layers), message=message)


def test_a_layer_without_statistics(world, refused, tmp_path):
    stats = tmp_path / "stats"
    argv = ["stats", world / "model", "--text", world / "text.txt", "--out", stats]
    assert call(*argv, "--layers", "0") == 0
    argv = edit(world, world / "facts.json", "--layers", "0,1", stats=stats)
    refused(*argv, message="layer must be one of [0]")


@pytest.mark.parametrize("command", ["stats", "edit"])
def test_output_folders_that_cannot_be_written(world, refused, command):
    def argv(out):
        if command == "edit":
            return edit(world, world / "facts.json", out=out)
        return ["stats", world / "model", "--text", world / "text.txt", "--out", out]

    refused(*argv(world / "facts.json"), message="must be a folder")
    refused(*argv(world / "facts.json" / "below"), message="facts.json")
    refused(*argv(world / "model"), message="other files in it")
    finished = argv(world / ("edits" if command == "edit" else "stats-model"))
    refused(*finished, message="a finished one")
    if command == "edit":
        refused(*finished, message="go on with it (--resume)")
    else:  # which --resume does not go on with
        refused(*finished, message="choose another name, or delete it")
    if Path("/proc").is_dir():
        refused(*argv("/proc/coachhook"), message="writable")


def test_damaged_config_and_missing_model(world, refused, tmp_path):
    argv = ["stats", tmp_path / "none", "--text", world / "text.txt", "--out", world / "new"]
    refused(*argv, message="none")
    (tmp_path / "empty").mkdir()
    argv[1] = tmp_path / "empty"
    refused(*argv, message="config.json")
    argv[1] = world / "model" / "config.json"
    refused(*argv, message="must be a folder with config.json, got the file")
    argv[1] = world / "facts.json"
    refused(*argv, message="must be a folder with config.json, got the file")


def test_text_that_is_no_text(world, refused, tmp_path):
    def argv(text):
        return ["stats", world / "model", "--text", text, "--out", world / "new"]

    refused(*argv(tmp_path / "none.txt"), message="must be an existing file or folder")
    refused(*argv(tmp_path), message="must hold *.txt or *.jsonl files")
    (tmp_path / "blank.txt").write_text("\n \n")
    refused(*argv(tmp_path / "blank.txt"), message="must hold text")
    (tmp_path / "binary.txt").write_bytes(b"good\n\xff\xfe\n")
    refused(*argv(tmp_path / "binary.txt"), message="line 2: text must be UTF-8")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    refused(*argv(tmp_path / "bad.jsonl"), message="line 2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["nonsense"], "invalid choice"),
        (["edit", "m", "f", "--out", "o", "--batch-size", "0"], "must be at least 1, got 0"),
        (["edit", "m", "f", "--out", "o", "--limit", "x"], "must be an integer, got 'x'"),
        (["edit", "m", "f", "--out", "o", "--layers", "a"], "layer indices such as 0,1,2"),
        (["edit", "m", "f", "--out", "o", "--layers=-1"], "must not be negative"),
        (["edit", "m", "f", "--out", "o", "--preset", "best"], "invalid choice"),
        (["edit", "m", "f", "--out", "o", "--target-betas", "a"], "numbers such as 0.9,0.999"),
        (["edit", "m", "f"], "--out"),
        (["stats", "m", "--text", "t"], "--out"),
        (["generate", "m", "--edits", "e"], "PROMPT"),
        (["generate", "m", "x"], "--edits"),
        (["eval", "m", "f", "--edits", "e", "--dtype", "int8"], "invalid choice"),
        (["revert", "e"], "--batch"),
    ],
)
def test_bad_usage(argv, message, capsys):
    assert call(*argv) == 2
    out, err = capsys.readouterr()
    assert message in err and out == ""


def test_settings_that_make_no_sense(world, refused):
    facts = world / "facts.json"
    for more, message in (
        (["--alpha", "nan"], "--alpha must be finite"),
        (["--covariance-weight", "-1"], "covariance_weight must be positive"),
        (["--target-lr", "0"], "target_lr must be positive"),
        (["--target-betas", "0.9"], "target_betas must be two numbers"),
        (["--context", "no slot"], "contexts must have exactly one '{}'"),
        (["--target-loss-layer", "9"], "from 0 to 2"),
    ):
        refused(*edit(world, facts, *more), message=message)
    argv = ["edit", world / "model", facts, "--out", world / "new"]
    refused(*argv, message="--stats is needed")
    argv = ["edit", world / "model", facts, "--out", world / "edits", "--resume"]
    refused(*argv, "--alpha", "1", message="got other ones: alpha 1.0")
    refused(*argv, "--preset", "paper", message="scope 'sequence'")


def test_a_device_that_is_not_there(world, refused):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    argv = ["generate", world / "model", "--edits", world / "edits", "Bob"]
    refused(*argv, "--device", "cuda:0", message="doctor")
    refused(*argv, "--device", "nonsense", message="nonsense")


# Three that torch knows, the last of them for tensors without values.
@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "nonsense"])
@pytest.mark.parametrize("command", ["generate", "stats", "demo", "bench"])
def test_a_device_that_cannot_compute(world, refused, command, device):
    there = {"mps": torch.backends.mps.is_available(), "xpu": torch.xpu.is_available()}
    if there.get(device, False):
        pytest.skip("this machine has such a device")
    argv = {
        "generate": ["generate", world / "model", "--edits", world / "edits", "Bob"],
        "stats": ["stats", world / "model", "--text", world / "text.txt", "--out", world / "new"],
        "demo": ["demo"],
        "bench": ["bench", "gram", "--quick"],
    }[command]
    refused(*argv, "--device", device, message="--device must be")
    refused(*argv, "--device", device, message=f"got '{device}'")


@pytest.mark.parametrize("command", ["edit", "generate", "eval", "inspect", "demo"])
def test_a_backend_that_does_not_exist(world, refused, monkeypatch, command):
    monkeypatch.setenv("COACHHOOK_BACKEND", "nope")
    model, edits, facts = world / "model", world / "edits", world / "facts.json"
    argv = {
        "edit": edit(world, facts),
        "generate": ["generate", model, "--edits", edits, "Bob"],
        "eval": ["eval", model, "--edits", edits, facts],
        "inspect": ["inspect", edits, "--model", model, "--text", "Bob"],
        "demo": ["demo"],
    }[command]
    refused(*argv, message="COACHHOOK_BACKEND must be one of")


@pytest.mark.parametrize("budget", ["nan", "inf", "-inf", "-1.0", "0.0"])
def test_a_budget_that_never_ends_or_never_begins(world, refused, budget):
    argv = ["bench", "gram", "--quick", f"--budget={budget}"]
    refused(*argv, message=f"--budget must be positive and finite, got {budget}")


def test_inspect_and_revert(world, refused):
    edits, model = world / "edits", world / "model"
    refused("inspect", world / "none", message="none")
    refused("inspect", model, message="manifest.json")
    refused("inspect", edits, "--text", "x", message="--text and --model go together")
    refused("inspect", edits, "--out", world / "x.png", message="needs --model and --text")
    argv = ["inspect", edits, "--model", model, "--text", "Bob", "--out"]
    refused(*argv, world / "x.gif", message="must end in .html or .png")
    refused(*argv, world / "none" / "x.html", message="existing folder")
    (world / "x.html").mkdir()
    refused(*argv, world / "x.html", message="must be a file, got the folder")
    argv = ["inspect", edits, "--model", model, "--text", "Bob", "--text"]
    for text in ("", " "):
        refused(*argv, text, message="--text must not be empty")
    refused("revert", edits, "--batch", 7, message="must be one of [1], got 7")
    refused("revert", world / "none", "--batch", 1, message="none")


def export(world, out="new", edits="edits", model="model", format="merged"):
    argv = ["export", world / edits, "--model", world / model, "--format", format]
    return [*argv, "--out", world / out]


def test_export_checks_everything_first(world, refused, tmp_path, monkeypatch):
    refused(*export(world, edits="none"), message="none")
    refused(*export(world, edits="stats-model"), message="must hold coachhook edits")
    refused(*export(world, out="model"), message="other files in it")
    refused(*export(world, out="edits"), message="new or empty folder")
    refused(*export(world, out="facts.json"), message="must be a folder")
    refused(*export(world, model="none"), message="none")
    refused(*export(world, model="other"), message=fingerprint_of(world / "stats-other"))
    refused(*export(world, format="gguf"), message="invalid choice: 'gguf'")
    refused(*export(world), "--rank", 2, message="rank must be None for format 'merged'")
    refused(*export(world, format="lora"), "--rank", 0, message="must be at least 1")
    refused(*export(world), "--covariance-weight", "nan", message="must be positive and finite")
    refused(*export(world), "--measure", -1, message="measure must be an integer from 0")
    refused(*export(world), "--text", tmp_path / "none.txt", message="must be an existing file")
    (tmp_path / "blank.txt").write_text("\n \n")
    refused(*export(world), "--text", tmp_path / "blank.txt", message="must hold text")
    refused(*export(world), "--device", "nonsense", message="--device must be")
    refused("export", world / "edits", "--out", world / "new", message="required: --model")
    copy = damaged(world / "edits", tmp_path)
    refused(*export(world, edits=copy), message="truncated")
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(*export(world, format="lora"), message="pip install 'coachhook[lora]'")


def test_a_failed_export_leaves_nothing(world, tmp_path, monkeypatch, capsys):
    from transformers import GPT2LMHeadModel

    def fail(self, folder, **options):
        (Path(folder) / "half").write_text("")
        raise RuntimeError("disk full")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", fail)
    assert call(*export(world, out=tmp_path / "out"), "--measure", 0) == 1
    out, err = capsys.readouterr()
    assert out == "" and "disk full" in err and "nothing was written" in err
    assert list(tmp_path.iterdir()) == []


def test_a_real_process_has_the_same_status(world, tmp_path):
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([{**FACT, "target_new": ""}]))
    out, err = tmp_path / "out", tmp_path / "err"
    assert processes.run("-m coachhook", *edit(world, facts), out=out, err=err) == 2
    assert out.read_text() == ""
    assert "record 0 (line 1): field 'target_new' must not be empty" in err.read_text()
    assert "Traceback" not in err.read_text()
    assert not (world / "new").exists()
