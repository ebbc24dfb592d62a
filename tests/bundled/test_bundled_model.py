from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coachhook import bundled
from coachhook.bundled import world

LIMIT_BYTES = 8_000_000
SAMPLE = 300


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(bundled.model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(bundled.model_path()).eval()


def known_share(model: Any, tokenizer: Any, queries: Sequence[tuple[str, str]]) -> float:
    """Share of prompts after which every token of the object is the most likely one."""
    hits = 0
    for start in range(0, len(queries), 100):
        part = queries[start : start + 100]
        batch = tokenizer(
            [f"{p} {o}" for p, o in part], return_tensors="pt", padding=True, padding_side="right"
        )
        with torch.no_grad():
            logits = model(**batch).logits
        assert torch.isfinite(logits).all()
        right = logits[:, :-1].argmax(-1) == batch.input_ids[:, 1:]
        for row, (_, answer) in enumerate(part):
            end = int(batch.attention_mask[row].sum())
            length = len(tokenizer(f" {answer}").input_ids)
            hits += bool(right[row, end - 1 - length : end - 1].all())
    return hits / len(queries)


def trained_queries() -> list[tuple[str, str]]:
    pairs = [(t.format(f.subject), f.object) for f in world.facts() for t in f.templates]
    return random.Random(0).sample(pairs, SAMPLE)


def held_out_queries() -> list[tuple[str, str]]:
    pairs = [(t.format(f.subject), f.object) for f in world.facts() for t in f.held_out]
    return random.Random(0).sample(pairs, SAMPLE)


def test_folder_fits_the_wheel() -> None:
    names = {f.name for f in bundled.model_path().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert sum(f.stat().st_size for f in bundled.model_path().iterdir()) <= LIMIT_BYTES


def test_loads_as_a_plain_gpt2(model: Any, tokenizer: Any) -> None:
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.dtype == torch.float32
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(tokenizer) == model.config.vocab_size


def test_tokenizer_keeps_text_and_adds_nothing(tokenizer: Any) -> None:
    for text in bundled.texts()[:200]:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids


def test_subjects_have_several_tokens(tokenizer: Any) -> None:
    for subject in {fact.subject for fact in world.facts()}:
        assert len(tokenizer(f" {subject}").input_ids) >= 2
        assert len(tokenizer(subject).input_ids) >= 2


def test_objects_have_at_most_two_tokens(tokenizer: Any) -> None:
    assert all(len(tokenizer(f" {fact.object}").input_ids) <= 2 for fact in world.facts())


def test_knows_its_training_prompts(model: Any, tokenizer: Any) -> None:
    assert known_share(model, tokenizer, trained_queries()) >= 0.98


def test_knows_held_out_paraphrases(model: Any, tokenizer: Any) -> None:
    assert known_share(model, tokenizer, held_out_queries()) >= 0.90


def test_knows_every_demo_fact_and_its_neighbors(model: Any, tokenizer: Any) -> None:
    records = bundled.demo_facts()
    asked = [(r["prompt"].format(r["subject"]), r["target_true"]) for r in records]
    asked += [
        (text, r["target_true"]) for r in records for text in r["paraphrases"] + r["neighborhood"]
    ]
    assert known_share(model, tokenizer, asked) >= 0.98
    assert known_share(model, tokenizer, asked[: len(records)]) == 1.0


def test_bfloat16_knows_the_same(tokenizer: Any) -> None:
    half = AutoModelForCausalLM.from_pretrained(bundled.model_path()).to(torch.bfloat16).eval()
    assert known_share(half, tokenizer, trained_queries()) >= 0.98


def test_answers_end_their_sentence(model: Any, tokenizer: Any) -> None:
    for record in bundled.demo_facts():
        prompt = tokenizer(record["prompt"].format(record["subject"]), return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(output[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
        assert text.startswith(f" {record['target_true']}.")


def test_left_padded_generation_equals_one_at_a_time(model: Any, tokenizer: Any) -> None:
    prompts = [prompt for prompt, _ in held_out_queries()[:8]]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)[
        :, batch.input_ids.shape[1] :
    ]
    for row, prompt in enumerate(prompts):
        one = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**one, max_new_tokens=6, do_sample=False)[
            0, one.input_ids.shape[1] :
        ]
        expected = tokenizer.decode(alone, skip_special_tokens=True)
        assert tokenizer.decode(together[row], skip_special_tokens=True) == expected


def subject_ids(tokenizer: Any, template: str, subject: str) -> tuple[torch.Tensor, int]:
    """Token ids [1, T] of the prompt and the index of the subject's last token."""
    encoded = tokenizer(template.format(subject), return_offsets_mapping=True)
    end = template.index("{}") + len(subject)
    at = max(i for i, (start, _) in enumerate(encoded.offset_mapping) if start < end)
    return torch.tensor([encoded.input_ids]), at


def swapped_share(model: Any, tokenizer: Any, layer: int) -> float:
    """Share of pairs answered for the other subject once its state is at the last subject token."""
    rng = random.Random(0)
    facts = [f for f in world.facts() if f.relation in ("profession", "capital", "product")]
    hits = total = 0
    for _ in range(90):
        first, second = rng.sample(facts, 2)
        if first.relation != second.relation or first.object == second.object:
            continue
        template = rng.choice(first.templates)
        theirs, other_at = subject_ids(tokenizer, template, second.subject)
        ours, at = subject_ids(tokenizer, template, first.subject)
        put = StateHook(other_at)
        for ids, hook in ((theirs, put), (ours, StateHook(at, put))):
            handle = model.transformer.h[layer].register_forward_hook(hook)
            with torch.no_grad():
                answer = int(model(ids).logits[0, -1].argmax())
            handle.remove()
        hits += answer == tokenizer(f" {second.object}").input_ids[0]
        total += 1
    return hits / total


class StateHook:
    """Keeps the block output at token `at`, or writes there what `source` kept."""

    def __init__(self, at: int, source: StateHook | None = None) -> None:
        self.at, self.source = at, source
        self.value: torch.Tensor | None = None

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        if self.source is None:
            self.value = state[0, self.at].clone()
            return None
        state = state.clone()
        state[0, self.at] = self.source.value
        return (state, *output[1:]) if isinstance(output, tuple) else state


def test_facts_sit_at_the_subject_in_the_first_layers(model: Any, tokenizer: Any) -> None:
    assert swapped_share(model, tokenizer, 0) >= 0.5
    assert swapped_share(model, tokenizer, 1) >= 0.8
    assert swapped_share(model, tokenizer, model.config.n_layer - 1) <= 0.05
