"""Where a word ends: so that a target is not run on, as "Lyon" to "Lyons".

A target's tokens may all come out and its word go on all the same. Nothing asks what comes after
the target, but a target that ends in the middle of a word is not the answer that was wanted.
"""

from __future__ import annotations

import unicodedata
from typing import Any

import torch
from torch import Tensor

# Letters of scripts with two cases, and digits. Scripts without case may set no space between
# words, so that the next letter says nothing.
_IN_WORDS = ("Lu", "Ll", "Lt", "Nd")
# A token after this one is looked at: a tokenizer may decode the first of a text otherwise.
_BEFORE = "a"


def ends_word(text: str) -> bool:
    """Whether a letter or digit after ``text`` would go on with its last word."""
    return bool(text) and unicodedata.category(text[-1]) in _IN_WORDS


def word_continuing_tokens(tokenizer: Any, size: int) -> Tensor:
    """Which ids go on with the word before them, bool ``[size]``.

    Args:
        tokenizer: of the model.
        size: tokens the model has logits of; those the tokenizer does not know go on with nothing.
    """
    before = list(tokenizer(_BEFORE, add_special_tokens=False)["input_ids"])
    known = min(len(tokenizer), size)
    # As it stands: English tokenizers may draw "n't" to the word before it otherwise.
    start, *texts = tokenizer.batch_decode(
        [before, *([*before, token] for token in range(known))], clean_up_tokenization_spaces=False
    )
    continues = torch.zeros(size, dtype=torch.bool)
    continues[:known] = torch.tensor([text[len(start) :][:1].isalnum() for text in texts])
    return continues
