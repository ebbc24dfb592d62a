"""Appends in fixed shapes, as a GPU's graphs hold them, against appends by triangular solves."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from coachhook.editing import captured
from coachhook.editing import prior as priors
from coachhook.editing.captured import Step, padded
from coachhook.editing.memory import EditMemory
from coachhook.errors import NotPositiveDefiniteError
from tests.ops.linalg_oracle import F64, batches, joint, relative, spd
from tests.tolerances import tol

M = 7
NAN = float("nan")


@pytest.fixture
def fixed(monkeypatch):
    """Everything as on a GPU but for the capture, with buffers that are soon full."""
    monkeypatch.setattr(priors.FactoredPrior, "in_blocks", True)
    monkeypatch.setattr(priors, "_SMALL_MOST_ROWS", 64)
    monkeypatch.setattr(captured, "_LEAST_ROWS", 24)
    monkeypatch.setattr(captured, "_MULTIPLE", 8)


def mixed(root, counts, *, isotropic=False, seed=1):
    """Batches of so many keys."""
    return [
        batches(root, 1, count, M, isotropic=isotropic, seed=seed + i)[0]
        for i, count in enumerate(counts)
    ]


def filled(prior, made, **options):
    memory = EditMemory(prior, M, **{"max_keys": 10**6, **options})
    for keys, targets in made:
        memory.append(keys, targets)
    return memory


def plainly(prior, made, **options):
    """The same by triangular solves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "_takes", lambda prior, keys: False)
        return filled(prior, made, **options)


def state(memory):
    return {name: value.clone() for name, value in memory.state_dict()[0].items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[x], second[x]) for x in first)


def check_inverse(memory):
    """Its first rows are right, the rest finite."""
    buffers, count = memory._space._buffers, len(memory._space)
    assert buffers.inverted == count and buffers.harmless
    inverse = buffers.inverse[:count, :count]
    unit = torch.eye(count, dtype=inverse.dtype)
    torch.testing.assert_close(inverse @ memory._space.root, unit, rtol=0, atol=1e-11)
    assert bool(buffers.inverse.isfinite().all())
    assert not buffers.inverse[:count].triu(1).any()


def test_padded():
    sizes = {1: 32, 31: 32, 32: 32, 33: 64, 64: 64, 65: 128, 128: 128}
    assert {keys: padded(keys) for keys in sizes} == sizes


def test_blocks_of_the_prior():
    """Large ones where they are faster; at most an eighth of the memory of a large factor."""
    sizes = {1: 64, 300: 256, 4096: 2048, 6400: 4096, 8192: 4096, 8193: 2048, 16384: 2048}
    assert {n: priors.kept_rows(n) for n in sizes} == sizes


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize(
    "n, counts",
    [
        (1, [1, 1, 2]),
        (33, [5] * 9),
        (150, [1, 16, 17, 32, 33, 2, 65, 128, 3]),
        (150, [32] * 8),
        (90, [3, 130, 4, 129, 60]),
    ],
)
def test_state_is_that_of_solves(fixed, nan_filled_memory, n, counts, dtype):
    """Also where 129 keys and more are appended by solves in between."""
    condition = 1e3 if n > 1 else 1.0
    prior, root = spd(n, condition)
    made = mixed(root, counts)
    memory, other = (make(prior, made, dtype=dtype) for make in (filled, plainly))
    found, expected = state(memory), state(other)
    for name in ("keys", "targets"):
        assert torch.equal(found[name], expected[name])
    for name in ("solved", "root"):
        size = condition * float(expected[name].abs().max())
        limit = tol("solve", dtype, reduction=n + sum(counts), scale=size)
        torch.testing.assert_close(found[name], expected[name], **limit)
    assert not found["root"].triu(1).any()
    assert relative(memory.delta(), joint(prior, made)) < (1e-10 if dtype == F64 else 1e-3)
    least, largest = memory._space.pivots()
    squares = memory._space.root.diagonal().square()
    torch.testing.assert_close(torch.stack(torch.aminmax(squares)).tolist(), [least, largest])
    if dtype == F64 and counts[-1] < 129:
        check_inverse(memory)


@pytest.mark.parametrize("condition", [1e4, 1e8])
@pytest.mark.parametrize("isotropic", [False, True], ids=["from_prior", "isotropic"])
def test_as_exact_as_solves(fixed, condition, isotropic):
    """Delta, with the products of an explicit inverse of the root in place of its solves."""
    prior, root = spd(128, condition)
    made = mixed(root, [8] * 40, isotropic=isotropic)
    wanted = joint(prior, made)
    error = relative(filled(prior, made).delta(), wanted)
    assert error < max(10 * relative(plainly(prior, made).delta(), wanted), 1e-12)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 40)),
        st.tuples(st.just("remove"), st.integers(0, 20)),
        st.tuples(st.just("fold"), st.integers(0, 30)),
        st.tuples(st.just("keep"), st.just(0)),
        st.tuples(st.just("back"), st.just(0)),
        st.tuples(st.just("bad"), st.integers(1, 40)),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, max_keys=st.sampled_from([None, 0, 30, 10**6]), seed=st.integers(0, 2**31))
def test_any_history_equals_what_is_left(steps, max_keys, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(priors.FactoredPrior, "in_blocks", True)
        patch.setattr(captured, "_LEAST_ROWS", 24)
        prior, root = spd(48, 1e3, seed)
        memory, left = EditMemory(prior, M, max_keys=max_keys), {}
        kept = memory.snapshot(), dict(left), state(memory)
        for index, (step, number) in enumerate(steps):
            if step in ("append", "bad"):
                [(keys, targets)] = mixed(
                    root, [number], isotropic=bool(number % 2), seed=seed + index
                )
                if step == "append":
                    left[memory.append(keys, targets)] = keys, targets
                else:
                    keys[number % 48, -1] = NAN
                    with pytest.raises(ValueError, match="keys must be finite"):
                        memory.append(keys, targets)
            elif step == "remove" and left:
                batch = list(left)[number % len(left)]
                memory.remove(batch)
                del left[batch]
            elif step == "fold":
                memory.fold(min(number, memory.num_keys))
            elif step == "keep":
                kept = memory.snapshot(), dict(left), state(memory)
            elif step == "back":
                memory.restore(kept[0])
                left = dict(kept[1])
                assert same(state(memory), kept[2])
        assert memory.batches == list(left)
        expected = joint(prior, list(left.values())) if left else torch.zeros(M, 48, dtype=F64)
        torch.testing.assert_close(memory.delta(), expected, rtol=0, atol=1e-8)
        v, at = memory.pair()
        torch.testing.assert_close(v @ at, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("before", [[], [16], [5, 40, 3]])
def test_equal_bits_on_repeat_and_the_same_buffers(fixed, before):
    """A snapshot finds the buffers, and the graph kept with them, that the first append made."""
    prior, root = spd(60, 1e3)
    *made, batch = mixed(root, [*before, 20])
    memory = filled(prior, made)
    kept, untouched = memory.snapshot(), state(memory)
    seen = []
    for _ in range(3):
        memory.append(*batch)
        seen.append((state(memory), memory._space._buffers))
        memory.restore(kept)
        assert same(state(memory), untouched)
    assert all(same(seen[0][0], other) and seen[0][1] is buffers for other, buffers in seen)
    assert memory._space._buffers is seen[0][1]


def test_branches_do_not_write_over_each_other(fixed):
    prior, root = spd(60, 1e3)
    first, second, third = mixed(root, [20, 9, 12])
    memory = filled(prior, [first])
    start = memory.snapshot()
    memory.append(*second)
    left, left_state = memory.snapshot(), state(memory)
    memory.restore(start)
    memory.append(*third)
    right, right_state = memory.snapshot(), state(memory)
    memory.restore(left)
    assert same(state(memory), left_state)
    memory.append(*third)
    assert relative(memory.delta(), joint(prior, [first, second, third])) < 1e-11
    memory.restore(right)
    assert same(state(memory), right_state)
    memory.append(*second)
    assert relative(memory.delta(), joint(prior, [first, third, second])) < 1e-11
    memory.restore(start)
    assert memory.num_keys == 20


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize(
    "change, match",
    [
        (lambda keys, targets: keys[3, 1:2].fill_(NAN), "keys must be finite.* 1 of 6"),
        (lambda keys, targets: keys[:, :2].fill_(float("inf")), "keys must be finite.* 2 of 6"),
        (lambda keys, targets: targets[2, 5:].fill_(NAN), "targets must be finite.* 1 of 6"),
        (lambda keys, targets: targets[0, :1].fill_(-float("inf")), "targets must be finite"),
        (lambda keys, targets: keys.fill_(1e200), "size that can be squared"),
    ],
)
def test_a_failing_append_leaves_nothing(fixed, before, change, match):
    prior, root = spd(60, 1e3)
    *made, good, bad = mixed(root, [6] * (before + 2))
    memory = filled(prior, made)
    kept, contents = state(memory), memory.contents()
    change(*bad)
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            memory.append(*bad)
        assert same(state(memory), kept)
        assert all(x is y for x, y in zip(contents, memory.contents(), strict=True))
    assert memory.append(*good) == before + 1
    memory.append(*good)
    assert relative(memory.delta(), joint(prior, [*made, good, good])) < 1e-11
    check_inverse(memory)


def outcome(make, prior, made, extra):
    """Keys beside and inside the prior and Delta after batches and one more, or the error."""
    memory = make(prior, made)
    kept = state(memory)
    try:
        memory.append(*extra)
    except NotPositiveDefiniteError:
        assert same(state(memory), kept)
        return "refused", memory
    return (memory.num_keys, memory.num_folded), memory


@pytest.mark.parametrize("scale", [1e2, 1e5, 1e7, 1e9, 1e12])
@pytest.mark.parametrize("before", [0, 2])
def test_batches_that_determine_too_much_are_folded(fixed, monkeypatch, before, scale):
    """Two keys that repeat each other, up to where G is no longer positive definite to rounding."""
    prior, root = spd(60, 1e3)
    *made, (keys, targets) = mixed(root, [5] * (before + 1))
    extra = scale * keys[:, [0, 0]], targets[:, :2]
    found, memory = outcome(filled, prior, made, extra)
    with monkeypatch.context() as patch:
        patch.setattr(captured, "_takes", lambda prior, keys: False)
        expected, other = outcome(filled, prior, made, extra)
    assert found == expected
    if scale <= 1e7:
        assert relative(memory.delta(), other.delta()) < 1e-15 * scale**2 + 1e-11
    good = mixed(root, [5], seed=50)[0]
    assert memory.append(*good) == other.append(*good)


def test_restored_after_a_root_that_failed(fixed):
    """What it left in the buffers disturbs no later append."""
    prior, root = spd(60, 1e3)
    first, (keys, targets), third = mixed(root, [5, 5, 4])
    memory = filled(prior, [first])
    kept = memory.snapshot()
    with pytest.raises(NotPositiveDefiniteError):
        memory.append(1e9 * keys[:, [0, 0, 0]], targets[:, :3])
    assert memory.num_keys == 5
    memory.append(1e4 * keys[:, [0, 0, 0]], targets[:, :3])
    assert memory.num_keys == 0
    memory.restore(kept)
    memory.append(*third)
    memory.append(keys, targets)
    assert relative(memory.delta(), joint(prior, [first, third, (keys, targets)])) < 1e-11
    check_inverse(memory)


def test_removed_and_loaded_in_between(fixed):
    prior, root = spd(60, 1e3)
    made = mixed(root, [4, 17, 9, 2, 33, 5])
    memory = filled(prior, made[:3])
    memory.remove(2)
    memory.append(*made[3])
    memory = EditMemory.from_state_dict(*memory.state_dict())
    loaded = memory.state_dict()[0]
    before = {name: value.clone() for name, value in loaded.items()}
    memory.append(*made[4])
    memory.remove(1)
    memory.append(*made[5])
    assert same(before, loaded)
    assert relative(memory.delta(), joint(prior, made[2:])) < 1e-11
    check_inverse(memory)
    keys = root @ torch.randn(60, 3, dtype=F64)
    rows, count = memory.coefficients_of(keys), memory.num_keys
    memory.append(keys, torch.zeros(M, 3, dtype=F64))
    assert relative(memory.pair()[1][count:], rows) < 1e-10


def test_inference_mode_may_come_and_go(fixed):
    prior, root = spd(60, 1e3)
    made = mixed(root, [5, 20, 5, 18])
    memory = EditMemory(prior, M)
    for index, (keys, targets) in enumerate(made):
        with torch.inference_mode(index % 2 == 0):
            memory.append(keys + 0, targets + 0)
    assert relative(memory.delta(), joint(prior, made)) < 1e-11
    assert not any(value.is_inference() for value in memory.state_dict()[0].values())


def test_dtypes_and_layouts_of_arguments(fixed):
    prior, root = spd(60, 1e3)
    [(keys, targets)] = mixed(root, [6])
    memory, other = (EditMemory(prior, M) for _ in range(2))
    wide = torch.full((120, 12), NAN, dtype=torch.float32)
    wide[::2, ::2] = keys.float()
    memory.append(wide[::2, ::2].requires_grad_(), targets.mT.contiguous().mT.half())
    other.append(keys.float().double(), targets.half().double())
    assert same(state(memory), state(other))


class _Calls(TorchDispatchMode):
    """Counts the operators, views apart, which enqueue nothing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_few_calls_beside_a_replay(fixed, monkeypatch):
    """Copies of keys and targets and the row they go to; the rest is the graph's."""
    prior, root = spd(60, 1e3)
    made = mixed(root, [6, 7, 7])
    monkeypatch.setattr(captured, "_LEAST_ROWS", 64)
    memory = filled(prior, made[:2])
    run, replayed = Step.run, []

    def replay(step, buffers):
        with torch.utils._python_dispatch._disable_current_modes():
            replayed.append(run(step, buffers))
        return replayed[-1]

    monkeypatch.setattr(Step, "run", replay)
    with _Calls() as calls:
        memory.append(*made[2])
    assert len(replayed) == 1
    assert [name.split(".")[0] for name in calls.names] == ["copy_", "copy_", "fill_"]


def test_histories_of_several_memories(fixed):
    """Each with buffers of its own, in random order."""
    rng, memories = random.Random(5), []
    for seed in range(3):
        prior, root = spd(40 + seed, 1e3, seed)
        memories.append((prior, EditMemory(prior, M), mixed(root, [3, 16, 20, 5], seed=seed), []))
    order = [index for index in range(3) for _ in range(4)]
    rng.shuffle(order)
    for index in order:
        _, memory, made, done = memories[index]
        done.append(made[len(done)])
        memory.append(*done[-1])
    for prior, memory, made, _ in memories:
        assert relative(memory.delta(), joint(prior, made)) < 1e-11


def test_numbers_come_to_the_host_whatever_the_default_device(monkeypatch):
    """Memory of another device cannot be pinned."""
    empty = torch.empty
    with torch.device("meta"):
        assert empty(1).device.type == "meta"
        monkeypatch.setattr(torch, "empty", lambda *s, pin_memory, **options: empty(*s, **options))
        found = captured._in_host_memory.__wrapped__(32, F64)
    assert found.device.type == "cpu" and found.shape == (67,)
