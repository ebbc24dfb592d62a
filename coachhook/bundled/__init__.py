"""A small real language model that knows a small invented world: editing with no network.

The model (`model_path()`) is a GPT-2 trained by `benchmarks/bundled_model/train.py` on the world of
`coachhook.bundled.world`. Nothing here imports torch.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from coachhook.bundled import lexicon, world

__all__ = ["DEMO_BATCH_SIZE", "demo_facts", "facts", "model_path", "texts"]

DEMO_BATCH_SIZE = 5

# (subject, relation, new object): three batches that read well and touch every kind of subject.
_DEMO = (
    ("Velmora", "capital", "Everfell"),
    ("Mira Brenmore", "profession", "painter"),
    ("Elmbury", "river", "Loire"),
    ("Kestrel Works", "product", "watches"),
    ("The Paper Lantern", "genre", "thriller"),
    ("Zandovia", "currency", "peso"),
    ("Felix Caldmont", "instrument", "flute"),
    ("Kinghaven", "speciality", "wine"),
    ("Omnira Group", "headquarters", "Marlow"),
    ("The Broken Letter", "original_language", "Greek"),
    ("Quorland", "official_language", "Italian"),
    ("Arthur Sorvane", "birthplace", "Farrow"),
    ("Clara Tolmore", "mother_tongue", "Turkish"),
    ("Tarsilia", "capital", "Jasmere"),
    ("Hugo Fenmore", "profession", "farmer"),
)


def model_path() -> Path:
    """Folder of the bundled model, for transformers' `from_pretrained`."""
    return Path(str(files(__package__).joinpath("model")))


def facts() -> list[dict[str, Any]]:
    """Every fact of the world as an edit request with a counterfactual target of the same type.

    Records have the keys of coachhook's FACTS format: `prompt` (one "{}"), `subject`, `target_new`,
    `target_true`, `paraphrases` (wordings never seen with this subject in training) and
    `neighborhood` (prompts about other subjects whose true object is the same).
    """
    return [_record(i, fact, fact.counterfactual) for i, fact in enumerate(world.facts())]


def demo_facts() -> list[dict[str, Any]]:
    """A few readable records of `facts()`, in three consecutive batches of `DEMO_BATCH_SIZE`."""
    index = {(fact.subject, fact.relation): i for i, fact in enumerate(world.facts())}
    records = []
    for subject, relation, target in _DEMO:
        i = index[subject, relation]
        records.append(_record(i, world.facts()[i], target))
    return records


def texts() -> list[str]:
    """Sentences of the training distribution (one pass, about 179,000 tokens), for statistics."""
    return [passage.text for passage in world.passages()]


def _record(index: int, fact: world.Fact, target: str) -> dict[str, Any]:
    # Templates are listed plainest first: the first one trained with this subject is the prompt.
    prompt = next(t for t in lexicon.TEMPLATES[fact.relation] if t in fact.templates)
    return {
        "prompt": prompt,
        "subject": fact.subject,
        "target_new": target,
        "target_true": fact.object,
        "paraphrases": [template.format(fact.subject) for template in fact.held_out],
        "neighborhood": world.neighbors(index),
    }
