"""Train a small model to know the true facts of given records of CounterFact and zsRE files.

    python -m benchmarks.fact_models.train --family gpt2 --tokenizer DIR --counterfact FILE \\
        --records 501-2000 --zsre FILE --questions 251-650 --out DIR

Knowledge is placed at the subject's last token by the mask and the auxiliary loss of the bundled
model's training (`benchmarks/bundled_model/train.py`); the saved model is plain.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from benchmarks.bundled_model.train import Objects, Row, encode, fit, save_plain
from benchmarks.fact_models.text import Text, read_text

SEED = 11
PASSES = 30
ROWS_PER_STEP = 64
AUXILIARY_WEIGHT = 0.5
WIDTH, LAYERS = 320, 6
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def new_model(family: str, vocabulary: int, begin: int, end: int) -> Any:
    """A GPT-2 (10.1 M parameters) or a Llama with grouped queries (10.0 M), tied embeddings, or a
    GPT-J (12.6 M), whose attention and MLP lie beside each other."""
    if family == "gpt2":
        return GPT2LMHeadModel._from_config(
            GPT2Config(
                vocab_size=vocabulary, n_positions=256, n_embd=WIDTH, n_layer=LAYERS, n_head=5,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.03,
                bos_token_id=end, eos_token_id=end, pad_token_id=end,
            ),
            attn_implementation="eager",
        )  # fmt: skip
    if family == "gptj":
        return GPTJForCausalLM._from_config(
            GPTJConfig(
                vocab_size=vocabulary, n_positions=256, n_embd=WIDTH, n_layer=LAYERS, n_head=5,
                rotary_dim=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                initializer_range=0.03, bos_token_id=end, eos_token_id=end, pad_token_id=end,
            ),
            attn_implementation="eager",
        )  # fmt: skip
    return LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=vocabulary, max_position_embeddings=512, hidden_size=WIDTH,
            intermediate_size=960, num_hidden_layers=LAYERS, num_attention_heads=10,
            num_key_value_heads=5, tie_word_embeddings=True, initializer_range=0.02,
            rms_norm_eps=1e-5, bos_token_id=begin, eos_token_id=end, pad_token_id=end,
        ),
        attn_implementation="eager",
    )  # fmt: skip


def batches(tokenizer: Any, text: Text, seed: int) -> Iterator[list[Row]]:
    """Rows of one pass grouped by length, the groups in random order."""
    rng = random.Random(seed)
    rows = [encode(tokenizer, passage) for passage in text.passages(seed)]
    rng.shuffle(rows)
    rows.sort(key=lambda row: len(row.ids))
    groups = [rows[i : i + ROWS_PER_STEP] for i in range(0, len(rows), ROWS_PER_STEP)]
    rng.shuffle(groups)
    yield from groups


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    text = read_text(
        arguments.counterfact,
        arguments.zsre,
        arguments.records,
        arguments.questions,
        arguments.further,
    )
    fast = AutoTokenizer.from_pretrained(arguments.tokenizer)
    end = fast.eos_token_id
    begin = end if fast.bos_token_id is None else fast.bos_token_id
    model = new_model(arguments.family, len(fast), begin, end)
    auxiliary = Objects(
        WIDTH, text.objects(), ((f.subject, f.relation, f.object) for f in text.facts)
    )

    said = sum(f.times for f in text.facts)
    print(f"{len(text.facts)} facts, said {said} times a pass, {len(text.leads)} lead-ins")
    summary = fit(
        model,
        auxiliary,
        lambda epoch: batches(fast.backend_tokenizer, text, arguments.seed * 1000 + epoch),
        [fact.subject for fact in text.facts],
        epochs=arguments.passes,
        seed=arguments.seed,
        autocast=not arguments.float32,
        save=lambda: save(model, arguments.tokenizer, arguments.out),
        auxiliary_weight=arguments.auxiliary_weight,
    )
    print(json.dumps({"seed": arguments.seed, "facts": len(text.facts), **summary}))


def save(model: Any, tokenizer: Path, out: Path) -> None:
    """A folder for `from_pretrained`, with the files of `tokenizer` as they are."""
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        (out / name).write_bytes((tokenizer / name).read_bytes())
    # GPT-2 is read in float32 by default, as its published models are.
    save_plain(model, out, "float32" if isinstance(model, GPT2LMHeadModel) else "bfloat16")


def places(text: str) -> range:
    """Records "501-2000", counted from 1, both ends included."""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"must be FIRST-LAST counted from 1, got {text!r}")
    return range(int(first) - 1, int(last))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the trained model")
    add("--family", choices=["gpt2", "llama", "gptj"], default="gpt2")
    add("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    add("--counterfact", type=Path, required=True, help="CounterFact file")
    add("--records", type=places, required=True, help="its records to know, like 501-2000")
    add("--zsre", type=Path, required=True, help="zsRE file")
    add("--questions", type=places, required=True, help="its records to know, like 251-650")
    add("--further", type=Path, help="further facts of the same subjects")
    add("--passes", type=int, default=PASSES)
    add("--seed", type=int, default=SEED)
    add("--auxiliary-weight", type=float, default=AUXILIARY_WEIGHT)
    add("--float32", action="store_true", help="no bfloat16 autocast")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
