"""The gate's CUDA kernels, run unchanged on the host, against plain numpy in float64."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.csrc.host import (
    CSRC,
    SANITIZE,
    Correction,
    Gate,
    GateResult,
    Host,
    KernelFailure,
    build,
    representable,
)

EPS = float(np.finfo(np.float32).eps)
ORDERS = (0, 1, 7, 23)
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(build(tmp_path_factory.mktemp("host") / "gate"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Host:
    program = build(tmp_path_factory.mktemp("sanitized") / "gate", *SANITIZE)
    return Host(program, {"ASAN_OPTIONS": "detect_leaks=1"})


def make(rows: int, rank: int, dtype: str = "float32", seed: int = 0, **options) -> Gate:
    """Coefficients of ordinary size with one row in ten far larger, so that some tokens fire."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, rank))
    values[::10] *= 8
    return Gate(representable(values, dtype), dtype=dtype, **options)


def spans(case: Gate) -> list[tuple[int, int]]:
    if case.cu_seqlens is not None:
        edges = case.cu_seqlens.tolist()
        return list(itertools.pairwise(edges))
    length = case.rows // max(case.sequences, 1)
    return [(b * length, (b + 1) * length) for b in range(case.sequences)]


def check(case: Gate, got: GateResult) -> None:
    """Every output of the gate against its definition."""
    c = case.coefficients.astype(np.float64)
    exact = np.linalg.norm(c, axis=1) if case.reduction == "norm" else c.max(axis=1)
    # A lane adds rank / 32 squares one after another, then five more levels: one rounding each.
    bound = (case.coefficients.shape[1] / 32 + 6) * EPS
    np.testing.assert_allclose(got.magnitude, exact, rtol=bound, equal_nan=True)

    # The rest follows from the rounded magnitudes alone, in float64, and is rounded once.
    magnitude = got.magnitude.astype(np.float64)
    z = np.full(case.rows, np.nan)
    valid = np.ones(case.rows, bool) if case.mask is None else case.mask.astype(bool)
    for b, (begin, end) in enumerate(spans(case)):
        keep = np.arange(begin, end)[valid[begin:end]]
        m = magnitude[keep]
        if case.scope == "direct":
            z[keep] = m
            continue
        if case.scope == "population":
            assert case.mean is not None and case.std is not None
            mean, std = case.mean[b % case.mean.size], case.std[b % case.std.size]
        else:
            mean = m.mean() if m.size else 0.0
            std = m.std(ddof=1) if m.size > 1 else np.nan
            if case.state:
                m2 = ((m - mean) ** 2).sum()
                np.testing.assert_allclose(got.state[b], (m.size, mean, m2), rtol=1e-10, atol=1e-12)
        if std > 8 * EPS * mean:
            z[keep] = (m - mean) / std
    np.testing.assert_allclose(got.z, z, rtol=2 * EPS, atol=1e-12, equal_nan=True)
    np.testing.assert_array_equal(got.fired, got.z >= np.float32(case.alpha))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 7, 8, 33, 256, 517])
@pytest.mark.parametrize("padding, offset", [(0, 0), (3, 0), (8, 1)])
def test_sizes_and_strides(host: Host, dtype: str, rank: int, padding: int, offset: int) -> None:
    case = make(18, rank, dtype, sequences=2, padding=padding, offset=offset)
    check(case, host.gate(case, order=rank % 5))


@pytest.mark.parametrize("scope", ["sequence", "population", "direct"])
@pytest.mark.parametrize("reduction", ["norm", "max"])
@pytest.mark.parametrize("layout", ["equal", "masked", "packed", "packed_masked"])
def test_scopes_and_layouts(host: Host, scope: str, reduction: str, layout: str) -> None:
    rows, sequences = 60, 4
    options: dict[str, object] = {"sequences": sequences}
    if "masked" in layout:
        mask = np.random.default_rng(1).random(rows) < 0.7
        mask[30:45] = False  # nothing valid in one of the equal sequences
        options["mask"] = mask
    if "packed" in layout:
        options["cu_seqlens"] = np.array([0, 1, 1, 31, 55])  # one token, none, and a tail outside
    if scope == "population":
        options |= {"mean": np.linspace(2, 5, sequences), "std": np.array([1.5, 0.0, np.nan, 2.0])}
    if scope == "direct":
        options["alpha"] = 5.0  # above an ordinary norm of 20 coefficients
    case = make(rows, 20, reduction=reduction, scope=scope, state=scope == "sequence", **options)
    if reduction == "max":
        case.coefficients = np.abs(case.coefficients)
    got = host.gate(case)
    check(case, got)
    if layout == "equal":
        assert 0 < got.fired.sum() < rows


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 1000])
def test_sequence_lengths(host: Host, length: int) -> None:
    case = make(2 * length, 5, sequences=2)
    got = host.gate(case)
    check(case, got)
    if length == 1:
        assert np.isnan(got.z).all() and not got.fired.any()


def test_scalar_population(host: Host) -> None:
    case = make(12, 6, sequences=3, scope="population", state=False)
    case.mean, case.std = np.array([2.5]), np.array([0.5])
    check(case, host.gate(case))


def test_equal_magnitudes_are_undefined(host: Host) -> None:
    case = Gate(np.full((40, 3), 0.1, np.float32), sequences=1)
    got = host.gate(case)
    assert np.isnan(got.z).all() and not got.fired.any()
    assert got.state[0, 2] == 0.0


def test_rounding_noise_is_undefined(host: Host) -> None:
    values = np.ones((40, 1), np.float32)
    values[::2] += EPS
    got = host.gate(Gate(values))
    assert np.isnan(got.z).all()


@pytest.mark.parametrize("reduction", ["norm", "max"])
def test_nan_never_fires(host: Host, reduction: str) -> None:
    case = make(24, 9, sequences=2, reduction=reduction)
    case.coefficients[5, 4] = np.nan
    got = host.gate(case)
    assert np.isnan(got.magnitude[5]) and np.isnan(got.z[:12]).all()
    assert not got.fired[:12].any() and not np.isnan(got.z[12:]).any()


@pytest.mark.parametrize("rank", [1, 33, 517])
def test_coefficients_that_do_not_count_are_minus_infinity(host: Host, rank: int) -> None:
    """Of edits that are not armed."""
    options = {"reduction": "max", "scope": "direct", "state": False, "sequences": 2}
    case = make(20, rank, alpha=0.5, **options)
    case.coefficients[::2, ::2] = -np.inf
    case.coefficients[7] = -np.inf
    got = host.gate(case)
    check(case, got)
    assert got.z[7] == -np.inf and not got.fired[7] and got.fired.any()


def test_nan_under_the_mask_is_ignored(host: Host) -> None:
    case = make(24, 9, sequences=1)
    case.mask = np.ones(24, bool)
    case.mask[5] = False
    case.coefficients[5] = np.nan
    got = host.gate(case)
    assert np.isnan(got.z[5]) and np.isfinite(np.delete(got.z, 5)).all()


def test_no_rows(host: Host) -> None:
    got = host.gate(Gate(np.zeros((0, 4), np.float32), sequences=2, cu_seqlens=np.zeros(3)))
    np.testing.assert_array_equal(got.state, np.zeros((2, 3)))


def test_rank_zero_has_no_magnitude(host: Host) -> None:
    got = host.gate(Gate(np.zeros((4, 0), np.float32), sequences=1))
    np.testing.assert_array_equal(got.magnitude, np.zeros(4))
    assert np.isnan(got.z).all()


def test_thread_order_does_not_change_a_bit(host: Host) -> None:
    case = make(66, 70, sequences=3)
    first = host.gate(case, order=0)
    for order in ORDERS[1:]:
        again = host.gate(case, order=order)
        assert same_bits(first.z, again.z) and same_bits(first.state, again.state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_does_not_change_a_bit(host: Host, dtype: str) -> None:
    case = make(20, 67, dtype)
    first = host.gate(case)
    for case.padding, case.offset in ((13, 0), (16 - 67 % 16, 0), (1, 3)):
        assert same_bits(first.z, host.gate(case).z)


def test_batch_and_padding_do_not_change_a_bit(host: Host) -> None:
    case = make(30, 40)
    alone = host.gate(case)
    other = make(30, 40, seed=1).coefficients
    batch = host.gate(Gate(np.concatenate([other, case.coefficients]), sequences=2))
    assert same_bits(alone.z, batch.z[30:])
    junk = np.full((7, 40), 1e6, np.float32)
    for left, right in ((junk, junk[:0]), (junk[:0], junk), (junk, junk)):
        padded = Gate(np.concatenate([left, case.coefficients, right]))
        padded.mask = np.zeros(padded.rows, bool)
        padded.mask[len(left) : len(left) + 30] = True
        assert same_bits(alone.z, host.gate(padded).z[padded.mask])


@pytest.mark.parametrize("dtype", DTYPES)
def test_correction(host: Host, dtype: str) -> None:
    random = np.random.default_rng(3)
    rows, m, rank = 45, 19, 37
    y = representable(random.standard_normal((rows, m)), dtype)
    q = random.standard_normal((m, rank)).astype(np.float32)
    s = random.standard_normal((rows, rank)).astype(np.float32)
    fired = random.random(rows) < 0.4
    got = host.correction(Correction(y, q, s, fired, dtype))
    np.testing.assert_array_equal(got[~fired], y[~fired])
    want = y.astype(np.float64) + s.astype(np.float64) @ q.astype(np.float64).T
    # float32 sums of `rank` products, then one rounding to the storage type.
    ulp = {"float32": EPS, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    products = np.abs(s) @ np.abs(q).T
    error = np.abs(got - want)[fired]
    assert (error <= (rank / 32 + 6) * EPS * products[fired] + ulp * np.abs(want[fired])).all()


def test_correction_of_many_rows(host: Host) -> None:
    """More rows than row blocks: a block walks on."""
    fired = np.arange(100) % 3 == 0
    ones = np.ones((100, 1), np.float32)
    got = host.correction(Correction(np.zeros((100, 2)), np.ones((2, 1)), ones, fired))
    np.testing.assert_array_equal(got, fired[:, None] * np.ones((1, 2)))


@pytest.mark.parametrize("order", ORDERS)
def test_sanitizers_find_nothing(sanitized: Host, order: int) -> None:
    for dtype in DTYPES:
        case = make(21, 35, dtype, sequences=3, padding=1, offset=1)
        check(case, sanitized.gate(case, order))
    packed = make(40, 16, cu_seqlens=np.array([0, 3, 3, 39]), sequences=3, mask=np.arange(40) % 4)
    check(packed, sanitized.gate(packed, order))
    fired = np.arange(9) % 2
    corrected = Correction(np.zeros((9, 11)), np.ones((11, 5)), np.ones((9, 5)), fired)
    np.testing.assert_array_equal(
        sanitized.correction(corrected, order), np.outer(fired, np.full(11, 5.0))
    )


def test_wrong_cu_seqlens_stay_in_bounds(sanitized: Host) -> None:
    case = make(10, 4, sequences=3, state=False)
    for edges in ([-5, 4, 20, 30], [9, 2, 12, 3], [0, 10, 10, 10]):
        case.cu_seqlens = np.array(edges)
        sanitized.gate(case)


def test_sanitizer_sees_an_access_outside(tmp_path: Path) -> None:
    """The net has no holes: an index one too far in the kernel is reported."""
    source = mutated(tmp_path, "gate.cuh", "p.magnitude[row] =", "p.magnitude[row + 1] =")
    broken = Host(build(tmp_path / "gate", *SANITIZE, csrc=source))
    with pytest.raises(KernelFailure, match="heap-buffer-overflow"):
        broken.gate(make(8, 4))


def mutated(folder: Path, name: str, old: str, new: str, which: int = 0) -> Path:
    """A copy of csrc/ with the given occurrence of ``old`` replaced."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    path = copy / name
    parts = path.read_text().split(old)
    assert len(parts) > which + 1, f"{old!r} is not in {name}"
    path.write_text(old.join(parts[: which + 1]) + new + old.join(parts[which + 1 :]))
    return copy


@pytest.mark.parametrize(
    "case, message",
    [
        (make(7, 4, sequences=2), r"row_norm_zscore_gate: rows must be a multiple of .*, got 7"),
        (make(4, 4, scope="population"), "mean and std must be non-null"),
        (make(4, 4, scope="direct"), "state must be null unless scope=sequence"),
        (
            Gate(np.zeros((2, 0), np.float32), reduction="max"),
            "rank must be >= 1 with reduction=max",
        ),
    ],
)
def test_bad_arguments_are_refused(host: Host, case: Gate, message: str) -> None:
    with pytest.raises(KernelFailure, match=message):
        host.gate(case)


def test_agrees_with_the_reference_op(host: Host) -> None:
    """Same z as the package's own reference, whose features are the coefficients themselves."""
    from coachhook.ops import Sequence, gate_scores

    case = make(48, 12, sequences=3)
    case.mask = np.arange(48) % 16 > 2
    x = torch.from_numpy(case.coefficients).view(3, 16, 12)
    identity = (torch.eye(12), torch.eye(12))
    mask = torch.from_numpy(case.mask).view(3, 16)
    want = gate_scores(x, identity, mask=mask, scope=Sequence()).view(-1).numpy()
    got = host.gate(case)
    # Both round the norms once; what that does to z grows with M / std, about 3 here.
    np.testing.assert_allclose(got.z, want, rtol=0, atol=16 * EPS, equal_nan=True)
