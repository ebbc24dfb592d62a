"""Cholesky update, downdate and update-with-solve against float64, on every backend here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coachhook.ops import (
    available_backends,
    cholesky_downdate_,
    cholesky_update_,
    cholesky_update_solve_,
)
from coachhook.ops.cholesky import _panels, cpu
from tests.ops.linalg_oracle import F64, exact, relative, spd
from tests.tolerances import tol

DTYPES = [torch.float32, torch.float64]
BACKENDS = [n for n, (able, _) in available_backends("cholesky_update_", "cpu").items() if able]
SIZES = [1, 2, 31, 32, 33, 100, 257]
COUNTS = [0, 1, 3, 40, 70, 150, 300]


def make(n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    factor = torch.linalg.cholesky(spd(n, 20.0)[0]).to(dtype)
    return factor, 0.5 * torch.randn(n, k, dtype=dtype)


def square(factor: torch.Tensor) -> torch.Tensor:
    return factor.tril().double() @ factor.tril().double().mT


def check_square(factor: torch.Tensor, expected: torch.Tensor, k: int) -> None:
    # Every key adds a rounding of its own, of the size of the largest entry.
    scale = float(expected.abs().max())
    limit = tol("factor", factor.dtype, reduction=len(factor) + k, scale=scale)
    torch.testing.assert_close(square(factor), expected, **limit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", COUNTS)
def test_update_solve_and_downdate(backend, dtype, n, k, nan_filled_memory):
    factor, keys = make(n, k, dtype)
    before, given_keys = square(factor), keys.clone()
    after = before + keys.double() @ keys.double().mT
    updated, solved = factor.clone(), factor.clone()
    assert cholesky_update_(updated, keys, backend=backend) is None
    solution = cholesky_update_solve_(solved, keys, backend=backend)
    check_square(updated, after, k)
    check_square(solved, after, k)
    assert torch.equal(updated.triu(1), torch.zeros(n, n, dtype=dtype))
    assert bool((updated.diagonal() > 0).all())
    assert solution.shape == (n, k) and solution.dtype == dtype and solution.is_contiguous()
    expected = torch.linalg.solve(after, keys.double())
    size = float(expected.abs().max()) if k else 1.0
    # Both matrices are solved with: C of condition 20, and C', whose condition the keys raise by up
    # to ||K||^2. The expected solution itself has the second error.
    condition = float(torch.linalg.cond(after))
    limit = tol("solve", dtype, reduction=n + k, scale=(20.0 + condition) * size)
    torch.testing.assert_close(solution.double(), expected, **limit)
    assert torch.equal(keys, given_keys)
    if k <= n // 3:
        cholesky_downdate_(updated, keys, backend=backend)
        scale = float(after.abs().max()) * condition
        limit = tol("factor", dtype, reduction=n, scale=scale)
        torch.testing.assert_close(square(updated), before, **limit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "n, k, condition, size, most",
    [
        (60, 30, 1e6, 5.0, 2e4),  # two solves: up to 8e6
        (60, 58, 20.0, 500.0, 1e5),  # two solves: up to 7e7
        (60, 50, 1e6, 0.5, 1e5),  # the solve that shares X: 8e4 to 6e5
        (60, 60, 1e6, 0.5, 4e4),  # the same: 6e5
        (2, 300, 20.0, 0.5, 20),  # the same: 7e3
    ],
)
def test_the_more_exact_solve_is_made(backend, n, k, condition, size, most):
    """Errors in eps, of the largest entry; the other way's are those beside the cases."""
    if backend == "reference":
        pytest.skip("the plain form solves with the new factor alone")
    torch.manual_seed(1)
    factor = torch.linalg.cholesky(spd(n, condition)[0])
    keys = size * torch.randn(n, k, dtype=F64)
    truth = exact(square(factor), [(keys, torch.eye(k, dtype=F64))]).mT
    solution = cholesky_update_solve_(factor, keys, backend=backend)
    error = float((solution - truth).abs().max() / truth.abs().max())
    assert error < most * torch.finfo(F64).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_row_blocks(dtype):
    n, k = cpu._ROW_BLOCK + 70, 5
    factor, keys = make(n, k, dtype)
    expected = square(factor) + keys.double() @ keys.double().mT
    cholesky_update_(factor, keys, backend="cpu")
    check_square(factor, expected, k)


def test_small_batches_of_prefix_sums(monkeypatch):
    factor, keys = make(200, 40, F64)
    whole, parts = factor.clone(), factor.clone()
    cholesky_update_(whole, keys, backend="cpu")
    monkeypatch.setattr(_panels, "_BATCH_ELEMENTS", 1)
    cholesky_update_(parts, keys, backend="cpu")
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14)


def _sliced(factor: torch.Tensor) -> torch.Tensor:
    n = len(factor)
    big = torch.full((n + 3, n + 4), float("nan"), dtype=factor.dtype)
    view = big[2 : n + 2, 3 : n + 3]
    view[torch.ones(n, n, dtype=torch.bool).tril()] = factor[torch.ones(n, n).tril() > 0]
    return view


LAYOUTS = {
    "row_major": lambda factor: factor.clone(memory_format=torch.contiguous_format),
    "column_major": lambda factor: factor.mT.clone(memory_format=torch.contiguous_format).mT,
    "sliced_nan_above": _sliced,
    "strided": lambda factor: factor.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_factor(backend, layout):
    factor, keys = make(90, 7, F64)
    wide_keys = torch.randn(90, 20, dtype=F64)
    wide_keys[:, ::3] = keys
    view = LAYOUTS[layout](factor)
    above = view.triu(1).clone()
    solution = cholesky_update_solve_(view, wide_keys[:, ::3], backend=backend)
    expected = factor.clone()
    torch.testing.assert_close(
        solution, cholesky_update_solve_(expected, keys, backend="reference"), rtol=0, atol=1e-13
    )
    torch.testing.assert_close(view.tril(), expected.tril(), rtol=0, atol=1e-13)
    torch.testing.assert_close(view.triu(1), above, rtol=0, atol=0, equal_nan=True)
    cholesky_downdate_(view, keys, backend=backend)
    torch.testing.assert_close(view.tril(), factor, rtol=0, atol=1e-12)
    if layout == "sliced_nan_above":
        assert int(view._base.isfinite().sum()) == 90 * 91 // 2


def test_keys_may_be_part_of_the_factor():
    factor, _ = make(50, 1, F64)
    keys = factor[:, :3]
    expected = square(factor) + keys @ keys.mT
    cholesky_update_(factor, keys)
    check_square(factor, expected, 3)


def test_two_runs_give_the_same_bits():
    factor, keys = make(150, 40, F64)
    runs = [factor.clone(), factor.clone()]
    solutions = [cholesky_update_solve_(run, keys) for run in runs]
    assert torch.equal(*runs) and torch.equal(*solutions)


@pytest.mark.parametrize("op", ["cholesky_update_", "cholesky_downdate_", "cholesky_update_solve_"])
def test_registration(op):
    factor, keys = make(40, 3, F64)
    cholesky_update_(factor, keys)
    torch.library.opcheck(getattr(torch.ops.coachhook, op).default, (factor, keys, "auto"))


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_whole(compiler):
    def step(factor, keys):
        cholesky_update_(factor, keys)
        solution = cholesky_update_solve_(factor, keys * 2)
        cholesky_downdate_(factor, keys)
        return solution.sum(1)

    factor, keys = make(40, 3, F64)
    eager, compiled = factor.clone(), factor.clone()
    expected = step(eager, keys)
    actual = torch.compile(step, fullgraph=True, backend=compiler)(compiled, keys)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(compiled, eager)


def test_no_gradient_is_recorded():
    factor, keys = make(20, 2, F64)
    solution = cholesky_update_solve_(factor, keys.requires_grad_())
    assert not solution.requires_grad and not factor.requires_grad


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 60),
    parts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    order=st.randoms(use_true_random=False),
)
def test_parts_in_any_order_equal_the_whole(n, parts, seed, order):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.linalg.cholesky(spd(n, 100.0, seed)[0])
    keys = torch.randn(n, sum(parts), generator=generator, dtype=F64)
    whole, stepwise = factor.clone(), factor.clone()
    cholesky_update_(whole, keys)
    pieces = list(keys.split(parts, dim=1))
    order.shuffle(pieces)
    for piece in pieces:
        cholesky_update_(stepwise, piece)
    assert relative(square(stepwise), square(whole)) < 1e-13


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", [cholesky_update_, cholesky_downdate_, cholesky_update_solve_])
def test_autocast_rounds_nothing(backend, op):
    factor, keys = torch.eye(40) * 2, 0.1 * torch.randn(40, 5)
    expected, updated = factor.clone(), factor.clone()
    wanted = op(expected, keys, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = op(updated, keys, backend=backend)
    assert torch.equal(updated, expected)
    assert wanted is found or torch.equal(found, wanted)
