"""The Cholesky ops and EditMemory on a GPU: right, repeatable, atomic, one wait for each call."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from torch import Tensor

from coachhook.editing.memory import EditMemory
from coachhook.errors import NotPositiveDefiniteError
from coachhook.ops import (
    available_backends,
    cholesky_downdate_,
    cholesky_update_,
    cholesky_update_solve_,
)
from coachhook.ops.cholesky import native
from coachhook.ops.cholesky.blocked import BlockedFactor
from tests.ops.linalg_oracle import F64, batches, exact, joint, outweighing, relative, spd
from tests.tolerances import tol

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

FORMS = ["extension", "torch"]
CONDITION = 20.0


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernels, or as without them."""
    if request.param == "torch":
        monkeypatch.setattr(native, "loaded", lambda: None)
    elif native.loaded() is None:
        pytest.skip("the CUDA extension is not built or finds no device")
    return request.param


@cache
def lower(n: int) -> Tensor:
    """L on the host, of a matrix with the condition ``CONDITION``; takes seconds at n = 2500."""
    return torch.linalg.cholesky(spd(n, CONDITION)[0])


def make(n: int, k: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return lower(n).to("cuda", dtype), (0.5 * torch.randn(n, k, dtype=dtype)).cuda()


def square(factor: Tensor) -> Tensor:
    return factor.tril().double() @ factor.tril().double().mT


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize(
    "n, k", [(1, 1), (33, 7), (257, 1), (257, 32), (700, 33), (700, 64), (1100, 10)]
)
def test_update_solve_and_downdate(form, dtype, n, k):
    factor, keys = make(n, k, dtype)
    if dtype == torch.float32:
        # They are taken out again: with 0.5 randn what is left of C in their direction is below
        # the 8 n eps that a downdate needs, from n = 700 on.
        keys *= 0.2
    before = square(factor)
    after = before + keys.double() @ keys.double().mT
    updated, solved = factor.clone(), factor.clone()
    cholesky_update_(updated, keys, backend="cuda")
    solution = cholesky_update_solve_(solved, keys, backend="cuda")
    scale, condition = float(after.abs().max()), float(torch.linalg.cond(after))
    limit = tol("factor", dtype, reduction=n + k, scale=scale)
    torch.testing.assert_close(square(updated), after, **limit)
    torch.testing.assert_close(square(solved), after, **limit)
    assert not updated.triu(1).any() and bool((updated.diagonal() > 0).all())
    expected = torch.linalg.solve(after, keys.double())
    size = (20.0 + condition) * float(expected.abs().max())
    limit = tol("solve", dtype, reduction=n + k, scale=size)
    torch.testing.assert_close(solution.double(), expected, **limit)
    if k <= n // 3:
        cholesky_downdate_(updated, keys, backend="cuda")
        limit = tol("factor", dtype, reduction=n, scale=scale * condition)
        torch.testing.assert_close(square(updated), before, **limit)


@pytest.mark.parametrize("k", [65, 150, 300, 512])
def test_many_keys(k):
    factor, keys = make(600, k)
    expected, updated = factor.clone(), factor.clone()
    wanted = cholesky_update_solve_(expected, keys, backend="reference")
    solution = cholesky_update_solve_(updated, keys, backend="cuda")
    torch.testing.assert_close(solution, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(updated, expected, rtol=0, atol=1e-12)


# Of k^T C^-1 k = n size^2, at most 1 / eps.
@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize(
    "dtype, size", [(F64, 1e3), (F64, 1e6), (torch.float32, 30.0), (torch.float32, 1e2)], ids=str
)
@pytest.mark.parametrize("n, k", [(257, 33), (257, 48), (257, 64)])
def test_more_keys_than_a_panel_has_rows_that_outweigh_the_factor(form, dtype, size, n, k):
    host = lower(n).to(dtype)
    keys = outweighing(host, k, size).to(dtype)
    after = square(host) + keys.double() @ keys.double().mT
    factor, there = host.cuda(), keys.cuda()
    solution = cholesky_update_solve_(factor, there, backend="cuda")
    limit = tol("factor", dtype, reduction=n + k, scale=float(after.abs().max()))
    torch.testing.assert_close(square(factor).cpu(), after, **limit)
    again = host.cuda()
    assert torch.equal(cholesky_update_solve_(again, there, backend="cuda"), solution)
    assert torch.equal(again, factor)
    if dtype == F64 and size == 1e3:  # larger ones are beyond the refinement of the oracle
        made = [(keys, torch.eye(k, dtype=F64))]
        truth = exact(square(host), made)
        assert relative(solution.cpu().mT, truth) < 2 * relative(joint(square(host), made), truth)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("condition", [1e4, 1e8])
@pytest.mark.parametrize("isotropic", [False, True], ids=["from_prior", "isotropic"])
def test_consecutive_batches_against_80_bits(form, condition, isotropic):
    n, m, k = 256, 8, 8
    prior, root = spd(n, condition)
    made = batches(root, 60, k, m, isotropic=isotropic)
    factor = torch.linalg.cholesky(prior).cuda()
    delta, total = torch.zeros(m, n, dtype=F64).cuda(), prior.clone()
    for keys, targets in made:
        there = keys.cuda()
        solved = cholesky_update_solve_(factor, there, backend="cuda")
        delta += (targets.cuda() - delta @ there) @ solved.mT
        total += keys @ keys.mT
    truth = exact(prior, made)
    assert relative(square(factor).cpu(), total) < 1e-13
    assert relative(delta.cpu(), truth) < max(10 * relative(joint(prior, made), truth), 1e-13)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("layout", ["rows", "columns", "sliced", "odd"])
def test_layouts(form, layout):
    n = 150
    factor, keys = make(n, 5)
    expected = factor.clone()
    wanted = cholesky_update_solve_(expected, keys, backend="reference")
    storage = torch.full((n + 3, n + 4), float("nan"), dtype=F64, device="cuda")
    if layout in ("rows", "columns"):
        storage = storage[:n, :n].clone()
    view = {
        "rows": storage,
        "columns": storage.mT,
        "sliced": storage[2 : n + 2, 2 : n + 2],
        "odd": storage[1 : n + 1, 3 : n + 3],
    }[layout]
    lower = torch.ones(n, n, dtype=torch.bool, device="cuda").tril()
    view[lower] = factor[lower]
    solution = cholesky_update_solve_(view, keys, backend="cuda")
    torch.testing.assert_close(solution, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(view[lower], expected[lower], rtol=0, atol=1e-12)
    assert int(storage.isfinite().sum()) == n * (n + 1) // 2


@pytest.mark.parametrize("form", ["extension"], indirect=True)
def test_keys_that_begin_between_two_accesses(form):
    prior, root = spd(64, 1e10)
    keys = batches(root, 1, 32, 8, isotropic=True)[0][0].cuda()
    between = torch.empty(1 + keys.numel(), dtype=F64, device="cuda")[1:].view(keys.shape)
    between.copy_(keys)
    assert between.is_contiguous() and between.data_ptr() % 16
    factors = [torch.linalg.cholesky(prior).cuda() for _ in range(2)]
    solutions = [
        cholesky_update_solve_(factor, given, backend="cuda")
        for factor, given in zip(factors, (keys, between), strict=True)
    ]
    assert torch.equal(*factors) and torch.equal(*solutions)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("op", [cholesky_update_, cholesky_downdate_, cholesky_update_solve_])
@pytest.mark.parametrize("k", [3, 60])
def test_failures_leave_the_factor(form, op, k):
    def fails(factor: Tensor, keys: Tensor, error: type[Exception], match: str) -> None:
        before = factor.clone()
        with pytest.raises(error, match=f"{op.__name__}: {match}"):
            op(factor, keys, backend="cuda")
        torch.testing.assert_close(factor, before, rtol=0, atol=0, equal_nan=True)

    factor, keys = make(300, k)
    keys *= 1e-3
    for value in (float("nan"), float("inf")):
        bad = keys.clone()
        bad[299, k * 2 // 3] = value
        fails(factor, bad, ValueError, "keys must be finite, got 1 NaN or Inf")
    for value in (0.0, -1.0, float("nan"), float("inf")):
        bad = factor.clone()
        bad[299, 299] = value
        fails(bad, keys, NotPositiveDefiniteError, "factor must be a Cholesky factor")
    bad = factor.clone()
    bad[299, 3] = float("nan")
    fails(bad, keys, NotPositiveDefiniteError, "factor must be a finite lower Cholesky factor")
    fails(factor, torch.full_like(keys, 1e200), NotPositiveDefiniteError, "")
    if op is cholesky_downdate_:
        solved = torch.linalg.solve_triangular(factor, keys, upper=False)
        for norm in (1.0, 1.1, 3.0):
            never = keys * (norm / torch.linalg.matrix_norm(solved, 2))
            fails(factor, never, NotPositiveDefiniteError, "keys must be part of")


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("k", [20, 48])
def test_equal_bits_on_every_run(form, k):
    factor, keys = make(500, k)
    first = factor.clone()
    solution = cholesky_update_solve_(first, keys, backend="cuda")
    for _ in range(10):
        again = factor.clone()
        assert torch.equal(cholesky_update_solve_(again, keys, backend="cuda"), solution)
        assert torch.equal(again, first)


def waits(function) -> int:
    """How often the host waits for the GPU."""
    function()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("k", [8, 48])
def test_the_host_waits_once(form, k):
    factor, keys = make(300, k)
    keys *= 1e-2
    assert waits(lambda: cholesky_update_(factor, keys, backend="cuda")) == 1
    assert waits(lambda: cholesky_downdate_(factor, keys, backend="cuda")) == 1
    assert waits(lambda: cholesky_update_solve_(factor, keys, backend="cuda")) == 1
    memory = EditMemory(square(factor), 4)
    few, targets = keys[:, :8], torch.randn(4, 8, dtype=F64, device="cuda")
    memory.append(few, targets)
    # The next one captures a graph, which waits for the device.
    assert waits(lambda: memory.append(few, targets)) == 1


@pytest.mark.parametrize("form", ["extension"], indirect=True)
@pytest.mark.parametrize("k", [8, 60])
def test_graph_replays_and_a_failing_replay_changes_nothing(form, k):
    factor, keys = make(300, k)
    warm = factor.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cholesky_update_solve_(warm, keys, backend="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    captured = factor.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        solution = cholesky_update_solve_(captured, keys, backend="cuda")
    graph.replay()
    torch.testing.assert_close(captured, warm, rtol=0, atol=1e-13)
    after = torch.linalg.solve(square(captured), keys)
    torch.testing.assert_close(solution, after, rtol=0, atol=1e-12)
    before = captured.clone()
    keys[7, k * 2 // 3] = float("nan")
    graph.replay()
    assert torch.equal(captured, before) and bool(solution.isnan().all())


@pytest.mark.parametrize("op", ["cholesky_update_", "cholesky_downdate_", "cholesky_update_solve_"])
def test_registration(op):
    factor, keys = make(60, 3)
    cholesky_update_(factor, keys)
    torch.library.opcheck(getattr(torch.ops.coachhook, op).default, (factor, keys, "cuda"))
    assert available_backends(op, "cuda")["cuda"] == (True, None)


@pytest.mark.parametrize("k", [8, 70])  # by the kernels, and by torch's products
def test_tf32_of_the_caller_is_not_used(k):
    factor, keys = make(400, k, torch.float32)
    exactly, allowed = factor.clone(), factor.clone()
    cholesky_update_(exactly, keys, backend="cuda")
    torch.set_float32_matmul_precision("high")
    try:
        cholesky_update_(allowed, keys, backend="cuda")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(exactly, allowed)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("rows", [64, 512, 2048])
@pytest.mark.parametrize("n, k", [(65, 16), (2500, 32), (2501, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "odd"])
def test_blocked_solves(form, n, k, rows, dtype, layout):
    factor, keys = make(n, k, dtype)
    # Sums of two or three parts of a tile's terms, and of all that fit between.
    if layout == "rows":
        factor = factor.contiguous()
    elif layout == "odd":
        storage = factor.new_full((n + 1, n + 1), float("nan"))
        storage[1:, 1:] = factor
        factor = storage[1:, 1:]
    blocked = BlockedFactor(factor, rows, native.kernels(factor))
    wide = factor.double().tril()
    condition = CONDITION**0.5  # of L; a GPU takes seconds to find it
    for _ in range(3):
        for found, matrix, upper in (
            (blocked.solve(keys), wide, False),
            (blocked.solve_transposed(keys), wide.mT, True),
        ):
            wanted = torch.linalg.solve_triangular(matrix, keys.double(), upper=upper)
            scale = condition * float(wanted.abs().max())
            limit = tol("solve", dtype, reduction=n, scale=scale)
            torch.testing.assert_close(found.double(), wanted, **limit)
    assert torch.equal(blocked.solve(keys), blocked.solve(keys))
    assert torch.equal(blocked.solve_transposed(keys), blocked.solve_transposed(keys))


def test_solves_of_a_large_factor():
    """With as many tiles as blocks of threads and more; the residual is that of a substitution."""
    n, k = 6400, 32
    factor = torch.randn(n, n, dtype=F64, device="cuda").tril_() / n**0.5
    factor.diagonal().abs_().add_(2.0)
    keys = torch.randn(n, k, dtype=F64, device="cuda")
    for rows in (1024, 4096):
        blocked = BlockedFactor(factor, rows, native.kernels(factor))
        for found, matrix in (
            (blocked.solve(keys), factor),
            (blocked.solve_transposed(keys), factor.mT),
        ):
            residual = (matrix @ found - keys).norm() / (factor.norm() * found.norm())
            assert float(residual) < 4 * torch.finfo(F64).eps


@pytest.mark.parametrize("max_keys", [None, 0, 20])
def test_edit_memory(max_keys):
    n, m = 300, 12
    prior, root = spd(n, 1e6)
    made = batches(root, 20, 5, m)
    memory = EditMemory(prior.cuda(), m, max_keys=max_keys)
    for keys, targets in made:
        memory.append(keys.cuda(), targets.cuda())
    assert relative(memory.delta().cpu(), joint(prior, made)) < 1e-9
    for batch in (7, 20, 1):
        memory.remove(batch)
    kept = [made[i] for i in range(20) if i + 1 not in (7, 20, 1)]
    assert relative(memory.delta().cpu(), joint(prior, kept)) < 1e-9
    with pytest.raises(ValueError, match="append: keys must be finite"):
        memory.append(torch.full((n, 1), float("nan"), device="cuda"), made[0][1][:, :1].cuda())
