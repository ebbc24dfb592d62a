"""What edits do to unrelated text: the same passages alone, and one after another.

    python -m benchmarks.long_text MODEL EDITS TEXT [--lengths 60,240]

TEXT is anything that `coachhook stats --text` reads, such as the `unrelated.jsonl` of an
experiment, and should name no edited subject. Its passages are joined by line ends in an order that
a seed decides, to rows of so many tokens. JSON lines on stdout: what `coachhook eval` says of
unrelated text.
"""

from __future__ import annotations

import argparse
import json
import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coachhook import Editor
from coachhook.evaluation.language import measure_rows, unrelated_rows
from coachhook.statistics import read_texts


def joined(passages: list[str], count: list[int], length: int) -> list[str]:
    """The passages one after another, as many as come to a number of tokens."""
    texts: list[str] = []
    tokens = 0
    for passage, its in zip(passages, count, strict=True):
        if texts and tokens + its <= length:
            texts[-1] += "\n" + passage
            tokens += its
        else:
            texts.append(passage)
            tokens = its
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("edits")
    parser.add_argument("text")
    parser.add_argument("--lengths", default="60,240")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    editor = Editor.load(model, tokenizer, args.edits)
    passages: list[str] = []
    counts: list[int] = []
    for passage in read_texts(args.text):
        if sum(counts) >= args.tokens:
            break
        passages.append(passage)
        counts.append(len(tokenizer(passage)["input_ids"]))
    order = list(range(len(passages)))
    random.Random(args.seed).shuffle(order)
    mixed, its = [passages[i] for i in order], [counts[i] for i in order]
    for length in (0, *(int(x) for x in args.lengths.split(","))):
        texts = joined(mixed, its, length)
        rows = unrelated_rows(tokenizer, texts, 2 * args.tokens, None)
        found = measure_rows(model, rows, hooks=editor.hooks, gates=editor.hooks, batch_size=16)
        print(json.dumps({"length": length or None, **found}), flush=True)


if __name__ == "__main__":
    main()
