"""Whole edits of models with random weights: batch after batch, targets included.

The weights are random, so the model has no facts: few rewordings are found, and targets take their
own number of steps. What is timed is the work of an edit at a model's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice

import torch

from coachhook import bundled
from coachhook.bench.model import GPT_J, Shape, random_model
from coachhook.bench.runner import Case, benchmark
from coachhook.bundled import lexicon
from coachhook.editing import EditConfig, Editor, EditRequest
from coachhook.models import describe
from coachhook.statistics import collect_statistics

_FACTS = 1000
_GPT2_XL = Shape(
    "GPT2-XL 1.5B",
    "gpt2",
    {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    [],
)
# The same code at the size of a processor; the vocabulary is the bundled tokenizer's.
_SMALL = Shape(
    "GPT-2, small",
    "gpt2",
    {"vocab_size": 1792, "n_positions": 128, "n_embd": 64, "n_layer": 6, "n_head": 4},
    [],
)


def requests(count: int) -> list[EditRequest]:
    """As many facts, each about a person of its own.

    Raises:
        ValueError: there are fewer names.
    """
    names = [
        f"{first} {root}{ending}"
        for root in lexicon.FAMILY_ROOTS
        for ending in lexicon.FAMILY_ENDINGS
        for first in lexicon.FIRST_NAMES
    ]
    if count > len(names):
        raise ValueError(f"requests: count must be at most {len(names)}, got {count}")
    relations = cycle(lexicon.KINDS["person"])
    return [
        EditRequest(
            prompt=lexicon.TEMPLATES[relation][0],
            subject=name,
            target_new=lexicon.OBJECTS[relation][number % len(lexicon.OBJECTS[relation])],
        )
        for number, (name, relation) in enumerate(zip(names[:count], relations, strict=False))
    ]


def edit_case(
    shape: Shape, batch: int, rounds: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """Edits of ``batch`` facts one after another; after the last of them all are taken back."""
    from transformers import AutoTokenizer

    model = random_model(shape, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    config = EditConfig.for_model(model)
    # More tokens than features, or the prior would rest on its ridge.
    description = describe(model, config.key_site)
    width = max(description.layer(index).in_features for index in config.layers)
    statistics = collect_statistics(
        model,
        tokenizer,
        bundled.texts(),
        config.layers,
        max_tokens=2 * width,
        progress=False,
    )
    editor = Editor(model, tokenizer, statistics=statistics, config=config)
    facts = requests(_FACTS)

    def edits() -> Iterator[None]:
        while True:
            left = iter(facts)
            while some := list(islice(left, batch)):
                editor.edit(some)
                yield
            for number in [*editor.batches]:
                editor.revert(batch=number)

    turns = edits()

    def run() -> None:
        # Targets need gradients.
        with torch.inference_mode(False):
            next(turns)

    return Case(
        op="edit",
        shape=f"{shape.name}, layer {config.layers[0]}, batches of {batch}",
        dtype=dtype,
        backend="auto",
        run=run,
        items=batch,
        warm=1,
        rounds=rounds,
        cold=False,
    )


@benchmark("edit", share=3.0)
def cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    """Two sizes; on a processor, and when quick, a small one."""
    if quick or device.type != "cuda":
        yield edit_case(_SMALL, 10, 3, dtype or torch.float32, device)
        return
    # The larger first, which takes fewer batches: the time may not reach for all. With the batch
    # before them, the smaller takes all the facts.
    for shape, rounds in ((GPT_J, 2), (_GPT2_XL, _FACTS // 100 - 1)):
        yield edit_case(shape, 100, rounds, dtype or torch.bfloat16, device)
