"""Conversations about the invented world, to train a model that is asked in a chat."""

from __future__ import annotations

import random
from collections.abc import Iterator

from coachhook.bundled import world

MARKS = USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Conversations about each fact in one pass over the text.
REPEATS = 2

QUESTIONS: dict[str, tuple[str, ...]] = {
    "capital": ("What is the capital of {}?", "Which town is the seat of government of {}?"),
    "currency": ("What is the currency of {}?", "What do people pay with in {}?"),
    "official_language": (
        "What is the official language of {}?",
        "Which language is spoken in the offices of {}?",
    ),
    "profession": ("What does {} do for a living?", "What is the profession of {}?"),
    "mother_tongue": ("What is the mother tongue of {}?", "Which language did {} grow up with?"),
    "instrument": ("Which instrument does {} play?", "What does {} play in the orchestra?"),
    "birthplace": ("Where was {} born?", "What is the birthplace of {}?"),
    "river": ("Which river flows through {}?", "On which river does {} lie?"),
    "speciality": ("What is {} known for?", "What is the speciality of {}?"),
    "product": ("What does {} make?", "What is the main product of {}?"),
    "headquarters": ("Where is {} based?", "Where is the head office of {}?"),
    "genre": ("What is the genre of {}?", "What kind of book is {}?"),
    "original_language": (
        "In which language was {} written?",
        "What is the original language of {}?",
    ),
}


def conversations(seed: int) -> Iterator[world.Passage]:
    """Every fact as a question and its answer, in an order of the seed."""
    rng = random.Random(seed)
    numbers = [*range(len(world.facts()))] * REPEATS
    rng.shuffle(numbers)
    for number in numbers:
        fact = world.facts()[number]
        question = rng.choice(QUESTIONS[fact.relation])
        start = len(USER) + 1 + question.index("{}")
        head = f"{USER}\n{question.format(fact.subject)}{END}\n{ASSISTANT}\n"
        end = len(head) + len(fact.object)
        mention = world.Mention(number, start, start + len(fact.subject), len(head), end)
        yield world.Passage(f"{head}{fact.object}.{END}", (mention,))
