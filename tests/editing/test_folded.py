"""Batches whose keys were folded into the prior: taken back, or refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from coachhook import Editor
from coachhook.editing import EditMemory, folder, memories


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
    keys, targets = (memory._all_rows("test", name).mT for name in ("keys", "targets"))
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


def _relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("most", [0, 5, 9])
def test_pairs_follow_what_is_appended_folded_and_taken_back(most):
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    root = draw(12, 30)
    prior = 3 * root @ root.T / 30
    memory = EditMemory(prior, 2, max_keys=most, keep_prior=True)
    made = [(draw(12, k), draw(2, k)) for k in (3, 1, 4, 2, 5, 3, 2, 4)]
    there = {}

    def check():
        keys, targets = (torch.cat(x, dim=1) for x in zip(*there.values(), strict=True))
        v, at = memory.pair()
        assert torch.equal(v, targets) and torch.equal(memory.keys(), keys)
        wanted = torch.linalg.solve(prior + keys @ keys.T, keys).T
        assert _relative(at, wanted) < 1e-11
        assert _relative(memory.delta(), targets @ wanted) < 1e-11
        # The prior alone, whatever was folded.
        assert _relative(memory.prior(), prior) < 1e-13
        some = draw(12, 2)
        assert _relative(memory.prior_solve(some), torch.linalg.solve(prior, some)) < 1e-11

    for keys, targets in made:
        there[memory.append(keys, targets)] = keys, targets
        check()
        assert memory.num_keys <= most
    before = memory.snapshot()
    for batch in (2, 7, 4, 1):
        memory.remove(batch)
        del there[batch]
        check()
        again = EditMemory.from_state_dict(*memory.state_dict())
        assert _relative(again.pair()[1], memory.pair()[1]) < 1e-12
        assert torch.equal(again.prior(), memory.prior())
    extra = draw(12, 3), draw(2, 3)
    there[memory.append(*extra)] = extra
    check()
    memory.restore(before)
    there = {i: batch for i, batch in enumerate(made, start=1)}
    check()
    for batch in list(there)[1:]:
        memory.remove(batch)
    there = {1: made[0]}
    check()


def test_a_pair_is_not_carried_over_a_fold_that_lost_its_keys():
    memory = EditMemory(torch.eye(6), 2, max_keys=2, keep_folded=False, keep_prior=True)
    keys = torch.eye(6)
    memory.append(keys[:, :2], torch.ones(2, 2))
    memory.pair()
    for i in (2, 3, 4, 5):
        memory.append(keys[:, i : i + 1], torch.ones(2, 1))
    assert memory.num_folded > 0
    with pytest.raises(ValueError, match="pair: batch 1 must have its keys at hand"):
        memory.pair()
    assert torch.equal(memory.prior(), torch.eye(6, dtype=torch.float64))


def test_edits_whose_keys_are_folded_are_those_of_others(
    make_editor, requests, tmp_path, monkeypatch
):
    batches = [requests[:4], requests[4:8], requests[8:12]]
    settings = {"target_steps": 4, "rewordings": 0}
    found, editors = [], []
    for most in (10**6, 20):
        monkeypatch.setattr(memories, "most_keys", lambda features, most=most: most)
        editor, model, tokenizer = make_editor(**settings)
        found.append([editor.edit(batch) for batch in batches])
        editors.append((editor, model))
    (usual, _), (small, model) = editors
    (layer,) = small.config.layers
    memory = small._state.layers[layer].memory
    assert memory.num_folded > 20 >= memory.num_keys
    for one, other in zip(*found, strict=True):
        assert one.converged == other.converged
        assert _relative(other.targets, one.targets) < 1e-4
    cues = [editor._state.cues(layer)["cues"] for editor in (small, usual)]
    assert cues[0].shape == cues[1].shape
    for a, b in zip(small._state.pair(layer), usual._state.pair(layer), strict=True):
        assert _relative(a, b) < 1e-4
    small.save(tmp_path / "edits")
    usual.save(tmp_path / "before")
    for editor in (small, usual):
        editor.edit(requests[12:14])
    wanted = small._state.pair(layer)
    for batch in (1, 3):  # folded, and beside the prior
        small.revert(batch)
        usual.revert(batch)
    for a, b in zip(small._state.pair(layer), usual._state.pair(layer), strict=True):
        assert _relative(a, b) < 1e-4
    small.detach()
    again = Editor.load(model, tokenizer, tmp_path / "edits")
    kept = again._state.layers[layer].memory
    assert kept.num_folded > 0 and kept.keep_prior
    again.edit(requests[12:14])
    for a, b in zip(again._state.pair(layer), wanted, strict=True):
        assert _relative(a, b) < 1e-6
    again.detach()
    # A folder in which nothing was folded, as before, is folded from the next edit on.
    monkeypatch.setattr(folder, "most_keys", lambda features: 20)
    later = Editor.load(model, tokenizer, tmp_path / "before")
    unfolded = later._state.layers[layer].memory
    assert unfolded.num_folded == 0 and unfolded.num_keys > 20
    later.edit(requests[12:14])
    assert unfolded.num_folded > 0 and unfolded.num_keys <= 20
    for a, b in zip(later._state.pair(layer), wanted, strict=True):
        assert _relative(a, b) < 1e-4
    later.detach()
