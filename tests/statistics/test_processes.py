"""Collections shared by real processes, started by torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from coachhook.statistics import Statistics, collect_statistics
from coachhook.statistics.batches import TokenStream, make_batches

# Runs several collections one after another; each ends with its statistics or its message.
_RUN = """
import json, sys, time
import torch, torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from coachhook.models import describe, get_submodule
from coachhook.statistics import collect_statistics, read_texts

folder, runs = sys.argv[1], json.loads(sys.argv[2])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder + "/model")
tokenizer = AutoTokenizer.from_pretrained(folder + "/model")
forwards, pause = [], 0

def count(module, arguments):
    forwards.append(1)
    time.sleep(pause)

get_submodule(model, describe(model).layer(0).path).register_forward_pre_hook(count)
for number, settings in enumerate(runs):
    pause, own_text = settings.pop("pause", 0), settings.pop("own_text", False)
    texts = list(read_texts(folder + "/texts.txt"))
    if own_text:
        texts[7] += f" w{rank}"
    texts = settings.pop("texts", texts)
    model.to(torch.bfloat16 if settings.pop("bfloat16", False) else torch.float32)
    forwards.clear()
    try:
        statistics = collect_statistics(
            model, tokenizer, texts, batch_tokens=64, sample_size=100, progress=False, **settings
        )
        statistics.save(f"{folder}/statistics-{number}-{rank}")
        error = None
    except ValueError as caught:
        error = str(caught)
    found = {"forwards": len(forwards), "error": error}
    with open(f"{folder}/found-{number}-{rank}.json", "w") as file:
        json.dump(found, file)
dist.barrier()
dist.destroy_process_group()
"""


def _torchrun(*words: str, processes: int = 2) -> subprocess.Popen[str]:
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *launch, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.fixture
def folder(build, tokenizer, make_texts, tmp_path) -> Path:
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(make_texts(300)))
    (tmp_path / "run.py").write_text(_RUN)
    return tmp_path


def _start(folder: Path, *runs: dict, processes: int = 2) -> subprocess.Popen[str]:
    script = str(folder / "run.py")
    return _torchrun(script, str(folder), json.dumps(runs), processes=processes)


def _end(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def _alone(build, tokenizer, folder: Path, *, dtype=torch.float32, **settings) -> Statistics:
    texts = (folder / "texts.txt").read_text().splitlines()
    defaults = {"batch_tokens": 64, "sample_size": 100, "progress": False}
    return collect_statistics(build("llama").to(dtype), tokenizer, texts, **defaults | settings)


def _assert_same(found: Statistics, expected: Statistics) -> None:
    assert found.tokens == expected.tokens
    assert torch.equal(found.sample_tokens, expected.sample_tokens)
    for layer in expected.layers:
        # The batches are the same, so their float32 products are; float64 sums in another order.
        error = (found.covariances[layer] - expected.covariances[layer]).abs().max()
        assert error <= 1e-14 * expected.covariances[layer].abs().max()
        assert torch.equal(found.samples[layer], expected.samples[layer])
        assert found.samples[layer].dtype == expected.samples[layer].dtype


def test_two_processes_give_what_one_gives(build, tokenizer, folder):
    runs: list[dict] = [
        {"max_tokens": 2000},
        {"max_tokens": 2000, "minimal": True, "bfloat16": True},
        {"own_text": True},
        {"texts": "-"},
        {"texts": ["w1 w2 w3"]},  # no batch for one of them
    ]
    _end(_start(folder, *runs))
    for number, dtype in enumerate([torch.float32, torch.bfloat16]):
        minimal = number == 1
        expected = _alone(build, tokenizer, folder, dtype=dtype, max_tokens=2000, minimal=minimal)
        found = [Statistics.load(folder / f"statistics-{number}-{rank}") for rank in (0, 1)]
        for statistics in found:
            _assert_same(statistics, expected)
            assert statistics.shrinkage == pytest.approx(expected.shrinkage, rel=1e-9)
            assert bool(statistics.shrinkage) == minimal
        assert torch.equal(found[0].covariances[1], found[1].covariances[1])
        forwards = [_found(folder, number, rank)["forwards"] for rank in (0, 1)]
        # 2000 tokens make at least 32 batches of 64; each process ran about half of them.
        assert sum(forwards) >= 32
        assert abs(forwards[0] - forwards[1]) <= 2
    for rank in (0, 1):
        error = _found(folder, 2, rank)["error"]
        assert "texts must be the same in all processes" in error
        assert "a source that every process can read" in _found(folder, 3, rank)["error"]
        assert Statistics.load(folder / f"statistics-4-{rank}").tokens == 4
    assert sum(_found(folder, 4, rank)["forwards"] for rank in (0, 1)) == 1


def _found(folder: Path, number: int, rank: int) -> dict:
    return json.loads((folder / f"found-{number}-{rank}.json").read_text())


@pytest.mark.slow  # three launches of torchrun, ten seconds each
def test_killed_processes_go_on_each_from_its_own_state(build, tokenizer, folder):
    kept = {"checkpoint_dir": str(folder / "state"), "checkpoint_seconds": 0.0}
    process = _start(folder, {"pause": 0.05, **kept})
    states = [folder / "state" / f"process-{rank}" / "manifest.json" for rank in (0, 1)]
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if all(state.exists() for state in states):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # torchrun ends its processes
    process.communicate(timeout=120)
    assert all(state.exists() for state in states)
    assert not (folder / "statistics-0-0").exists()

    _end(_start(folder, {"resume": True, **kept}, processes=1))
    assert "processes must be as many as before, got 1" in _found(folder, 0, 0)["error"]

    _end(_start(folder, {"resume": True, **kept}))
    expected = _alone(build, tokenizer, folder)
    _assert_same(Statistics.load(folder / "statistics-0-1"), expected)
    whole = len(list(_batches(tokenizer, folder)))
    resumed = sum(_found(folder, 0, rank)["forwards"] for rank in (0, 1))
    assert 0 < resumed < whole


def _batches(tokenizer, folder: Path) -> list:
    texts = (folder / "texts.txt").read_text().splitlines()
    stream = TokenStream(
        iter(texts), tokenizer, max_length=32, max_tokens=None, window_tokens=32 * 64
    )
    batches = []
    while window := stream.window():
        batches += make_batches(window, 0, 64)
    return batches


@pytest.mark.slow  # gloo was seen to abort a process at its exit, after the work was done
def test_the_command_under_torchrun(build, tokenizer, folder):
    words = ["-m", "coachhook", "stats", str(folder / "model"), "--json", "--device", "cpu"]
    words += ["--text", str(folder / "texts.txt"), "--out", str(folder / "out"), "--tokens", "1500"]
    out = _end(_torchrun(*words))
    assert json.loads(out)["tokens"] == 1500  # one process speaks
    assert not (folder / "out.partial").exists()
    expected = _alone(
        build, tokenizer, folder, max_tokens=1500, batch_tokens=2048, sample_size=4096
    )
    _assert_same(Statistics.load(folder / "out"), expected)
