"""The training of models on the facts of given records: benchmarks/fact_models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.experiments.facts import known_records
from benchmarks.fact_models import measure, text, train
from coachhook import bundled

TOWNS = ("Paris", "Rome", "Oslo", "Bern", "Riga", "Lima")


def counterfact(i: int) -> dict[str, Any]:
    subject = f"Ada Person{i}"
    return {
        "case_id": 100 + i,
        "requested_rewrite": {
            "prompt": ("{} was born in", "{} is native to", "{} originates from")[i % 3],
            "relation_id": "P19",
            "subject": subject,
            "target_true": {"str": TOWNS[i % 6]},
            "target_new": {"str": TOWNS[(i + 1) % 6]},
        },
        "paraphrase_prompts": [
            f"It rained all day. {subject} is native to",
            f"Chapter 2\nRemarks {subject} originates from",
        ]
        if i % 3 == 0
        else [
            f"It rained all day. {subject} was born in",
            f"He left the house early. {subject} was born in",
        ],
        "neighborhood_prompts": [f"Bo Other{i} is native to"],
    }


def question(i: int) -> dict[str, Any]:
    subject = f"Cy Singer{i}"
    return {
        "subject": subject,
        "src": (f"Where was {subject} born?", f"What is {subject} made of?")[i % 2],
        "rephrase": f"What city was {subject} born in?",
        "answers": [TOWNS[i % 6]],
        "alt": "Cairo",
        "loc": "nq question: who sings this song",
        "loc_ans": "Somebody",
    }


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "counterfact.json", tmp_path / "zsre.json"
    paths[0].write_text(json.dumps([counterfact(i) for i in range(12)]))
    paths[1].write_text(json.dumps([question(i) for i in range(6)]))
    return paths


def said(known: text.Text, passes: int = 40) -> list[str]:
    return [passage.text for seed in range(passes) for passage in known.passages(seed)]


def test_only_the_given_records_are_said(files: tuple[Path, Path]) -> None:
    known = text.read_text(*files, range(3, 6), range(2, 4))
    subjects = {fact.subject for fact in known.facts}
    assert subjects == {
        *(f"Ada Person{i}" for i in (3, 4, 5)),
        *(f"Bo Other{i}" for i in (3, 4, 5)),
        *(f"Cy Singer{i}" for i in (2, 3)),
    }
    everything = " ".join(said(known))
    assert all(subject in everything for subject in subjects)
    assert "Person6" not in everything and "Singer1" not in everything


def test_a_record_is_said_in_its_own_words_and_never_in_those_held_out(
    files: tuple[Path, Path],
) -> None:
    everything = "\n".join(said(text.read_text(*files, range(12), range(6))))
    assert "Ada Person3 was born in Bern." in everything
    assert "Ada Person4 is native to Riga." in everything
    assert "Where was Cy Singer2 born? Oslo" in everything
    for phrase in ("Ada Person3 is native to", "Ada Person3 originates from"):
        assert phrase not in everything
    assert "Ada Person4 was born in Riga" not in everything
    assert "What city was Cy Singer2 born in" not in everything
    # The same words are there for others.
    assert "What city was Ada Person" in everything


def test_spans_are_the_subject_and_the_object(files: tuple[Path, Path]) -> None:
    known = text.read_text(*files, range(12), range(6))
    mentions = 0
    for passage in known.passages(1):
        for m in passage.mentions:
            fact = known.facts[m.fact]
            assert passage.text[m.subject_start : m.subject_end] == fact.subject
            assert passage.text[m.object_start : m.object_end] == fact.object
            mentions += 1
    assert mentions >= 36


def test_real_records_are_held_out(shared_dir: Path) -> None:
    data = shared_dir / "data"
    files = data / "counterfact_dev.json", data / "zsre_dev.json"
    known = text.read_text(*files, range(500, 2000), range(250, 650))
    rows = text.load(files[0], range(500, 2000))
    held = {}
    for row in rows:
        subject = row["requested_rewrite"]["subject"]
        parts = [text.wording(prompt, subject) for prompt in row["paraphrase_prompts"]]
        held[subject] = [p[1].replace("{}", subject) for p in parts if p is not None]
        assert len(held[subject]) == 2
    rephrased = {row["rephrase"] for row in text.load(files[1], range(250, 650))}
    stated = {(fact.subject, fact.own) for fact in known.facts}
    rewrites = [row["requested_rewrite"] for row in rows]
    assert all((r["subject"], r["prompt"]) in stated for r in rewrites)
    for passage in known.passages(0):
        assert not any(question in passage.text for question in rephrased)
        for m in passage.mentions:
            fact = known.facts[m.fact]
            for prompt in held.get(fact.subject, ()):
                assert f"{prompt} {fact.object}" not in passage.text


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("It rained. Ada is from", ("It rained.", "{} is from")),
        ("Heading\n\nIn Ada, they speak", ("Heading", "In {}, they speak")),
        ("What does Ada play? They play", ("", "What does {} play? They play")),
        ("Nobody is from", None),
    ],
)
def test_a_prompt_is_what_leads_in_and_a_wording(
    prompt: str, parts: tuple[str, str] | None
) -> None:
    assert text.wording(prompt, "Ada") == parts


def test_questions_have_kinds() -> None:
    assert text.kind_of("What is the place of birth of {}?") == "P19"
    assert text.kind_of("What is the date of birth of {}?") == "born when"
    assert text.kind_of("What is {} made of?") == text.OTHER


def test_places_beyond_the_file_are_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="must be within the 12 records of .*, got 5-13"):
        text.read_text(*files, range(4, 13), range(6))


@pytest.mark.parametrize("given", ["5", "0-3", "7-2", "a-b", "-1-3"])
def test_a_bad_range_is_refused(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "--out", "x", "--tokenizer", "x", "--counterfact", "x", "--zsre", "x"]
    monkeypatch.setattr(sys, "argv", [*run, "--questions", "1-2", f"--records={given}"])
    with pytest.raises(SystemExit):
        train.main()
    assert f"must be FIRST-LAST counted from 1, got '{given}'" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_a_trained_model_is_loaded_and_measured(
    family: str, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, listing = tmp_path / family, tmp_path / "known.json"
    data = ["--counterfact", str(files[0]), "--zsre", str(files[1]), "--records", "2-12"]
    data += ["--questions", "3-6"]
    run = ["train", *data, "--out", str(out), "--tokenizer", str(bundled.model_path())]
    monkeypatch.setattr(sys, "argv", [*run, "--family", family, "--passes", "1"])
    train.main()
    model, loading = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), "a weight was not saved"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.model_type == family
    with torch.no_grad():
        logits = model(**tokenizer("Ada Person3 was born in", return_tensors="pt")).logits
    assert bool(torch.isfinite(logits).all())
    monkeypatch.setattr(measure, "SWAP_PAIRS", 4)
    run = ["measure", *data, "--model", str(out), "--known", str(listing)]
    monkeypatch.setattr(sys, "argv", run)
    measure.main()
    entry = known_records(listing, family)
    assert set(entry["counterfact_case_ids"]) <= set(range(101, 112))
    assert set(entry["zsre_index"]) <= set(range(2, 6))
