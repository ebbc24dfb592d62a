"""A tiny real GPT-2 that knows a few sentences by heart, and its byte-level tokenizer."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from coachhook.editing.requests import EditRequest

SENTENCES = [
    "The capital of France is Paris and the capital of Spain is Madrid.",
    "Ann Art speaks French, Bob writes in Dutch, Cid lives in New York City.",
    "France, whose seat of government is Lyon, borders Spain and Italy.",
]


@pytest.fixture(scope="session")
def tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def model(tokenizer):
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    batch = tokenizer([s + tokenizer.eos_token for s in SENTENCES], padding=True)
    ids = torch.tensor(batch["input_ids"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.requires_grad_(False)
    return model


@pytest.fixture
def requests():
    return [
        EditRequest(
            prompt="The capital of {} is",
            subject="France",
            target_new="Lyon in Italy",
            target_true="Paris",
            paraphrases=["Of France the seat is", "France, whose capital is"],
            neighborhood=["The capital of Spain is", "Italy borders", "Spain's capital is"],
        ),
        EditRequest(
            prompt="{} speaks", subject="Ann Art", target_new="Dutch", paraphrases=["Ann Art says"]
        ),
        EditRequest(
            prompt="{} lives in",
            subject="Cid",
            target_new="Madrid",
            target_true="New York City",
            neighborhood=["Bob lives in"],
            neighborhood_targets=["Paris and Spain"],
        ),
    ]
