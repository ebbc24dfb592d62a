"""Whole edits on a GPU: as on a processor; replayed steps give the targets of others."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from coachhook import EditConfig, Editor, bundled
from coachhook.bench.editing import requests
from coachhook.bench.model import Shape, random_model
from coachhook.editing.replay import Replayed
from coachhook.editing.suffix import Suffix
from coachhook.models import describe
from coachhook.statistics import collect_statistics

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

VOCABULARY = 1792  # the bundled tokenizer's
SHAPES = {
    "gpt2": {"n_positions": 128, "n_embd": 64, "n_layer": 6, "n_head": 4},
    "gptj": {"n_positions": 128, "n_embd": 64, "n_layer": 6, "n_head": 4, "rotary_dim": 8},
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
}


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def captured(monkeypatch) -> list[bool]:
    """Collects the captures."""
    made: list[bool] = []
    capture = Replayed._captured

    def noted(self, *arguments):
        made.append(True)
        return capture(self, *arguments)

    monkeypatch.setattr(Replayed, "_captured", noted)
    return made


def model_of(kind: str, device: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    special = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    shape = Shape(kind, kind, SHAPES[kind] | special, [])
    return random_model(shape, dtype, torch.device("cpu")).to(device)


def editor_of(model, tokenizer, config: EditConfig) -> Editor:
    statistics = collect_statistics(
        model, tokenizer, bundled.texts(), config.layers, max_tokens=2000, progress=False,
        key_site=config.key_site,
    )  # fmt: skip
    return Editor(model, tokenizer, statistics=statistics, config=config)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("preset", ["for_model", "paper"])
def test_replayed_steps_give_the_targets_of_others(kind, preset, captured, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    facts, found = requests(24), []
    for replays in (None, False):
        monkeypatch.setattr(Suffix, "replays", replays)
        model = model_of(kind, "cuda", torch.float64)
        editor = editor_of(model, tokenizer, getattr(EditConfig, preset)(model))
        found.append([editor.edit(facts[:12]), editor.edit(facts[12:])])
        assert bool(captured) == (replays is None)
        captured.clear()
    for ours, others in zip(*found, strict=True):
        assert ours.steps == others.steps and ours.converged == others.converged
        # Rounding of some sixty steps; a wrong row or a stale buffer gives one of order 1.
        difference = (ours.targets - others.targets).norm(dim=0) / others.targets.norm(dim=0)
        assert float(difference.max()) < 1e-6


def test_statistics_and_keys_are_those_of_a_processor():
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    found = []
    for device in ("cpu", "cuda"):
        model = model_of("gpt2", device)
        layers = [layer.index for layer in describe(model).layers]
        found.append(
            collect_statistics(
                model, tokenizer, bundled.texts(), layers, max_tokens=3000, progress=False
            )
        )
    for layer, expected in found[0].covariances.items():
        got = found[1].covariances[layer]
        assert torch.equal(got, got.T)
        assert float((got - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("key_site", ["down_proj", "mlp"])
def test_a_bfloat16_model_is_edited_and_reverted(captured, key_site):
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    model = model_of("llama", "cuda", torch.bfloat16)
    editor = editor_of(model, tokenizer, EditConfig.for_model(model, key_site=key_site))
    ids = tokenizer(bundled.texts()[0], return_tensors="pt").input_ids.to("cuda")
    with torch.inference_mode():
        before = model(ids).logits
        facts = requests(30)
        for first in (0, 10, 20):
            with torch.inference_mode(False):
                result = editor.edit(facts[first : first + 10])
            assert torch.isfinite(result.targets).all()
        assert captured
        for number in [*editor.batches]:
            editor.revert(batch=number)
        assert torch.equal(model(ids).logits, before)
