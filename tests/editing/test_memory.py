"""EditMemory against joint solves: Delta does not depend on the order of appends and folds."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from coachhook.editing import prior as priors
from coachhook.editing.memory import EditMemory
from coachhook.errors import BackendUnavailableError
from coachhook.ops import cholesky_update_solve_
from tests.ops.linalg_oracle import F64, batches, exact, joint, relative, spd

N, M = 80, 12
CAPS = [None, 0, 7, 10**6]


def filled(prior, made, **options):
    memory = EditMemory(prior, len(made[0][1]), **options)
    for keys, targets in made:
        memory.append(keys, targets)
    return memory


@pytest.mark.parametrize("max_keys", CAPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_consecutive_batches_equal_one(max_keys, dtype):
    prior, root = spd(N, 1e3)
    made = batches(root, 10, 10, M)
    memory = filled(prior, made, max_keys=max_keys, dtype=dtype)
    whole = EditMemory(prior, M, max_keys=max_keys, dtype=dtype)
    assert whole.append(*(torch.cat(x, 1) for x in zip(*made, strict=True))) == 1
    # 1e3 eps, times the condition's square root; the goal in float64 is 1e-9.
    limit = 1e-11 if dtype == F64 else 1e-4
    assert relative(memory.delta(), joint(prior, made)) < limit
    assert relative(memory.delta(), whole.delta().double()) < limit
    assert memory.batches == list(range(1, 11)) and memory.delta().dtype == dtype
    assert memory.num_keys + memory.num_folded == 100
    if max_keys is not None:
        assert memory.num_keys <= max_keys


@pytest.mark.parametrize("condition", [1e4, 1e6, 1e8, 1e10])
@pytest.mark.parametrize("isotropic", [False, True], ids=["from_prior", "isotropic"])
def test_error_is_within_ten_times_that_of_a_joint_solve(condition, isotropic):
    prior, root = spd(128, condition)
    made = batches(root, 100, 8, M, isotropic=isotropic)
    truth = exact(prior, made)
    error = relative(filled(prior, made).delta(), truth)
    # Where isotropic keys have repaired the condition, the joint solve is at 10 eps itself.
    assert error < max(10 * relative(joint(prior, made), truth), 1e-13)


@pytest.mark.parametrize("max_keys", CAPS)
def test_solves_in_blocks_as_on_a_gpu(max_keys, monkeypatch):
    monkeypatch.setattr(priors.FactoredPrior, "in_blocks", True)
    monkeypatch.setattr(priors, "_SMALL_MOST_ROWS", 64)
    prior, root = spd(150, 1e6)
    made = batches(root, 12, 5, M)
    memory = filled(prior, made, max_keys=max_keys)
    assert relative(memory.delta(), joint(prior, made)) < 1e-10
    before = memory.snapshot()
    for batch in (3, 12, 1):
        memory.remove(batch)
    kept = [made[i] for i in range(12) if i + 1 not in (3, 12, 1)]
    assert relative(memory.delta(), joint(prior, kept)) < 1e-10
    targets, coefficients = memory.pair()
    assert relative(targets @ coefficients, memory.delta()) < 1e-10
    memory.restore(before)
    memory.fold(memory.num_keys)
    assert relative(memory.delta(), joint(prior, made)) < 1e-10


class _HostReads(TorchDispatchMode):
    """Counts the operators through which a host learns a value of a GPU tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero")
        return func(*args, **(kwargs or {}))


def test_an_append_reads_nothing_but_its_checks():
    prior, root = spd(N, 1e3)
    made = batches(root, 3, 4, M)
    memory = filled(prior, made[:2])
    with _HostReads() as reads:
        bool(torch.ones(()))  # what is counted
        memory.append(*made[2])
    # The checks come as one list, which is not an operator on the CPU.
    assert reads.count == 1
    assert memory.num_keys == 12


@pytest.mark.parametrize("max_keys", CAPS)
def test_agrees_with_the_factor_path(max_keys):
    prior, root = spd(N, 1e6)
    made = batches(root, 30, 5, M)
    factor, delta = torch.linalg.cholesky(prior), torch.zeros(M, N, dtype=F64)
    for keys, targets in made:
        delta += (targets - delta @ keys) @ cholesky_update_solve_(factor, keys).mT
    assert relative(filled(prior, made, max_keys=max_keys).delta(), delta) < 1e-9


@pytest.mark.parametrize("max_keys", CAPS)
@pytest.mark.parametrize("isotropic", [False, True], ids=["from_prior", "isotropic"])
def test_removed_in_random_order_as_if_never_added(max_keys, isotropic):
    prior, root = spd(N, 1e4)
    made = batches(root, 24, 5, M, isotropic=isotropic)
    memory, order = filled(prior, made, max_keys=max_keys), random.Random(3)
    gone = order.sample(range(24), 15)
    for index in gone:
        memory.remove(index + 1)
    kept = [made[i] for i in range(24) if i not in gone]
    never = filled(prior, kept, max_keys=max_keys)
    assert relative(memory.delta(), never.delta()) < 1e-9
    assert relative(memory.delta(), joint(prior, kept)) < 1e-9
    assert memory.batches == [i + 1 for i in range(24) if i not in gone]
    assert memory.append(*made[0]) == 25
    memory.remove(25)
    for batch in memory.batches:
        memory.remove(batch)
    assert memory.batches == [] and memory.num_keys == memory.num_folded == 0
    assert float(memory.delta().abs().max()) < 1e-9
    assert memory.append(*made[3]) == 26
    assert relative(memory.delta(), joint(prior, [made[3]])) < 1e-7 * (10 if max_keys == 0 else 1)


def test_removal_beside_the_prior_leaves_nothing_at_any_condition():
    prior, root = spd(N, 1e10)
    made = batches(root, 10, 4, M, isotropic=True)
    memory = filled(prior, made)
    assert memory.num_folded == 0
    for batch in (4, 10, 1, 7):
        memory.remove(batch)
    never = filled(prior, [made[i] for i in (1, 2, 4, 5, 7, 8)])
    assert relative(memory.delta(), never.delta()) < 1e-10


@pytest.mark.parametrize("keep_folded", [True, False])
def test_fold_keeps_delta(keep_folded):
    prior, root = spd(N, 1e4)
    made = batches(root, 9, 4, M)
    memory = filled(prior, made, max_keys=10**6, keep_folded=keep_folded)
    before = memory.delta()
    for keys in (0, 3, 9, 24):
        memory.fold(keys)
        assert relative(memory.delta(), before) < 1e-11
    assert memory.num_keys == 0 and memory.num_folded == 36 and len(memory.batches) == 9
    memory.append(*made[0])
    assert relative(memory.delta(), joint(prior, [*made, made[0]])) < 1e-11


@pytest.mark.parametrize("max_keys", CAPS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_forms_of_delta(max_keys, count):
    prior, root = spd(N, 1e3)
    made = batches(root, count, 5, M)
    memory = filled(prior, made, max_keys=max_keys)
    delta, probe = memory.delta(), torch.randn(N, 3, dtype=F64)
    q, s = memory.factored()
    assert q.shape == (M, min(M, 5 * count)) and s.shape == (q.shape[1], N)
    torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[1], dtype=F64), rtol=0, atol=1e-13)
    v, at = memory.pair()
    assert torch.equal(v, torch.cat([targets for _, targets in made], 1))
    keys = torch.cat([keys for keys, _ in made], 1)
    coefficients = torch.linalg.solve(prior + keys @ keys.mT, keys).mT
    assert relative(at, coefficients) < 1e-11
    for other in (q @ s, v @ at):
        assert relative(other, delta) < 1e-11
    assert relative(memory.apply(probe), delta @ probe) < 1e-11
    assert memory.column_batches().tolist() == [b + 1 for b in range(count) for _ in range(5)]


def test_what_taking_back_dominant_folded_keys_costs_is_said():
    """A state that was saved and loaded in between goes on from what it had cost by then."""
    prior, _ = spd(N, 1e8)
    rng = torch.Generator().manual_seed(3)
    made = [
        tuple(torch.randn(size, 4, dtype=F64, generator=rng) for size in (N, M)) for _ in range(10)
    ]
    memory = filled(prior, made, max_keys=0)
    with pytest.warns(UserWarning, match=r"of the order of \de-\d+ in Delta") as said:
        for batch in (2, 9, 4):
            memory.remove(batch)
        memory = EditMemory.from_state_dict(*memory.state_dict())
        for batch in (7, 5, 1):
            memory.remove(batch)
    left = [made[i - 1] for i in memory.batches]
    told = float(str(said[-1].message).split("order of ")[1].split()[0])
    error = relative(memory.delta(), filled(prior, left).delta())
    assert 1e-10 < error < 100 * told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory = filled(prior, made, max_keys=10**6)
        for batch in (2, 9, 4, 7, 5, 1):
            memory.remove(batch)
        assert relative(memory.delta(), filled(prior, left).delta()) < 1e-9
        usual, root = spd(N, 1e4)
        memory = filled(usual, batches(root, 10, 4, M), max_keys=0)
        memory.remove(3)


@pytest.mark.parametrize("backend", ["nope", "triton", "cuda"])
def test_a_backend_that_cannot_run_is_refused_at_once(backend):
    with pytest.raises((ValueError, BackendUnavailableError), match=backend):
        EditMemory(spd(8)[0], 2, backend=backend)


def test_empty_memory():
    memory = EditMemory(spd(N)[0], M)
    q, s = memory.factored()
    v, at = memory.pair()
    assert torch.equal(memory.delta(), torch.zeros(M, N, dtype=F64))
    assert (q.shape, s.shape, v.shape, at.shape) == ((M, 0), (0, N), (M, 0), (0, N))
    assert torch.equal(memory.apply(torch.ones(N, 2)), torch.zeros(M, 2, dtype=F64))
    assert memory.batches == [] and memory.column_batches().shape == (0,)
    memory.fold(0)


def test_no_more_than_max_keys_and_the_newest_stay():
    prior, root = spd(N)
    memory = EditMemory(prior, M, max_keys=20)
    for keys, targets in batches(root, 12, 6, M):
        batch = memory.append(keys, targets)
        assert memory.num_keys <= 20
        assert int(memory.column_batches()[-1]) == batch
    assert EditMemory(spd(8)[0], 1).max_keys == 64
    assert EditMemory(spd(400)[0], 1).max_keys == 100


def test_keys_that_outweigh_the_prior_are_folded():
    prior, root = spd(40, 1e10)
    made = batches(root, 25, 4, M, isotropic=True)
    memory = filled(prior, made, max_keys=10**6)
    assert memory.num_folded > 0
    assert relative(memory.delta(), exact(prior, made)) < 1e-9


class TestRepeatedKeys:
    """The same key edited again: least squares averages, and says so."""

    prior, root = spd(N, 1e4)
    keys, first = batches(root, 1, 3, M)[0]
    second = first + 2.0

    @pytest.mark.parametrize("max_keys", CAPS)
    @pytest.mark.parametrize("scale", [1.0, 1e3])
    def test_contradiction(self, max_keys, scale):
        keys = scale * self.keys
        made = [(keys, self.first), (keys, self.second)]
        memory = filled(self.prior, made, max_keys=max_keys)
        # The condition of the joint problem is 1e4 scale^2: at scale 1e3 it leaves six digits.
        limit = 1e-12 * scale**2
        assert relative(memory.delta(), exact(self.prior, made)) < limit
        if scale > 1:
            average = (self.first + self.second) / 2
            torch.testing.assert_close(memory.apply(keys), average, rtol=0, atol=1e-2)
        memory.remove(1)
        # The second batch leaves a gap of 1/2 in the prior: nothing is lost to a downdate either.
        assert relative(memory.delta(), exact(self.prior, made[1:])) < limit

    def test_many_repeats(self):
        made = [(self.keys, self.first)] * 50
        memory = filled(self.prior, made, max_keys=10**6)
        assert relative(memory.delta(), exact(self.prior, made)) < 1e-9

    def test_overlaps(self):
        memory = EditMemory(self.prior, M, max_keys=10**6)
        other, target = batches(self.root, 1, 2, M, seed=5)[0]
        memory.append(self.keys, self.first)
        assert memory.overlaps(1) == []
        batch = memory.append(
            torch.cat([other, -3 * self.keys[:, 1:2], 2 * self.keys[:, 2:]], 1),
            torch.cat([target, self.second[:, :2]], 1),
        )
        [(column, older, cosine)] = memory.overlaps(batch)
        assert (column, older) == (3, 1) and cosine == pytest.approx(1.0)
        assert memory.overlaps(batch, above=1.1) == []
        memory.fold(3)
        assert memory.overlaps(batch) == [] and memory.overlaps(1) == []
        within = memory.append(other[:, [0, 0]], target[:, [0, 0]])
        [first, second] = memory.overlaps(within)
        assert first[:2] == (0, batch) and second[0] == 1 and second[1] in (batch, within)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 6)),
        st.tuples(st.just("remove"), st.integers(0, 20)),
        st.tuples(st.just("fold"), st.integers(0, 12)),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(
    steps=STEPS,
    max_keys=st.sampled_from(CAPS),
    seed=st.integers(0, 2**31),
    carried=st.booleans(),
)
def test_any_history_equals_what_is_left(steps, max_keys, seed, carried):
    n, m = 24, 5
    prior, root = spd(n, 1e3, seed)
    memory = EditMemory(prior, m, max_keys=max_keys, keep_prior=carried)
    left: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, (step, number) in enumerate(steps):
        if step == "append":
            [batch] = batches(root, 1, number, m, isotropic=bool(number % 2), seed=seed + index)
            left[memory.append(*batch)] = batch
        elif step == "remove" and left:
            batch = list(left)[number % len(left)]
            memory.remove(batch)
            del left[batch]
        elif step == "fold":
            memory.fold(min(number, memory.num_keys))
        if carried:  # from step to step
            memory.pair()
    assert memory.batches == list(left)
    if carried:
        torch.testing.assert_close(memory.prior(), prior, rtol=1e-9, atol=1e-9)
    assert memory.num_keys + memory.num_folded == sum(k.shape[1] for k, _ in left.values())
    expected = joint(prior, list(left.values())) if left else torch.zeros(m, n, dtype=F64)
    torch.testing.assert_close(memory.delta(), expected, rtol=0, atol=1e-9)
    v, at = memory.pair()
    torch.testing.assert_close(v @ at, expected, rtol=0, atol=1e-9)
    assert memory.column_batches().tolist() == [b for b, (k, _) in left.items() for _ in k.T]


def test_the_pair_after_many_appends_is_that_of_one_solve():
    """Coefficients carried from append to append, and again after a batch was taken back."""
    generator = torch.Generator().manual_seed(2)
    n, m = 24, 10
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    memory = EditMemory(root @ root.T + torch.eye(n), m, max_keys=10**6)

    def check():
        v, at = memory.pair()
        direct = memory._space.solve(memory._space.solved)
        assert (at - direct).norm() <= 1e-11 * direct.norm()
        assert (v @ at - memory.delta()).norm() <= 1e-10 * memory.delta().norm()

    for step in range(40):
        keys = torch.randn(n, 1 + step % 3, generator=generator, dtype=torch.float64)
        memory.append(keys, torch.randn(m, keys.shape[1], generator=generator))
        if step % 7 != 3:
            check()
    snapshot, before = memory.snapshot(), memory.pair()[1]
    memory.append(keys, torch.zeros(m, keys.shape[1]))
    check()
    memory.restore(snapshot)
    assert torch.equal(memory.pair()[1], before)
    memory.remove(5)
    check()


@pytest.mark.parametrize("max_keys", [5, 10**6])
def test_coefficients_of_keys_are_those_after_an_append(max_keys):
    prior, root = spd(N, 1e3)
    memory = EditMemory(prior, M, max_keys=max_keys)
    for made in (None, *batches(root, 4, 6, M)):
        if made is not None:
            memory.append(*made)
        before = memory.contents()
        keys = root @ torch.randn(N, 3, dtype=F64)
        found = memory.coefficients_of(keys)
        assert all(a is b for a, b in zip(before, memory.contents(), strict=True))
        other = EditMemory.from_state_dict(*memory.state_dict())
        other.append(keys, torch.zeros(M, 3, dtype=F64))
        expected = other.pair()[1][-3:]
        assert (found - expected).norm() <= 1e-11 * expected.norm()


def test_autocast_rounds_nothing():
    prior, root = spd(60, 50.0)
    made = batches(root, 3, 5, 7)
    found = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            memory = EditMemory(prior, 7, dtype=torch.float32, max_keys=12)
            for keys, targets in made:
                memory.append(keys, targets)
            keys = made[0][0].float()
            found.append([*memory.pair(), memory.delta(), memory.prior()])
            for ask in (memory.apply, memory.prior_solve, memory.coefficients_of):
                found[-1].append(ask(keys))
    assert memory.num_folded
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
