"""Several facts about one subject: in one batch, one after the other, and contradictory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coachhook import Editor, EditRequest
from coachhook.bundled import facts
from coachhook.editing.encoding import encode_requests
from coachhook.editing.targets import optimise_targets
from coachhook.editing.ties import find_ties
from coachhook.models import describe

from .test_editor import answer, assert_same_bits, state_bits

SUBJECT = "Alma Brenwick"
TWO = ("{}", "Some say that {}")


@pytest.fixture(scope="module")
def about_one():
    """Four facts about one person."""
    found = [EditRequest.from_dict(fact) for fact in facts() if fact["subject"] == SUBJECT]
    assert len(found) == 4
    return found


def request(prompt, subject, target):
    return EditRequest(prompt=prompt, subject=subject, target_new=target)


def test_requests_about_one_subject_are_tied():
    batch = [
        request("The capital of {} is", "France", "Lyon"),
        request("The capital of {} is", "Spain", "Vigo"),
        request("People in {} speak", "France", "Welsh"),
        request("The capital of {} is", "France", "Nice"),
        request("People in {} speak", "France", "Welsh"),
    ]
    earlier = [
        request("{} borders", "France", "Peru"),
        request("{} borders", "France", "Chile"),
        request("The capital of {} is", "France", "Brest"),
        request("{} borders", "Italy", "Peru"),
    ]
    ties = find_ties(batch, earlier)
    assert ties.numbers == [0, 1, 0, 0, 0, 0]
    assert ties.reminders == [earlier[1]]
    assert ties.replaced == {0: 3}


def answers(model, tokenizer, requests):
    return [answer(model, tokenizer, r.text).startswith(r.target_new) for r in requests]


def test_one_batch_about_one_subject(make_editor, about_one):
    editor, model, tokenizer = make_editor()
    result = editor.edit(about_one)
    assert all(result.converged)
    assert all(answers(model, tokenizer, about_one))
    (layer,) = editor.config.layers
    assert len(set(editor.batches[1].groups[layer])) == 1


def test_batches_about_one_subject_keep_the_earlier_facts(make_editor, about_one, tmp_path):
    editor, model, tokenizer = make_editor()
    for fact in about_one[:3]:
        editor.edit([fact])
    assert all(answers(model, tokenizer, about_one[:3]))
    editor.save(tmp_path / "edits")
    editor.detach()
    again = Editor.load(model, tokenizer, tmp_path / "edits")
    again.edit(about_one[3:])
    assert all(answers(model, tokenizer, about_one))
    again.revert(4)
    assert answers(model, tokenizer, about_one) == [True, True, True, False]
    again.detach()


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (2, 1), (3, 1)])
def test_an_earlier_edit_need_not_fire_in_the_later_prompt(make_editor, about_one, first, second):
    # One key and a high threshold: the edit of the first fact fires in its own prompt alone.
    editor, model, tokenizer = make_editor(contexts=("{}",), alpha_cued=0.97, rewordings=0)
    editor.edit([about_one[first]])
    with editor.hooks.record() as seen:
        answer(model, tokenizer, about_one[second].text)
    assert seen and not any(fired.any() for _, _, fired in seen)
    assert editor.edit([about_one[second]]).warnings == []
    assert all(answers(model, tokenizer, [about_one[first], about_one[second]]))
    editor.revert(2)
    assert answers(model, tokenizer, [about_one[first], about_one[second]]) == [True, False]


def test_a_correction_is_the_same_whether_added_or_replaced(make_editor, about_one):
    """Where the earlier edit fires everywhere, replacing it is adding to it."""
    editor, model, tokenizer = make_editor(target_weight_decay=0.0, rewordings=0, alpha_cued=0.5)
    editor.edit(about_one[:1])
    encoded = encode_requests(tokenizer, about_one[1:3], editor.config.contexts, None)
    earlier = editor._earlier(about_one[1:3], encoded, tokenizer.pad_token_id)
    settings = {"pad_id": tokenizer.pad_token_id, "ties": [0, 0]}
    description = describe(model)
    added = optimise_targets(model, description, encoded, editor.config, **settings)
    replaced = optimise_targets(
        model, description, encoded, editor.config, earlier=earlier, **settings
    )
    for known in earlier:
        for there in known.values():
            assert torch.allclose(there.added, there.value.expand_as(there.added))
    assert {place for known in earlier for place in known} >= {("subject_last", 0)}
    first = earlier[0]["subject_last", 0].value
    assert torch.allclose(replaced.values, added.values, rtol=1e-4, atol=1e-4)
    assert torch.allclose(replaced.deltas[:, 0], added.deltas[:, 0] + first.float(), atol=1e-4)
    assert replaced.steps == added.steps


def test_a_fact_that_did_not_converge_is_not_kept(make_editor, about_one):
    editor, model, tokenizer = make_editor(target_steps=1)
    assert editor.edit(about_one[:1]).converged == [False]
    result = editor.edit(about_one[1:2])
    assert editor._ties(about_one[1:2]).reminders == []
    assert result.steps == [0]


def test_of_two_answers_to_one_prompt_the_later_holds(make_editor, about_one, requests):
    first = about_one[0]
    second = EditRequest(
        prompt=first.prompt, subject=first.subject, target_new=about_one[0].target_true
    )
    third = EditRequest(prompt=first.prompt, subject=first.subject, target_new=first.target_new)
    editor, model, tokenizer = make_editor()
    result = editor.edit([first, second, requests[0], third])
    assert result.converged == [True, False, True, True]
    assert len(result.warnings) == 1 and "is not written" in result.warnings[0]
    assert result.targets.shape[1] == 4
    assert answer(model, tokenizer, first.text).startswith(first.target_new)
    assert {r for r, _ in editor.batches[1].slots} == {0, 2, 3}


def test_reverting_the_only_batch_about_it_leaves_nothing(make_editor, about_one, requests):
    editor, _, _ = make_editor(rewordings=0)
    editor.edit(requests[:2])
    before = state_bits(editor)
    editor.edit(about_one[:2])
    editor.revert(2)
    after = state_bits(editor)
    for name, value in before.items():
        assert torch.allclose(value.double(), after[name].double(), atol=1e-9), name
    assert_same_bits(
        {k: v for k, v in before.items() if "alpha" in k},
        {k: v for k, v in after.items() if "alpha" in k},
    )


def test_tied_targets_are_those_of_one_delta(make_editor, about_one, requests):
    """Tied requests share a delta, and the others come out as they do alone."""
    editor, model, tokenizer = make_editor(places=("subject_last",), contexts=TWO)
    batch = [requests[0], about_one[0], requests[1], about_one[1]]
    encoded = encode_requests(tokenizer, batch, editor.config.contexts, None)

    def targets(chosen, **more):
        return optimise_targets(
            model, describe(model), [encoded[i] for i in chosen], editor.config, pad_id=0, **more
        )

    tied = targets([0, 1, 2, 3], ties=[5, 7, 6, 7])
    assert torch.equal(tied.deltas[1], tied.deltas[3])
    assert tied.steps[1] == tied.steps[3]
    alone = targets([0, 2])
    assert torch.allclose(tied.deltas[[0, 2]], alone.deltas, rtol=1e-4, atol=1e-4)
    free = targets([0, 1, 2, 3])
    assert not torch.allclose(free.deltas[1], free.deltas[3], atol=1e-2)


def test_out_of_memory_halves_what_runs_at_once(make_editor, requests):
    """The same targets where the device holds only a few rows at a time."""
    editor, model, tokenizer = make_editor(places=("subject_last",), contexts=TWO)
    encoded = encode_requests(tokenizer, requests[:5], editor.config.contexts, None)
    head, rows = model.get_submodule("transformer.h")[-1], []

    def small_device(_module, args):
        rows.append(args[0].shape[0])
        if args[0].shape[0] > 8:
            raise torch.cuda.OutOfMemoryError("out of memory")

    def targets():
        return optimise_targets(model, describe(model), encoded, editor.config, pad_id=0)

    wanted = targets()
    handle = head.register_forward_pre_hook(small_device)
    try:
        found = targets()
    finally:
        handle.remove()
    assert max(rows) > 8 and min(rows) <= 8
    assert found.steps == wanted.steps
    assert torch.allclose(found.values, wanted.values, rtol=1e-4, atol=1e-4)
    handle = head.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("out of memory"))
    )
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            targets()
    finally:
        handle.remove()


def test_a_fact_that_a_later_batch_cannot_keep_is_named(make_editor, about_one):
    """One Adam step, far too long: the shared correction does not come to say both."""
    editor, model, tokenizer = make_editor(places=("subject_last",), rewordings=0)
    assert editor.edit(about_one[:1]).converged == [True]
    editor._state.config = editor.config.with_(target_steps=2, target_lr=50.0)
    lost = [w for w in editor.edit(about_one[1:3]).warnings if "it is lost" in w]
    assert len(lost) == 1
    assert about_one[0].text in lost[0] and about_one[0].target_new in lost[0]
    assert not answers(model, tokenizer, about_one[:1])[0]


def test_contradictions_with_keys_of_their_own_are_named(make_editor, requests):
    """The published algorithm solves for both at once: the later one is not preferred."""
    other = replace(requests[0], target_new=requests[1].target_new)
    editor, _, _ = make_editor("paper", covariance_weight=15.0)
    warnings = editor.edit([requests[0], other, requests[2]]).warnings
    (named,) = [text for text in warnings if "lies between the two" in text]
    assert requests[0].target_new in named and other.target_new in named
    editor.revert(1)
    assert not any("between" in text for text in editor.edit(requests[:3]).warnings)
    ours, _, _ = make_editor()
    (named,) = ours.edit([requests[0], other]).warnings
    assert "is not written" in named


def test_a_replaced_request_has_no_key_where_keys_are_averaged(make_editor, requests):
    """Its target was counted all the same, and did not fit the keys."""
    editor, model, tokenizer = make_editor(
        key_pooling="mean", places=("subject_last",), rewordings=0
    )
    later = replace(requests[0], target_new=requests[0].target_true)
    (named,) = editor.edit([requests[0], requests[1], later]).warnings
    assert "is not written" in named
    assert editor.batches[1].slots == [(1, 0), (2, 0)]
    assert answers(model, tokenizer, [requests[1], later]) == [True, True]


def test_what_a_batch_leans_on_stays_when_an_earlier_batch_is_taken_back(make_editor):
    """The second answer was found beside the first one's corrections, and needs fewer places."""
    editor, model, tokenizer = make_editor(rewordings=0, target_steps=5)
    places = editor.config.places
    first = request("The capital of {} is", "Zandovia", "of the")
    second = replace(first, target_new="under")

    def slots(batch):
        return [places[p] for _, p in editor.batches[batch].slots]

    def output():
        ids = tokenizer(first.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(ids).logits

    editor.edit([first])
    assert "subject_previous" in slots(1)
    alone = output()
    editor.edit([second])
    assert "subject_previous" in slots(2)
    both = output()
    editor.revert(1)
    torch.testing.assert_close(output(), both, rtol=0.0, atol=1e-3)
    editor.edit([first])
    editor.revert(3)
    torch.testing.assert_close(output(), both, rtol=0.0, atol=1e-3)
    editor.revert(2)
    editor.edit([first])
    torch.testing.assert_close(output(), alone, rtol=0.0, atol=1e-3)


def test_a_subject_that_is_one_token_at_the_start_of_a_text(make_editor):
    """What was written at its token before the last has no token in prompts that begin with it."""
    editor, _, tokenizer = make_editor(contexts=("{}",), rewordings=0, target_steps=2)
    subject = "Customers"
    pieces = [tokenizer(text)["input_ids"] for text in (subject, f" {subject}")]
    assert [len(ids) for ids in pieces] == [1, 4]
    editor.edit([request("The home of {} is", subject, "Lyon")])
    assert "subject_previous" in {editor.config.places[p] for _, p in editor.batches[1].slots}
    assert editor.edit([request("{} lives in", subject, "Paris")]).batch == 2
