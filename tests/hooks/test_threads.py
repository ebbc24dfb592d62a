"""Several threads that run one hooked model at once, as a server does."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from coachhook.hooks import attach_hooks, attached_hooks
from tests.models.families import tiny

from .support import SCOPES, calibrate, fill, shallow


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns every few bytecodes instead of every 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def prompts(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of every size and length, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for i in range(count):
        rows, columns = 1 + i % 3, 5 + i % 7
        ids = torch.randint(3, 60, (rows, columns), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(rows):
            mask[row, : (i + row) % 4] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@pytest.mark.parametrize(
    ("family", "scope"), [("gpt2", "cued"), *(("llama", scope) for scope in SCOPES)]
)
def test_threads_answer_as_one_alone(often: None, family: str, scope: str) -> None:
    model = shallow(family)
    hooks = attach_hooks(model, [0, 1])
    fill(hooks, scope)
    batches = prompts(24)
    calibrate(model, hooks, torch.randint(3, 60, (4, 12)))

    def answer(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)

    wanted = [answer(batch) for batch in batches]
    with hooks.disabled():
        plain = [answer(batch) for batch in batches]
    assert sum(not torch.equal(a, b) for a, b in zip(wanted, plain, strict=True)) > 6
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(answer, batches))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_a_forward_in_another_thread_is_not_seen() -> None:
    model = tiny("llama")
    hooks = attach_hooks(model, [0])
    context = hooks[0].context
    mask = torch.tensor([[0, 1, 1]])
    context.enter(model.model, (), {"input_ids": torch.ones(1, 3).long(), "attention_mask": mask})
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: (context.forward.shape, context.forward.mask)).result() == (
            None,
            None,
        )
        # What blocks say holds for every thread: generation with a streamer runs in one of its own.
        with hooks.disabled():
            assert pool.submit(lambda: len(context.disabled)).result() == 1
    assert context.forward.shape == (1, 3)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_threads_of_its_own(way) -> None:
    model = tiny("llama")
    hooks = attach_hooks(model, [0])
    fill(hooks, "sequence")
    ids = torch.randint(3, 60, (2, 9))
    calibrate(model, hooks, ids)
    other = way(model)
    theirs = attached_hooks(other)
    assert theirs is not None and theirs[0].context.forward is not hooks[0].context.forward
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_blocks_of_several_threads_end_in_any_order(often: None) -> None:
    model = tiny("llama").double()
    hooks = attach_hooks(model, [0, 1])
    fill(hooks, "membership")
    blocks = [hooks.packed(torch.tensor([0, end])) for end in (4, 6)]
    for block in blocks:
        block.__enter__()
    for block in blocks:
        block.__exit__(None, None, None)
    ids = torch.randint(3, 60, (2, 5))

    def record(_: int) -> bool:
        for _ in range(300):
            with hooks.record() as one, hooks.record() as other:
                pass
            if one or other:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(record, range(8)))
    with torch.no_grad(), hooks.record() as records:
        model(ids)
    assert [index for index, _, _ in records] == [0, 1]
    assert not hooks[0].context.sinks
