"""Batches whose keys were folded into the prior: taken back, or refused with the reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch


@pytest.fixture
def folded(make_editor, requests):
    """Three batches of two facts of which the first is folded and the second partly."""
    editor, _, _ = make_editor(scope="sequence", key_pooling="mean", max_keys=3, target_steps=2)
    for first in (0, 2, 4):
        editor.edit(requests[first : first + 2])
    (layer,) = editor.config.layers
    memory = editor._state.layers[layer].memory
    assert memory.num_folded > 0 and memory.num_keys > 0
    return editor, memory, layer


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_taking_a_folded_batch_back(folded, batch):
    editor, memory, layer = folded
    keys, targets = (x.mT for x in memory._all_rows("test"))
    inside = keys[:, : memory.num_folded]
    prior = memory._factor @ memory._factor.T - inside @ inside.T
    left = memory.column_batches() != batch
    k, v = keys[:, left], targets[:, left]
    expected = torch.linalg.solve(prior + k @ k.T, k @ v.T).T
    editor.revert(batch)
    assert batch not in editor.batches
    assert (memory.delta() - expected).norm() <= 1e-9 * expected.norm()
    hook = editor.hooks[layer].delta().double()
    assert (hook - expected).norm() <= 1e-6 * expected.norm()


def test_a_batch_folded_without_its_keys_is_refused(folded):
    editor, memory, layer = folded
    memory._folded = tuple(replace(piece, keys=None, targets=None) for piece in memory._folded)
    before, hook = memory.delta(), editor.hooks[layer].delta()
    with pytest.raises(ValueError, match="batch 1 must have its keys at hand.*set a larger"):
        editor.revert(1)
    assert list(editor.batches) == [1, 2, 3]
    assert torch.equal(memory.delta(), before)
    assert torch.equal(editor.hooks[layer].delta(), hook)
