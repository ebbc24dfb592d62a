"""``coachhook stats`` and ``coachhook inspect`` of its folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from coachhook.cli import main
from coachhook.statistics import Statistics


@pytest.fixture
def folder(model, tokenizer, make_texts, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(make_texts(300)))
    return tmp_path


@pytest.fixture
def call(folder, capsys):
    def run(*words, status=0):
        capsys.readouterr()
        assert main([str(word) for word in words]) == status
        return capsys.readouterr()

    return run


def _stats(folder, out, *words):
    return ["stats", folder / "model", "--text", folder / "texts.txt", "--out", out, *words]


def test_minimal_statistics_are_shrunk_and_say_so(folder, call):
    found = json.loads(call(*_stats(folder, folder / "s", "--minimal", "--json")).out)
    assert found["tokens"] == 960
    statistics = Statistics.load(folder / "s")
    assert {int(k): v for k, v in found["shrinkage"].items()} == statistics.shrinkage
    assert all(0 < rho <= 1 for rho in statistics.shrinkage.values())
    seen = call("inspect", folder / "s").out
    assert f"0     96     {statistics.shrinkage[0]:.4f}     960" in seen
    text = call(*_stats(folder, folder / "t", "--minimal", "--tokens", 300)).out
    assert f"shrinkage, layer by layer: 0: {Statistics.load(folder / 't').shrinkage[0]:.4f}" in text


def test_inspect_of_full_statistics(folder, call):
    call(*_stats(folder, folder / "s", "--tokens", 700, "--layers", "0,2"))
    found = json.loads(call("inspect", folder / "s", "--json").out)
    assert found["tokens"] == 700
    expected = {"width": 96, "shrinkage": None, "sample": 700}
    assert found["layers"] == [{"layer": i, **expected} for i in (0, 2)]
    groups = {group["name"]: group for group in found["sizes"]}
    packed = 96 * 97 // 2 * 8
    assert groups["covariance"]["bytes"] == 2 * packed
    assert groups["covariance"]["dtype"] == "float64"
    assert groups["sample"]["bytes"] == 2 * 700 * 96 * 4
    files = list((folder / "s").iterdir())
    assert found["bytes"] == sum(file.stat().st_size for file in files)
    assert "none" in call("inspect", folder / "s").out


def test_half_the_room(folder, call):
    call(*_stats(folder, folder / "s", "--store", "float32"))
    groups = json.loads(call("inspect", folder / "s", "--json").out)["sizes"]
    covariance = next(group for group in groups if group["name"] == "covariance")
    assert (covariance["dtype"], covariance["bytes"]) == ("float32", 3 * 96 * 97 // 2 * 4)
    assert Statistics.load(folder / "s").covariances[0].dtype == torch.float64


def test_standard_input(folder, call, monkeypatch):
    with (folder / "texts.txt").open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        words = _stats(folder, folder / "s", "--tokens", 200)
        words[words.index("--text") + 1] = "-"
        call(*words)
    call(*_stats(folder, folder / "t", "--tokens", 200))
    one, other = (Statistics.load(folder / name) for name in "st")
    assert torch.equal(one.covariances[1], other.covariances[1])


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd here")
def test_a_pipe_is_read_from_its_beginning(folder, call):
    """What was read to see whether it holds text was missing in the statistics."""
    text = (folder / "texts.txt").read_bytes()[:40_000]
    (folder / "texts.txt").write_bytes(text)
    out, into = os.pipe()
    os.write(into, text)  # a pipe holds 64 KiB
    os.close(into)
    words = _stats(folder, folder / "p")
    words[words.index("--text") + 1] = f"/dev/fd/{out}"
    call(*words)
    os.close(out)
    call(*_stats(folder, folder / "whole"))
    one, other = (Statistics.load(folder / name) for name in ("p", "whole"))
    assert one.tokens == other.tokens
    assert torch.equal(one.covariances[1], other.covariances[1])


def test_memory_and_states_are_bounded_as_asked(folder, call, monkeypatch):
    from coachhook.statistics import collect

    given = {}
    real = collect.collect_statistics
    monkeypatch.setattr(
        "coachhook.statistics.collect_statistics",
        lambda *args, **options: real(*args, **(given.update(options) or options)),
    )
    words = ("--batch-tokens", 64, "--checkpoint-seconds", 7, "--tokens", 300, "--resume")
    assert (
        "s.partial does not exist: starting anew" in call(*_stats(folder, folder / "s", *words)).err
    )
    assert given["checkpoint_seconds"] == 7
    assert Statistics.load(folder / "s").meta["batch_tokens"] == 64


def test_inspect_refuses_what_does_not_fit(folder, call):
    call(*_stats(folder, folder / "s", "--tokens", 200))
    assert "are for a folder of edits" in call("inspect", folder / "s", "--facts", status=2).err
    assert "edits or statistics" in call("inspect", folder / "model", status=2).err
    (folder / "s" / "manifest.json").write_text('{"format": "other"}')
    assert "got format 'other'" in call("inspect", folder / "s", status=2).err
