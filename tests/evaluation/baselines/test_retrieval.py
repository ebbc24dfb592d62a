"""Facts put before prompts, through model(...) and generate."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import processors
from transformers import GenerationConfig

from coachhook import EditRequest
from coachhook.evaluation.baselines import make_baseline
from coachhook.evaluation.baselines.retrieval import subject_retriever
from coachhook.evaluation.scoring import encode_prompts, greedy
from tests.evaluation.baselines.support import BATCHES, logits_of
from tests.evaluation.tiny import tiny_tokenizer

FACTS = BATCHES[0]
TEMPLATE = "New fact: {}.\n"
RELATED = "The capital of France is"
BESIDES = "Bob writes in"


@pytest.fixture
def edited(model, tokenizer):
    with make_baseline("retrieval", copy.deepcopy(model), tokenizer) as baseline:
        baseline.edit(FACTS)
        yield baseline._model, baseline


def _with_fact(tokenizer, text, fact=FACTS[0]):
    before = TEMPLATE.format(f"{fact.text} {fact.target_new}")
    return tokenizer(before)["input_ids"] + tokenizer(text)["input_ids"]


@torch.no_grad()
def test_a_related_row_is_answered_as_if_the_fact_stood_before_it(model, tokenizer, edited):
    changed, _ = edited
    ids = tokenizer(RELATED)["input_ids"]
    wanted = model(input_ids=torch.tensor([_with_fact(tokenizer, RELATED)])).logits[:, -len(ids) :]
    found = changed(input_ids=torch.tensor([ids])).logits
    assert torch.equal(found, wanted)
    assert torch.equal(
        changed(input_ids=torch.tensor([ids]), logits_to_keep=2).logits, wanted[:, -2:]
    )
    (alone,) = changed(input_ids=torch.tensor([ids]), return_dict=False)
    assert torch.equal(alone, wanted)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_each_have_their_own_facts(side, model, tokenizer, edited):
    changed, _ = edited
    texts = [RELATED, BESIDES, "Ann Art"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(len(row) for row in rows)
    ids = torch.zeros(3, width, dtype=torch.int64)
    mask = torch.zeros(3, width, dtype=torch.int64)
    for i, row in enumerate(rows):
        places = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, places], mask[i, places] = torch.tensor(row), 1
    found = changed(input_ids=ids, attention_mask=mask).logits
    whole = [_with_fact(tokenizer, RELATED), rows[1], _with_fact(tokenizer, "Ann Art", FACTS[1])]
    for i, (row, tokens) in enumerate(zip(rows, whole, strict=True)):
        wanted = model(input_ids=torch.tensor([tokens])).logits[0, -len(row) :]
        torch.testing.assert_close(found[i][mask[i].bool()], wanted, rtol=1e-5, atol=1e-5)
        assert not found[i][~mask[i].bool()].any()


def test_generate_goes_on_from_the_prompt_alone(model, tokenizer, edited):
    changed, baseline = edited
    texts = [RELATED, BESIDES, "Ann Art speaks", "The capital of Spain is"]
    rows = encode_prompts(tokenizer, texts)
    whole = list(rows)
    whole[0] = tuple(_with_fact(tokenizer, RELATED))
    whole[2] = tuple(_with_fact(tokenizer, "Ann Art speaks", FACTS[1]))
    found = greedy(changed, tokenizer, rows, max_new_tokens=8)
    assert found == greedy(model, tokenizer, whole, max_new_tokens=8)
    assert found != greedy(model, tokenizer, rows, max_new_tokens=8)
    ids = torch.tensor([rows[0]])
    out = changed.generate(ids, max_new_tokens=8, do_sample=False)
    assert out[0, : len(rows[0])].tolist() == list(rows[0])
    with baseline.disabled():
        plain = changed.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(plain, model.generate(ids, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("where", ["arguments", "config", "model"])
def test_limits_of_the_whole_text_do_not_count_the_facts(where, model, tokenizer, edited):
    changed, _ = edited
    model = copy.deepcopy(model)
    prompts = [RELATED, BESIDES]
    rows = [tokenizer(text)["input_ids"] for text in prompts]
    fact = _with_fact(tokenizer, RELATED)
    longest = max(map(len, rows)) + 9
    assert longest < len(fact)  # the fact alone would take all of it
    for limits, new in (
        ({"max_length": longest}, {"max_new_tokens": 9}),
        (
            {"max_length": longest, "min_length": longest - 3},
            {"max_new_tokens": 9, "min_new_tokens": 6},
        ),
        ({"max_length": longest, "max_new_tokens": 4}, {"max_new_tokens": 4}),
    ):
        given = limits
        if where == "config":
            given = {"generation_config": GenerationConfig(**limits)}
        if where == "model":
            ends = {"eos_token_id": 0, "pad_token_id": 0}
            changed.generation_config, given = GenerationConfig(**limits, **ends), {}
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        found = changed.generate(input_ids=ids, attention_mask=mask, do_sample=False, **given)
        for text, row in zip((fact, rows[1]), found, strict=True):
            alone = torch.tensor([text])
            wanted = model.generate(alone, do_sample=False, **new)[0, len(text) :]
            assert row[width : width + len(wanted)].tolist() == wanted.tolist()
            assert not row[width + len(wanted) :].any()  # padding


def test_several_sequences_for_a_prompt(tokenizer, edited):
    changed, _ = edited
    rows = encode_prompts(tokenizer, [RELATED, "Ann Art speaks"])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = changed.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=4,
        num_beams=2,
        num_return_sequences=2,
        do_sample=False,
    )
    assert out.shape == (4, width + 4)
    assert torch.equal(out[:, :width], ids.repeat_interleave(2, 0))


def test_a_start_token_is_not_repeated(model):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
            ),
        ]
    )
    ids = tokenizer(RELATED)["input_ids"]
    assert ids[0] == 0
    whole = tokenizer(TEMPLATE.format(f"{FACTS[0].text} {FACTS[0].target_new}"))["input_ids"]
    whole += ids[1:]
    assert whole.count(0) == 1
    changed = copy.deepcopy(model)
    with make_baseline("retrieval", changed, tokenizer) as baseline, torch.no_grad():
        baseline.edit(FACTS[:1])
        found = changed(input_ids=torch.tensor([ids])).logits
        wanted = model(input_ids=torch.tensor([whole])).logits[:, -len(ids) :]
    assert torch.equal(found, wanted)


def test_a_fact_that_does_not_fit_is_left_out(model, tokenizer, edited):
    changed, _ = edited
    long = RELATED + " and so on" * 11
    ids = torch.tensor([tokenizer(long)["input_ids"]])
    assert 50 < ids.shape[1] <= 64
    with torch.no_grad():
        assert torch.equal(changed(input_ids=ids).logits, model(input_ids=ids).logits)
    ids = torch.tensor([tokenizer(RELATED)["input_ids"]])
    room = 64 - ids.shape[1]  # the continuation needs the whole window
    out = changed.generate(ids, max_new_tokens=room, do_sample=False)
    assert torch.equal(out, model.generate(ids, max_new_tokens=room, do_sample=False))


def test_what_would_be_wrong_for_the_longer_row_is_refused(tokenizer, edited):
    changed, _ = edited
    ids = torch.tensor([tokenizer(RELATED)["input_ids"]])
    with pytest.raises(ValueError, match="labels must be None"):
        changed(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="position_ids must be None"):
        changed(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None])
    with pytest.raises(ValueError, match="decode with model.generate"):
        changed(input_ids=ids, past_key_values=object())
    with pytest.raises(ValueError, match="return_dict_in_generate must not be set"):
        changed.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="input_ids must be given"):
        changed.generate(max_new_tokens=2)
    assert changed(input_ids=ids).past_key_values is None


def test_subject_retriever():
    facts = [
        EditRequest("The capital of {} is", "France", "Lyon"),
        EditRequest("The president of {} is", "France", "Ann"),
        EditRequest("The capital of {} is", "Art", "Rome"),
    ]
    assert subject_retriever("The capital of France is", facts) == [0, 1]
    assert subject_retriever("Who is president of France?", facts) == [1, 0]
    assert subject_retriever("France", facts) == [1, 0]  # the later one of equals
    assert subject_retriever("The artist of Spain", facts) == []
    assert subject_retriever("Artists", facts) == []
    assert subject_retriever("Art's capital", facts) == [2]


def test_a_later_fact_replaces_the_one_asked_for_in_the_same_words(tokenizer, edited):
    changed, baseline = edited
    first = logits_of(changed, tokenizer, [RELATED])[0]
    later = EditRequest("The capital of {} is", "France", "Spain")
    baseline.edit([later])
    found = logits_of(changed, tokenizer, [RELATED])[0]
    assert not torch.equal(found, first)
    with baseline.disabled(), torch.no_grad():
        whole = torch.tensor([_with_fact(tokenizer, RELATED, later)])
        assert torch.equal(found, changed(input_ids=whole).logits[:, -found.shape[1] :])


def test_several_facts_and_a_retriever_of_the_users_own(model, tokenizer):
    changed = copy.deepcopy(model)
    asked = []

    def all_of_them(text, facts):
        asked.append(text)
        return range(len(facts))

    with make_baseline(
        "retrieval", changed, tokenizer, retriever=all_of_them, most=2, template="{}. "
    ) as baseline:
        baseline.edit(FACTS)
        found = logits_of(changed, tokenizer, [BESIDES])[0]
        both = ". ".join(f"{fact.text} {fact.target_new}" for fact in FACTS) + ". "
        whole = tokenizer(both)["input_ids"] + tokenizer(BESIDES)["input_ids"]
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([whole])).logits[:, -found.shape[1] :]
        assert torch.equal(found, wanted)
    assert asked[-1] == BESIDES
