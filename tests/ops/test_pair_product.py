"""Features of bfloat16 tokens through the extension ``coachhook._cpu``."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from coachhook.errors import BackendUnavailableError
from coachhook.ops import Membership, Population, Prefix, Sequence, Ungated, _backends, hook_output
from coachhook.ops.hooked_linear import cpu, pairs
from tests.tolerances import tol

needs_extension = pytest.mark.skipif(
    _backends.native_cpu() is None, reason=str(_backends.native_cpu_error())
)
# Tokens, n and features around the sizes of vectors, tiles and blocks.
TOKENS = [1, 15, 16, 17, 63, 64, 65, 130]
WIDTHS = [1, 2, 31, 32, 33, 639, 640, 641, 1301]
FEATURES = [1, 5, 6, 7, 100, 191, 192]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(x, s):
    assert pairs.takes(x, s)
    features, norms = pairs.product(x, s)
    want = x.double() @ s.double().T
    # Each number of S to 2^-16, and float32 sums.
    bound = x.double().abs() @ s.double().abs().T * (2.0**-16 + 2e-6)
    assert ((features.double() - want).abs() <= bound).all()
    torch.testing.assert_close(norms, features.double().norm(dim=-1), rtol=1e-12, atol=0)
    again = pairs.product(x, s)
    assert torch.equal(again[0], features) and torch.equal(again[1], norms)
    return features, norms


@needs_extension
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("n", WIDTHS)
def test_products_and_norms_of_odd_sizes(tokens, n):
    for f in (1, 7, 12):
        check(torch.randn(tokens, n).bfloat16(), torch.randn(f, n))


@needs_extension
@pytest.mark.parametrize("f", FEATURES)
def test_products_of_many_features(f):
    check(torch.randn(70, 650).bfloat16(), torch.randn(f, 650))


@needs_extension
def test_more_tokens_than_go_through_at_once():
    check(torch.randn(11_000, 3).bfloat16(), torch.randn(192, 3))


@needs_extension
def test_rows_may_lie_apart():
    x, s = torch.randn(40, 90).bfloat16(), torch.randn(9, 100)
    got = check(x[:, 3:74], s[:, 5:76])
    want = pairs.product(x[:, 3:74].contiguous(), s[:, 5:76].contiguous())
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    check(x[:1, :71].expand(33, 71), s[:1, :71].expand(5, 71))


@needs_extension
def test_nothing_is_written_or_read_beyond_the_ends():
    x, s = torch.full((19, 41), float("nan")).bfloat16(), torch.full((9, 41), float("nan"))
    x[:17, :37], s[:7, :37] = torch.randn(17, 37).bfloat16(), torch.randn(7, 37)
    features, norms = torch.full((9, 17), 5.0), torch.full((19,), 5.0, dtype=torch.float64)
    _backends.native_cpu().pair_product(
        x=x.data_ptr(),
        x_row_stride=41,
        tokens=17,
        n=37,
        s=s.data_ptr(),
        s_row_stride=41,
        rank=7,
        features=features.data_ptr(),
        norms=norms.data_ptr(),
    )
    want = pairs.product(x[:17, :37], s[:7, :37])
    assert torch.equal(features[:7].T, want[0]) and torch.equal(norms[:17], want[1])
    assert (features[7:] == 5).all() and (norms[17:] == 5).all()
    assert not features.isnan().any()


@needs_extension
def test_the_bits_of_a_token_do_not_depend_on_the_others():
    x, s = torch.randn(150, 700).bfloat16(), torch.randn(20, 700)
    features, norms = pairs.product(x, s)
    for rows in (slice(0, 1), slice(7, 40), slice(63, 66), slice(100, 150)):
        part = pairs.product(x[rows], s)
        assert torch.equal(part[0], features[rows]) and torch.equal(part[1], norms[rows])


@needs_extension
def test_a_token_that_is_not_a_number_stays_alone():
    x, s = torch.randn(50, 64).bfloat16(), torch.randn(20, 64)
    want = pairs.product(x, s)
    x[7, 3], x[30, 5] = float("nan"), float("inf")
    features, norms = pairs.product(x, s)
    bad = torch.zeros(50, dtype=torch.bool)
    bad[[7, 30]] = True
    assert not norms[bad].isfinite().any() and norms[7].isnan()
    assert torch.equal(features[~bad], want[0][~bad]) and torch.equal(norms[~bad], want[1][~bad])


@needs_extension
@pytest.mark.parametrize("kind", ["sequence", "prefix", "population", "sum", "own", "ungated"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_op_with_it_is_the_reference(kind, masked, monkeypatch):
    x, base = torch.randn(2, 40, 48).bfloat16(), torch.randn(2, 40, 19).bfloat16()
    delta = torch.linalg.qr(torch.randn(19, 5))[0], torch.randn(5, 48)
    mask = torch.rand(2, 40) > 0.2 if masked else None
    scope = {
        "sequence": Sequence(),
        "prefix": Prefix(),
        "population": Population(15.0, 4.0),
        "sum": Membership(torch.tensor([0, 0, 1, 1, 2])),
        "own": Membership(torch.tensor([0, 0, 1, 1, 2]), "own"),
        "ungated": Ungated(),
    }[kind]
    taken = []
    real = pairs.product
    monkeypatch.setattr(pairs, "product", lambda *a: taken.append(1) or real(*a))
    for operand in (delta, delta[0] @ delta[1]):
        if isinstance(operand, torch.Tensor) and isinstance(scope, Membership):
            continue
        given = base, x, operand, 0.7
        y, z = hook_output(*given, mask=mask, scope=scope, backend="cpu")
        want = hook_output(*given, mask=mask, scope=scope, backend="reference")
        torch.testing.assert_close(z, want[1], rtol=2e-4, atol=2e-4, equal_nan=True)
        torch.testing.assert_close(
            y, want[0], **tol("output", torch.bfloat16, reduction=48, scale=30.0)
        )
    assert taken


def test_without_the_extension_the_op_runs_as_before(monkeypatch):
    x, s = torch.randn(40, 48).bfloat16(), torch.randn(5, 48)
    monkeypatch.setattr(_backends, "native_cpu", lambda: None)
    assert not pairs.takes(x, s)
    features, norms = cpu._features(x, s)
    assert norms is None
    torch.testing.assert_close(features, F.linear(x.float(), s), rtol=1e-4, atol=1e-4)
    with pytest.raises(BackendUnavailableError, match="^hooked_linear: "):
        pairs.product(x, s)


@needs_extension
def test_what_it_does_not_take():
    x, s = torch.randn(40, 48).bfloat16(), torch.randn(5, 48)
    assert pairs.takes(x, s)
    assert not pairs.takes(x.float(), s) and not pairs.takes(x, s.bfloat16())
    assert not pairs.takes(x[:0], s) and not pairs.takes(x, s[:0])
    assert not pairs.takes(x[:, ::2], s[:, :24]) and not pairs.takes(x[:, :24], s[:, ::2])
    assert not pairs.takes(x, torch.randn(193, 48))
    with pytest.raises(ValueError, match="pair_product: rank must be 1 to 192"):
        pairs.product(x, torch.randn(193, 48))
    torch.set_num_threads(2)
    assert not pairs.takes(x, s)
