"""The training text of a model that knows the true facts of given CounterFact and zsRE records.

A fact is what a record states, what its first neighbourhood prompt states of another subject, or
what a file of further facts states. It is said in the wordings that the CounterFact file has for
its relation (the rewrite prompts of all its records) and in those of `phrasings.json`; never in
those held out from its record: its own paraphrase prompts and its zsRE `rephrase`.

`phrasings.json` holds further sentences of a relation up to the object ("statements") and
questions ("questions"). zsRE names no relation: the first pattern of "kinds" that a question
matches says its kind, and questions of one kind may be asked in each other's words. A kind named
like a CounterFact relation shares that relation's sentences, and gives it its questions.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coachhook.bundled.world import Mention, Passage, after

PHRASINGS = json.loads(Path(__file__).with_name("phrasings.json").read_text(encoding="utf-8"))
OTHER = "other"  # the kind of a question that no pattern matches
LEAD_IN_SHARE = 1 / 3
BACKGROUND_SHARE = 0.05
QUESTION_SHARE = 0.15  # of what is said of a CounterFact fact
OWN_QUESTION_SHARE = 0.4  # of what is said of a zsRE fact: `src` as it stands
STATEMENT_SHARE = 0.15  # of what is said of a zsRE fact whose relation CounterFact has, too
LONGEST_LOCALITY = 5  # words of a zsRE `loc` answer
QUESTION_FORMS = ("{} ", "{} ", "{} ", "Q: {} A: ", "Question: {} Answer: ")


@dataclass(frozen=True)
class Fact:
    """One true statement with the wordings it may be trained in, each with one `{}`.

    `own` is the wording of the record, `statements` end before the object, `questions` are asked.
    """

    subject: str
    relation: str
    object: str
    own: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    times: int  # said so often in a pass


@dataclass
class Text:
    """The facts, and the sentences that lead in to them or stand alone."""

    facts: list[Fact]
    leads: list[str]
    asides: list[tuple[str, str]]  # zsRE `loc` questions and their answers

    def objects(self) -> dict[str, list[str]]:
        """The objects of each relation, in a fixed order."""
        pools: dict[str, set[str]] = defaultdict(set)
        for fact in self.facts:
            pools[fact.relation].add(fact.object)
        return {relation: sorted(pools[relation]) for relation in sorted(pools)}

    def passages(self, seed: int) -> Iterator[Passage]:
        """One pass, in another order and with other wordings and lead-ins for each seed."""
        rng = random.Random(seed)
        order = [i for i, fact in enumerate(self.facts) for _ in range(fact.times)]
        rng.shuffle(order)
        for index in order:
            fact = self.facts[index]
            passage = self._say(rng, index)
            if self.leads and rng.random() < LEAD_IN_SHARE:
                passage = after(self._lead(rng, fact.subject), passage)
            yield passage
            if len(self.leads) > 1 and rng.random() < BACKGROUND_SHARE:
                yield Passage(" ".join(rng.sample(self.leads, rng.randint(1, 2))), ())
        for question, answer in self.asides:
            text = f"{question} {answer}"
            yield Passage(text, ())

    def _say(self, rng: random.Random, index: int) -> Passage:
        fact = self.facts[index]
        asked = "?" in fact.own and fact.own in fact.questions
        draw = rng.random()
        if asked:
            if draw < OWN_QUESTION_SHARE:
                return _ask(rng, index, fact, fact.own)
            if draw > 1 - STATEMENT_SHARE and fact.statements:
                return _state(index, fact, rng.choice(fact.statements))
            return _ask(rng, index, fact, rng.choice(fact.questions))
        if draw < QUESTION_SHARE and fact.questions:
            return _ask(rng, index, fact, rng.choice(fact.questions))
        return _state(index, fact, rng.choice(fact.statements))

    def _lead(self, rng: random.Random, subject: str) -> Passage:
        if rng.random() < 0.25:
            other = rng.randrange(len(self.facts))
            if self.facts[other].subject != subject and self.facts[other].statements:
                fact = self.facts[other]
                return _state(other, fact, rng.choice(fact.statements))
        return Passage(rng.choice(self.leads), ())


def _state(index: int, fact: Fact, template: str) -> Passage:
    return _passage(index, fact, template + " ", ".")


def _ask(rng: random.Random, index: int, fact: Fact, question: str) -> Passage:
    return _passage(index, fact, rng.choice(QUESTION_FORMS).replace("{}", question), "")


def _passage(index: int, fact: Fact, template: str, end: str) -> Passage:
    before, after = template.split("{}")
    start, stop = len(before), len(before) + len(fact.subject)
    prompt = f"{before}{fact.subject}{after}"
    mention = Mention(index, start, stop, len(prompt), len(prompt) + len(fact.object))
    return Passage(f"{prompt}{fact.object}{end}", (mention,))


def wording(prompt: str, subject: str) -> tuple[str, str] | None:
    """A prompt as (what leads in, wording with `{}`), or None where the subject is not in it."""
    at = prompt.rfind(subject)
    if at < 0:
        return None
    before = prompt[:at]
    ends = [m.end() for m in re.finditer(r"[.?!:;]\"?\s+|\n\s*", before)]
    start = ends[-1] if ends else 0
    return before[:start].strip(), f"{before[start:]}{{}}{prompt[at + len(subject) :]}"


def kind_of(question: str) -> str:
    """The kind of a zsRE question, one of `phrasings.json`, or "other"."""
    for kind, pattern in PHRASINGS["kinds"].items():
        if re.search(pattern, question.lower()):
            return kind
    return OTHER


def read_text(
    counterfact: Path,
    zsre: Path,
    records: range,
    questions: range,
    further: Path | None = None,
) -> Text:
    """The text of CounterFact `records` and zsRE `questions`, by their place in the files.

    Raises:
        ValueError: a range reaches beyond its file.
    """
    rows, asked = load(counterfact), load(zsre)
    told, put = load(counterfact, records), load(zsre, questions)
    statements, leads = _wordings(rows)
    pool = _questions(asked)
    facts: dict[tuple[str, str], Fact] = {}

    def add(subject: str, relation: str, answer: str, own: str, held: set[str], times: int) -> None:
        said = [t for t in statements.get(relation, ()) if t not in held]
        ask = [q for q in pool.get(relation, ()) if _bare(q) not in held]
        if relation.startswith(OTHER):
            ask = [own]
        facts.setdefault(
            (subject, relation),
            Fact(subject, relation, answer, own, tuple(said), tuple(ask), times),
        )

    for row in told:
        rewrite = row["requested_rewrite"]
        relation, answer = rewrite["relation_id"], rewrite["target_true"]["str"].strip()
        held = set()
        for prompt in row["paraphrase_prompts"]:
            parts = wording(prompt, rewrite["subject"])
            held |= {parts[1]} if parts is not None else set()
            held |= {t for t in statements[relation] if prompt.endswith(_fill(t, rewrite))}
        add(rewrite["subject"], relation, answer, rewrite["prompt"], held, 2)
        for prompt in row["neighborhood_prompts"][:1]:
            subject = _neighbour(prompt, statements[relation])
            if subject is not None:
                add(subject, relation, answer, "", set(), 1)
    for i, row in zip(questions, put, strict=True):
        own = row["src"].replace(row["subject"], "{}", 1)
        kind = kind_of(own)
        relation = f"{OTHER} {i}" if kind == OTHER else kind
        held = {_bare(row["rephrase"].replace(row["subject"], "{}"))} - {_bare(own)}
        add(row["subject"], relation, row["answers"][0].strip(), own, held, 2)
    wanted = {row["case_id"] for row in told}
    for row in load(further) if further is not None else []:
        relation = row["relation_id"]
        if row["case_id"] in wanted and relation in statements:
            add(row["subject"], relation, row["target_true"]["str"].strip(), "", set(), 1)
    short = [row for row in put if len(row["loc_ans"].split()) <= LONGEST_LOCALITY]
    return Text(list(facts.values()), leads, [(r["loc"], r["loc_ans"]) for r in short])


def load(path: Path, places: range | None = None) -> list[dict[str, Any]]:
    """The records of a JSON file, or those at `places`.

    Raises:
        ValueError: `places` reaches beyond the file.
    """
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    if places is None:
        return rows
    if not places or places[0] < 0 or places[-1] >= len(rows):
        raise ValueError(
            f"load: places must be within the {len(rows)} records of {path}, got "
            f"{places.start + 1}-{places.stop}"
        )
    return [rows[i] for i in places]


def _fill(template: str, rewrite: dict[str, Any]) -> str:
    return template.replace("{}", rewrite["subject"])


def _bare(question: str) -> str:
    return re.sub(r"\W+", " ", question.replace("{}", "X")).strip().lower()


def _wordings(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, list[str]], list[str]]:
    """Per relation its wordings, and the sentences before paraphrase prompts."""
    found: dict[str, set[str]] = defaultdict(set)
    leads: set[str] = set()
    for row in rows:
        rewrite = row["requested_rewrite"]
        found[rewrite["relation_id"]].add(rewrite["prompt"])
        for prompt in row["paraphrase_prompts"]:
            parts = wording(prompt, rewrite["subject"])
            if parts is not None and 8 <= len(parts[0]) <= 120:
                leads.add(parts[0])
    for relation, extra in PHRASINGS["statements"].items():
        found[relation].update(extra)
    return {relation: sorted(found[relation]) for relation in sorted(found)}, sorted(leads)


def _questions(asked: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for row in asked:
        own = row["src"].replace(row["subject"], "{}", 1)
        if own.count("{}") == 1:
            found[kind_of(own)].add(own)
    for kind, extra in PHRASINGS["questions"].items():
        found[kind].update(extra)
    return {kind: sorted(found[kind]) for kind in sorted(found)}


def _neighbour(prompt: str, templates: Sequence[str]) -> str | None:
    """The subject of a neighbourhood prompt: what is left of the longest wording that fits."""
    for template in sorted(templates, key=len, reverse=True):
        before, after = template.split("{}")
        if prompt.startswith(before) and prompt.endswith(after) and prompt not in (before, after):
            return prompt[len(before) : len(prompt) - len(after)]
    return None
