"""Facts files: formats, templates, and every bad record named."""

from __future__ import annotations

import json
import warnings

import pytest

from coachhook.errors import FactsError
from coachhook.evaluation.datasets import find_subject, load_facts, read_facts

OWN = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}
NESTED = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} writes in",
        "subject": "Ann Art",
        "target_new": {"str": "Latin", "id": "Q1"},
        "target_true": {"str": "French", "id": "Q2"},
    },
    "paraphrase_prompts": ["So. Ann Art speaks"],
    "neighborhood_prompts": ["Bob speaks", "Cid writes in"],
}
FLAT = {
    "case_id": 7,
    "prompt": "Ann Art writes in",
    "subject": "Ann Art",
    "target_new": "Latin",
    "ground_truth": "French",
    "rephrase_prompt": "So. Ann Art speaks",
    "locality_prompt": "Bob speaks",
    "locality_ground_truth": "Dutch",
}
ZSRE = {
    "subject": "Pope Mark",
    "src": "Where did Pope Mark die?",
    "pred": "Rome",
    "rephrase": "Where did Pope Mark died?",
    "alt": " Venice",
    "answers": ["Rome", "Roma"],
    "loc": "nq question: who sings",
    "loc_ans": "Blue",
    "cond": "Rome >> Venice",
}


def write(path, value):
    text = value if isinstance(value, str) else json.dumps(value, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


def test_real_files_are_recognised(shared_dir):
    nested = read_facts(shared_dir / "data" / "counterfact_dev.json")
    flat = read_facts(shared_dir / "data" / "counterfact_dev_flat.json")
    assert (nested.format, flat.format) == ("counterfact", "flat")
    assert len(nested.requests) == len(flat.requests) == 2000
    assert not nested.problems and not flat.problems
    for a, b in zip(nested.requests, flat.requests, strict=True):
        assert (a.id, a.prompt, a.subject) == (b.id, b.prompt, b.subject)
        assert (a.target_new, a.target_true) == (b.target_new, b.target_true)
        assert a.paraphrases[0] == b.paraphrases[0]
        assert a.neighborhood[0] == b.neighborhood[0]
        assert b.neighborhood_targets == (b.target_true,)


def test_the_real_zsre_file_has_one_record_without_an_answer(shared_dir):
    path = shared_dir / "data" / "zsre_dev.json"
    facts = read_facts(path)
    assert facts.format == "zsre"
    assert len(facts.requests) == 649
    line = path.read_text(encoding="utf-8").splitlines().index('  "alt": "",') + 1
    assert len(facts.problems) == 1
    assert "record 597" in facts.problems[0] and "'alt'" in facts.problems[0]
    named = int(facts.problems[0].split("(line ")[1].split(")")[0])
    assert named < line < named + 12
    first = facts.requests[0]
    assert first.prompt == "At what location did {} die?"
    assert (first.target_new, first.target_true) == ("Venice", "Rome")
    assert first.neighborhood_targets == ("Blue Öyster Cult",)
    with pytest.raises(FactsError, match="record 597"):
        load_facts(path)


@pytest.mark.parametrize(
    ("record", "format"),
    [(OWN, "own"), (NESTED, "counterfact"), (FLAT, "flat"), (ZSRE, "zsre")],
    ids=["own", "counterfact", "flat", "zsre"],
)
@pytest.mark.parametrize("form", ["list", "lines", "object", "single", "bom"])
def test_every_format_in_every_form(tmp_path, record, format, form):
    other = json.loads(json.dumps(record).replace("France", "Spain").replace("Ann", "Sue"))
    text = {
        "list": json.dumps([record, other], indent=2),
        "lines": f"{json.dumps(record)}\n\n{json.dumps(other)}\n",
        "object": json.dumps({"version": 1, "facts": [record, other]}),
        "single": json.dumps(record, indent=2),
        "bom": "\ufeff" + json.dumps([record, other]),
    }[form]
    path = tmp_path / "facts.json"
    path.write_text(text, encoding="utf-8")
    facts = read_facts(path)
    assert facts.format == format
    assert not facts.problems
    assert len(facts.requests) == (1 if form == "single" else 2)
    assert facts.requests == read_facts(path, format).requests
    assert facts.requests[0].subject in ("France", "Ann Art", "Pope Mark")


def test_fields_of_each_format(tmp_path):
    nested = load_facts(write(tmp_path / "a.json", [NESTED]))[0]
    assert nested.text == "Ann Art writes in"
    assert (nested.target_new, nested.target_true, nested.id) == ("Latin", "French", 7)
    assert nested.paraphrases == ("So. Ann Art speaks",)
    assert nested.neighborhood == ("Bob speaks", "Cid writes in")
    assert nested.neighborhood_targets == ()
    zsre = load_facts(write(tmp_path / "b.json", [ZSRE]))[0]
    assert (zsre.prompt, zsre.target_new) == ("Where did {} die?", "Venice")
    assert (zsre.neighborhood, zsre.neighborhood_targets) == ((ZSRE["loc"],), ("Blue",))
    own = load_facts(
        write(tmp_path / "c.json", [{**OWN, "paraphrases": ["{}'s seat"], "id": "x"}])
    )[0]
    assert own.paraphrases == ("France's seat",)
    assert own.id == "x"


@pytest.mark.parametrize(
    ("text", "subject", "start"),
    [
        ("Artur likes Art", "Art", 12),
        ("Art made Artur", "Art", 0),
        ("In Paris, Paris", "Paris", 10),
        ("Neoparis", "paris", 3),
        ("Élan is Él", "Él", 8),
        ("nothing", "Paris", None),
        ("C++ is C++, created by", "C++", 7),
    ],
)
def test_subject_is_found_as_whole_words(text, subject, start):
    assert find_subject(text, subject) == start


def test_own_text_prompt_becomes_a_template_at_the_whole_word(tmp_path):
    record = {"prompt": "Artur says Art is", "subject": "Art", "target_new": "x"}
    (request,) = load_facts(write(tmp_path / "f.json", [record]))
    assert request.prompt == "Artur says {} is"
    assert request.text == record["prompt"]
    assert request.subject_span == (11, 14)


def drop(name):
    return {k: v for k, v in OWN.items() if k != name}


BAD = [
    (drop("prompt"), "'prompt' is missing"),
    (drop("subject"), "'subject' is missing"),
    (drop("target_new"), "'target_new' is missing"),
    ({**OWN, "target_new": ""}, "'target_new' must not be empty, got ''"),
    ({**OWN, "target_new": " \t"}, "'target_new' must not be empty"),
    ({**OWN, "target_new": 5}, "'target_new' must be a string, got int"),
    ({**OWN, "prompt": "{} and {} are"}, "'prompt' must have exactly one '{}', got 2"),
    ({**OWN, "prompt": "The capital of Spain is"}, "contain the subject 'France'"),
    ({**OWN, "subject": "  "}, "'subject' must not be empty"),
    ({**OWN, "paraphrases": [1]}, "'paraphrases[0]' must be a string, got int"),
    ({**OWN, "paraphrases": ["a", ""]}, "'paraphrases[1]' must not be empty"),
    ({**OWN, "neighborhood": {"a": 1}}, "'neighborhood' must be a list of strings, got dict"),
    ({**OWN, "neighborhood": ["a"], "neighborhood_targets": ["b", "c"]}, "neighborhood_targets"),
    ({**OWN, "id": [1]}, "'id' must be a string or an integer, got list"),
    (17, "must be an object, got int"),
    (None, "must be an object, got NoneType"),
]


@pytest.mark.parametrize(("record", "message"), BAD, ids=[m for _, m in BAD])
@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_a_bad_record_is_named_with_place_and_field(tmp_path, record, message, lines):
    records = [OWN, record, {**OWN, "subject": "Spain"}]
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1)
    path = write(tmp_path / ("f.jsonl" if lines else "f.json"), text)
    with pytest.raises(FactsError) as caught:
        load_facts(path)
    (problem,) = caught.value.problems
    assert message in problem
    assert problem.startswith("line 2:" if lines else "record 1 (line 7):")
    assert str(path) in str(caught.value) and problem in str(caught.value)
    assert [r.subject for r in read_facts(path).requests] == ["France", "Spain"]


def test_all_bad_records_are_named_at_once(tmp_path):
    records = [record for record, _ in BAD]
    with pytest.raises(FactsError) as caught:
        load_facts(write(tmp_path / "f.json", records))
    assert len(caught.value.problems) == len(BAD)
    for i in range(len(BAD)):
        assert any(p.startswith(f"record {i} (line ") for p in caught.value.problems)


def test_two_bad_fields_of_one_record_are_both_named(tmp_path):
    with pytest.raises(FactsError) as caught:
        load_facts(write(tmp_path / "f.json", [{"prompt": "x {} y {}", "subject": "a"}]))
    assert len(caught.value.problems) == 2


def test_a_nested_record_names_the_nested_field(tmp_path):
    record = json.loads(json.dumps(NESTED))
    record["requested_rewrite"]["target_new"] = {"str": " "}
    del record["requested_rewrite"]["subject"]
    with pytest.raises(FactsError) as caught:
        load_facts(write(tmp_path / "f.json", [NESTED, record]))
    text = "\n".join(caught.value.problems)
    assert "'requested_rewrite.target_new.str' must not be empty" in text
    assert "'requested_rewrite.subject' is missing" in text


def test_every_line_that_is_not_json_is_named(tmp_path):
    path = write(tmp_path / "f.jsonl", f"{json.dumps(OWN)}\n{{oops\n\nnope\n{json.dumps(OWN)}")
    facts = read_facts(path)
    assert len(facts.requests) == 2
    assert [p.split(":")[0] for p in facts.problems] == ["line 2", "line 4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b" \n\n", "got an empty file"),
        (b"[]", "got an empty list"),
        (b'[{"prompt": "x"', "must be JSON or JSON Lines"),
        (b"[" * 100_000, "must hold records, got brackets"),
        (b'"text"', "must hold records, got str"),
        (b"\xff\xfe\x00", "must be UTF-8"),
    ],
)
def test_files_that_hold_no_records(tmp_path, content, message):
    path = tmp_path / "f.json"
    path.write_bytes(content)
    with pytest.raises(FactsError, match=message):
        load_facts(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_facts(tmp_path / "none.json")
    with pytest.raises(OSError):
        load_facts(tmp_path)


def test_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="format must be one of counterfact, flat, zsre, own"):
        read_facts(write(tmp_path / "f.json", [OWN]), "csv")


def test_doubtful_records_warn_and_stay(tmp_path):
    records = [
        {**OWN, "target_true": "Lyon", "id": 1},
        {**OWN, "target_new": "Nice", "id": 1, "colour": "red"},
    ]
    path = write(tmp_path / "f.json", records)
    facts = read_facts(path)
    assert len(facts.requests) == 2
    text = "\n".join(facts.warnings)
    assert "record 0 (line 2): field 'target_new' equals the true answer 'Lyon'" in text
    assert "id 1 is used by 2 records" in text
    assert "'colour' is not known" in text
    assert "asks 'The capital of France is' for 'Nice'" in text
    with pytest.warns(UserWarning, match="equals the true answer"):
        load_facts(path)


def test_good_records_do_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_facts(write(tmp_path / "f.json", [OWN, NESTED["requested_rewrite"] | OWN]))
