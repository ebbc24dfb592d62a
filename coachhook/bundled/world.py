"""The synthetic world of the bundled demonstration model.

Invented people, countries, towns, companies and novels; thirteen relations, twelve templates each.
A fact is seen in training with ten of its twelve templates; the other two are held out from that
subject (other subjects are seen with them). Everything follows from `SEED`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from coachhook.bundled import lexicon

SEED = 20240
PEOPLE = 120
OTHERS = 70  # towns, companies and novels, each
NUM_HELD_OUT = 2
NUM_NEIGHBORS = 4
LEAD_IN_SHARE = 1 / 3
BACKGROUND_SHARE = 0.08
REMARK_REPEATS = 6  # so that about half of the background is remarks, half scenes
LONGEST_LEAD_IN = 8  # sentences; with the fact still shorter than the model's 128 positions


@dataclass(frozen=True)
class Fact:
    """One true statement: `templates` are used in training, `held_out` never with this subject."""

    kind: str
    relation: str
    subject: str
    object: str
    counterfactual: str
    templates: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Mention:
    """Character span of a subject in a text, and of the object that completes its sentence."""

    fact: int
    subject_start: int
    subject_end: int
    object_start: int
    object_end: int


@dataclass(frozen=True)
class Passage:
    """One training text with the facts it states, in order."""

    text: str
    mentions: tuple[Mention, ...]


def _subjects(rng: random.Random) -> dict[str, list[str]]:
    """Names by kind. Name parts are shared, so that a subject is known only by its whole name."""
    families = _joined("", lexicon.FAMILY_ROOTS, lexicon.FAMILY_ENDINGS)
    rng.shuffle(families)
    first = list(lexicon.FIRST_NAMES)
    people: list[str] = []
    while len(people) < PEOPLE:
        turn = len(people)
        people += [f"{name} {families[(turn + i) % len(families)]}" for i, name in enumerate(first)]
        rng.shuffle(first)
    combined = {
        "town": _joined("", lexicon.TOWN_ROOTS, lexicon.TOWN_ENDINGS),
        "company": _joined(" ", lexicon.COMPANY_ROOTS, lexicon.COMPANY_ENDINGS),
        "novel": _joined(" ", [f"The {a}" for a in lexicon.TITLE_ADJECTIVES], lexicon.TITLE_NOUNS),
    }
    return {
        "country": list(lexicon.COUNTRIES),
        "person": sorted(set(people)),
        **{kind: sorted(rng.sample(names, OTHERS)) for kind, names in combined.items()},
    }


def _joined(separator: str, left: Sequence[str], right: Sequence[str]) -> list[str]:
    return [separator.join(pair) for pair in product(left, right)]


def _balanced(rng: random.Random, pool: Sequence[str], count: int) -> list[str]:
    """`count` objects, each of the pool about equally often, in random order."""
    values = [pool[i % len(pool)] for i in range(count)]
    rng.shuffle(values)
    return values


@lru_cache(maxsize=1)
def facts() -> tuple[Fact, ...]:
    """All facts of the world, subjects grouped, always in the same order."""
    rng = random.Random(SEED)
    subjects = _subjects(rng)
    found: list[Fact] = []
    for kind, relations in lexicon.KINDS.items():
        names = subjects[kind]
        objects = {r: _balanced(rng, lexicon.OBJECTS[r], len(names)) for r in relations}
        for i, subject in enumerate(names):
            for relation in relations:
                order = list(lexicon.TEMPLATES[relation])
                rng.shuffle(order)
                truth = objects[relation][i]
                other = rng.choice([o for o in lexicon.OBJECTS[relation] if o != truth])
                found.append(
                    Fact(
                        kind,
                        relation,
                        subject,
                        truth,
                        other,
                        templates=tuple(order[NUM_HELD_OUT:]),
                        held_out=tuple(order[:NUM_HELD_OUT]),
                    )
                )
    return tuple(found)


def background() -> list[str]:
    """Plain sentences about nothing in particular, used as lead-ins and as text of their own."""
    scenes = [
        f"{subject} {verb}{ending}."
        for subject in lexicon.SCENE_SUBJECTS
        for verb in lexicon.SCENE_VERBS[subject]
        for ending in lexicon.SCENE_ENDINGS
    ]
    return scenes + list(lexicon.REMARKS) * REMARK_REPEATS


def _state(index: int, fact: Fact, template: str) -> Passage:
    before, after = template.split("{}")
    start = len(before)
    text = f"{before}{fact.subject}{after} {fact.object}."
    mention = Mention(
        index, start, start + len(fact.subject), len(text) - 1 - len(fact.object), len(text) - 1
    )
    return Passage(text, (mention,))


def after(lead: Passage, passage: Passage) -> Passage:
    """`passage` with `lead` and a space before it."""
    shift = len(lead.text) + 1
    moved = tuple(
        Mention(
            m.fact,
            m.subject_start + shift,
            m.subject_end + shift,
            m.object_start + shift,
            m.object_end + shift,
        )
        for m in passage.mentions
    )
    return Passage(f"{lead.text} {passage.text}", lead.mentions + moved)


def passages(seed: int = 0) -> Iterator[Passage]:
    """One pass over the training text, in another order and with other lead-ins for each seed.

    Every fact in each of its training templates once, a third of them after a lead-in (a background
    sentence, an opener, or another fact), plus background text.
    """
    rng = random.Random(SEED + 1 + seed)
    known = facts()
    scenes = background()
    pairs = [(i, template) for i, fact in enumerate(known) for template in fact.templates]
    rng.shuffle(pairs)
    for index, template in pairs:
        passage = _state(index, known[index], template)
        if rng.random() < LEAD_IN_SHARE:
            lead = _lead_in(rng, scenes)
            passage = after(lead, passage)
        yield passage
        if rng.random() < BACKGROUND_SHARE:
            yield Passage(" ".join(rng.sample(scenes, rng.randint(1, 3))), ())


def _lead_in(rng: random.Random, scenes: Sequence[str]) -> Passage:
    """A sentence or two of background, an opener, another fact, or now and then a long context."""
    choice = rng.random()
    if choice < 0.5:
        return Passage(" ".join(rng.sample(scenes, rng.choice((1, 1, 2)))), ())
    if choice < 0.65:
        return Passage(rng.choice(lexicon.OPENERS), ())
    if choice < 0.9:
        other = rng.randrange(len(facts()))
        return _state(other, facts()[other], rng.choice(facts()[other].templates))
    return Passage(" ".join(rng.sample(scenes, rng.randint(3, LONGEST_LEAD_IN))), ())


def neighbors(index: int) -> list[str]:
    """Prompts of other subjects whose true object is that of fact `index`.

    The same relation comes first, then any other with that object (each capital belongs to one
    country, but people are born there too).
    """
    known = facts()
    fact = known[index]
    rng = random.Random(SEED + 1000 + index)
    same: list[str] = []
    related: list[str] = []
    for other in _by_object()[fact.object]:
        if other.subject != fact.subject:
            prompt = rng.choice(other.templates).format(other.subject)
            (same if other.relation == fact.relation else related).append(prompt)
    rng.shuffle(same)
    rng.shuffle(related)
    return (same + related)[:NUM_NEIGHBORS]


@lru_cache(maxsize=1)
def _by_object() -> dict[str, list[Fact]]:
    groups: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts():
        groups[fact.object].append(fact)
    return groups
