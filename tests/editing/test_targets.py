"""How targets are optimised: the steps, and when a request leaves."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace

import pytest
import torch

from coachhook import EditConfig
from coachhook.editing import room, targets
from coachhook.editing.adam import ClampedAdam
from coachhook.editing.encoding import encode_requests
from coachhook.editing.prompts import SUBJECT_PLACES
from coachhook.editing.suffix import Suffix
from coachhook.editing.targets import optimise_targets
from coachhook.models import describe

BETAS = (0.9, 0.999)
TWO = ("{}", "Some say that {}")


def test_steps_by_coordinate_are_torchs_adam():
    """Also of a request that is left out of some steps."""
    starts = torch.randn(3, 2, 5, dtype=torch.float64)
    ours = ClampedAdam(starts, 0.3, (0.8, 0.99), torch.full((3, 1), math.inf), "coordinate")
    theirs = [torch.nn.Parameter(start.clone()) for start in starts]
    adam = torch.optim.Adam(theirs, lr=0.3, betas=(0.8, 0.99))
    for step in range(12):
        which = [i for i in range(3) if i == 0 or step % (i + 1) == 0]
        gradient = torch.randn_like(starts)
        ours.take(gradient, torch.tensor(which))
        adam.zero_grad()
        for i in which:
            theirs[i].grad = gradient[i]
        adam.step()
        torch.testing.assert_close(ours.deltas(), torch.stack(list(theirs)), rtol=1e-12, atol=1e-12)


def test_steps_by_vector_follow_the_gradient_at_each_place():
    start = torch.randn(2, 2, 7, dtype=torch.float64)
    gradient = torch.randn_like(start) * torch.tensor([1e-3, 50.0])[:, None]
    adam = ClampedAdam(start, 0.3, BETAS, torch.full((2, 1), math.inf), "vector")
    adam.take(gradient, torch.tensor([0, 1]))
    step = adam.deltas() - start
    wanted = -0.3 * math.sqrt(7) * gradient / gradient.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(step, wanted, rtol=1e-4, atol=0)


def test_each_correction_stays_in_its_ball():
    radius = torch.tensor([[0.5], [100.0]])
    adam = ClampedAdam(torch.zeros(2, 3, 4), 1.0, BETAS, radius, "coordinate")
    for _ in range(5):
        adam.take(torch.ones(2, 3, 4), torch.tensor([0, 1]))
    norm = adam.deltas().norm(dim=-1)
    torch.testing.assert_close(norm[0], torch.full((3,), 0.5), rtol=1e-6, atol=0)
    # lr for each coordinate and step; Adam adds 1e-8 to what it divides by.
    torch.testing.assert_close(norm[1], torch.full((3,), 5.0 * 2), rtol=1e-4, atol=0)


def test_a_request_leaves_where_its_loss_no_longer_falls(make_editor, requests):
    """With no room to move; those that converge are as they are without the rule."""
    editor, model, tokenizer = make_editor(places=("subject_last",), rewordings=0)
    batch = encode_requests(tokenizer, requests[:3], editor.config.contexts, None)

    def found(batch, **changes):
        config = editor.config.with_(target_stop=0.3, target_weight_decay=0.0, **changes)
        return optimise_targets(model, describe(model), batch, config, pad_id=0)

    patient, steps = found(batch, target_progress=0.0), editor.config.target_steps
    assert all(step < steps - 1 for step in patient.steps) and max(patient.losses) < 0.3
    assert torch.equal(found(batch).deltas, patient.deltas)
    assert found(batch, target_clamp=1e-3).steps == [5] * 3
    assert found(batch, target_clamp=1e-3, target_progress=0.0).steps == [steps - 1] * 3


def test_a_loss_may_rise_when_rewordings_join(make_editor, requests):
    """They are optimised although the loss was lower without them."""
    editor, model, tokenizer = make_editor(places=("subject_last",), rewordings=0)
    encoded = encode_requests(tokenizer, requests[:4], editor.config.contexts, None)
    others = [request.contexts[0] for request in encoded[1:]]
    config = editor.config.with_(target_lr=0.1, target_stop=0.3, target_weight_decay=0.0)
    found = [
        optimise_targets(model, describe(model), [one], config, pad_id=0)
        for one in (encoded[0], replace(encoded[0], rewordings=others))
    ]
    assert 5 < found[0].steps[0] < config.target_steps - 3
    assert found[1].steps[0] >= found[0].steps[0] + 2


def test_a_request_goes_on_at_its_next_place_beside_the_others(make_editor, requests, monkeypatch):
    """A batch takes as many forwards as the request with the longest way."""
    editor, model, tokenizer = make_editor(rewordings=0, contexts=TWO, dtype=torch.float64)
    batch = encode_requests(tokenizer, requests[:5], editor.config.contexts, None)
    unknown = replace(requests[5], target_new="Marie Antoinette Fontaine")
    batch += encode_requests(tokenizer, [unknown], editor.config.contexts, None)
    config = editor.config.with_(
        target_steps=7, target_progress=0.0, target_kl=0.1, target_clamp=1.0
    )
    calls = []
    find = targets.find_losses
    monkeypatch.setattr(targets, "find_losses", lambda *a: calls.append(a[2]) or find(*a))

    def found(some):
        calls.clear()
        return optimise_targets(model, describe(model), some, config, pad_id=0), len(calls)

    together, taken = found(batch)
    alone = [found([one]) for one in batch]
    assert taken == max(count for _, count in alone) > 7
    # Some are at a later place while others are at their first.
    assert min(count for _, count in alone) < taken
    for i, (one, _) in enumerate(alone):
        torch.testing.assert_close(together.values[:, i], one.values[:, 0], rtol=1e-9, atol=1e-9)
        assert together.steps[i] == one.steps[0] and together.converged[i] == one.converged[0]
        of = [together.places.index(place) for place in one.places]
        assert together.used[i, of].tolist() == one.used[0].tolist()
        assert int(together.used[i].sum()) == int(one.used.sum())


def test_settings_of_the_steps_are_checked():
    with pytest.raises(ValueError, match="target_scaling must be one of coordinate, vector, got"):
        EditConfig(layers=[0], target_scaling="matrix")
    with pytest.raises(ValueError, match="target_progress must not be negative, got -1"):
        EditConfig(layers=[0], target_progress=-1)
    for betas in [0.9, "ab", (0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, 0.9, 0.9)]:
        with pytest.raises(ValueError, match="target_betas must be two numbers from 0 to below 1"):
            EditConfig(layers=[0], target_betas=betas)


def test_chunks_may_have_other_numbers_of_wordings(make_editor, requests):
    """What does not fit at once is run in parts, each with prompts of its own number."""
    editor, model, tokenizer = make_editor(rewordings=0, contexts=TWO, dtype=torch.float64)
    encoded = encode_requests(tokenizer, requests[:3], editor.config.contexts, None)
    others = [request.contexts[0] for request in encoded[1:]]
    batch = [replace(encoded[0], rewordings=others), *encoded[1:]]
    whole, parts = (
        optimise_targets(model, describe(model), batch, editor.config, pad_id=0, max_tokens=most)
        for most in (100_000, 1)
    )
    assert parts.converged == whole.converged and parts.steps == whole.steps
    torch.testing.assert_close(parts.deltas, whole.deltas, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kept", [None, 0.0, 0.5])
def test_a_chunk_has_room_for_the_rows_of_its_largest_request(make_editor, requests, kept):
    """Each of its requests takes as many, whichever of them comes first."""
    editor, _, tokenizer = make_editor()
    contexts = ("{}", "Long before all of this was known to the others, {}")
    batch = encode_requests(tokenizer, requests[:8], contexts, None)
    others = [request.contexts[0] for request in batch]
    batch[0] = replace(batch[0], rewordings=others)

    def needed(some):
        prompts = [(r, prompt) for r in some for prompt in [*r.prompts, r.essence]]
        rows = max(len(r.prompts) for r in some) + 1
        ends = [len(p.ids) + len(r.target) * (p is not r.essence) for r, p in prompts]
        firsts = [p.position((name, 0), ()) for _, p in prompts for name in SUBJECT_PLACES]
        pairs = zip(firsts[::2], firsts[1::2], strict=True)
        live = [
            end - min(last, last if previous is None else previous)
            for end, (last, previous) in zip(ends, pairs, strict=True)
        ]
        width = max(ends)
        return len(some) * rows * (width if kept is None else max(live) + kept * width)

    for order in (batch, batch[::-1]):
        chunks = room.chunks(order, range(8), 350, kept, among=range(8))
        assert sorted(i for chunk in chunks for i in chunk) == list(range(8)) and len(chunks) < 8
        for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
            some = [order[i] for i in chunk]
            assert len(chunk) == 1 or needed(some) <= 350
            assert following is None or needed([*some, order[following[0]]]) > 350


@pytest.mark.parametrize("most", [60, 100_000])
def test_where_all_tokens_are_run_there_is_room_for_fewer(make_editor, requests, monkeypatch, most):
    """Which shows in the first forward; nobody is left out."""
    editor, model, tokenizer = make_editor(rewordings=0, contexts=TWO, dtype=torch.float64)
    batch = encode_requests(tokenizer, requests[:4], editor.config.contexts, None)
    make, made = targets.make_problem, []

    def making(suffix, some, *args):
        made.append(len(some))
        return make(suffix, some, *args)

    monkeypatch.setattr(targets, "make_problem", making)
    monkeypatch.setattr(Suffix, "bytes_per_kept_token", 0)

    def found():
        made.clear()
        return optimise_targets(
            model, describe(model), batch, editor.config, pad_id=0, max_tokens=most
        )

    live, chunks = found(), list(made)
    monkeypatch.setattr(Suffix, "_difference", lambda *_: math.inf)
    whole = found()
    assert whole.steps == live.steps
    torch.testing.assert_close(whole.deltas, live.deltas, rtol=1e-6, atol=1e-6)
    if most > 1000:
        assert made == chunks == [4]
    else:  # the first is made again
        assert made[0] == chunks[0] > made[1] and sum(made[1:]) == 4


@pytest.mark.parametrize("short", [False, True])
def test_the_problem_of_a_chunk_is_gone_when_the_next_is_made(
    make_editor, requests, monkeypatch, short
):
    """Also one that the device had no room for."""
    editor, model, tokenizer = make_editor(rewordings=0, contexts=TWO)
    batch = encode_requests(tokenizer, requests[:3], editor.config.contexts, None)
    make, optimise, made, alive = targets.make_problem, targets._optimise_chunk, [], []

    def making(*args):
        alive.extend(problem() is not None for problem in made)
        problem = make(*args)
        made.append(weakref.ref(problem))
        return problem

    def optimising(*args):
        if short and len(made) == 1:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return optimise(*args)

    monkeypatch.setattr(targets, "make_problem", making)
    monkeypatch.setattr(targets, "_optimise_chunk", optimising)
    most = 10_000 if short else 1
    optimise_targets(model, describe(model), batch, editor.config, pad_id=0, max_tokens=most)
    assert len(made) >= 3 and not any(alive)
