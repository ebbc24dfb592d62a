"""Subjects that begin alike are told apart where they part."""

from __future__ import annotations

import pytest
import torch

from coachhook import EditConfig, Editor, EditRequest
from coachhook.bundled import lexicon, world
from coachhook.editing.beginnings import Beginnings
from coachhook.editing.encoding import encode_requests
from coachhook.editing.reading import answered
from coachhook.editing.records import BatchRecord


def facts_of(*subjects):
    known = {fact.subject: fact for fact in world.facts()}
    found = []
    for subject in subjects:
        fact = known[subject]
        options = lexicon.OBJECTS[fact.relation]
        new = options[(options.index(fact.object) + 1) % len(options)]
        prompt = lexicon.TEMPLATES[fact.relation][0]
        found.append(EditRequest(prompt, subject, new, fact.object))
    return found


def alike(tokenizer):
    """Groups of the world's subjects that are the same up to their last tokens."""
    found = {}
    for subject in sorted({fact.subject for fact in world.facts()}):
        ids = tokenizer(f" {subject}", add_special_tokens=False).input_ids
        if len(ids) > 2:
            found.setdefault(tuple(ids[:-1]), []).append(subject)
    return [subjects for subjects in found.values() if len(subjects) > 2]


def test_what_is_shared(bundled):
    tokenizer = bundled[1]
    group, elsewhere, *_ = alike(tokenizer)
    one, other, stranger = facts_of(*group[:2], elsewhere[0])
    ids = tokenizer(f" {group[0]}", add_special_tokens=False).input_ids
    ends_there = EditRequest("{} is", tokenizer.decode(ids[:-1]).strip(), "here")
    encoded = encode_requests(tokenizer, [one, stranger, other, ends_there], ("{}",), None)
    seen = Beginnings(tokenizer)

    def shared(*numbers, batches=()):
        requests = [one, stranger, other, ends_there]
        return seen.shared([encoded[i] for i in numbers], [requests[i] for i in numbers], batches)

    assert shared(0, 1) == [False, False]
    assert shared(0, 2) == [True, True]
    assert shared(0, 0) == [False, False]  # of one subject
    # Where the shorter one ends it has its last token; up to there they are alike.
    assert shared(0, 3) == [False, True]

    before = BatchRecord([other], torch.zeros(0, 1), [True], [0.0], [], {}, {})
    assert shared(0, 1, batches=[before]) == [True, False]
    assert shared(0, 1) == [False, False]  # taken back


@pytest.mark.parametrize("together", [True, False])
def test_a_later_fact_leaves_those_alone_whose_subjects_begin_alike(bundled, together):
    """With targets that take every place that they may."""
    model, tokenizer, statistics = bundled
    groups = alike(tokenizer)[:4]
    batches = [facts_of(*(group[i] for group in groups)) for i in range(3)]
    if together:
        batches = [[fact for batch in batches for fact in batch]]
    # Corrections so short that many targets need a second place.
    config = EditConfig.for_model(model, target_clamp=0.3)
    editor = Editor(model, tokenizer, statistics=statistics, config=config)
    try:
        for batch in batches:
            editor.edit(batch)
        places = {
            config.places[place]
            for record in list(editor.batches.values())[0 if together else 1 :]
            for _, place in record.slots
        }
        assert "prompt_last" in places and "subject_previous" not in places
        everything = [fact for batch in batches for fact in batch]
        encoded = encode_requests(tokenizer, everything, ("{}",), None)
        asked = [(e.contexts[0].ids, e.target) for e in encoded]
        with torch.no_grad():
            held = answered(model, asked)
        converged = [c for record in editor.batches.values() for c in record.converged]
        assert sum(held) >= sum(converged) > 4
    finally:
        editor.detach()
