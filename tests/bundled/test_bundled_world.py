from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from coachhook import bundled
from coachhook.bundled import lexicon, world

ROOT = Path(__file__).parents[2]


def digest() -> str:
    payload = json.dumps([bundled.facts(), bundled.demo_facts(), bundled.texts()])
    return hashlib.sha256(payload.encode()).hexdigest()


def test_world_is_the_one_the_model_was_trained_on() -> None:
    """The weights know exactly these facts: a changed world needs a newly trained model."""
    assert digest() == "45eee0b7c520c70be5353ff7074ed2eb29461835c722c9b294f51a4af19b60c4"


def test_world_does_not_depend_on_the_process() -> None:
    code = "from tests.bundled.test_bundled_world import digest; print(digest())"
    environment = {**os.environ, "PYTHONHASHSEED": "3", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == digest()


def test_facts_are_well_formed() -> None:
    facts = bundled.facts()
    assert len(facts) > 900
    for record in facts + bundled.demo_facts():
        assert record["prompt"].count("{}") == 1
        assert record["target_new"] != record["target_true"]
        assert record["target_new"].strip() and record["target_true"].strip()
        assert len(record["paraphrases"]) >= 2
        assert record["prompt"].format(record["subject"]) not in record["paraphrases"]
        assert all(record["subject"] in text for text in record["paraphrases"])
        assert len(record["neighborhood"]) >= 2
        assert not any(record["subject"] in text for text in record["neighborhood"])


def test_targets_have_the_type_of_the_truth() -> None:
    for fact in world.facts():
        pool = lexicon.OBJECTS[fact.relation]
        assert fact.object in pool and fact.counterfactual in pool


def test_neighborhood_prompts_are_true_statements_of_the_same_object() -> None:
    text = " ".join(bundled.texts())
    for record in bundled.demo_facts():
        for prompt in record["neighborhood"]:
            assert f"{prompt} {record['target_true']}." in text


def test_no_held_out_template_is_in_the_texts() -> None:
    for seed in range(2):
        text = " ".join(passage.text for passage in world.passages(seed))
        for fact in world.facts():
            for template in fact.held_out:
                assert template.format(fact.subject) not in text


def test_every_template_is_seen_with_other_subjects() -> None:
    seen = {(fact.relation, template) for fact in world.facts() for template in fact.templates}
    for relation, templates in lexicon.TEMPLATES.items():
        assert len(templates) >= 8
        assert all((relation, template) in seen for template in templates)


def test_spans_point_at_subject_and_object() -> None:
    known = world.facts()
    for passage in world.passages(seed=1):
        for mention in passage.mentions:
            fact = known[mention.fact]
            assert passage.text[mention.subject_start : mention.subject_end] == fact.subject
            assert passage.text[mention.object_start : mention.object_end] == fact.object


def test_demo_facts_are_three_batches_about_different_subjects() -> None:
    records = bundled.demo_facts()
    assert len(records) == 3 * bundled.DEMO_BATCH_SIZE
    assert len({record["subject"] for record in records}) == len(records)
    known = {
        (record["prompt"], record["subject"], record["target_true"]) for record in bundled.facts()
    }
    assert all(
        (record["prompt"], record["subject"], record["target_true"]) in known for record in records
    )


def test_import_needs_no_torch() -> None:
    code = (
        "import sys, importlib.util, types\n"
        "package = types.ModuleType('coachhook'); package.__path__ = ['coachhook']\n"
        "sys.modules['coachhook'] = package\n"
        "import coachhook.bundled as bundled\n"
        "bundled.facts(); bundled.texts(); bundled.model_path()\n"
        "print('torch' in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
