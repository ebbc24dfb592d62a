"""The whole CUDA path of the Cholesky ops except the GPU.

``ops/cholesky/cuda.py`` runs on CPU tensors, with the kernels in a host build of the extension and,
as it does for many keys, without them.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from coachhook.errors import NotPositiveDefiniteError
from coachhook.ops.cholesky import cuda, reference
from coachhook.ops.cholesky.blocked import BlockedFactor, block_rows
from tests.ops.linalg_oracle import F64, batches, exact, joint, outweighing, relative, spd
from tests.tolerances import tol

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=["kernels", "torch"])
def native(request: pytest.FixtureRequest, nan_filled_memory: None) -> ModuleType | None:
    return None if request.param == "torch" else request.getfixturevalue("extension")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of the chain at sizes that a test can afford."""
    monkeypatch.setattr(cuda, "_MOST_ROWS", 64)


def make(n: int, k: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    factor = torch.linalg.cholesky(spd(n, 20.0)[0]).to(dtype)
    return factor, 0.5 * torch.randn(n, k, dtype=dtype)


def square(factor: Tensor) -> Tensor:
    return factor.tril().double() @ factor.tril().double().mT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, k", [(1, 1), (33, 2), (70, 40), (130, 5)])
def test_update_solve_and_downdate(native, dtype, n, k):
    factor, keys = make(n, k, dtype)
    before, given_keys = square(factor), keys.clone()
    after = before + keys.double() @ keys.double().mT
    solved = factor.clone()
    solution = cuda.modify_("update", solved, keys, 1, native, solve=True)
    scale = float(after.abs().max())
    limit = tol("factor", dtype, reduction=n + k, scale=scale)
    torch.testing.assert_close(square(solved), after, **limit)
    assert torch.equal(solved.triu(1), torch.zeros_like(factor))
    expected = torch.linalg.solve(after, keys.double())
    condition = float(torch.linalg.cond(after))
    size = (20.0 + condition) * float(expected.abs().max())
    limit = tol("solve", dtype, reduction=n + k, scale=size)
    torch.testing.assert_close(solution.double(), expected, **limit)
    assert torch.equal(keys, given_keys)
    if k <= n // 3:
        assert cuda.modify_("downdate", solved, keys, -1, native) is None
        limit = tol("factor", dtype, reduction=n, scale=scale * condition)
        torch.testing.assert_close(square(solved), before, **limit)


@pytest.mark.parametrize("k", [65, 150, 300])
def test_more_keys_than_the_kernels_take(k):
    factor, keys = make(200, k)
    expected, updated = factor.clone(), factor.clone()
    wanted = reference.cholesky_update_solve_(expected, keys)
    assert cuda._extension(factor, keys) is None
    torch.testing.assert_close(
        cuda.cholesky_update_solve_(updated, keys), wanted, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(updated, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["rows", "columns", "sliced", "strided"])
def test_layouts(native, layout):
    n, k = 70, 3
    factor, keys = make(n, k)
    expected = factor.clone()
    wanted = reference.cholesky_update_solve_(expected, keys)
    lower = torch.ones(n, n, dtype=torch.bool).tril()
    size = {"rows": (n, n), "columns": (n, n), "sliced": (n + 3, n + 5), "strided": (2 * n, 3 * n)}
    storage = torch.full(size[layout], float("nan"), dtype=F64)
    view = {
        "rows": storage,
        "columns": storage.mT,
        "sliced": storage[2 : n + 2, 3 : n + 3],
        "strided": storage[::2, ::3],
    }[layout]
    view[lower] = factor[lower]
    torch.testing.assert_close(
        cuda.modify_("update", view, keys, 1, native, solve=True), wanted, rtol=0, atol=1e-13
    )
    torch.testing.assert_close(view[lower], expected[lower], rtol=0, atol=1e-13)
    assert int(storage.isfinite().sum()) == n * (n + 1) // 2


@pytest.mark.parametrize("k", [3, 60])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_failures_leave_the_factor(native, sign, dtype, k):
    def fails(factor: Tensor, keys: Tensor, error: type[Exception], match: str) -> None:
        before = factor.clone()
        with pytest.raises(error, match="op: " + match):
            cuda.modify_("op", factor, keys, sign, native, solve=sign > 0)
        torch.testing.assert_close(factor, before, rtol=0, atol=0, equal_nan=True)

    factor, keys = make(70, k, dtype)
    keys = keys * 1e-3
    for value in (float("nan"), float("inf")):
        bad = keys.clone()
        bad[69, k * 2 // 3] = value
        fails(factor, bad, ValueError, "keys must be finite, got 1 NaN or Inf")
    for value in (0.0, -1.0, float("nan"), float("inf")):
        bad = factor.clone()
        bad[69, 69] = value
        fails(bad, keys, NotPositiveDefiniteError, "factor must be a Cholesky factor")
    bad = factor.clone()
    bad[69, 3] = float("nan")
    fails(bad, keys, NotPositiveDefiniteError, "factor must be a finite lower Cholesky factor")
    huge = torch.full_like(keys, 1e30 if dtype == torch.float32 else 1e200)
    fails(factor, huge, NotPositiveDefiniteError, "")
    if sign < 0:
        solved = torch.linalg.solve_triangular(factor, keys, upper=False)
        for norm in (1.0, 1.1, 3.0):
            never = keys * (norm / torch.linalg.matrix_norm(solved, 2))
            fails(factor, never, NotPositiveDefiniteError, "keys must be part of the factored")


def test_downdate_close_to_the_limit_is_accepted(native):
    matrix, root = spd(96, 1e3)
    factor = torch.linalg.cholesky(matrix)
    keys = root @ torch.randn(96, 5, dtype=F64)
    solved = torch.linalg.solve_triangular(factor, keys, upper=False)
    keys = keys * (0.999 / torch.linalg.matrix_norm(solved, 2))
    cuda.modify_("op", factor, keys, -1, native)
    torch.testing.assert_close(factor @ factor.mT, matrix - keys @ keys.mT, rtol=0, atol=1e-12)


def test_keys_that_outweigh_the_factor(native):
    # Pivots of I + X^T X far apart: the solution must come from the new factor.
    prior, root = spd(64, 1e10)
    made = batches(root, 1, 60, 8, isotropic=True)
    factor = torch.linalg.cholesky(prior)
    delta = made[0][1] @ cuda.modify_("op", factor, made[0][0], 1, native, solve=True).mT
    assert relative(delta, exact(prior, made)) < 1e-9


# Of k^T C^-1 k = 150 size^2, at most 1 / eps.
@pytest.mark.parametrize(
    "dtype, size", [(F64, 1e3), (F64, 1e6), (torch.float32, 30.0), (torch.float32, 1e2)], ids=str
)
@pytest.mark.parametrize("k", [33, 48, 64])
def test_more_keys_than_a_panel_has_rows_that_outweigh_the_factor(native, dtype, size, k):
    """The I of a singular ``I + P_1`` would drown in rounding, for an error of size^2 eps."""
    factor, _ = make(150, 1, dtype)
    keys = outweighing(factor, k, size).to(dtype)
    after = square(factor) + keys.double() @ keys.double().mT
    cuda.modify_("op", factor, keys, 1, native)
    limit = tol("factor", dtype, reduction=150 + k, scale=float(after.abs().max()))
    torch.testing.assert_close(square(factor), after, **limit)


@pytest.mark.parametrize("k", [33, 48, 64])
@pytest.mark.parametrize("other", [1.0, 1e-3], ids=["even", "uneven"])
def test_solution_of_keys_that_outweigh_the_factor(native, k, other):
    """From the old factor, or from the new one where some keys are small."""
    factor, _ = make(150, 1)
    keys, prior = outweighing(factor, k, 1e3), square(factor)
    keys[:, k // 2 :] *= other
    made = [(keys, torch.eye(k, dtype=F64))]
    solution = cuda.modify_("op", factor, keys, 1, native, solve=True)
    truth = exact(prior, made)
    assert relative(solution.mT, truth) < 2 * relative(joint(prior, made), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_begin_between_two_accesses(native, dtype):
    """Contiguous, so that nothing has to be copied for their strides; read by both solves."""
    prior, root = spd(64, 1e10)
    keys = batches(root, 1, 32, 8, isotropic=True)[0][0].to(dtype)
    between = torch.empty(1 + keys.numel(), dtype=dtype)[1:].view(keys.shape).copy_(keys)
    assert between.is_contiguous() and between.data_ptr() % 16
    factors = [torch.linalg.cholesky(prior).to(dtype) for _ in range(2)]
    solutions = [
        cuda.modify_("op", factor, given, 1, native, solve=True)
        for factor, given in zip(factors, (keys, between), strict=True)
    ]
    assert torch.equal(*factors) and torch.equal(*solutions)


def test_no_keys_and_keys_from_the_factor(native):
    factor, _ = make(40, 1)
    before = factor.clone()
    assert cuda.modify_("op", factor, factor[:, :0], 1, native, solve=True) is None
    assert torch.equal(factor, before)
    expected = square(factor) + factor[:, :3] @ factor[:, :3].mT
    cuda.modify_("op", factor, factor[:, :3], 1, native)
    torch.testing.assert_close(square(factor), expected)


@pytest.mark.parametrize("k", [4, 48])
def test_two_runs_give_the_same_bits(native, k):
    factor, keys = make(70, k)
    runs = [factor.clone(), factor.clone()]
    solutions = [cuda.modify_("op", run, keys, 1, native, solve=True) for run in runs]
    assert torch.equal(*runs) and torch.equal(*solutions)


def test_float32_products_keep_the_callers_setting():
    factor, keys = make(40, 2, torch.float32)
    settings = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(settings, "fp32_precision") else "allow_tf32"
    before = getattr(settings, name)
    torch.set_float32_matmul_precision("high")
    try:
        chosen = getattr(settings, name)
        cuda.modify_("op", factor, keys, 1, None)
        assert getattr(settings, name) == chosen != before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_inverses_of_blocks_are_made_in_full_precision(monkeypatch):
    """Those that torch makes: for more keys than the kernels take."""
    settings, seen = torch.backends.cuda.matmul, []
    name = "fp32_precision" if hasattr(settings, "fp32_precision") else "allow_tf32"
    factor, keys = make(200, 70, torch.float32)
    multiply = torch.bmm

    def watched(*arguments):
        seen.append(getattr(settings, name))
        return multiply(*arguments)

    monkeypatch.setattr(cuda, "_MOST_ROWS", 128)
    monkeypatch.setattr(cuda, "_STEPS", 2)
    monkeypatch.setattr(torch, "bmm", watched)
    torch.set_float32_matmul_precision("high")
    try:
        cuda.modify_("op", factor, keys, 1, None)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen and set(seen) <= {"ieee", False}


@pytest.mark.parametrize("rows", [64, 128, 512])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_blocked_solves(native, n, rows):
    factor, keys = make(n, 7 if native is None else 32)
    factor = factor + torch.full((n, n), float("nan"), dtype=F64).triu(1)
    lower = factor.tril()
    blocked = BlockedFactor(factor, rows, native)
    forward = torch.linalg.solve_triangular(lower, keys, upper=False)
    backward = torch.linalg.solve_triangular(lower.mT, keys, upper=True)
    torch.testing.assert_close(blocked.solve(keys), forward, rtol=0, atol=1e-12)
    torch.testing.assert_close(blocked.solve_transposed(keys), backward, rtol=0, atol=1e-12)


def test_residual_of_blocked_solves_at_high_condition():
    """Explicit inverses of diagonal blocks: the residual may grow by their condition."""
    for condition in (1e4, 1e8, 1e12):
        prior, root = spd(512, condition)
        factor = torch.linalg.cholesky(prior)
        keys = root @ torch.randn(512, 8, dtype=F64)
        x = BlockedFactor(factor, 512).solve(keys)
        residual = (factor @ x - keys).norm() / (factor.norm() * x.norm())
        assert float(residual) < 4 * torch.finfo(F64).eps


def test_block_rows():
    assert [block_rows(n, 8, 1024) for n in (1, 512, 1600, 6400, 16384)] == [
        64,
        64,
        256,
        1024,
        1024,
    ]
