"""The kernels of the Cholesky update, run unchanged on the host, against numpy in float64."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.csrc.host import SANITIZE, Host, KernelFailure, _array, build
from tests.csrc.test_gate_host import mutated

DRIVER = "cholesky_driver.cpp"
ORDERS = (0, 1, 7, 23)  # of the threads
WIDTH = 32
REALS = {"float64": 1, "float32": 0}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(build(tmp_path_factory.mktemp("host") / "cholesky", driver=DRIVER))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Host:
    folder = tmp_path_factory.mktemp("sanitized")
    program = build(folder / "cholesky", *SANITIZE, driver=DRIVER)
    return Host(program, {"ASAN_OPTIONS": "detect_leaks=1"})


@dataclass
class Update:
    """L [n, n] and X [n, k] in ``real``; the new factor is L chol(I + sign X X^T)."""

    factor: np.ndarray
    solved: np.ndarray
    sign: int = 1
    real: str = "float64"
    margin: float = 0.0
    pivot_limit: float = 100.0
    chunk: int = 64

    @property
    def n(self) -> int:
        return len(self.factor)

    @property
    def columns(self) -> int:
        return 32 if self.solved.shape[1] <= 32 else 64

    @property
    def panels(self) -> int:
        return -(-self.n // WIDTH)

    def padded(self) -> np.ndarray:
        x = np.zeros((self.panels * WIDTH, self.columns))
        x[: self.n, : self.solved.shape[1]] = self.solved
        return x

    def sums(self) -> np.ndarray:
        """X_j^T X_j of every panel."""
        x = self.padded().reshape(self.panels, WIDTH, self.columns)
        return np.einsum("pik,pil->pkl", x, x)

    def paired(self) -> np.ndarray:
        """Z Z^T of the first two panels, where they are taken together: [0 or 1, 64, 64]."""
        first = self.padded()[: 2 * WIDTH]
        return (first @ first.T)[None][: self.columns > WIDTH and self.panels > 1]

    def dense(self) -> np.ndarray:
        """G [n, n] in float64."""
        x = self.solved.astype(np.float64)
        return np.linalg.cholesky(np.eye(self.n) + self.sign * x @ x.T)

    def rotations(self) -> np.ndarray:
        """G_jj over W_j by their formulas, [panels, 32 + columns, 32]."""
        x, out = self.padded(), []
        prefix = np.eye(self.columns)
        for panel in range(self.panels):
            part = x[panel * WIDTH : (panel + 1) * WIDTH]
            inner = np.linalg.solve(prefix, part.T)
            corner = np.linalg.cholesky(np.eye(WIDTH) + self.sign * part @ inner)
            out.append(np.vstack([corner, self.sign * np.linalg.solve(corner, inner.T).T]))
            prefix = prefix + self.sign * part.T @ part
        return np.stack(out)

    def residuals(self) -> np.ndarray:
        """K minus what the columns left of each chunk explain; NaN where nobody may look."""
        chunks = []
        for first in range(0, self.n, self.chunk):
            rest = np.zeros((self.n, self.columns))
            rest[:, : self.solved.shape[1]] = self.factor[:, first:] @ self.solved[first:]
            rest[:first] = np.nan
            chunks.append(rest)
        return np.stack(chunks)


@dataclass
class Rotations:
    status: np.ndarray
    sums: np.ndarray
    rotations: np.ndarray
    inverse: np.ndarray


def make(n: int, k: int, real: str = "float64", sign: int = 1, **options) -> Update:
    random = np.random.default_rng(n + k)
    factor = np.tril(random.standard_normal((n, n))) / np.sqrt(n)
    np.fill_diagonal(factor, 1.0 + random.random(n))
    solved = random.standard_normal((n, k))
    if sign < 0:
        solved *= 0.8 / np.linalg.norm(solved, 2)
    return Update(factor.astype(real), solved.astype(real), sign, real, **options)


def run_rotations(host: Host, case: Update, order: int = 0, inverse: bool = True) -> Rotations:
    c, panels, real = case.columns, case.panels, case.real
    header = (0, REALS[real], case.n, case.solved.shape[1], c, case.sign, case.n + 1, int(inverse))
    with np.errstate(over="ignore", invalid="ignore"):
        # The entry of the total is for the kernel to write.
        parts = [case.sums(), np.full((1, c, c), np.nan)]
        parts += [case.paired()] if len(case.paired()) else []
        sums = np.concatenate(parts).astype(real)
    arrays = (
        np.array([case.margin, case.pivot_limit]),
        case.padded().astype(real),
        case.factor,
        sums,
    )
    out = host._run(struct.pack("<8q", *header) + b"".join(map(_array, arrays)), order)
    status, out = np.frombuffer(out, np.int32, 2), out[8:]
    numbers = np.frombuffer(out, real)
    parts = np.split(numbers, np.cumsum([sums.size, panels * (WIDTH + c) * WIDTH]))
    return Rotations(
        status,
        parts[0].reshape(-1, c, c)[: panels + 1],
        parts[1].reshape(panels, WIDTH + c, WIDTH),
        parts[2].reshape(-1, c),
    )


def stored(case: Update, layout: str) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """A buffer with L in it and NaN elsewhere, its view as [n, n], and (strides, offset)."""
    n, real = case.n, case.real
    pitch, offset = {
        "aligned": (-(-n // 4) * 4, 0),
        "odd": (n + 3 - n % 2, 1),
        "columns": (n + n % 2, 0),
        "odd columns": (n + 1 - n % 2, 1),
    }[layout]
    buffer = np.full(offset + n * pitch - (pitch - n), np.nan, real)
    item = buffer.itemsize
    strides = (item, pitch * item) if "columns" in layout else (pitch * item, item)
    view = np.lib.stride_tricks.as_strided(buffer[offset:], (n, n), strides)
    view[np.tril_indices(n)] = case.factor[np.tril_indices(n)]
    return buffer, view, (strides[0] // item, strides[1] // item, offset)


def run_apply(
    host: Host, case: Update, layout: str = "aligned", order: int = 0, failed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The buffer before and the view [n, n] after."""
    buffer, _, (down, across, offset) = stored(case, layout)
    header = (1, REALS[case.real], case.n, case.columns, down, across, case.chunk, offset)
    real = case.real
    arrays = (
        *(buffer, case.residuals().astype(real), case.padded().astype(real)),
        *(case.rotations().astype(real), np.array([failed, 0], np.int32)),
    )
    out = host._run(struct.pack("<8q", *header) + b"".join(map(_array, arrays)), order)
    after = np.frombuffer(out, real)
    item = after.itemsize
    shape, strides = (case.n, case.n), (down * item, across * item)
    return buffer, np.lib.stride_tricks.as_strided(after[offset:], shape, strides)


def run_invert(
    host: Host, case: Update, rows: int, layout: str = "columns", order: int = 0
) -> np.ndarray:
    """[blocks, rows, rows]; NaN where the kernels write nothing."""
    buffer, _, (down, across, offset) = stored(case, layout)
    blocks = -(-case.n // rows)
    size = (blocks * (rows + 1) - 1) * rows * buffer.itemsize
    header = (2, REALS[case.real], case.n, rows, down, across, offset, size)
    out = host._run(struct.pack("<8q", *header) + _array(buffer), order)
    strides = np.array([rows * (rows + 1), rows, 1]) * buffer.itemsize
    numbers = np.frombuffer(out, case.real)
    return np.lib.stride_tricks.as_strided(numbers, (blocks, rows, rows), strides)


def check_inverses(case: Update, got: np.ndarray) -> None:
    rows = got.shape[1]
    for j, first in enumerate(range(0, case.n, rows)):
        tip = case.factor[first : first + rows, first : first + rows].astype(np.float64)
        wanted = np.linalg.inv(tip)
        scale = np.linalg.cond(tip) * np.abs(wanted).max()
        found = got[j, : len(tip), : len(tip)]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=limit(case, scale))
        assert not np.triu(got[j, : len(tip)], 1).any()


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("layout", ["aligned", "odd", "columns"])
@pytest.mark.parametrize("n, rows", [(1, 64), (65, 128), (150, 128), (200, 256), (700, 512)])
def test_inverses(host: Host, real: str, layout: str, n: int, rows: int) -> None:
    case = make(n, 1, real)
    check_inverses(case, run_invert(host, case, rows, layout))


def run_solve(
    host: Host,
    case: Update,
    layout: str = "columns",
    order: int = 0,
    transposed: bool = False,
    keep: bool = True,
    rows: int = 64,
    workers: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """``L^-1 X``, or ``L^-T X``, in blocks of some rows, and the residuals."""
    buffer, _, (down, across, offset) = stored(case, layout)
    n, real = case.n, case.real
    blocks = -(-n // rows)
    inverses = np.full((blocks * (rows + 1) - 1) * rows, np.nan)
    for j, first in enumerate(range(0, n, rows)):
        last = min(first + rows, n)
        place = inverses[j * rows * (rows + 1) :][: rows * rows].reshape(rows, rows)
        inverse = np.linalg.inv(case.factor[first:last, first:last].astype(np.float64))
        place[: last - first, : last - first] = np.tril(inverse)
    right = np.full((blocks if keep else 1, n, case.columns), np.nan)
    right[0] = case.padded()[:n]
    header = (
        3,
        REALS[real],
        n,
        rows,
        case.columns,
        int(transposed),
        int(keep),
        down,
        across,
        offset,
        workers,
    )
    arrays = (buffer, inverses.astype(real), right.astype(real))
    out = np.frombuffer(
        host._run(struct.pack("<11q", *header) + b"".join(map(_array, arrays)), order), real
    )
    size = n * case.columns
    return out[:size].reshape(n, -1), out[size:].reshape(right.shape)


def check_solve(
    case: Update, got: tuple[np.ndarray, np.ndarray], transposed: bool = False, rows: int = 64
) -> None:
    factor, x = case.factor.astype(np.float64), case.padded()[: case.n]
    wanted = np.linalg.solve(factor.T if transposed else factor, x)
    scale = np.linalg.cond(factor) * np.abs(wanted).max()
    np.testing.assert_allclose(got[0], wanted, rtol=0, atol=limit(case, scale))
    for j, residual in enumerate(got[1]):
        first = rows * j
        left = x - factor[:, :first] @ wanted[:first]
        np.testing.assert_allclose(
            residual[first:], left[first:], rtol=0, atol=limit(case, scale * case.n)
        )
        assert j == 0 or np.isnan(residual[:first]).all()


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("layout", ["aligned", "odd", "columns"])
@pytest.mark.parametrize("n, k", [(1, 1), (64, 5), (99, 33), (400, 3)])
def test_solves(host: Host, real: str, layout: str, n: int, k: int) -> None:
    case = make(n, k, real)
    check_solve(case, run_solve(host, case, layout))
    for transposed in (False, True):
        solved = run_solve(host, case, layout, 0, transposed, keep=False)[0]
        check_solve(case, (solved, np.empty((0, n))), transposed)


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize(
    "k, shared", [(4, 227 << 10), (4, 99 << 10), (33, 227 << 10), (33, 99 << 10)]
)
def test_solves_dealt_out_among_blocks(host: Host, real: str, k: int, shared: int) -> None:
    """Tiles in one run, in several, and runs of several tiles; rings of two to four stages."""
    case = make(333, k, real)
    with_less = Host(host.program, {"SHIM_SHARED": str(shared)})
    for workers in (1, 2, 7, 40):
        for transposed, layout in ((False, "aligned"), (True, "columns")):
            solved = run_solve(
                *(with_less, case, layout, workers % len(ORDERS), transposed),
                keep=False,
                rows=256,
                workers=workers,
            )[0]
            check_solve(case, (solved, np.empty((0, case.n))), transposed)
    got = run_solve(with_less, case, "odd columns", rows=256, workers=7)
    check_solve(case, got, rows=256)


def test_order_of_the_blocks_does_not_change_a_bit(host: Host) -> None:
    case = make(333, 4)
    for transposed in (False, True):
        first, *others = (
            run_solve(host, case, "columns", order, transposed, False, rows=256, workers=11)[0]
            for order in ORDERS
        )
        for other in others:
            np.testing.assert_array_equal(other, first)


def limit(case: Update, scale: float) -> float:
    """Rounding of sums of n + k terms, with a margin for their tail; ``scale`` is their size."""
    return 16 * float(np.finfo(case.real).eps) * np.sqrt(case.n + case.columns) * scale


def check_rotations(case: Update, got: Rotations) -> None:
    assert got.status[0] == 0
    sums = np.concatenate([np.zeros((1, case.columns, case.columns)), np.cumsum(case.sums(), 0)])
    np.testing.assert_allclose(got.sums, sums, rtol=0, atol=limit(case, sums[-1].max()))
    dense, x = case.dense(), case.padded()
    for panel, stacked in enumerate(got.rotations.astype(np.float64)):
        left, right = panel * WIDTH, min((panel + 1) * WIDTH, case.n)
        size, atol = right - left, limit(case, np.abs(dense).max() * np.sqrt(case.n))
        corner = stacked[:WIDTH]
        assert not np.triu(corner, 1).any()
        np.testing.assert_allclose(
            corner[:size, :size], dense[left:right, left:right], rtol=0, atol=atol
        )
        # What W_j is for: below the diagonal G_ij = X_i W_j.
        below = x[right : case.n] @ stacked[WIDTH:]
        np.testing.assert_allclose(below[:, :size], dense[right:, left:right], rtol=0, atol=atol)


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "n, k", [(1, 1), (32, 5), (300, 3), (32, 33), (40, 41), (75, 33), (70, 64)]
)
def test_rotations(host: Host, real: str, sign: int, n: int, k: int) -> None:
    # The margin is of the inverse alone.
    case = make(n, k, real, sign, margin=0.01)
    got = run_rotations(host, case)
    check_rotations(case, got)
    total = (1 - case.margin) * np.eye(case.columns) + sign * got.sums[-1].astype(np.float64)
    np.testing.assert_allclose(
        got.inverse, np.linalg.inv(total), rtol=0, atol=limit(case, np.linalg.cond(total))
    )
    assert not run_rotations(host, case, inverse=False).inverse.size


def test_failures_are_flagged(host: Host) -> None:
    def failed(case: Update) -> bool:
        return bool(run_rotations(host, case).status[0])

    for value, row in ((np.nan, 0), (np.inf, 33), (-np.inf, 33), (1e200, 33)):
        case = make(34, 4)
        case.solved[row, 2] = value
        assert failed(case), (value, row)
    for value in (0.0, -1.0, np.nan, np.inf):
        case = make(34, 4)
        case.factor[33, 33] = value
        assert failed(case), value
    case = make(34, 4, sign=-1)
    assert not failed(case)
    case.solved *= 1.0 / 0.79
    assert failed(case)
    case = make(34, 4, sign=-1)
    gap = 1 - np.linalg.norm(case.solved, 2) ** 2
    case.margin = 0.99 * gap
    assert not failed(case)
    case.margin = 1.01 * gap
    assert failed(case)


def test_uneven_pivots_are_flagged(host: Host) -> None:
    case = make(34, 3)
    case.solved[:, 1:] = case.solved[:, :1] * 3.0
    total = np.linalg.cholesky(np.eye(3) + case.solved.T @ case.solved).diagonal() ** 2
    for ratio, uneven in ((0.99, 1), (1.01, 0)):
        case.pivot_limit = ratio * total.max() / total.min()
        assert run_rotations(host, case).status.tolist() == [0, uneven]


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("layout", ["aligned", "odd", "columns", "odd columns"])
@pytest.mark.parametrize(
    "n, k, chunk", [(1, 1, 32), (33, 40, 64), (100, 8, 32), (96, 64, 96), (211, 5, 64)]
)
def test_apply(host: Host, real: str, layout: str, n: int, k: int, chunk: int) -> None:
    case = make(n, k, real, chunk=chunk)
    before, after = run_apply(host, case, layout)
    want = case.factor.astype(np.float64) @ case.dense()
    lower = np.tril_indices(n)
    atol = limit(case, np.abs(want).max() * np.abs(case.solved).max())
    np.testing.assert_allclose(after[lower], want[lower], rtol=0, atol=atol)
    # Above the diagonal and around the matrix nothing was read or written.
    assert np.isnan(after[np.triu_indices(n, 1)]).all()
    assert np.isfinite(before).sum() == len(lower[0])


def test_apply_of_a_downdate(host: Host) -> None:
    case = make(70, 4, sign=-1)
    _, after = run_apply(host, case)
    want = case.factor @ case.dense()
    np.testing.assert_allclose(np.tril(after), want, rtol=0, atol=limit(case, 4.0))


def test_a_failed_update_writes_nothing(host: Host) -> None:
    case = make(70, 4)
    before, after = run_apply(host, case, "odd", failed=1)
    pitch = after.strides[0] // after.itemsize
    again = np.lib.stride_tricks.as_strided(before[1:], after.shape, after.strides)
    assert pitch == 73
    np.testing.assert_array_equal(again, after)


def test_thread_order_does_not_change_a_bit(host: Host) -> None:
    for case in (make(70, 5), make(70, 50)):
        rotations = run_rotations(host, case).rotations
        factor = run_apply(host, case)[1]
        for order in ORDERS[1:]:
            np.testing.assert_array_equal(run_rotations(host, case, order).rotations, rotations)
            np.testing.assert_array_equal(run_apply(host, case, order=order)[1], factor)
    inverses = run_invert(host, case, 128)
    for order in ORDERS[1:]:
        np.testing.assert_array_equal(run_invert(host, case, 128, order=order), inverses)
        np.testing.assert_array_equal(
            run_solve(host, case, order=order)[0], run_solve(host, case)[0]
        )


def test_layout_and_chunks_do_not_change_the_result(host: Host) -> None:
    case = make(100, 5)
    aligned = np.tril(run_apply(host, case)[1])
    for layout in ("odd", "columns", "odd columns"):
        np.testing.assert_array_equal(np.tril(run_apply(host, case, layout)[1]), aligned)
    case.chunk = 32
    again = np.tril(run_apply(host, case)[1])
    np.testing.assert_allclose(again, aligned, rtol=0, atol=limit(case, 4.0))


@pytest.mark.parametrize("order", ORDERS)
def test_sanitizers_find_nothing(sanitized: Host, order: int) -> None:
    real, layout = ("float64", "odd") if order % 2 else ("float32", "columns")
    case = make(35, 3, real, chunk=32)
    check_rotations(case, run_rotations(sanitized, case, order))
    run_apply(sanitized, case, layout, order)
    check_inverses(case, run_invert(sanitized, case, 128, layout, order))
    check_solve(case, run_solve(sanitized, case, layout, order))
    solved = run_solve(sanitized, case, layout, order, True, keep=False)[0]
    check_solve(case, (solved, np.empty((0, case.n))), True)
    if order == ORDERS[-1]:
        case = make(33, 33, chunk=32)
        check_rotations(case, run_rotations(sanitized, case, order))
        run_apply(sanitized, case, "aligned", order)


def test_sanitizer_sees_an_access_outside(tmp_path: Path) -> None:
    """The net has no holes: an index one too far in the kernel is reported."""
    right = "rotations[(kWidth + c) * kWidth + lane] = "
    source = mutated(tmp_path, "cholesky_panels.cuh", right, right.replace("lane", "lane + 1"))
    program = build(tmp_path / "cholesky", *SANITIZE, csrc=source, driver=DRIVER)
    with pytest.raises(KernelFailure, match="heap-buffer-overflow"):
        run_rotations(Host(program), make(8, 4))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chunk": 48}, "cholesky_apply: chunk must be a positive multiple of 32, got 48"),
        ({"sign": 2}, "cholesky_rotations: sign must be 1 or -1, got 2"),
    ],
)
def test_bad_arguments_are_refused(host: Host, change: dict[str, int], message: str) -> None:
    case = make(40, 2)
    rotations = case.rotations()
    for name, value in change.items():
        setattr(case, name, value)
    case.rotations = lambda: rotations  # type: ignore[method-assign]
    with pytest.raises(KernelFailure, match=re.escape(message)):
        run_apply(host, case) if "chunk" in change else run_rotations(host, case)
