from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from coachhook.errors import FingerprintMismatchError, FormatError
from coachhook.statistics import Statistics, collect, collect_statistics
from coachhook.store import load_folder
from tests import processes

# A slow stream of texts, so that the kill meets the run in its midst.
_RUN = """
import sys, time
from transformers import AutoModelForCausalLM, AutoTokenizer
from coachhook.statistics import collect_statistics, read_texts

def slowly(texts):
    for text in texts:
        time.sleep(0.005)
        yield text

folder, resume = sys.argv[1], sys.argv[2] == "resume"
model = AutoModelForCausalLM.from_pretrained(folder + "/model")
tokenizer = AutoTokenizer.from_pretrained(folder + "/model")
statistics = collect_statistics(
    model, tokenizer, slowly(read_texts(folder + "/texts.txt")), max_tokens=3000, batch_tokens=64,
    sample_size=100, checkpoint_dir=folder + "/checkpoint", checkpoint_seconds=0.0, resume=resume,
)
statistics.save(folder + "/statistics")
"""


def _collect(model, tokenizer, texts, **settings):
    defaults = {"batch_tokens": 64, "sample_size": 100, "progress": False}
    return collect_statistics(model, tokenizer, texts, **defaults | settings)


def _position(checkpoint: Path) -> dict | None:
    try:
        return json.loads((checkpoint / "manifest.json").read_text())["position"]
    except FileNotFoundError:
        return None


def test_a_killed_run_goes_on_and_ends_bit_identical(build, tokenizer, make_texts, tmp_path):
    model, texts = build("llama"), make_texts(500)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    expected = _collect(model, tokenizer, texts, max_tokens=3000)

    kills = 0
    for mode in ("start", "resume"):
        before = _position(tmp_path / "checkpoint")
        process = processes.start(_RUN, tmp_path, mode)
        deadline = time.monotonic() + 120
        while process.exitcode is None and time.monotonic() < deadline:
            now = _position(tmp_path / "checkpoint")
            if now is not None and now != before and (before is None or now["counts"]["tokens"]):
                process.kill()
                break
            time.sleep(0.005)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills == 2
    assert not (tmp_path / "statistics").exists()

    assert processes.run(_RUN, tmp_path, "resume") == 0
    found = Statistics.load(tmp_path / "statistics")
    assert found.tokens == expected.tokens == 3000
    for layer in expected.layers:
        assert torch.equal(found.covariances[layer], expected.covariances[layer])
        assert torch.equal(found.samples[layer], expected.samples[layer])
    assert found.meta["texts"] == expected.meta["texts"]


class _Killed(Exception):
    pass


@pytest.fixture(scope="module")
def died(build, make_tokenizer, make_texts, tmp_path_factory):
    """A checkpoint of a run that ended in the midst of a window."""
    model, state = build(), tmp_path_factory.mktemp("died") / "state"
    texts, forwards = make_texts(400), []

    def die(module, arguments):
        forwards.append(1)
        if len(forwards) == 45:
            raise _Killed

    handle = model.transformer.h[1].register_forward_pre_hook(die)
    with pytest.raises(_Killed):
        _collect(model, make_tokenizer(), texts, checkpoint_dir=state, checkpoint_seconds=0.0)
    handle.remove()
    position = _position(state)
    assert position["counts"]["read"] > 0 and position["batches"] > 0
    return state


@pytest.fixture
def interrupted(died, make_texts, tmp_path):
    """A copy of that checkpoint, and the texts of the run."""
    return shutil.copytree(died, tmp_path / "state"), make_texts(400)


def test_resuming_twice_gives_the_same_and_a_finished_run_comes_back(model, tokenizer, interrupted):
    state, texts = interrupted
    expected = _collect(model, tokenizer, texts)
    for _ in range(2):
        found = _collect(model, tokenizer, texts, checkpoint_dir=state, resume=True)
        assert found.tokens == expected.tokens
        for layer in expected.layers:
            assert torch.equal(found.covariances[layer], expected.covariances[layer])
            assert torch.equal(found.samples[layer], expected.samples[layer])


def test_the_progress_of_a_resumed_run_begins_where_the_state_is(
    model, tokenizer, interrupted, monkeypatch
):
    state, texts = interrupted
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(collect, "tqdm", Bar)
    _, tensors = load_folder(state, "statistics-checkpoint")
    done = int(tensors["counts"].sum())
    assert done > _position(state)["counts"]["tokens"]
    settings = {"checkpoint_dir": state, "resume": True, "progress": True}
    whole = _collect(model, tokenizer, texts, **settings).tokens
    _collect(model, tokenizer, texts, **settings)  # of a run that had come to its end
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [
        (done, whole, whole),
        (whole, whole, whole),
    ]


def test_without_a_state_resume_starts_at_the_beginning(model, tokenizer, make_texts, tmp_path):
    texts = make_texts(20)
    found = _collect(model, tokenizer, texts, checkpoint_dir=tmp_path / "new", resume=True)
    assert torch.equal(found.covariances[1], _collect(model, tokenizer, texts).covariances[1])


def test_without_resume_the_state_is_replaced(model, tokenizer, interrupted):
    state, texts = interrupted
    found = _collect(model, tokenizer, texts[:10], checkpoint_dir=state)
    assert torch.equal(found.covariances[1], _collect(model, tokenizer, texts[:10]).covariances[1])
    assert _position(state)["counts"]["read"] == 10


def test_the_state_of_another_model_is_refused(build, tokenizer, interrupted):
    state, texts = interrupted
    other = build()
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight += 0.1
    with pytest.raises(FingerprintMismatchError, match="resume: fingerprint must be"):
        _collect(other, tokenizer, texts, checkpoint_dir=state, resume=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": [0]},
        {"max_tokens": 500},
        {"batch_tokens": 65},
        {"sample_size": 3},
        {"key_site": "mlp"},
    ],
)
def test_the_state_of_other_settings_is_refused(model, tokenizer, interrupted, settings):
    state, texts = interrupted
    with pytest.raises(ValueError, match=f"resume: {next(iter(settings))} must be"):
        _collect(model, tokenizer, texts, checkpoint_dir=state, resume=True, **settings)


@pytest.mark.parametrize("place", ["before", "in_window", "missing"])
def test_the_state_of_other_texts_is_refused(model, tokenizer, interrupted, place):
    state, texts = interrupted
    if place == "before":
        texts[3] += " w9"
    elif place == "in_window":
        texts[_position(state)["counts"]["read"] + 2] += " w9"
    else:
        texts = texts[:5]
    with pytest.raises(ValueError, match="resume: texts"):
        _collect(model, tokenizer, texts, checkpoint_dir=state, resume=True)


def test_texts_that_have_grown_since_are_read_as_they_are_now(
    model, tokenizer, make_texts, interrupted
):
    state, texts = interrupted
    texts = texts + make_texts(550)[400:]
    for _ in range(2):
        found = _collect(model, tokenizer, texts, checkpoint_dir=state, resume=True)
        expected = _collect(model, tokenizer, texts)
        assert found.tokens == expected.tokens
        assert torch.equal(found.sample_tokens, expected.sample_tokens)
        for layer in expected.layers:
            torch.testing.assert_close(found.covariances[layer], expected.covariances[layer])
        texts = texts + make_texts(700)[600:]  # and after the run had come to its end


def test_a_damaged_state_is_refused(model, tokenizer, interrupted):
    state, texts = interrupted
    file = state / "tensors-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FormatError, match="truncated"):
        _collect(model, tokenizer, texts, checkpoint_dir=state, resume=True)


def test_an_unusable_folder_is_refused_before_any_work(model, tokenizer, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_text("x")

    def untouched():
        raise AssertionError("read")
        yield

    with pytest.raises(ValueError, match="save: path must be a new or empty folder"):
        _collect(model, tokenizer, untouched(), checkpoint_dir=tmp_path / "mine")
