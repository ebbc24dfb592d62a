"""Facts files: CounterFact, EasyEdit's flat records, zsRE (MEND) and our own, checked whole.

A file is JSON (a list of records, an object that holds one such list, or one record) or JSON Lines.
The format is recognised by the field names; each becomes a list of
:class:`~coachhook.editing.requests.EditRequest`. All records are read before any is refused, so
that one run names every bad one.

Formats (Meng et al. 2022 for CounterFact, Mitchell et al. 2022 for the zsRE split of MEND):

* ``counterfact``: ``requested_rewrite{prompt, subject, target_new{str}, target_true{str}}``,
  ``paraphrase_prompts``, ``neighborhood_prompts``, ``generation_prompts``, ``case_id``.
* ``flat``: ``prompt, subject, target_new, ground_truth, rephrase_prompt, locality_prompt,
  locality_ground_truth``; the prompt holds the subject literally.
* ``zsre``: ``src, subject, alt, answers, rephrase, loc, loc_ans``; ``alt`` is the new target.
* ``own``: the fields of :class:`EditRequest`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from coachhook.editing.requests import EditRequest
from coachhook.errors import FactsError

FORMATS = ("counterfact", "flat", "zsre", "own")

# Fields that only one format has. "own" is what is left.
_MARKERS = {
    "counterfact": {"requested_rewrite"},
    "zsre": {"src", "alt"},
    "flat": {"ground_truth", "rephrase_prompt", "locality_prompt"},
    "own": {"target_true", "paraphrases", "neighborhood"},
}
_OWN_FIELDS = {f.name for f in fields(EditRequest)} | {"case_id"}


@dataclass
class FactsFile:
    """A facts file as read.

    Args:
        requests: the good records, in file order.
        format: one of :data:`FORMATS`.
        problems: one line per bad field, with the record's place and the field.
        warnings: one line per doubtful record; such records are in ``requests``.
        places: where in the file each of ``requests`` stands.
        numbers: which record of the file each of ``requests`` is, from 0.
        records: records in the file, bad ones included.
    """

    requests: list[EditRequest] = field(default_factory=list)
    format: str = "own"
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    records: int = 0

    def some(self, which: slice | Sequence[int]) -> FactsFile:
        """The same with a part of the good records: a slice of them, or those of these numbers."""
        if isinstance(which, slice):
            which = range(len(self.requests))[which]
        return replace(
            self,
            requests=[self.requests[i] for i in which],
            places=[self.places[i] for i in which],
            numbers=[self.numbers[i] for i in which],
        )


@dataclass(frozen=True)
class _Row:
    number: int
    place: str
    value: Any
    problem: str = ""  # of a line that is no JSON


class _Record:
    """Field access that collects problems instead of stopping at the first one."""

    def __init__(self, row: _Row) -> None:
        self.number, self.place = row.number, row.place
        self.data: dict[str, Any] = row.value
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def problem(self, name: str, message: str) -> None:
        self.problems.append(f"{self.place}: field {name!r} {message}")

    def warn(self, name: str, message: str) -> None:
        self.warnings.append(f"{self.place}: field {name!r} {message}")

    def lookup(self, name: str) -> Any:
        """The value at a dotted name, or None where it is absent."""
        value: Any = self.data
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def text(self, name: str, *, required: bool = True, strip: bool = False) -> str | None:
        """A non-empty string; ``{"str": ...}`` is taken for its string."""
        value = self.lookup(name)
        if isinstance(value, dict) and "str" in value:
            name, value = f"{name}.str", value["str"]
        if value is None:
            if required:
                self.problem(name, "is missing")
            return None
        if not isinstance(value, str):
            self.problem(name, f"must be a string, got {type(value).__name__}")
            return None
        if not value.strip():
            self.problem(name, f"must not be empty, got {value!r}")
            return None
        return value.strip() if strip else value

    def texts(self, name: str) -> list[str]:
        """A list of non-empty strings (a single string is a list of one); absent is empty."""
        value = self.lookup(name)
        if value is None:
            return []
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list):
            self.problem(name, f"must be a list of strings, got {type(value).__name__}")
            return []
        for i, item in enumerate(items):
            if not isinstance(item, str):
                self.problem(f"{name}[{i}]", f"must be a string, got {type(item).__name__}")
                return []
            if not item.strip():
                self.problem(f"{name}[{i}]", f"must not be empty, got {item!r}")
                return []
        return list(items)

    def identifier(self, *names: str) -> str | int | None:
        """The first of the named fields that is there; a string or an integer."""
        for name in names:
            value = self.lookup(name)
            if value is None:
                continue
            if isinstance(value, (str, int)):
                return value
            self.problem(name, f"must be a string or an integer, got {type(value).__name__}")
        return None

    def template(self, name: str, subject: str | None) -> str | None:
        """A prompt with its subject turned into ``{}``."""
        prompt = self.text(name)
        if prompt is None:
            return None
        slots = prompt.count("{}")
        if slots == 1:
            return prompt
        if slots > 1:
            self.problem(name, f"must have exactly one '{{}}', got {slots} in {prompt!r}")
            return None
        if subject is None:
            return None
        start = find_subject(prompt, subject)
        if start is None:
            self.problem(
                name, f"must have a '{{}}' or contain the subject {subject!r}, got {prompt!r}"
            )
            return None
        return f"{prompt[:start]}{{}}{prompt[start + len(subject) :]}"

    def build(self, **values: Any) -> EditRequest | None:
        """The request, or None when the record has problems."""
        true, new = values["target_true"], values["target_new"]
        if new is not None and true == new:
            self.warn("target_new", f"equals the true answer {true!r}: nothing would change")
        if self.problems:
            return None
        try:
            return EditRequest(**values)
        except (TypeError, ValueError) as error:
            self.problems.append(f"{self.place}: {error}")
            return None


def find_subject(text: str, subject: str) -> int | None:
    """Where ``subject`` starts in ``text``: its last place as whole words, else its last place.

    "Art" is found in "Artur likes Art" at the second place. The last place is taken because it is
    the one whose token has read every earlier mention.
    """
    whole = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text)]
    if whole:
        return whole[-1]
    start = text.rfind(subject)
    return None if start < 0 else start


def _counterfact(record: _Record) -> EditRequest | None:
    subject = record.text("requested_rewrite.subject")
    return record.build(
        subject=subject,
        prompt=record.template("requested_rewrite.prompt", subject),
        target_new=record.text("requested_rewrite.target_new", strip=True),
        target_true=record.text("requested_rewrite.target_true", required=False, strip=True),
        paraphrases=record.texts("paraphrase_prompts"),
        neighborhood=record.texts("neighborhood_prompts"),
        generation_prompts=record.texts("generation_prompts"),
        id=record.identifier("case_id"),
    )


def _flat(record: _Record) -> EditRequest | None:
    subject = record.text("subject")
    neighborhood = record.texts("locality_prompt")
    targets = record.texts("locality_ground_truth")
    if targets and len(targets) != len(neighborhood):
        record.problem(
            "locality_ground_truth",
            f"must have one answer for each of {len(neighborhood)} prompts, got {len(targets)}",
        )
    return record.build(
        subject=subject,
        prompt=record.template("prompt", subject),
        target_new=record.text("target_new", strip=True),
        target_true=record.text("ground_truth", required=False, strip=True),
        paraphrases=record.texts("rephrase_prompt"),
        neighborhood=neighborhood,
        neighborhood_targets=[t.strip() for t in targets],
        id=record.identifier("case_id"),
    )


def _zsre(record: _Record) -> EditRequest | None:
    subject = record.text("subject")
    new = record.text("alt", strip=True)
    answers = [a.strip() for a in record.texts("answers")]
    neighborhood = record.texts("loc")
    targets = record.texts("loc_ans")
    if targets and len(targets) != len(neighborhood):
        record.problem("loc_ans", f"must have one answer, got {len(targets)}")
    # A question may have several right answers; a new target among them changes nothing.
    true = new if new in answers else (answers[0] if answers else None)
    return record.build(
        subject=subject,
        prompt=record.template("src", subject),
        target_new=new,
        target_true=true,
        paraphrases=record.texts("rephrase"),
        neighborhood=neighborhood,
        neighborhood_targets=[t.strip() for t in targets],
        id=record.identifier("case_id"),
    )


def _own(record: _Record) -> EditRequest | None:
    for name in sorted(set(record.data) - _OWN_FIELDS):
        record.warn(name, "is not known and is ignored")
    subject = record.text("subject")
    paraphrases = record.texts("paraphrases")
    if subject is not None:
        paraphrases = [p.replace("{}", subject) for p in paraphrases]
    return record.build(
        subject=subject,
        prompt=record.template("prompt", subject),
        target_new=record.text("target_new", strip=True),
        target_true=record.text("target_true", required=False, strip=True),
        paraphrases=paraphrases,
        neighborhood=record.texts("neighborhood"),
        neighborhood_targets=[t.strip() for t in record.texts("neighborhood_targets")],
        generation_prompts=record.texts("generation_prompts"),
        id=record.identifier("id", "case_id"),
    )


_READERS: dict[str, Callable[[_Record], EditRequest | None]] = {
    "counterfact": _counterfact,
    "flat": _flat,
    "zsre": _zsre,
    "own": _own,
}


def read_facts(
    path: str | PathLike[str], format: str | None = None, limit: int | None = None
) -> FactsFile:
    """Reads a facts file and keeps what is wrong with it.

    Args:
        path: a JSON or JSON Lines file in UTF-8.
        format: one of :data:`FORMATS`; recognised from the field names by default.
        limit: so many good records are enough; those behind them are not looked at.

    Raises:
        FactsError: the file is empty, not UTF-8, not JSON, or holds no list of records.
        OSError: the file cannot be read.
        ValueError: ``format`` is not known.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"facts: format must be one of {', '.join(FORMATS)}, got {format!r}")
    name = str(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FactsError(f"facts: {name} must be UTF-8 text, got {error}") from error
    except OSError as error:
        raise type(error)(f"facts: {name} must be a file, got: {error.strerror}") from error
    if not text.strip():
        raise FactsError(f"facts: {name} must hold at least one record, got an empty file")
    try:
        rows = _rows(text, name)
    except RecursionError as error:
        raise FactsError(
            f"facts: {name} must hold records, got brackets a thousand deep"
        ) from error
    facts = FactsFile(records=len(rows))
    if not rows:
        raise FactsError(f"facts: {name} must hold at least one record, got an empty list")
    facts.format = format or _recognise([r.value for r in rows if isinstance(r.value, dict)])
    read = _READERS[facts.format]
    kept: list[tuple[str, EditRequest]] = []
    for row in rows:
        if len(kept) == limit:
            break
        if row.problem or not isinstance(row.value, dict):
            wrong = row.problem or f"must be an object, got {type(row.value).__name__}"
            facts.problems.append(f"{row.place}: {wrong}")
            continue
        record = _Record(row)
        request = read(record)
        facts.problems.extend(record.problems)
        facts.warnings.extend(record.warnings)
        if request is not None:
            kept.append((record.place, request))
            facts.numbers.append(record.number)
    facts.requests = [request for _, request in kept]
    facts.places = [place for place, _ in kept]
    facts.warnings.extend(_doubles(kept))
    return facts


def load_facts(path: str | PathLike[str], format: str | None = None) -> list[EditRequest]:
    """Reads a facts file that must be good throughout.

    Args:
        path: a JSON or JSON Lines file in UTF-8.
        format: one of :data:`FORMATS`; recognised from the field names by default.

    Raises:
        FactsError: as :func:`read_facts`, or the file holds bad records; ``problems`` names every
            one of them with its place and field.

    Warns:
        UserWarning: a record is doubtful (its new target equals the true one, an id is used twice).
    """
    facts = read_facts(path, format)
    if facts.problems:
        raise bad_records(path, facts)
    for line in facts.warnings:
        warnings.warn(f"facts: {path}: {line}", stacklevel=2)
    return facts.requests


def bad_records(path: str | PathLike[str], facts: FactsFile) -> FactsError:
    """The error that names every problem of ``facts``."""
    count = len(facts.problems)
    return FactsError(
        f"facts: {path} must hold good records only, got {count} problem{'s'[: count > 1]} "
        f"(read as format {facts.format!r})",
        facts.problems,
    )


def _recognise(records: list[dict[str, Any]]) -> str:
    votes = {name: sum(bool(m & r.keys()) for r in records) for name, m in _MARKERS.items()}
    best = max(votes, key=lambda name: votes[name])
    return best if votes[best] else "own"


def _rows(text: str, name: str) -> list[_Row]:
    """The records with their places, lines that are not JSON among them."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if _is_json_lines(text, name):
            return _json_lines(text)
        raise FactsError(
            f"facts: {name} must be JSON or JSON Lines, got {error.msg} "
            f"at line {error.lineno}, column {error.colno}"
        ) from error
    if isinstance(whole, list):
        return _list_rows(text, text.index("["))
    if not isinstance(whole, dict):
        raise FactsError(f"facts: {name} must hold records, got {type(whole).__name__}")
    known = set().union(*_MARKERS.values(), _OWN_FIELDS)
    lists = [key for key, value in whole.items() if isinstance(value, list)]
    if len(lists) == 1 and not known & whole.keys():
        match = re.search(rf"{re.escape(json.dumps(lists[0]))}\s*:\s*\[", text)
        if match is not None:
            return _list_rows(text, match.end() - 1)
        # The key is spelled with other escapes than ours, so its place in the text is unknown.
        return [_Row(i, f"record {i}", v) for i, v in enumerate(whole[lists[0]])]
    return [_Row(0, "record 0 (line 1)", whole)]


def _is_json_lines(text: str, name: str) -> bool:
    if Path(name).suffix in {".jsonl", ".ndjson"}:
        return True
    # Not splitlines, as for the records themselves.
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        return isinstance(json.loads(lines[0]), dict)
    except json.JSONDecodeError:
        return all(line.lstrip().startswith("{") for line in lines)


def _json_lines(text: str) -> list[_Row]:
    rows: list[_Row] = []
    # Only "\n" ends a record: splitlines would also split at separators inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        value, problem = None, ""
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"must be JSON, got {error.msg} at column {error.colno}"
        rows.append(_Row(len(rows), f"line {number}", value, problem))
    return rows


def _list_rows(text: str, start: int) -> list[_Row]:
    """The elements of the JSON list that starts at ``text[start]``, with index and line."""
    decoder = json.JSONDecoder()
    gap = re.compile(r"[\s,]*")
    rows: list[_Row] = []
    line, counted, at = 1, 0, start + 1
    while True:
        at = gap.match(text, at).end()  # type: ignore[union-attr]  # matches the empty string too
        if text[at] == "]":
            return rows
        line += text.count("\n", counted, at)
        counted = at
        value, at = decoder.raw_decode(text, at)
        rows.append(_Row(len(rows), f"record {len(rows)} (line {line})", value))


def _doubles(kept: list[tuple[str, EditRequest]]) -> list[str]:
    lines = []
    ids = Counter(request.id for _, request in kept if request.id is not None)
    lines += [f"id {i!r} is used by {n} records" for i, n in ids.items() if n > 1]
    seen: dict[str, tuple[str, EditRequest]] = {}
    for place, request in kept:
        first = seen.setdefault(request.text, (place, request))
        if first[1].target_new != request.target_new:
            lines.append(
                f"{place}: asks {request.text!r} for {request.target_new!r}, but {first[0]} asks"
                f" for {first[1].target_new!r}; the later one will hold"
            )
    return lines
