"""Real prompts on small trained models of two architectures."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from coachhook.hooks import attach_hooks
from coachhook.models import load_model

from .support import SCOPES, calibrate, fill, fired

MODELS = ("factlm-gpt2", "factlm-llama")
# Answers take seconds: each scope on one of the models, the one that keeps most on both.
ANSWERED = [
    ("factlm-gpt2", "sequence"),
    ("factlm-gpt2", "membership"),
    ("factlm-gpt2", "cued"),
    ("factlm-llama", "prefix"),
    ("factlm-llama", "population"),
    ("factlm-llama", "cued"),
]


@pytest.fixture(scope="module")
def texts(shared_dir: Path) -> list[str]:
    records = json.loads((shared_dir / "data" / "counterfact_dev.json").read_text())[:4]
    rewrites = [record["requested_rewrite"] for record in records]
    return [
        *(rewrite["prompt"].format(rewrite["subject"]) for rewrite in rewrites),
        *(record["paraphrase_prompts"][0] for record in records),
    ]


def _answers(model, tokenizer, texts: list[str], **settings) -> list[str]:
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        out = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=6,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :])


def _until_end(text: str, tokenizer) -> str:
    return text.split(tokenizer.eos_token)[0]


@pytest.fixture(scope="module")
def loaded(shared_dir: Path):
    """Models by name and dtype, each read once: tests take their hooks off again."""
    return cache(lambda name, dtype: load_model(shared_dir / "models" / name, dtype=dtype))


@pytest.mark.parametrize(("name", "scope"), ANSWERED)
def test_batches_and_beams_answer_as_one_prompt_at_a_time(
    loaded, texts: list[str], name: str, scope: str
) -> None:
    model, tokenizer = loaded(name, "float64")
    plain = _answers(model, tokenizer, texts)
    hooks = attach_hooks(model)
    assert list(hooks) == [0, 1, 2]
    fill(hooks, scope, size=20.0)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    calibrate(model, hooks, batch["input_ids"], share=0.2)
    with hooks.record() as records:
        together = _answers(model, tokenizer, texts)
    assert fired(records) > 0
    assert together != plain
    alone = [_answers(model, tokenizer, [text])[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        assert _until_end(one, tokenizer) == _until_end(other, tokenizer)
    beams = _answers(model, tokenizer, texts[:2], num_beams=3)
    for text, answer in zip(texts[:2], beams, strict=True):
        single = _answers(model, tokenizer, [text], num_beams=3)[0]
        assert _until_end(answer, tokenizer) == _until_end(single, tokenizer)
    hooks.detach()
    assert _answers(model, tokenizer, texts) == plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", MODELS)
def test_padding_moves_no_decision(
    loaded, texts: list[str], name: str, scope: str, dtype: str
) -> None:
    """In the dtypes of use a token fires alone exactly where it fires in a padded batch.

    Only the first hooked layer is looked at: it sees the same input either way, up to the rounding
    of the attention below it, and alpha lies in a gap of the scores.
    """
    model, tokenizer = loaded(name, dtype)
    hooks = attach_hooks(model, [0])
    fill(hooks, scope)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    mask = batch["attention_mask"].bool()
    layer = hooks[0]
    if scope == "population":
        layer.set_scope(scope, population=(10.0, 5.0))
    with torch.no_grad(), hooks.record() as records:
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    z = records[0][1]
    real = z[mask & ~z.isnan()].sort().values
    top = real[int(0.7 * len(real)) : int(0.95 * len(real))]
    widest = int((top[1:] - top[:-1]).argmax())
    layer.set_alpha(float((top[widest] + top[widest + 1]) / 2))
    with torch.no_grad(), hooks.record() as records:
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
        for row, keep in zip(batch["input_ids"], mask, strict=True):
            model(row[keep][None])
    together, *alone = records
    assert fired([together]) > 0
    for i, (_, _, flags) in enumerate(alone):
        assert torch.equal(together[2][i][mask[i]], flags[0])
        assert not together[2][i][~mask[i]].any()
    hooks.detach()
