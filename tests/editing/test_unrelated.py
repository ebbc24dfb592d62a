"""Thresholds against unrelated text: strangers raise them, the edit's own subject does not."""

from __future__ import annotations

import pytest
import torch

import coachhook as ch
from coachhook import EditConfig, Editor
from coachhook.bundled import texts
from coachhook.editing.prompts import EncodedPrompt
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
    config = EditConfig.for_model(model)
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
