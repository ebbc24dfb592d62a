"""EditMemory as state: snapshots, saving, bad input, memory in use."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from coachhook.editing.memory import EditMemory, regularized_prior
from coachhook.errors import NotPositiveDefiniteError
from tests.ops.linalg_oracle import F64, batches, joint, relative, spd

N, M = 60, 9
PRIOR, ROOT = spd(N, 1e3)
MADE = batches(ROOT, 8, 4, M)


def filled(count=5, **options):
    memory = EditMemory(PRIOR, M, **options)
    for keys, targets in MADE[:count]:
        memory.append(keys, targets)
    return memory


def bits(memory):
    """Everything observable, as tensors and values to compare exactly."""
    tensors, values = memory.state_dict()
    return {k: v.clone() for k, v in tensors.items()}, json.dumps(values), memory.delta()


def same(first, second):
    return (
        first[1] == second[1]
        and first[0].keys() == second[0].keys()
        and all(torch.equal(first[0][k], second[0][k]) for k in first[0])
        and torch.equal(first[2], second[2])
    )


CHANGES = {
    "append": lambda memory: memory.append(*MADE[6]),
    "fold": lambda memory: memory.fold(min(3, memory.num_keys)),
    "remove_newest": lambda memory: memory.remove(5),
    "remove_oldest": lambda memory: memory.remove(1),
    "all": lambda memory: [memory.append(*MADE[7]), CHANGES["fold"](memory), memory.remove(2)],
}


@pytest.mark.parametrize(
    ("max_keys", "change"),
    # With max_keys=0 there is nothing left to fold.
    [(cap, name) for cap in (None, 0, 10) for name in CHANGES if (cap, name) != (0, "fold")],
)
def test_restore_is_bit_exact(max_keys, change):
    memory = filled(max_keys=max_keys)
    before = bits(memory)
    snapshot = memory.snapshot()
    for _ in range(2):
        CHANGES[change](memory)
        assert not same(bits(memory), before)
        memory.restore(snapshot)
        assert same(bits(memory), before)


def test_snapshots_may_be_restored_in_any_order():
    # After five batches there are spare rows, which both branches want to write to.
    memory = filled(5)
    older = memory.snapshot(), bits(memory)
    memory.append(*MADE[6])
    newer = memory.snapshot(), bits(memory)
    memory.restore(older[0])
    memory.append(*MADE[7])
    memory.restore(newer[0])
    assert same(bits(memory), newer[1])
    memory.restore(older[0])
    assert same(bits(memory), older[1])


def test_inference_mode_may_come_and_go():
    with torch.inference_mode():
        memory = filled(3, max_keys=6)
    memory.append(*(x.clone().requires_grad_() for x in MADE[3]))
    memory.fold(memory.num_keys)
    memory.remove(2)
    with torch.inference_mode():
        memory.append(*MADE[4])
        memory.remove(1)
    delta = memory.delta()
    assert not delta.requires_grad
    assert relative(delta, joint(PRIOR, MADE[2:5])) < 1e-11


def test_foreign_snapshot_is_refused():
    with pytest.raises(ValueError, match="restore: snapshot must have been taken from this memory"):
        filled().restore(filled().snapshot())


@pytest.mark.parametrize("options", [{}, {"max_keys": 0}, {"max_keys": 6}, {"keep_folded": False}])
def test_saved_and_loaded_memory_continues(options, tmp_path):
    memory = filled(**options)
    memory.fold(min(5, memory.num_keys))
    tensors, values = memory.state_dict()
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "memory.safetensors")
    values = json.loads(json.dumps(values))
    on_disk = (tmp_path / "memory.safetensors").read_bytes()
    loaded = EditMemory.from_state_dict(load_file(tmp_path / "memory.safetensors"), values)
    saved, read = bits(memory), bits(loaded)
    assert same((*saved[:2], saved[2]), (*read[:2], saved[2]))
    for each in (memory, loaded):
        assert each.append(*MADE[6]) == 6
        each.fold(min(2, each.num_keys))
        each.remove(6)
    # The strides of what was loaded take other paths through the BLAS.
    assert relative(loaded.delta(), memory.delta()) < 1e-13
    assert (tmp_path / "memory.safetensors").read_bytes() == on_disk


def test_loading_leaves_the_given_tensors_alone():
    tensors, values = filled(max_keys=10).state_dict()
    given = {k: v.clone() for k, v in tensors.items()}
    loaded = EditMemory.from_state_dict(given, values)
    loaded.append(*MADE[6])
    loaded.fold(loaded.num_keys)
    loaded.remove(1)
    assert all(torch.equal(given[k], tensors[k]) for k in tensors)


def test_incomplete_state_is_refused_and_changes_nothing():
    tensors, values = filled(max_keys=6).state_dict()
    memory = filled(2)
    before = bits(memory)
    for name in ("factor", "keys", "targets", "solved", "root", "base"):
        with pytest.raises(KeyError, match=name):
            memory.load_state_dict({k: v for k, v in tensors.items() if k != name}, values)
        with pytest.raises(ValueError, match=f"{name} must be"):
            memory.load_state_dict({**tensors, name: tensors[name][:-1]}, values)
    with pytest.raises(KeyError):
        memory.load_state_dict(tensors, {k: v for k, v in values.items() if k != "next"})
    assert same(bits(memory), before)


def raises_and_changes_nothing(memory, error, match, call):
    before = bits(memory)
    with pytest.raises(error, match=match):
        call()
    assert same(bits(memory), before)


@pytest.mark.parametrize("max_keys", [None, 0])
def test_bad_batches(max_keys):
    memory = filled(3, max_keys=max_keys)
    keys, targets = MADE[4]
    nan_keys, inf_targets = keys.clone(), targets.clone()
    nan_keys[3, 2], inf_targets[0, 0] = float("nan"), float("inf")
    huge = torch.full_like(keys, 1e170)
    for arguments, error, match in [
        ((nan_keys, targets), ValueError, "append: keys must be finite, got NaN or Inf in 1 of 4"),
        ((keys, inf_targets), ValueError, "append: targets must be finite"),
        ((keys.T, targets), ValueError, r"append: keys must be \[60, k\].*got \[4, 60\]"),
        ((keys, targets.T), ValueError, r"append: targets must be \[9, k\].*got \[4, 9\]"),
        ((keys[:, 0], targets), ValueError, r"append: keys must be \[60, k\].*got \[60\]"),
        ((keys, targets[:, :3]), ValueError, r"same number k >= 1 of columns, .* \[9, 3\]"),
        ((keys[:, :0], targets[:, :0]), ValueError, r"k >= 1 of columns, got \[60, 0\]"),
        ((keys.long(), targets), TypeError, "keys must be floating point, got torch.int64"),
        ((keys.to("meta"), targets), ValueError, "keys must be on cpu like the prior, got meta"),
        ((keys.tolist(), targets), TypeError, "append: keys must be a torch.Tensor, got list"),
        ((huge, targets), ValueError, "append: keys must be of a size that can be squared"),
    ]:
        raises_and_changes_nothing(memory, error, match, lambda a=arguments: memory.append(*a))
    raises_and_changes_nothing(memory, ValueError, "apply: keys", lambda: memory.apply(nan_keys))
    for number in (0, 4, -1, "1"):
        match = re.escape(f"remove: batch must be one of [1, 2, 3], got {number!r}")
        raises_and_changes_nothing(memory, ValueError, match, lambda n=number: memory.remove(n))
    for number in (-1, 13, 1.0):
        match = f"fold: keys must be an int from 0 to {memory.num_keys}"
        raises_and_changes_nothing(memory, ValueError, match, lambda n=number: memory.fold(n))


def test_removed_batch_is_unknown():
    memory = filled(3)
    memory.remove(2)
    with pytest.raises(ValueError, match=r"remove: batch must be one of \[1, 3\], got 2"):
        memory.remove(2)


def test_folded_batches_that_were_not_kept():
    memory = filled(4, keep_folded=False)
    memory.fold(6)
    reason = r"batch 2 must have its keys at hand.*keep_folded=True, or set a larger max_keys"
    raises_and_changes_nothing(memory, ValueError, reason, lambda: memory.remove(2))
    with pytest.raises(ValueError, match="pair: batch 1 must have its keys at hand"):
        memory.pair()
    q, s = memory.factored()
    assert q.shape == (M, M) and relative(q @ s, memory.delta()) < 1e-14
    memory.remove(3)
    assert relative(memory.delta(), joint(PRIOR, [MADE[0], MADE[1], MADE[3]])) < 1e-11


def test_folded_batch_that_cannot_be_subtracted():
    # Next to this key the prior is rounding noise: what it was cannot be recovered.
    memory = filled(2, max_keys=0)
    memory.append(1e5 * torch.ones(N, 1), torch.ones(M, 1))
    match = "keys must be part of the factored matrix"
    raises_and_changes_nothing(memory, NotPositiveDefiniteError, match, lambda: memory.remove(3))


@pytest.mark.parametrize("max_keys", [0, 10])
def test_keys_that_cannot_be_folded(max_keys):
    memory = filled(3, max_keys=max_keys)
    keys = torch.cat([MADE[0][0], 1e10 * torch.randn(N, 12)], 1)
    targets = torch.ones(M, 16)
    match = "keys must not outweigh the prior by more than 1 / eps"
    raises_and_changes_nothing(
        memory, NotPositiveDefiniteError, match, lambda: memory.append(keys, targets)
    )


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e3), (F64, 3e7)], ids=str)
def test_a_fold_that_would_leave_nothing_of_the_prior(dtype, size):
    # The factor would still be one, of K K^T alone, and Delta anything.
    memory = EditMemory(torch.eye(N, dtype=F64), M, dtype=dtype)
    keys = size * torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
    keys[:, 4] = 0
    match = r"must not outweigh the prior by more than 1 / eps, got k\^T C\^-1 k = "
    raises_and_changes_nothing(
        memory, NotPositiveDefiniteError, match, lambda: memory.append(keys, torch.ones(M, 5))
    )
    memory.append(keys[:, :4], torch.ones(M, 4))
    torch.testing.assert_close(memory.apply(keys[:, :4]), torch.ones(M, 4, dtype=dtype))


def test_bad_priors():
    rank_deficient = ROOT[:, :40] @ ROOT[:, :40].mT
    not_symmetric = PRIOR + 0.1 * torch.randn(N, N).tril(-1)
    remedy = r"regularized_prior for a matrix"
    for prior, error, match in [
        (rank_deficient, NotPositiveDefiniteError, remedy),
        (-PRIOR, NotPositiveDefiniteError, remedy),
        (torch.tensor([[1, 1], [1, 1 + 4e-16]], dtype=F64), NotPositiveDefiniteError, remedy),
        (torch.zeros(4, 4), NotPositiveDefiniteError, remedy),
        (not_symmetric, ValueError, "prior must be symmetric"),
        (PRIOR * float("nan"), ValueError, "prior must be finite"),
        (PRIOR[:5], ValueError, r"prior must be \[n, n\] with n >= 1, got \[5, 60\]"),
        (PRIOR.long(), TypeError, "prior must be floating point"),
        (None, TypeError, "prior must be a torch.Tensor, got NoneType"),
    ]:
        with pytest.raises(error, match=match):
            EditMemory(prior, M)
    for options, error, match in [
        ({"dtype": torch.bfloat16}, TypeError, "dtype must be float64 or float32"),
        ({"max_keys": -1}, ValueError, "max_keys must be an int from 0, or None, got -1"),
        ({"out_features": 0}, ValueError, "out_features must be a positive int, got 0"),
    ]:
        with pytest.raises(error, match=match):
            EditMemory(PRIOR, **{"out_features": M, **options})


@pytest.mark.parametrize("tokens", [20, 59, 300])
def test_ridge_makes_any_covariance_a_prior(tokens):
    keys = torch.randn(tokens, N, dtype=F64)
    keys[:, 7] = 0.0
    covariance = keys.mT @ keys / tokens
    prior = regularized_prior(covariance.float(), 15.0, 1e-4)
    expected = 15 * (covariance + 1e-4 * covariance.diagonal().mean() * torch.eye(N, dtype=F64))
    torch.testing.assert_close(prior, expected, rtol=0, atol=1e-5)
    memory = EditMemory(prior, M)
    memory.append(*MADE[0])
    assert relative(memory.delta(), joint(prior, MADE[:1])) < 1e-8


def test_ridge_arguments():
    for arguments, match in [
        ((PRIOR, 0.0, 0.1), "weight must be positive"),
        ((PRIOR, float("nan"), 0.1), "weight must be positive"),
        ((PRIOR, 1.0, -0.1), "ridge must be at least 0"),
        ((PRIOR[:3], 1.0, 0.1), r"covariance must be \[n, n\]"),
    ]:
        with pytest.raises(ValueError, match="regularized_prior: " + match):
            regularized_prior(*arguments)


def test_float32_warns_where_it_loses_digits():
    with pytest.warns(UserWarning, match="float32 leaves an error"):
        EditMemory(spd(50, 1e7)[0], M, dtype=torch.float32)


def test_prior_is_not_changed_and_its_dtype_does_not_matter():
    prior = PRIOR.float()
    before = prior.clone()
    memory = EditMemory(prior, M, max_keys=0)
    memory.append(*(x.bfloat16() for x in MADE[0]))
    assert torch.equal(prior, before) and memory.delta().dtype == F64


def _peak_rss() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


@pytest.mark.parametrize("max_keys", [None, 0], ids=["append", "append_and_fold"])
def test_peak_memory_of_an_append(max_keys):
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        pytest.skip("the peak memory of this process cannot be reset")
    n, k = 2048, 16
    factor_bytes = n * n * 8
    memory = EditMemory(torch.eye(n, dtype=F64), 16, max_keys=max_keys)
    keys, targets = torch.randn(n, k, dtype=F64), torch.randn(16, k, dtype=F64)
    memory.append(keys, targets)  # what the BLAS keeps for itself
    reset.write_text("5")
    before = _peak_rss()
    memory.append(keys * 2, targets)
    assert _peak_rss() - before < 0.3 * factor_bytes


class _CutOff(TorchDispatchMode):
    """Interrupts before the operator of a number; counts them."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("max_keys", [0, 3, 10**6])
@pytest.mark.parametrize("change", ["append", "remove"])
def test_a_change_cut_off_anywhere_leaves_the_memory_as_it_was_or_refusing(max_keys, change):
    prior, root = spd(24, 1e3)
    made = batches(root, 5, 4, 3)

    def change_it(memory):
        memory.append(*made[4]) if change == "append" else memory.remove(2)

    def fresh():
        memory = EditMemory(prior, 3, max_keys=max_keys)
        for batch in made[:4]:
            memory.append(*batch)
        return memory

    memory = fresh()
    before = memory.delta()
    with _CutOff() as mode:
        change_it(memory)
    after, refused = memory.delta(), 0
    for at in range(1, mode.count + 1):
        memory = fresh()
        with pytest.raises(KeyboardInterrupt), _CutOff(at):
            change_it(memory)
        assert torch.equal(memory.delta(), before)
        try:
            change_it(memory)
        except RuntimeError as error:
            assert "prior must be whole" in str(error) and torch.equal(memory.delta(), before)
            refused += 1
        else:
            assert torch.equal(memory.delta(), after)
        memory = fresh()
        snapshot = memory.snapshot()
        with pytest.raises(KeyboardInterrupt), _CutOff(at):
            change_it(memory)
        memory.restore(snapshot)
        change_it(memory)
        assert torch.equal(memory.delta(), after)
    # Only a fold writes to the factor itself; what is taken out of it is subtracted from a copy.
    assert (refused > 0) == (change == "append" and max_keys < 10**6)
