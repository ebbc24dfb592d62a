"""``hooked_linear`` against the frozen layer alone (floor) and the published eager hook (peer)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from coachhook.bench.peers import published_hook
from coachhook.bench.runner import Case, benchmark
from coachhook.ops import Membership, Population, Scope, Sequence, available_backends, hooked_linear

ALPHA = 2.2
# (out, in, rank): GPT-2 XL's down-projection with a hundred edits; quick: GPT-2's with sixteen.
_SIZE, _QUICK_SIZE = (1600, 6400, 100), (768, 3072, 16)
# (batch, tokens, scope, storage): reading prompts, and decoding one token at a time.
_LOADS = [
    (8, 64, "sequence", "factored"),
    (8, 64, "sequence", "dense"),
    (8, 64, "membership", "pair"),
    (1, 64, "sequence", "factored"),
    (1, 1, "population", "factored"),
    (8, 1, "population", "factored"),
    (1, 1, "sequence", "factored"),
]
_QUICK_LOADS = [(8, 64, "sequence", "factored"), (1, 1, "population", "factored")]


class Layer:
    """A frozen layer with a hook of given rank, the same one for the op and for its peer."""

    def __init__(self, m: int, n: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device="cpu").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.weight = (normal(m, n) / math.sqrt(n)).to(dtype)
        self.bias = normal(m).to(dtype)
        self.q = torch.linalg.qr(normal(m, rank))[0].contiguous()
        self.s = normal(rank, n) / math.sqrt(n)
        self.dense = self.q @ self.s
        self.hook = (self.weight.float() + self.dense).to(dtype)
        self.mean, self.std = self._population(normal(512, n))

    def _population(self, x: Tensor) -> tuple[Tensor, Tensor]:
        norms = (x @ self.s.T).norm(dim=-1).double()
        return norms.mean(), norms.std()

    def delta(self, storage: str) -> Tensor | tuple[Tensor, Tensor]:
        """The hook as the ops take it, in float32 as hooks are stored."""
        return self.dense if storage == "dense" else (self.q, self.s)

    def scope(self, name: str) -> Scope:
        """The named scope, with statistics of unrelated tokens where it needs any."""
        if name == "population":
            return Population(self.mean, self.std)
        return Membership() if name == "membership" else Sequence()


def _functions(
    layer: Layer, x: Tensor, scope: str, storage: str, backend: str
) -> dict[str, Callable[[], object]]:
    alpha = torch.tensor(ALPHA, device=x.device)
    return {
        "run": partial(
            hooked_linear,
            x,
            layer.weight,
            layer.bias,
            layer.delta(storage),
            alpha,
            scope=layer.scope(scope),
            backend=backend,
        ),
        "floor": partial(F.linear, x, layer.weight, layer.bias),
        "peer": partial(published_hook, x, layer.weight, layer.bias, layer.hook, layer.bias, ALPHA),
    }


@benchmark("hooked_linear")
def cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    """Cases of the gated layer; the peer is the published hook in the same dtype."""
    m, n, rank = _QUICK_SIZE if quick else _SIZE
    backends = [
        name
        for name, (able, _) in available_backends("hooked_linear", device).items()
        if able and name != "reference"
    ]
    for kind in [dtype] if dtype is not None else [torch.float32, torch.bfloat16]:
        layer = Layer(m, n, rank, kind, device)
        for batch, tokens, scope, storage in _QUICK_LOADS if quick else _LOADS:
            x = torch.randn(batch, tokens, n, generator=torch.Generator().manual_seed(1))
            x = x.to(device, kind)
            for backend in backends or ["reference"]:
                functions = _functions(layer, x, scope, storage, backend)
                yield Case(
                    op="hooked_linear",
                    shape=f"m={m} n={n} B={batch} T={tokens} {storage} r={rank} {scope}",
                    dtype=kind,
                    backend=backend,
                    peer_name="published eager hook",
                    **functions,
                )
