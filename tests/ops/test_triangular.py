"""``L^-T`` on a CPU in each of its two forms."""

from __future__ import annotations

import pytest
import torch

from coachhook.ops.cholesky import triangular
from tests.tolerances import tol


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 255, 257, 641])
@pytest.mark.parametrize("by_row", [True, False])
def test_solves_with_the_transpose(monkeypatch, threads, dtype, n, by_row, nan_filled_memory):
    monkeypatch.setattr(triangular, "_LEAST_ROWS", 1)
    factor = torch.randn(n, n, dtype=dtype).tril(-1) / n + torch.eye(n, dtype=dtype)
    right = torch.randn(n, 7, dtype=dtype)
    expected = torch.linalg.solve_triangular(factor.double().mT, right.double(), upper=True)
    factor += torch.full_like(factor, torch.nan).triu(1)  # not to be read
    given = factor if by_row else factor.mT.contiguous().mT
    for given_right in (right, right.mT.contiguous().mT):
        kept = given_right.clone()
        found = triangular.solve_transposed(given, given_right)
        limit = tol("solve", dtype, reduction=n, scale=float(expected.abs().max()))
        torch.testing.assert_close(found.double(), expected, **limit)
        assert torch.equal(given_right, kept)
    assert triangular.solve_transposed(given, right[:, :0]).shape == (n, 0)
