"""gram_update_ against float64, on every backend of this machine."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coachhook.errors import BackendUnavailableError
from coachhook.ops import available_backends, gram_update_
from coachhook.ops.gram import cpu, cuda, gram_add_lower_
from tests.ops.linalg_oracle import F64
from tests.tolerances import tol

BACKENDS = [name for name, (able, _) in available_backends("gram_update_", "cpu").items() if able]
X_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
GRAM_DTYPES = [torch.float32, torch.float64]


def start(n: int, dtype: torch.dtype) -> torch.Tensor:
    root = torch.randn(n, n + 3, dtype=F64)
    matrix = (root @ root.mT).tril()
    return (matrix + matrix.tril(-1).mT).to(dtype)


def expected_gram(gram, x, mask=None):
    tokens = x.reshape(-1, x.shape[-1]).double()
    if mask is not None:
        tokens = tokens[mask.reshape(-1)]
    return gram.double() + tokens.mT @ tokens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x_dtype", X_DTYPES, ids=str)
@pytest.mark.parametrize("gram_dtype", GRAM_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (0, 7), (1, 33), (300, 40), (3, 7, 65), (2, 1030)])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_against_float64(backend, x_dtype, gram_dtype, shape, masked, nan_filled_memory):
    x = torch.randn(*shape, dtype=F64).to(x_dtype)
    mask = torch.rand(shape[:-1]) < 0.6 if masked else None
    gram = start(shape[-1], gram_dtype)
    expected = expected_gram(gram, x, mask)
    assert gram_update_(gram, x, mask=mask, backend=backend) is None
    limit = tol("gram", gram_dtype, reduction=max(1, x.numel() // shape[-1]), scale=expected.max())
    torch.testing.assert_close(gram.double(), expected, **limit)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_nan(backend):
    x = torch.randn(4, 6, 9)
    mask = torch.rand(4, 6) < 0.5
    x[~mask] = float("nan")
    gram = torch.zeros(9, 9)
    gram_update_(gram, x, mask=mask, backend=backend)
    expected = expected_gram(torch.zeros(9, 9), x, mask)
    limit = tol("gram", torch.float32, reduction=24, scale=expected.max())
    torch.testing.assert_close(gram.double(), expected, **limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    big = torch.randn(11, 50, 20)
    x, mask = big[:, ::5, 3:16], torch.rand(10, 11).T < 0.5
    storage = torch.zeros(20, 30, dtype=F64)
    gram = storage[2:15, 5:18]
    gram_update_(gram, x, mask=mask, backend=backend)
    torch.testing.assert_close(gram, expected_gram(torch.zeros(13, 13), x, mask))
    assert int(storage.count_nonzero()) == 169


def test_conversion_in_several_parts(monkeypatch):
    monkeypatch.setattr(cpu, "_TOKENS", 7)
    x, gram = torch.randn(31, 12).bfloat16(), torch.zeros(12, 12, dtype=F64)
    gram_update_(gram, x, backend="cpu")
    torch.testing.assert_close(gram, expected_gram(torch.zeros(12, 12), x))


@pytest.mark.parametrize("x_dtype", X_DTYPES[:-1], ids=str)
@pytest.mark.parametrize("shape", [(5, 1), (0, 7), (1, 33), (300, 40), (7, 128), (40, 300)])
def test_the_lower_half_alone(x_dtype, shape, nan_filled_memory, monkeypatch):
    monkeypatch.setattr(cpu, "_TOKENS", 64)
    x = torch.randn(*shape, dtype=F64).to(x_dtype)
    total = start(shape[1], F64)
    expected = expected_gram(total, x).tril()
    gram_add_lower_(total, x)
    # The products are float32, the sums of several calls are not.
    limit = tol("gram", torch.float32, reduction=max(1, len(x)), scale=expected.max())
    torch.testing.assert_close(total.tril(), expected, **limit)
    tiny = torch.full((1, shape[1]), 1e-5)
    gram_add_lower_(total.fill_(1), tiny)
    assert (total.tril() > 1).sum() == shape[1] * (shape[1] + 1) // 2


@pytest.mark.parametrize("x_dtype", X_DTYPES[:-1], ids=str)
@pytest.mark.parametrize("shape", [(5, 1), (0, 7), (1, 33), (300, 40)])
def test_the_lower_half_alone_as_on_a_gpu(x_dtype, shape, nan_filled_memory, monkeypatch):
    monkeypatch.setattr(cuda, "_TOKENS", 64)
    monkeypatch.setattr(cuda, "_COLUMNS", 16)
    x = torch.randn(*shape, dtype=F64).to(x_dtype)
    total = start(shape[1], F64)
    expected = expected_gram(total, x).tril()
    cuda.add_lower_(total, x)
    limit = tol("gram", torch.float32, reduction=max(1, len(x)), scale=expected.max())
    torch.testing.assert_close(total.tril(), expected, **limit)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
def test_not_finite_keys_are_found_where_others_make_up_for_them(value, dtype):
    x = torch.zeros(6, 5, dtype=dtype)
    x[1, 2], x[4, 0] = value, -value
    total = torch.ones(5, 5, dtype=F64)
    calls = [lambda: gram_update_(total, x)]
    if dtype != F64:
        calls.append(lambda: gram_add_lower_(total, x))
    for call in calls:
        with pytest.raises(ValueError, match="NaN or Inf in 2 of 6 tokens"):
            call()
    assert torch.equal(total, torch.ones_like(total))


@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
def test_keys_whose_sum_overflows_are_finite(dtype):
    x = torch.full((4, 3), torch.finfo(dtype).max, dtype=dtype)
    gram = torch.zeros(3, 3, dtype=F64)
    gram_update_(gram, x)
    assert not gram.isnan().any() and (gram > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_sums_stay_positive_semidefinite(backend, dtype):
    # Rank 40 of 64, scales 1e-3 .. 1e1: in float32 sums the smallest eigenvalues come out negative.
    x = (torch.randn(40, 64) * torch.logspace(-3, 1, 64)).to(dtype)
    gram = torch.zeros(64, 64, dtype=F64)
    for part in x.split(8):
        gram_update_(gram, part, backend=backend)
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert float(eigenvalues[0]) > -1e-14 * float(eigenvalues[-1])


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5), n=st.integers(1, 40))
def test_parts_equal_the_whole(sizes, n):
    x = torch.randn(sum(sizes), n, dtype=F64)
    whole, parts = torch.zeros(n, n, dtype=F64), torch.zeros(n, n, dtype=F64)
    gram_update_(whole, x)
    for part in x.split(sizes):
        gram_update_(parts, part)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_registration_and_compilation():
    gram, x = torch.zeros(6, 6), torch.randn(2, 4, 6)
    mask = torch.rand(2, 4) < 0.7
    op = torch.ops.coachhook.gram_update_.default
    torch.library.opcheck(op, (gram, x, mask, "auto"))
    torch.library.opcheck(op, (gram, x, None, "auto"))

    def twice(gram, x, mask):
        gram_update_(gram, x * 2, mask=mask)
        gram_update_(gram, x)
        return gram.diagonal().sum()

    eager, compiled = torch.zeros(6, 6), torch.zeros(6, 6)
    run = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x, mask), twice(eager, x, mask))
    torch.testing.assert_close(compiled, eager)


def test_bad_input_changes_nothing():
    gram, x = torch.eye(5, dtype=F64), torch.randn(3, 4, 5)
    mask = torch.ones(3, 4, dtype=torch.bool)
    bad = x.clone()
    bad[2, 1, 3] = float("inf")
    for arguments, error, match in [
        ((gram, bad), ValueError, r"x must be finite for real tokens, got NaN or Inf in 1 of 12"),
        ((gram, x[..., :4]), ValueError, r"x must be \[..., n\] with n = 5, got \[3, 4, 4\]"),
        ((gram, x.long()), TypeError, r"x must be float16, .* got torch.int64"),
        ((gram, x.to("meta")), ValueError, r"x must be on cpu like gram, got meta"),
        ((gram, x.tolist()), TypeError, r"x must be a torch.Tensor, got list"),
        ((gram.half(), x), TypeError, r"gram must be float32 or float64, got torch.float16"),
        ((gram[:4], x), ValueError, r"gram must be \[n, n\] with n >= 1, got \[4, 5\]"),
        (
            (gram[:0, :0], x[..., :0]),
            ValueError,
            r"gram must be \[n, n\] with n >= 1, got \[0, 0\]",
        ),
        (
            (torch.zeros(5).expand(5, 5), x),
            ValueError,
            r"gram must have no elements that share memory",
        ),
    ]:
        with pytest.raises(error, match="gram_update_: " + match):
            gram_update_(*arguments)
    for wrong, error, match in [
        (mask.float(), TypeError, r"mask must be a bool tensor, got torch.float32"),
        (mask[:2], ValueError, r"mask must be \[3, 4\] like the tokens of x, got \[2, 4\]"),
        ([True], TypeError, r"mask must be a bool tensor, got list"),
    ]:
        with pytest.raises(error, match="gram_update_: " + match):
            gram_update_(gram, x, mask=wrong)
    with pytest.raises(BackendUnavailableError, match="CUDA"):
        gram_update_(gram, x, backend="cuda")
    assert torch.equal(gram, torch.eye(5, dtype=F64))


@pytest.mark.parametrize("x_dtype", X_DTYPES, ids=str)
@pytest.mark.parametrize("gram_dtype", GRAM_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (0, 7), (1, 33), (3, 7, 65)])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_cuda_form(monkeypatch, x_dtype, gram_dtype, shape, masked, nan_filled_memory):
    """Its blocks and its mirror are torch's products on any device."""
    monkeypatch.setattr(cuda, "_COLUMNS", 16)
    monkeypatch.setattr(cuda, "_TOKENS", 5)
    x = torch.randn(*shape, dtype=F64).to(x_dtype)
    mask = torch.rand(shape[:-1]) < 0.6 if masked else None
    gram = start(shape[-1], gram_dtype)
    expected = expected_gram(gram, x, mask)
    if mask is not None:
        x[~mask] = float("nan")
    tokens = x.reshape(-1, shape[-1])
    cuda.gram_update_(gram, tokens, None if mask is None else mask.reshape(-1))
    limit = tol("gram", gram_dtype, reduction=max(1, len(tokens)), scale=expected.max())
    torch.testing.assert_close(gram.double(), expected, **limit)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_keys_survive_tf32(dtype):
    """TF32 drops the last 13 bits of a float32: those of every 16-bit number are zero."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = patterns[patterns.isfinite()].float().view(torch.int32)
    assert len(bits) > 60000 and not (bits & 0x1FFF).any()


def test_only_16_bit_keys_may_use_tf32(monkeypatch):
    asked = []

    @contextmanager
    def watched(*, tf32):
        asked.append(tf32)
        yield

    monkeypatch.setattr(cuda, "float32_products", watched)
    for dtype in X_DTYPES:
        cuda.gram_update_(torch.zeros(3, 3), torch.randn(2, 3).to(dtype), None)
    assert asked == [True, True, False, False]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_rounds_nothing(backend):
    x = torch.randn(30, 8)
    grams, totals = ([torch.zeros(8, 8, dtype=d) for _ in "ab"] for d in (torch.float32, F64))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            gram_update_(grams[autocast], x, backend=backend)
            gram_add_lower_(totals[autocast], x)
    assert torch.equal(*grams) and torch.equal(*totals)
