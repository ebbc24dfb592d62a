from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{i}" for i in range(60)]
_COMMON = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BUILDERS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_COMMON, n_positions=32, n_embd=24, n_layer=3, n_head=3)
    ),
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(**_COMMON, n_positions=32, n_embd=24, n_layer=3, n_head=3, rotary_dim=4)
    ),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **_COMMON,
            max_position_embeddings=32,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=3,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **_COMMON,
            max_position_embeddings=32,
            hidden_size=24,
            ffn_dim=40,
            num_hidden_layers=3,
            num_attention_heads=3,
            word_embed_proj_dim=24,
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            **_COMMON,
            max_position_embeddings=32,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ),
}


def _build(family: str = "gpt2"):
    torch.manual_seed(11)
    model = _BUILDERS[family]().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # default weights are so small that attention would be uniform
    return model


def _texts(count: int, longest: int = 20, seed: int = 5) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def _tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {
        word: 4 + i for i, word in enumerate(WORDS)
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="session")
def build():
    return _build


@pytest.fixture(scope="session")
def make_texts():
    return _texts


@pytest.fixture(scope="session")
def make_tokenizer():
    return _tokenizer


@pytest.fixture(params=list(_BUILDERS))
def any_model(request):
    return _build(request.param)


@pytest.fixture
def model():
    return _build()


@pytest.fixture
def tokenizer():
    return _tokenizer()
