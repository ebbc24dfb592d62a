"""Which facts are edited, and which text is unrelated to them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coachhook.editing import EditRequest
from coachhook.evaluation import read_facts
from coachhook.evaluation.scoring import encode_prompts
from coachhook.statistics import read_texts


def gather(
    paths: Sequence[Path], *, known: Path | None, model: str, count: int | None, seed: int
) -> tuple[list[EditRequest], list[EditRequest]]:
    """Facts of several files, mixed in an order that only the seed decides.

    Bad records are left out, and so are second facts with the prompt of an earlier one.

    Returns:
        The facts to edit, and others about other subjects for systems that need training: known
        ones that are left over, then ones that the model does not know. These have no prompt that
        the edited ones are measured with: CounterFact's records share their neighbourhoods.

    Args:
        paths: facts files of any format that `coachhook edit` reads.
        known: a JSON file that says which records a model knows, by the name of its folder:
            `counterfact_case_ids` (ids) and `zsre_index` (places in the file); None takes all.
        model: name of the model's folder.
        count: take so many; None takes all.
        seed: of the order.

    Raises:
        ValueError: no fact is left, or fewer than `count`, or `known` does not know the model.
    """
    only = None if known is None else known_records(known, model)
    mixed = _mixed([r for path in paths for r in _requests(path, only)], seed)
    if not mixed:
        least = "a good record" if only is None else "a good record that --known names"
        raise ValueError(f"FACTS must hold {least}, got none in {', '.join(map(str, paths))}")
    if count is not None and len(mixed) < count:
        raise ValueError(f"--count must be at most the {len(mixed)} facts there are, got {count}")
    edited, spare = mixed[:count], mixed[len(mixed) if count is None else count :]
    if only is not None:
        spare += _mixed([r for path in paths for r in _requests(path, None)], seed)
    taken = {request.subject for request in edited}
    asked = {p for r in edited for p in (r.text, *r.paraphrases, *r.neighborhood)}
    spare = [r for r in _unique(spare) if r.subject not in taken and r.text not in asked]
    return edited, [_without(r, asked) for r in spare]


def _without(request: EditRequest, prompts: set[str]) -> EditRequest:
    """The request without those of its prompts to be measured with that are in a set."""
    kept = [i for i, p in enumerate(request.neighborhood) if p not in prompts]
    answers = request.neighborhood_targets
    return replace(
        request,
        paraphrases=[p for p in request.paraphrases if p not in prompts],
        neighborhood=[request.neighborhood[i] for i in kept],
        neighborhood_targets=[answers[i] for i in kept] if answers else (),
    )


def known_records(path: Path, model: str) -> dict[str, list[int]]:
    """The entry of a model in a file that says which records models know; a list left out is empty.

    Raises:
        ValueError: the file holds something else, or does not know the model.
    """
    shape = '{"model folder": {"counterfact_case_ids": [...], "zsre_index": [...]}}'
    try:
        listing = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"--known must be JSON like {shape}, got {path}: {error}") from error
    if not isinstance(listing, dict):
        raise ValueError(f"--known must be JSON like {shape}, got a {type(listing).__name__}")
    if model not in listing:
        raise ValueError(f"--known must have an entry {model!r}, got {sorted(listing)}")
    entry, found = listing[model], {}
    for name in ("counterfact_case_ids", "zsre_index"):
        numbers = entry.get(name, []) if isinstance(entry, dict) else None
        if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
            raise ValueError(
                f"--known must be JSON like {shape}, got no list of integers {name!r} for {model!r}"
            )
        found[name] = numbers
    return found


def _mixed(requests: Sequence[EditRequest], seed: int) -> list[EditRequest]:
    mixed = _unique(requests)
    random.Random(seed).shuffle(mixed)
    return mixed


def _unique(requests: Sequence[EditRequest]) -> list[EditRequest]:
    found: dict[str, EditRequest] = {}
    for request in requests:
        found.setdefault(request.text, request)
    return list(found.values())


def _requests(path: Path, only: dict[str, list[int]] | None) -> list[EditRequest]:
    facts = read_facts(path)
    if only is None or facts.format not in ("counterfact", "flat", "zsre"):
        return facts.requests
    if facts.format != "zsre":
        ids = set(only["counterfact_case_ids"])
        return [r for r in facts.requests if r.id in ids]
    # zsRE records have no id; their places survive bad records being left out.
    outside = [i for i in only["zsre_index"] if not 0 <= i < facts.records]
    if outside:
        raise ValueError(
            f"--known must name records of {path} by their place below {facts.records}, got "
            f"{outside[0]}"
        )
    wanted = set(only["zsre_index"])
    return [r for r, i in zip(facts.requests, facts.numbers, strict=True) if i in wanted]


def write_facts(path: Path, requests: Sequence[EditRequest]) -> None:
    """Writes facts in our own format, one a line."""
    lines = [json.dumps(r.to_dict(), ensure_ascii=False) for r in requests]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_written(path: Path) -> list[EditRequest]:
    """Reads what :func:`write_facts` wrote."""
    # Only "\n" ends a line: splitlines would also split at separators inside strings.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [EditRequest.from_dict(json.loads(line)) for line in lines if line]


def write_passages(path: Path, passages: Sequence[str]) -> None:
    """Writes texts as JSON Lines, so that one of several lines stays one text."""
    lines = [json.dumps({"text": passage}) for passage in passages]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def unrelated(
    text: Path, requests: Sequence[EditRequest], tokenizer: Any, tokens: int
) -> list[str]:
    """Passages that name no edited subject, from the end of the text, up to `tokens` tokens.

    Statistics read a text from its beginning, so the end is what they have not seen, if the text is
    long enough.
    """
    subjects = {r.subject for r in requests}
    chosen: list[str] = []
    for passage in reversed(list(read_texts(text))):
        if tokens <= 0:
            break
        if not any(subject in passage for subject in subjects):
            tokens -= len(encode_prompts(tokenizer, [passage])[0])
            chosen.append(passage)
    return chosen


def batches(requests: Sequence[EditRequest], size: int) -> Iterator[Sequence[EditRequest]]:
    """Consecutive slices."""
    for start in range(0, len(requests), size):
        yield requests[start : start + size]
