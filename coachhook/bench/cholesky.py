"""The Cholesky ops against a pass over the factor (floor) and dense LU or Cholesky (peer)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from coachhook.bench.runner import Case, benchmark
from coachhook.ops import available_backends, cholesky_update_, cholesky_update_solve_

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


def _peers(prior: Tensor, keys: Tensor) -> dict[str, tuple[str, Callable[[], Tensor]]]:
    return {
        "cholesky_update_": ("torch.linalg.cholesky", partial(refactored, prior, keys)),
        "cholesky_update_solve_": ("torch.linalg.solve", partial(lu_solve, prior, keys)),
    }


@benchmark("cholesky")
def cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    """Update, and update with solve. The factor grows with every call; the time does not."""
    functions = {
        "cholesky_update_": cholesky_update_,
        "cholesky_update_solve_": cholesky_update_solve_,
    }
    for kind in [dtype] if dtype in (torch.float32, torch.float64) else [torch.float64]:
        for n, k in [(1024, 32)] if quick else [(1600, 32), (4096, 32), (6400, 32)]:
            prior = synthetic_prior(n, kind, device)
            keys = synthetic_keys(n, k, kind, device)
            factor = torch.linalg.cholesky(prior)
            # The least any update does: read and write one triangle.
            floor = partial(torch.ones_like(factor[: n // 2]).mul_, 1.0)
            peers = _peers(prior, keys)
            for op, function in functions.items():
                able = [b for b, (can, _) in available_backends(op, device).items() if can]
                for backend in [b for b in able if b != "reference"] or ["reference"]:
                    yield Case(
                        op=op,
                        shape=f"n={n} k={k}",
                        dtype=kind,
                        backend=backend,
                        run=partial(function, factor, keys, backend=backend),
                        floor=floor,
                        peer_name=peers[op][0],
                        peer=peers[op][1],
                    )
