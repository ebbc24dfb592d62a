"""The Cholesky ops against a pass over the factor (floor) and dense LU or Cholesky (peer)."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from coachhook.bench.runner import Case, benchmark
from coachhook.editing.prior import kept_rows
from coachhook.ops import available_backends, cholesky_update_, cholesky_update_solve_
from coachhook.ops.cholesky import cuda
from coachhook.ops.cholesky.blocked import BlockedFactor, block_rows

_LOG = logging.getLogger(__name__)

_RANK = 256


def synthetic_prior(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A dense, well-conditioned symmetric positive definite matrix [n, n]."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(n, _RANK, generator=generator, dtype=torch.float32).to(device, dtype)
    matrix = root @ root.mT / _RANK
    matrix.diagonal().add_(1)
    return matrix


def synthetic_keys(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Keys [n, k] that weigh a little less than the prior of :func:`synthetic_prior`."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(n, k, generator=generator) * (0.5 / n) ** 0.5).to(device, dtype)


def lu_solve(prior: Tensor, keys: Tensor) -> Tensor:
    """What the published implementation does for each layer and batch: a dense solve by LU."""
    return torch.linalg.solve(prior + keys @ keys.mT, keys)


def refactored(prior: Tensor, keys: Tensor) -> Tensor:
    """The factor computed anew."""
    return torch.linalg.cholesky(prior + keys @ keys.mT)


def jax_rank_one(factor: Tensor, keys: Tensor) -> tuple[str, Callable[[], object]] | None:
    """JAX's update by one key at a time, on its own copies; None where JAX is not installed.

    On a GPU its ``cholesky_update``, with a kernel of its own; ``XLA_PYTHON_CLIENT_PREALLOCATE=
    false`` in the environment leaves torch its share of the memory. Elsewhere that function is
    unrolled row by row, which takes minutes to compile from n = 512 on: there the same recurrence
    runs as a scan over the rows.

    Returns:
        What runs, and a function that runs it for all keys.
    """
    jax = _jax()
    if jax is None:
        return None
    jax.config.update("jax_enable_x64", True)
    root = jax.numpy.asarray(factor.mT.contiguous().cpu().numpy())  # upper: A = R^T R
    columns = [jax.numpy.asarray(column) for column in keys.mT.contiguous().cpu().numpy()]
    if jax.default_backend() == "gpu":
        name, update = "jax cholesky_update", jax.jit(jax.lax.linalg.cholesky_update)
    else:
        name, update = "jax rotations in a scan", jax.jit(partial(_rotations, jax))

    def run() -> object:
        result = root
        for column in columns:
            result = update(result, column)
        return result.block_until_ready()

    return f"{name}, {len(columns)} times", run


@cache
def _jax() -> Any:
    if importlib.util.find_spec("jax") is None:
        _LOG.warning("bench: cholesky: JAX is not installed, so it is not compared with")
        return None
    return importlib.import_module("jax")


def _rotations(jax: Any, root: Any, key: Any) -> Any:
    """Upper R of ``R^T R + k k^T`` by a Givens rotation for each row, in JAX."""

    def step(rest: Any, indexed: tuple[Any, Any]) -> tuple[Any, Any]:
        i, row = indexed
        radius = jax.numpy.hypot(row[i], rest[i])
        c, s = row[i] / radius, rest[i] / radius
        return c * rest - s * row, c * row + s * rest

    # A scan hands out one row after another; a matrix carried along would be copied at each.
    return jax.lax.scan(step, key, (jax.numpy.arange(len(key)), root))[1]


def _peers(prior: Tensor, keys: Tensor) -> dict[str, tuple[str, Callable[[], Tensor]]]:
    return {
        "cholesky_update_": ("torch.linalg.cholesky", partial(refactored, prior, keys)),
        "cholesky_update_solve_": ("torch.linalg.solve", partial(lu_solve, prior, keys)),
    }


def _sizes(device: torch.device, quick: bool) -> list[tuple[int, int]]:
    if quick:
        return [(1024, 32)]
    sizes = (6400, 16384) if device.type == "cuda" else (1600, 4096, 6400)
    return [(n, 32) for n in sizes]


@benchmark("cholesky")
def cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    """Update, and update with solve. The factor grows with every call; the time does not."""
    functions = {
        "cholesky_update_": cholesky_update_,
        "cholesky_update_solve_": cholesky_update_solve_,
    }
    for kind in [dtype] if dtype in (torch.float32, torch.float64) else [torch.float64]:
        for n, k in _sizes(device, quick):
            prior = synthetic_prior(n, kind, device)
            keys = synthetic_keys(n, k, kind, device)
            factor = torch.linalg.cholesky(prior)
            # The least any update does: read and write one triangle.
            floor = partial(torch.ones_like(factor[: n // 2]).mul_, 1.0)
            peers = _peers(prior, keys)
            for op, function in functions.items():
                able = [b for b, (can, _) in available_backends(op, device).items() if can]
                for backend in [b for b in able if b != "reference"] or ["reference"]:
                    more: dict[str, Callable[[], object]] = {}
                    if op == "cholesky_update_solve_":
                        more["torch.linalg.cholesky"] = partial(refactored, prior, keys)
                    yield Case(
                        op=op,
                        shape=f"n={n} k={k}",
                        dtype=kind,
                        backend=backend,
                        run=partial(function, factor, keys, backend=backend),
                        floor=floor,
                        peer_name=peers[op][0],
                        peer=peers[op][1],
                        more_peers=more,
                        bytes_moved=n * n * factor.element_size(),
                        graphs=("op",) if backend == "cuda" else (),
                    )
            if device.type == "cuda":
                # The blocks of an update, which are inverted each time, and those that are kept.
                for rows in (block_rows(n, 8, 1024), kept_rows(n)):
                    yield _chain(factor, keys, rows)
        # Last, since it takes as long as all the others.
        yield from _beside_jax(*_sizes(device, quick)[0], kind, device)


def _beside_jax(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The update at the smallest size against JAX's, where that is installed."""
    keys = synthetic_keys(n, k, dtype, device)
    factor = torch.linalg.cholesky(synthetic_prior(n, dtype, device))
    one_by_one = jax_rank_one(factor, keys)
    if one_by_one is not None:
        yield Case(
            op="cholesky_update_",
            shape=f"n={n} k={k}, beside JAX",
            dtype=dtype,
            backend="auto",
            run=partial(cholesky_update_, factor, keys),
            peer_name=one_by_one[0],
            peer=one_by_one[1],
            warm=1,
            rounds=3,
        )


def _chain(factor: Tensor, keys: Tensor, rows: int) -> Case:
    """``L^-1 K`` as a chain of products, against the library's triangular solve."""
    n, k = keys.shape
    extension = cuda._extension(factor, keys)
    blocked = BlockedFactor(factor, rows, extension)
    library = BlockedFactor(factor, rows)
    return Case(
        op="BlockedFactor.solve",
        shape=f"n={n} k={k} rows={rows}",
        dtype=factor.dtype,
        backend="cuda",
        run=partial(blocked.solve, keys),
        peer_name="torch.linalg.solve_triangular",
        peer=partial(torch.linalg.solve_triangular, factor, keys, upper=False),
        more_peers={
            "chain of the library's products": partial(library.solve, keys),
            "transposed": partial(blocked.solve_transposed, keys),
            "making the inverses": partial(BlockedFactor, factor, rows, extension),
        },
        bytes_moved=n * n * factor.element_size() // 2,
        graphs=("op", "transposed", "chain of the library's products", "making the inverses"),
    )
