"""``EditMemory.append`` against two reads of the factor (floor) and the dense solve (peer)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from coachhook.bench.cholesky import lu_solve, synthetic_keys, synthetic_prior
from coachhook.bench.runner import Case, benchmark
from coachhook.editing.memory import EditMemory

_OUT_FEATURES = 16


def filled(prior: Tensor, keys: Tensor, count: int) -> EditMemory:
    """A memory with ``count`` keys, appended in batches as large as ``keys``."""
    memory = EditMemory(prior, _OUT_FEATURES, dtype=prior.dtype, max_keys=sys.maxsize)
    for batch in range(count // keys.shape[1]):
        memory.append(keys.roll(batch, 0), targets_of(keys))
    return memory


def append(memory: EditMemory, keys: Tensor, targets: Tensor) -> None:
    """Adds a batch and forgets it again, so that every call finds the same number of keys."""
    before = memory.snapshot()
    memory.append(keys, targets)
    memory.restore(before)


def targets_of(keys: Tensor) -> Tensor:
    """Some for keys [n, k]: they are only copied."""
    return keys.new_ones(_OUT_FEATURES, keys.shape[1])


@benchmark("memory")
def cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    """One more batch of 32 keys on top of 0, 320 and 1,024."""
    k, kinds = 32, [dtype] if dtype in (torch.float32, torch.float64) else [torch.float64]
    sizes = [1024] if quick else [6400, 16384] if device.type == "cuda" else [6400]
    for kind, n in product(kinds, sizes):
        prior = synthetic_prior(n, kind, device)
        keys = synthetic_keys(n, k, kind, device)
        # A product with one vector reads as much as two solves read of a triangle.
        floor = partial(torch.mv, torch.ones_like(prior), keys[:, 0].contiguous())
        for count in [64] if quick else [0, 320, 1024]:
            yield Case(
                op="EditMemory.append",
                shape=f"n={n} k={k} keys={count}",
                dtype=kind,
                backend="auto",
                run=partial(append, filled(prior, keys, count), keys.roll(-1, 0), targets_of(keys)),
                floor=floor,
                peer_name="torch.linalg.solve",
                peer=partial(lu_solve, prior, keys),
                bytes_moved=n * n * prior.element_size(),
            )
