"""``gram_update_`` against half of the product (floor) and the whole of it (peer)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from coachhook.bench.runner import Case, benchmark
from coachhook.ops import available_backends, gram_update_


def _whole_product(gram: Tensor, x: Tensor) -> Tensor:
    wide = x.to(gram.dtype)
    return gram.addmm_(wide.mT, wide)


def _sizes(device: torch.device, quick: bool) -> list[tuple[int, int]]:
    if quick:
        return [(768, 512)]
    if device.type == "cuda":
        return [(6400, 8192), (16384, 8192)]
    return [(1600, 2048), (4096, 2048), (4096, 256)]


@benchmark("gram")
def cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    """Sums in the dtype of the keys; 16-bit keys in float32, the peer converting them likewise."""
    able = [b for b, (can, _) in available_backends("gram_update_", device).items() if can]
    for kind in [dtype] if dtype is not None else [torch.float32, torch.float64, torch.bfloat16]:
        sums = kind if kind in (torch.float32, torch.float64) else torch.float32
        for n, tokens in _sizes(device, quick):
            x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(0)).to(device, kind)
            gram = torch.zeros(n, n, dtype=sums, device=device)
            # A GPU multiplies 16-bit keys as they are.
            floor = x if device.type == "cuda" else x.to(sums)
            for backend in [b for b in able if b != "reference"] or ["reference"]:
                yield Case(
                    op="gram_update_",
                    shape=f"n={n} tokens={tokens}",
                    dtype=kind,
                    backend=backend,
                    run=partial(gram_update_, gram, x, backend=backend),
                    floor=partial(torch.mm, floor.mT, floor[:, : n // 2]),
                    peer_name="addmm_",
                    peer=partial(_whole_product, gram, x),
                    bytes_moved=n * n * gram.element_size() * 2 + x.nbytes,
                    graphs=("op",) if backend == "cuda" else (),
                )
