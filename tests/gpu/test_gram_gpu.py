"""gram_update_ on a GPU: right in every dtype, symmetric, exact products, no waiting."""

from __future__ import annotations

import pytest
import torch

from coachhook.ops import gram_update_
from coachhook.ops.gram import gram_add_lower_
from tests.ops.linalg_oracle import F64
from tests.tolerances import tol

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

X_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("x_dtype", X_DTYPES, ids=str)
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5,), (0, 7), (300, 40), (3, 70, 65), (2, 50, 1030)])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_against_float64(x_dtype, gram_dtype, shape, masked):
    x = torch.randn(*shape, dtype=F64, device="cuda").to(x_dtype)
    mask = torch.rand(shape[:-1], device="cuda") < 0.6 if masked else None
    gram = torch.eye(shape[-1], dtype=gram_dtype, device="cuda")
    tokens = x.reshape(-1, shape[-1]).double()
    if mask is not None:
        tokens = tokens[mask.reshape(-1)]
        x[~mask] = float("nan")
    expected = gram.double() + tokens.mT @ tokens
    torch.cuda.set_sync_debug_mode("error")
    try:
        gram_update_(gram, x, mask=mask, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Twice: the sums of tensor cores are cut off, not rounded to nearest.
    limit = tol("gram", gram_dtype, reduction=max(1, len(tokens)), scale=2 * expected.max())
    torch.testing.assert_close(gram.double(), expected, **limit)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("x_dtype", X_DTYPES[:-1], ids=str)
@pytest.mark.parametrize("shape", [(0, 7), (300, 40), (70, 65), (9000, 1030)])
def test_the_lower_half_alone(x_dtype, shape, nan_filled_memory):
    x = torch.randn(*shape, dtype=F64, device="cuda").to(x_dtype)
    total = torch.eye(shape[1], dtype=F64, device="cuda")
    expected = (total + x.double().mT @ x.double()).tril()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gram_add_lower_(total, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Twice: the sums of tensor cores are cut off, not rounded to nearest.
    limit = tol("gram", torch.float32, reduction=max(1, len(x)), scale=2 * expected.max())
    torch.testing.assert_close(total.tril(), expected, **limit)
    tiny = torch.full((1, shape[1]), 1e-3, device="cuda", dtype=x_dtype)
    gram_add_lower_(total.fill_(1), tiny)
    assert int((total.tril() > 1).sum()) == shape[1] * (shape[1] + 1) // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_float64_sums_stay_positive_semidefinite(dtype):
    x = (torch.randn(40, 64) * torch.logspace(-3, 1, 64)).to("cuda", dtype)
    gram = torch.zeros(64, 64, dtype=F64, device="cuda")
    for part in x.split(8):
        gram_update_(gram, part, backend="cuda")
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert float(eigenvalues[0]) > -1e-14 * float(eigenvalues[-1])


def test_float32_keys_are_not_rounded_to_tf32():
    x = torch.randn(200, 96, device="cuda")
    exactly, allowed = (torch.zeros(96, 96, device="cuda") for _ in range(2))
    gram_update_(exactly, x, backend="cuda")
    torch.set_float32_matmul_precision("high")
    try:
        gram_update_(allowed, x, backend="cuda")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(exactly, allowed)


def test_registration():
    gram, x = torch.zeros(6, 6, device="cuda"), torch.randn(2, 4, 6, device="cuda")
    mask = torch.rand(2, 4, device="cuda") < 0.7
    op = torch.ops.coachhook.gram_update_.default
    torch.library.opcheck(op, (gram, x, mask, "cuda"))
