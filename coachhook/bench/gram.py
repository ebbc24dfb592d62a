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


@benchmark("gram")
def cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    """Sums in the dtype of the keys; 16-bit keys in float32, the peer converting them likewise."""
    able = [b for b, (can, _) in available_backends("gram_update_", device).items() if can]
    for kind in [dtype] if dtype is not None else [torch.float32, torch.float64, torch.bfloat16]:
        sums = kind if kind in (torch.float32, torch.float64) else torch.float32
        for n, tokens in [(768, 512)] if quick else [(1600, 2048), (4096, 2048), (4096, 256)]:
            x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(0)).to(device, kind)
            gram, wide = torch.zeros(n, n, dtype=sums, device=device), x.to(sums)
            for backend in [b for b in able if b != "reference"] or ["reference"]:
                yield Case(
                    op="gram_update_",
                    shape=f"n={n} tokens={tokens}",
                    dtype=kind,
                    backend=backend,
                    run=partial(gram_update_, gram, x, backend=backend),
                    floor=partial(torch.mm, wide.mT, wide[:, : n // 2]),
                    peer_name="addmm_",
                    peer=partial(_whole_product, gram, x),
                )
