"""Edit facts of the invented world: `python -m benchmarks.bundled_model.edit --model DIR`.

One fact of each of 200 subjects gets another object of its relation, in batches of 10. Asked are a
template per fact, two more as paraphrases, and two subjects that are not edited. A model with a
chat template is also asked in a chat: two questions about each fact (reliability is of the first,
generality of the second) and one about each of the other subjects. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.bundled_model import chat
from coachhook import EditConfig, Editor, EditRequest, collect_statistics
from coachhook.bundled import lexicon, model_path, texts, world
from coachhook.evaluation import evaluate
from coachhook.models import load_model

SEED = 5
STATISTICS_TOKENS = 30_000
BATCH = 10


def requests(count: int) -> tuple[list[EditRequest], list[EditRequest]]:
    """Facts as sentences, and the same facts as questions."""
    rng = random.Random(SEED)
    facts = list(world.facts())
    rng.shuffle(facts)
    chosen = list({fact.subject: fact for fact in reversed(facts)}.values())[:count]
    edited = {fact.subject for fact in chosen}
    found, asked = [], []
    for fact in chosen:
        templates = lexicon.TEMPLATES[fact.relation]
        new = rng.choice([o for o in lexicon.OBJECTS[fact.relation] if o != fact.object])
        prompt, *others = rng.sample(templates, 3)
        request = EditRequest(prompt, fact.subject, new, fact.object)
        rest = [f for f in facts if f.relation == fact.relation and f.subject not in edited]
        strangers = rng.sample(rest, min(2, len(rest)))
        found.append(
            replace(
                request,
                paraphrases=[template.format(fact.subject) for template in others],
                neighborhood=[rng.choice(templates).format(f.subject) for f in strangers],
            )
        )
        first, second = chat.QUESTIONS[fact.relation]
        asked.append(
            replace(
                request,
                prompt=first,
                paraphrases=[second.format(fact.subject)],
                neighborhood=[first.format(f.subject) for f in strangers],
            )
        )
    return found, asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=model_path(), help="the bundled one, if none")
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--preset", choices=["default", "paper"], default="default")
    parser.add_argument("--layer", type=int, help="the preset's, if none")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, dtype=torch.float32)
    layers = None if arguments.layer is None else [arguments.layer]
    if arguments.preset == "paper":  # its lambda is for models a hundred times as large
        config = EditConfig.paper(model, layers=layers, covariance_weight=15)
    else:
        config = EditConfig.for_model(model, layers=layers)
    statistics = collect_statistics(
        model, tokenizer, texts(), layers=config.layers, max_tokens=STATISTICS_TOKENS
    )
    facts, questions = requests(arguments.facts)
    editor = Editor(model, tokenizer, statistics=statistics, config=config)
    converged = 0
    for start in range(0, len(facts), BATCH):
        converged += sum(editor.edit(facts[start : start + BATCH], progress="facts").converged)
    measured = evaluate(model, tokenizer, facts, hooks=editor.hooks)
    summary = {
        "preset": arguments.preset,
        "layers": list(config.layers),
        "facts": len(facts),
        "converged": converged,
        "teacher_forced": measured["teacher_forced"]["after"],
        "generated": measured["generated"]["after"],
        "intervals": measured["teacher_forced"]["intervals"]["after"],
    }
    if tokenizer.chat_template is not None:
        replies = evaluate(
            model, tokenizer, questions, hooks=editor.hooks, generate=False, chat=True
        )
        summary["chat"] = {state: replies["chat"][state] for state in ("before", "after")}
        summary["chat"]["intervals"] = replies["chat"]["intervals"]["after"]
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
