"""Systems saved and opened again, and the scores of the gate."""

from __future__ import annotations

import pytest
import torch

from benchmarks.experiments import plan
from benchmarks.experiments.scores import GROUPS, auc
from benchmarks.experiments.systems import _pack, _unpack, known_systems, make_system, state_there
from benchmarks.experiments.tables import cost_columns, score_rows
from coachhook import bundled
from coachhook.editing import EditRequest
from coachhook.evaluation import load_facts
from coachhook.models import load_model
from coachhook.statistics import Statistics
from tests.experiments.conftest import run


@pytest.fixture(scope="module")
def parts(world):
    model, tokenizer = load_model(bundled.model_path(), dtype="float32")
    return model, tokenizer, Statistics.load(world / "stats-only" / "statistics")


def logits(model, tokenizer, requests):
    with torch.no_grad():
        return [model(**tokenizer(r.text, return_tensors="pt")).logits[0, -1] for r in requests]


@pytest.mark.parametrize("name", ["ours", "memit", "accumulated", "grace", "retrieval"])
def test_a_system_opened_again_goes_on_as_if_never_closed(name, parts, world, tmp_path):
    requests = load_facts(world / "facts.jsonl")[:2]
    model, tokenizer, _ = parts
    plain = logits(model, tokenizer, requests)
    options = {"target_steps": 4} if name in ("ours", "memit", "accumulated") else {}
    system = make_system(name, *parts, options)
    torch.manual_seed(1)
    system.edit(requests[:1])
    assert system.save(tmp_path / "state") and state_there(tmp_path / "state")
    torch.manual_seed(2)
    outcome = system.edit(requests[1:])
    assert outcome.seconds > 0 and len(outcome.converged) == 1
    wanted = logits(model, tokenizer, requests)
    system.close()
    again = make_system(name, *parts, options, tmp_path / "state")
    assert again.done == 1
    torch.manual_seed(2)
    again.edit(requests[1:])
    assert again.done == 2
    for a, b in zip(logits(model, tokenizer, requests), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with again.disabled():
        off = logits(model, tokenizer, requests)
    assert all(torch.equal(a, b) for a, b in zip(off, plain, strict=True))
    # A save replaces the one before.
    assert again.save(tmp_path / "state")
    again.close()
    opened = make_system(name, *parts, options, tmp_path / "state")
    assert opened.done == 2
    opened.close()


def test_states_of_tensors_and_plain_values_are_packed():
    tensors = {}
    value = {
        "a": [torch.arange(3), (1, 2.5, "x", None, True)],
        ("k", 1): torch.zeros(0, 2, dtype=torch.bfloat16),
        "r": EditRequest("{} is", "It", "so", paraphrases=["It's"]),
    }
    packed = _pack(value, tensors)
    found = _unpack(packed, tensors)
    assert torch.equal(found["a"][0], value["a"][0]) and found["a"][1] == value["a"][1]
    assert found["k", 1].shape == (0, 2) and found["k", 1].dtype == torch.bfloat16
    assert found["r"] == value["r"]
    with pytest.raises(TypeError, match="tensors and plain values, got Linear"):
        _pack([torch.nn.Linear(1, 1)], {})


def test_presets_and_baselines_have_names():
    assert known_systems()[:4] == ["ours", "ours-mlp", "no-gate", "paper"]
    for systems, size, _ in plan.DEFAULTS.values():
        assert set(systems) <= set(known_systems()) and size > 0


def test_an_open_gate_writes_every_token(parts, world):
    requests = load_facts(world / "facts.jsonl")[:1]
    system = make_system("no-gate", *parts, {"target_steps": 4})
    system.edit(requests)
    model, tokenizer, _ = parts
    with system.gates.record() as records:
        logits(model, tokenizer, requests)
    assert all(bool(fired.all()) for _, _, fired in records)
    system.close()


def test_auc_of_small_samples():
    assert auc(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])) == 1.0
    assert auc(torch.tensor([1.0]), torch.tensor([1.0])) == 0.5
    # Of six pairs 3 > 1, 3 > 2, 1 = 1 (a half), and all above the undefined one.
    low = torch.tensor([1.0, 2.0, float("nan")])
    assert auc(torch.tensor([3.0, 1.0]), low) == pytest.approx((3 + 1.5) / 6)


def test_scores_of_edited_keys_and_of_all_others(world, tmp_path):
    more = ("--count", 3, "--batch-sizes", 2, "--checkpoints", 2, "--systems", "ours,paper")
    quick = ("--set", "paper.target_steps=5", "--set", "ours.target_steps=5")
    run(world, "zscores", tmp_path, *more, *quick)
    ours, paper = plan.read_all(tmp_path)
    assert ours["spec"]["system"] == "ours" and paper["spec"]["system"] == "paper"
    rows = score_rows(ours)
    assert {row["edits"] for row in rows} == {2, 3}
    assert [row["group"] for row in rows if row["edits"] == 3] == list(GROUPS)
    last = {row["group"]: row for row in rows if row["edits"] == 3}
    assert last["edited"]["tokens"] == 3 and last["unrelated"]["tokens"] <= 400
    assert last["edited"]["auc"] == 0.5
    # An edit's own key gives a coefficient near 1.
    assert last["edited"]["q01"] > 0.9 > last["unrelated"]["q99"]
    assert last["unrelated"]["auc"] > 0.99
    layers = {row["layer"] for row in score_rows(paper)}
    assert len(layers) > 1 and all(row["alpha"] < 2.21 for row in score_rows(paper))
    values = {(v["layer"], v["group"]): v["values"] for v in ours["final"]["values"]}
    assert len(values[ours["final"]["scores"][0]["layer"], "edited"]) == 3


def test_only_systems_that_use_statistics_are_charged_with_them():
    final = dict.fromkeys(("edit_seconds", "edit_cpu_seconds"), 2.0) | {"training_seconds": 3.0}
    final |= dict.fromkeys(("converged", "peak_mib", "start_mib"), 1.0)
    for system, seconds in (("ours", 20.0), ("memit", 20.0), ("grace", 5.0), ("mend", 5.0)):
        row = cost_columns(final, 10, {"statistics_seconds": 15.0}, system, {})
        assert row["edits_per_second_with_preparation"] == 10 / seconds
    # Statistics that were given cost nobody knows what.
    for system, known in (("ours", None), ("lora", 2.0)):
        row = cost_columns(final, 10, {"statistics_seconds": None}, system, {})
        assert row["edits_per_second_with_preparation"] == known
