"""Token ids of requests, for tokenizers that differ in what they add."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from coachhook.cli.ask import continuations
from coachhook.editing.prompts import encode_target
from coachhook.evaluation.scoring import encode_pairs, score


@pytest.fixture(scope="module")
def llama2():
    """A tokenizer in the manner of Llama 2: a text starts with a space of the tokenizer's own."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    words = "The capital of France is a Paris Lyon".split()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(words * 20, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("target", ["Lyon", " Lyon", "Lyon is a capital"])
def test_a_target_goes_on_with_the_prompt(llama2, target):
    prompt = "The capital of France is"
    whole = llama2(f"{prompt} {target.strip()}")["input_ids"]
    assert llama2(prompt)["input_ids"] + encode_target(llama2, target) == whole


def test_a_reply_goes_on_with_white_space(bundled):
    """What a chat template ends with: no space of ours is put in between."""
    _, tokenizer, _ = bundled
    head, alone = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("It:\n", "Lyon"))
    assert encode_target(tokenizer, "Lyon", "It:\n") == alone
    assert tokenizer.decode(head + alone) == "It:\nLyon"
    assert encode_target(tokenizer, "Lyon", "It:") != alone


def test_a_reply_is_written_without_a_space(make_editor, requests):
    editor, model, tokenizer = make_editor()
    request = replace(requests[0], prompt=f"{requests[0].prompt}\n")
    assert editor.edit([request]).converged == [True]
    (answer,) = continuations(model, tokenizer, [request.text], 3)
    assert answer.startswith(request.target_new), answer
    (row,) = encode_pairs(tokenizer, [(request.text, request.target_new)])
    assert tokenizer.decode(row.ids) == f"{request.text}{request.target_new}"
    assert score(model, [row])[0].accuracy == 1.0
