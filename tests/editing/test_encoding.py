"""Token ids of requests, for tokenizers that differ in what they add."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from coachhook.editing.prompts import encode_target


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
