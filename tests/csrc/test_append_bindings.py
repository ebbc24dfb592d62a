"""Appends of the edit memory with the kernels that a GPU has, built for the host."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from coachhook.editing import captured
from coachhook.editing import prior as priors
from coachhook.editing.captured import Step
from coachhook.editing.memory import EditMemory
from coachhook.ops.cholesky import native
from tests.ops.linalg_oracle import F64, batches, joint, relative, spd

M = 7
NAN = float("nan")


@pytest.fixture
def kernels(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch, nan_filled_memory: None
) -> ModuleType:
    """Everything as on a GPU but for the capture."""
    monkeypatch.setattr(priors.FactoredPrior, "in_blocks", True)
    monkeypatch.setattr(priors, "_SMALL_MOST_ROWS", 64)
    monkeypatch.setattr(native, "kernels", lambda factor: extension)
    return extension


def filled(prior: Tensor, made: list[tuple[Tensor, Tensor]]) -> EditMemory:
    memory = EditMemory(prior, M, max_keys=10**6)
    for keys, targets in made:
        memory.append(keys, targets)
    return memory


@pytest.mark.parametrize("order", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("n, m, k, size", [(1, 1, 1, 32), (33, 70, 5, 32), (64, 3, 64, 64)])
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_a_batch_is_brought_to_its_place(kernels, monkeypatch, n, m, k, size, dtype, layout, order):
    monkeypatch.setenv("SHIM_ORDER", str(order))

    def laid_out(x: Tensor) -> Tensor:
        if layout == "rows":
            return x
        if layout == "columns":
            return x.mT.contiguous().mT
        wide = torch.full((2 * len(x), 3 * x.shape[1]), NAN, dtype=dtype)
        wide[::2, 1::3] = x
        return wide[::2, 1::3]

    keys, targets = torch.randn(n, k, dtype=dtype), torch.randn(m, k, dtype=dtype)
    key_rows, right = (
        torch.full((size, n), NAN, dtype=dtype),
        torch.full((n, size), NAN, dtype=dtype),
    )
    target_rows, at = torch.full((size, m), NAN, dtype=dtype), torch.full((1,), -1)
    places = key_rows, right, target_rows
    native.load_batch(kernels, laid_out(keys), laid_out(targets), *places, 37, at)
    assert at.item() == 37
    for rows, given in ((key_rows, keys), (right.mT, keys), (target_rows, targets)):
        assert torch.equal(rows[:k], given.mT)
        assert not rows[k:].any()


@pytest.mark.parametrize("counts", [[5] * 6, [20, 33, 1, 64, 30], [40, 100, 3]])
def test_appends(kernels, counts):
    """Of sizes that the kernels solve with, and others."""
    prior, root = spd(150, 1e3)
    made = [batches(root, 1, count, M, seed=i)[0] for i, count in enumerate(counts)]
    assert relative(filled(prior, made).delta(), joint(prior, made)) < 1e-10


def test_batches_of_another_dtype_in_between(kernels):
    """Torch copies those, and leaves nothing behind for the kernel's next one."""
    prior, root = spd(90, 1e3)
    made = [batches(root, 1, count, M, seed=i)[0] for i, count in enumerate([20, 25, 18, 31, 17])]
    made = [(keys.float(), targets.float()) for keys, targets in made]
    memory = EditMemory(prior, M, max_keys=10**6)
    for index, (keys, targets) in enumerate(made):
        memory.append(*((keys, targets) if index % 2 else (keys.double(), targets.double())))
    other = filled(prior, [(keys.double(), targets.double()) for keys, targets in made])
    found, expected = memory.state_dict()[0], other.state_dict()[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)


def test_a_failing_append_leaves_nothing(kernels):
    prior, root = spd(60, 1e3)
    *made, (keys, targets) = [batches(root, 1, 20, M, seed=i)[0] for i in range(4)]
    memory = filled(prior, made)
    before = {name: value.clone() for name, value in memory.state_dict()[0].items()}
    bad = keys.clone()
    bad[3, 4] = NAN
    with pytest.raises(ValueError, match="append: keys must be finite"):
        memory.append(bad, targets)
    after = memory.state_dict()[0]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    memory.append(keys, targets)
    assert relative(memory.delta(), joint(prior, [*made, (keys, targets)])) < 1e-10


def test_one_call_beside_a_replay(kernels, monkeypatch):
    """It brings the batch to its place; the rest is the graph's."""
    prior, root = spd(60, 1e3)
    made = [batches(root, 1, 20, M, seed=i)[0] for i in range(3)]
    monkeypatch.setattr(captured, "_LEAST_ROWS", 128)
    memory, seen = filled(prior, made[:2]), []
    load_batch = kernels.load_batch
    monkeypatch.setattr(kernels, "load_batch", lambda **given: seen.append(load_batch(**given)))

    def refuses(*arguments: object) -> None:
        raise AssertionError("copied by torch")

    monkeypatch.setattr(Tensor, "copy_", refuses)
    [step] = memory._space._buffers.steps.values()
    assert isinstance(step, Step)
    step.load(*made[2], at=40)
    assert len(seen) == 1
    assert torch.equal(step.keys[:20], made[2][0].mT) and int(step.at) == 40


def test_bad_arguments_are_refused(kernels):
    keys, rows = torch.zeros(4, 3, dtype=F64), torch.zeros(2, 4, dtype=F64)
    at = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="load_batch: columns must be from 1 to size, got 3"):
        native.load_batch(kernels, keys, keys, rows, rows.mT, rows, 0, at)
