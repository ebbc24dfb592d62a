"""Measure the bundled model: `python benchmarks/bundled_model/measure.py`.

Writes accuracy.json: the share of prompts answered with the whole object (greedy, all tokens) on
training prompts and on templates held out from the subject, the swap test per layer, bfloat16, and
left-padded generation.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from coachhook import bundled
from coachhook.bundled import lexicon, world

BATCH = 128
SWAP_PAIRS = 300
GENERATED = 24
# Lead-ins whose words and shape the training text does not have.
UNSEEN = (
    "Some people doubt it, but others do not.",
    "Yesterday I asked a colleague from accounting.",
    "According to Wikipedia:",
    "1984 was a wonderful year for jazz.",
)
Query = tuple[str, str]
Pair = tuple[str, str, str, str]  # template, subject, another subject, its object


class Measurement:
    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        base = self.model.base_model
        self.blocks = base.h if hasattr(base, "h") else base.layers

    def correct(self, queries: Sequence[Query]) -> list[bool]:
        """Whether every token of the object is the most likely one after its prompt."""
        found = [False] * len(queries)
        order = sorted(range(len(queries)), key=lambda i: len(queries[i][0]))
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            texts = [f"{queries[i][0]} {queries[i][1]}" for i in part]
            batch = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
            with torch.no_grad():
                logits = self.model(**batch).logits
            if not bool(torch.isfinite(logits).all()):
                raise ArithmeticError("measure: logits must be finite, got NaN or infinity")
            best = logits[:, :-1].argmax(-1) == batch.input_ids[:, 1:]
            for row, i in enumerate(part):
                end = int(batch.attention_mask[row].sum())
                answer = len(self._answer(queries[i][1]))
                found[i] = bool(best[row, end - 1 - answer : end - 1].all())
        return found

    def share(self, queries: Sequence[Query]) -> float:
        return round(sum(self.correct(queries)) / len(queries), 4)

    def _answer(self, answer: str) -> list[int]:
        ids: list[int] = self.tokenizer(f" {answer}", add_special_tokens=False).input_ids
        return ids

    def swap(self, pairs: Sequence[Pair]) -> list[float]:
        """Share of pairs, per layer, whose answer becomes that of the other subject.

        The block output at the last subject token is replaced by that of the other subject in the
        same prompt.
        """
        hits = [0] * len(self.blocks)
        for template, first, second, other in pairs:
            ours, at = self._subject(template, first)
            theirs, other_at = self._subject(template, second)
            answer = self._answer(other)[0]
            states = self._outputs(theirs, other_at)
            for layer, block in enumerate(self.blocks):
                handle = block.register_forward_hook(_replace(at, states[layer]))
                with torch.no_grad():
                    hits[layer] += int(self.model(ours).logits[0, -1].argmax()) == answer
                handle.remove()
        return [round(hit / len(pairs), 3) for hit in hits]

    def _outputs(self, ids: Tensor, at: int) -> list[Tensor]:
        """Output [d] of every block at token `at`."""
        kept: list[Tensor] = []

        def keep(module: Any, args: Any, output: Any) -> None:
            kept.append((output[0] if isinstance(output, tuple) else output)[0, at])

        handles = [block.register_forward_hook(keep) for block in self.blocks]
        with torch.no_grad():
            self.model(ids)
        for handle in handles:
            handle.remove()
        return kept

    def _subject(self, template: str, subject: str) -> tuple[Tensor, int]:
        """Token ids [1, T] of the prompt and the index of the subject's last token."""
        encoded = self.tokenizer(template.format(subject), return_offsets_mapping=True)
        end = template.index("{}") + len(subject)
        at = max(i for i, (start, _) in enumerate(encoded.offset_mapping) if start < end)
        return torch.tensor([encoded.input_ids]), at

    def left_padding(self, queries: Sequence[Query]) -> float:
        """Share of prompts whose greedy continuation in a left-padded batch is the one alone."""
        rng = random.Random(1)
        chosen = rng.sample(queries, min(GENERATED, len(queries)))
        prompts = [prompt for prompt, _ in chosen]
        settings = {"max_new_tokens": 8, "do_sample": False}
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        together = self.model.generate(**batch, **settings)[:, batch.input_ids.shape[1] :]
        same = 0
        for row, prompt in enumerate(prompts):
            one = self.tokenizer(prompt, return_tensors="pt")
            alone = self.model.generate(**one, **settings)[0, one.input_ids.shape[1] :]
            texts = [
                self.tokenizer.decode(t, skip_special_tokens=True) for t in (alone, together[row])
            ]
            same += texts[0] == texts[1]
        return same / len(prompts)


def _replace(at: int, value: Tensor) -> Any:
    def hook(module: Any, args: Any, output: Any) -> Any:
        state = (output[0] if isinstance(output, tuple) else output).clone()
        state[0, at] = value
        return (state, *output[1:]) if isinstance(output, tuple) else state

    return hook


def _training_queries() -> list[Query]:
    return [(t.format(fact.subject), fact.object) for fact in world.facts() for t in fact.templates]


def _swap_pairs() -> list[Pair]:
    rng = random.Random(0)
    by_relation: dict[str, list[world.Fact]] = defaultdict(list)
    for fact in world.facts():
        by_relation[fact.relation].append(fact)
    pairs: list[Pair] = []
    while len(pairs) < SWAP_PAIRS:
        first = rng.choice(world.facts())
        second = rng.choice(by_relation[first.relation])
        if first.object != second.object:
            template = rng.choice(first.templates)
            pairs.append((template, first.subject, second.subject, second.object))
    return pairs


def measure(folder: Path) -> dict[str, Any]:
    rng = random.Random(0)
    known = world.facts()
    trained = _training_queries()
    records = [(r["prompt"].format(r["subject"]), r["target_true"]) for r in bundled.facts()]
    held_out = [(t.format(fact.subject), fact.object) for fact in known for t in fact.held_out]
    scenes = world.background()
    led = [(f"{rng.choice(scenes)} {prompt}", answer) for prompt, answer in held_out]
    unseen = [(f"{UNSEEN[i % len(UNSEEN)]} {p}", answer) for i, (p, answer) in enumerate(held_out)]
    subject = Measurement(folder)
    result: dict[str, Any] = {
        "facts": len(known),
        "subjects": len({fact.subject for fact in known}),
        "training_prompts": subject.share(trained),
        "record_prompts": subject.share(records),
        "held_out": subject.share(held_out),
        "held_out_by_relation": {
            relation: subject.share(
                [
                    (t.format(f.subject), f.object)
                    for f in known
                    if f.relation == relation
                    for t in f.held_out
                ]
            )
            for relation in lexicon.TEMPLATES
        },
        "held_out_after_lead_in": subject.share(led),
        "held_out_after_unseen_sentence": subject.share(unseen),
        "swap_by_layer": subject.swap(_swap_pairs()),
        "left_padding_equal": subject.left_padding(trained),
    }
    subject.model.to(torch.bfloat16)
    result["bfloat16"] = {
        "record_prompts": subject.share(records),
        "held_out": subject.share(held_out),
    }
    result["folder_bytes"] = sum(f.stat().st_size for f in folder.iterdir())
    return result


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=bundled.model_path())
    parser.add_argument("--out", type=Path, default=here / "accuracy.json")
    arguments = parser.parse_args()
    result = measure(arguments.model)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
