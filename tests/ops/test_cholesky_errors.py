"""Bad input to the Cholesky ops: a clear message, and the factor bit-identical."""

from __future__ import annotations

import pytest
import torch

from coachhook.errors import BackendUnavailableError, NotPositiveDefiniteError
from coachhook.ops import (
    available_backends,
    cholesky_downdate_,
    cholesky_update_,
    cholesky_update_solve_,
)
from tests.ops.linalg_oracle import F64, spd

OPS = [cholesky_update_, cholesky_downdate_, cholesky_update_solve_]
BACKENDS = [n for n, (able, _) in available_backends("cholesky_update_", "cpu").items() if able]


@pytest.fixture
def factor():
    return torch.linalg.cholesky(spd(30, 20.0)[0])


def fails(op, factor, keys, error, match, **options):
    before = factor.clone() if isinstance(factor, torch.Tensor) and not factor.is_meta else None
    with pytest.raises(error, match=match):
        op(factor, keys, **options)
    if before is not None:
        assert torch.equal(torch.nan_to_num(factor), torch.nan_to_num(before))
        assert torch.equal(factor.isnan(), before.isnan())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_keys_not_finite(op, backend, value, factor):
    keys = torch.randn(30, 4, dtype=F64)
    keys[17, 2] = value
    match = rf"{op.__name__}: keys must be finite, got 1 NaN or Inf"
    fails(op, factor, keys, ValueError, match, backend=backend)


@pytest.mark.parametrize("op", OPS)
def test_shapes_types_and_devices(op, factor):
    keys = torch.randn(30, 2, dtype=F64)
    name = op.__name__
    for wrong, error, match in [
        (keys.T, ValueError, rf"{name}: keys must be \[n, k\] with n = 30 rows.*got \[2, 30\]"),
        (keys[:, 0], ValueError, r"got \[30\]; pass one key as keys\[:, None\]"),
        (keys.float(), TypeError, r"keys must be torch.float64 like factor, got torch.float32"),
        (keys.to("meta"), ValueError, r"keys must be on cpu like factor, got meta"),
        (keys.numpy(), TypeError, r"keys must be a torch.Tensor, got ndarray"),
    ]:
        fails(op, factor, wrong, error, match)
    for wrong, error, match in [
        (factor[:, :29], ValueError, r"factor must be \[n, n\] with n >= 1, got \[30, 29\]"),
        (factor[None], ValueError, r"factor must be \[n, n\]"),
        (factor[:0, :0], ValueError, r"factor must be \[n, n\] with n >= 1, got \[0, 0\]"),
        (factor.half(), TypeError, r"factor must be float32 or float64, got torch.float16"),
        ([1.0], TypeError, r"factor must be a torch.Tensor, got list"),
    ]:
        fails(op, wrong, keys, error, match)
    shared = torch.ones(30, dtype=F64).expand(30, 30)
    fails(op, shared, keys, ValueError, r"no elements that share memory.*pass factor.clone\(\)")
    fails(op, factor, keys, ValueError, "backend must be one of", backend="fast")
    fails(op, factor, keys, BackendUnavailableError, "it runs on CUDA tensors", backend="cuda")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_not_a_factor(op, backend, value, factor):
    factor[11, 11] = value
    keys = 1e-3 * torch.randn(30, 2, dtype=F64)
    match = rf"{op.__name__}: factor must be a Cholesky factor with positive, finite diagonal"
    fails(op, factor, keys, NotPositiveDefiniteError, match, backend=backend)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("column", [3, 28])
def test_nan_below_the_diagonal(op, column, factor):
    factor[29, column] = float("nan")
    keys = 1e-3 * torch.randn(30, 2, dtype=F64)
    fails(op, factor, keys, NotPositiveDefiniteError, op.__name__, backend="cpu")


@pytest.mark.parametrize("op", [cholesky_update_, cholesky_update_solve_])
@pytest.mark.parametrize("size", [1e160, 1e300])
def test_overflow(op, size, factor):
    keys = torch.full((30, 2), size, dtype=F64)
    fails(op, factor, keys, NotPositiveDefiniteError, op.__name__, backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", [1.0, 1.001, 1.1, 3.0])
def test_downdate_of_keys_never_added(backend, dtype, norm):
    matrix, root = spd(120, 1e3)
    factor = torch.linalg.cholesky(matrix)
    keys = root @ torch.randn(120, 5, dtype=F64)
    solved = torch.linalg.solve_triangular(factor, keys, upper=False)
    keys = keys * (norm / torch.linalg.matrix_norm(solved, 2))
    match = r"cholesky_downdate_: keys must be part of the factored matrix.*lambda_min"
    fails(
        cholesky_downdate_,
        factor.to(dtype),
        keys.to(dtype),
        NotPositiveDefiniteError,
        match,
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_downdate_close_to_the_limit_is_accepted(backend):
    matrix, root = spd(120, 1e3)
    factor = torch.linalg.cholesky(matrix)
    keys = root @ torch.randn(120, 5, dtype=F64)
    solved = torch.linalg.solve_triangular(factor, keys, upper=False)
    keys = keys * (0.999 / torch.linalg.matrix_norm(solved, 2))
    cholesky_downdate_(factor, keys, backend=backend)
    torch.testing.assert_close(factor @ factor.mT, matrix - keys @ keys.mT, rtol=0, atol=1e-12)
