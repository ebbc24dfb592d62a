"""Unrelated text: what is close to an edit raises its threshold or is kept apart from it."""

from __future__ import annotations

import pytest
import torch

import coachhook as ch
from coachhook import EditConfig, Editor
from coachhook.bundled import texts
from coachhook.editing import EditMemory, EditRequest
from coachhook.editing.prompts import EncodedPrompt
from coachhook.editing.records import BatchRecord
from coachhook.editing.state import EditState, LayerEdits
from coachhook.editing.unrelated import SampleTokens, endings


def test_own_tokens_are_found_by_their_ending():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (200, 4), generator=generator, dtype=torch.int32)
    tokens[:20, :2] = -1
    edits = [[(1,)], [(0, 2), (2, 2, 1)], [], [(0, 1, 2, 0, 1)], [(1, 0, 2, 1)]]
    found = SampleTokens(tokens).own(edits)
    for row, ids in enumerate(tokens.tolist()):
        for column, wanted in enumerate(edits):
            expected = any(ids[-len(end) :] == list(end) for end in wanted)
            assert bool(found[row, column]) == expected
    assert found.any(dim=0).tolist() == [True, True, False, False, True]


def test_rows_of_endings():
    tokens = torch.tensor([[1, 2], [3, 2], [1, 3]], dtype=torch.int32)
    known = SampleTokens(tokens)
    assert known.rows([(2,)]) == {0, 1}
    assert known.rows([(1, 2), (3,)]) == {0, 2}
    assert known.rows([(4,)]) == set()


def test_endings_are_the_subject_up_to_the_token_looked_up():
    prompts = [
        EncodedPrompt([9, 1, 2, 3, 7], 1, 3),
        EncodedPrompt([5, 6, 4, 2, 3, 7], 2, 4),
        EncodedPrompt([8, 1, 2, 3], 1, 3),
    ]
    assert endings(prompts, 8) == [(1, 2, 3), (4, 2, 3)]
    assert endings(prompts, 2) == [(2, 3)]


@pytest.mark.parametrize("mentions", [True, False])
def test_text_about_the_subject_does_not_raise_the_threshold(bundled, requests, mentions):
    model, tokenizer, _ = bundled
    config = EditConfig.for_model(model, cues=False)
    text = [f"{r.text} something." for r in requests[:3]] if mentions else []
    statistics = ch.collect_statistics(
        model, tokenizer, [*texts()[:600], *text], config.layers, sample_size=100_000
    )
    editor = Editor(model, tokenizer, statistics=statistics, config=config)
    try:
        editor.edit(requests[:3])
        state, layer = editor._state, config.layers[0]
        with_tokens = state.pair(layer)[1].norm(dim=1)
        state.sample_tokens = None
        without = state.pair(layer)[1].norm(dim=1)
    finally:
        editor.detach()
    # Rows are scaled by alpha over the threshold; a sampled key of the edit itself raises it to
    # the ceiling.
    assert (with_tokens >= without).all()
    if mentions:
        assert (without < 0.9 * with_tokens).all()


N = 8
# In these tests a subject is one token, and its key is a row.
TOKENS = torch.tensor([[5, 7], [5, 9], [7, 3]], dtype=torch.int32)


def near(first, second, share):
    """A unit vector close to one axis, with some of another."""
    key = torch.zeros(N, dtype=torch.float64)
    key[first], key[second] = share, (1 - share**2) ** 0.5
    return key


@pytest.fixture
def state():
    sample = torch.stack([near(0, 1, 0.9), near(5, 6, 0.9), near(4, 7, 0.9)])
    memory = EditMemory(0.1 * torch.eye(N, dtype=torch.float64), 2)
    config = EditConfig(layers=[0], contexts=["{}"])
    layers = {0: LayerEdits(memory, sample)}
    return EditState(config, layers, sample_tokens=SampleTokens(TOKENS))


def write(state, subject, key, ending):
    request = EditRequest(f"{subject} is", subject, "new")
    record = BatchRecord([request], torch.zeros(2, 1), [True], [0.0], [(0, 0)], {}, {}, [[ending]])
    change = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    return state.append(0, key[None], change, record)


def coefficients(state, key):
    """Of each edit; it fires from alpha on, its own keys give 1 unless its threshold is raised."""
    return (state.pair(0)[1] @ key).tolist()


def test_a_stranger_close_to_an_edit_is_kept_apart(state, monkeypatch):
    key = near(0, 2, 0.98)
    write(state, "A", key, (3,))
    assert state.batches[1].anchors == {0: [0]}
    own, stranger = coefficients(state, key), coefficients(state, near(0, 1, 0.9))
    # The threshold is not raised any more, and others like the stranger are left alone, too.
    assert own[0] == pytest.approx(1, rel=1e-9)
    assert abs(stranger[0]) < 0.3
    assert coefficients(state, near(0, 1, 0.85))[0] < 0.3
    assert state.layers[0].memory.num_keys == 2

    state.remove(1)
    assert state.layers[0].memory.num_keys == 0
    monkeypatch.setattr("coachhook.editing.state._MOST_ANCHORS", 0)
    write(state, "A", key, (3,))
    assert state.batches[2].anchors == {0: []}
    raised = coefficients(state, key)[0]
    assert raised == pytest.approx(0.7 / 0.95, rel=0.03)
    assert coefficients(state, near(0, 1, 0.9))[0] > 0.85 * raised


def test_text_about_the_edit_itself_is_not_kept_apart(state):
    write(state, "A", near(0, 2, 0.98), (7,))  # as the first token of the sample
    assert state.batches[1].anchors == {0: []}
    assert coefficients(state, near(0, 1, 0.9))[0] > 0.8


def test_an_edit_about_a_token_that_was_kept_apart(state):
    """A later batch is about the stranger: its key is the edit's now."""
    first, second = near(0, 2, 0.98), near(0, 1, 0.9)
    write(state, "A", first, (3,))
    write(state, "B", second, (7,))
    a, b = coefficients(state, first), coefficients(state, second)
    assert a[0] > 0.99 and a[1] < 0.5
    assert b[1] > 0.99 and b[0] < 0.5
    again = BatchRecord.from_dict(state.batches[1].to_dict(), torch.zeros(2, 1))
    assert again.anchors == {0: [0]}
    # Records of folders from before there were any.
    old = {k: v for k, v in state.batches[1].to_dict().items() if k != "anchors"}
    assert BatchRecord.from_dict(old, torch.zeros(2, 1)).anchors == {}
    state.remove(1)
    assert coefficients(state, second) == pytest.approx([1.0], rel=1e-6)


def test_only_the_nearest_are_kept_apart_and_not_twice(state):
    axis = near(0, 1, 0.9)
    state.layers[0].sample = torch.stack([near(0, i, 0.9) for i in range(1, N)])
    state.sample_tokens = None
    write(state, "A", axis, (3,))
    assert len(state.batches[1].anchors[0]) == 4
    before = set(state.batches[1].anchors[0])
    write(state, "B", near(0, 3, 0.93), (3,))
    assert not before & set(state.batches[2].anchors[0])


def test_the_sum_of_all_corrections_has_no_anchors(state):
    state.config = state.config.with_(correction="sum")
    write(state, "A", near(0, 2, 0.98), (3,))
    assert state.batches[1].anchors == {0: []}


def test_an_edit_fires_for_its_own_prompt_among_keys_that_give_more(state):
    """Its threshold comes down to what the bare prompt gives, though its contexts give more."""
    state.config = state.config.with_(contexts=["{}", "So {}"])
    state.layers[0].memory = EditMemory(10 * torch.eye(N, dtype=torch.float64), 2)
    keys = torch.stack([near(3, 2, 0.3), near(3, 2, 1.0)])
    keys[0] *= 0.6
    request = EditRequest("A is", "A", "new")
    record = BatchRecord(
        [request], torch.zeros(2, 1), [True], [0.0], [(0, 0)], {}, {}, [[(3,)]]
    )  # fmt: skip
    state.append(0, keys, torch.ones(2, 2, dtype=torch.float64), record)
    own = state.pair(0)[1][0] @ keys.mT
    assert float(own[1] / own[0]) > 2
    # Without the cap the threshold would be alpha, and the bare prompt below it.
    assert float(own[0]) == pytest.approx(state.config.alpha / 0.98, rel=1e-6)
