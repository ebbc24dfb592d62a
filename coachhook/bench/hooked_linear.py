"""``hooked_linear`` against the frozen layer alone (floor), the published eager hook and others."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from coachhook.bench.peers import compiled_hook, lora_layer, plain_hook, published_hook
from coachhook.bench.runner import Case, benchmark
from coachhook.ops import Membership, Population, Scope, Sequence, available_backends, hooked_linear
from coachhook.ops.hooked_linear import decode, products
from coachhook.ops.hooked_linear.cues import blank_state

ALPHA = 2.2
CUE_REACH = 40  # columns for which an edit of a prompt's end stays armed
CUE_GAP = 1  # columns between the two tokens that make its cue
CUE_LIMIT = 4.0  # responses to a cue have a standard deviation of 1


class Load(NamedTuple):
    """What a layer is given: sequences, their tokens, the scope, and how the hook is stored.

    The scope "cued" is the default preset's: membership, own corrections, each edit with a cue.
    """

    batch: int
    tokens: int
    scope: str
    storage: str


# (out, in, rank): GPT-2 XL's down-projection with a hundred edits; quick: GPT-2's with sixteen.
_SIZE, _QUICK_SIZE = (1600, 6400, 100), (768, 3072, 16)
# Reading prompts, and decoding one token at a time.
_LOADS = [
    Load(8, 64, "sequence", "factored"),
    Load(8, 64, "sequence", "dense"),
    Load(8, 64, "membership", "pair"),
    Load(8, 64, "cued", "pair"),
    Load(1, 1, "cued", "pair"),
    Load(1, 64, "sequence", "factored"),
    Load(1, 1, "population", "factored"),
    Load(8, 1, "population", "factored"),
    Load(1, 1, "sequence", "factored"),
]
_QUICK_LOADS = [Load(8, 64, "sequence", "factored"), Load(1, 1, "population", "factored")]
# Down-projections of GPT-2 XL, Llama 3 8B, GPT-J 6B and Llama 3 70B.
_GPU_SIZES = [(4096, 14336), (1600, 6400), (4096, 16384), (8192, 28672)]
_GPU_RANKS = [128, 0, 32, 512]  # 0: dense
_GPU_TOKENS = [1, 8, 64, 512, 4096]
_GPU_QUICK = [(4096, 14336)], [128, 0], [1, 64, 4096]
# The rank and the first size at which every backend and way is compared; elsewhere the backend that
# "auto" takes, and other ranks at the first size only.
_MAIN_RANK = 128
# Edits with cues: that many, and as many as the default preset makes of a thousand facts.
_GPU_EDITS = [_MAIN_RANK, 2048]
_DECODING_TOKENS = 64
# Environment switches of the ways that are not the default.
_FUSED, _OVERLAPPED = {products.ENVIRONMENT_SWITCH: "fused"}, {decode.OVERLAP_SWITCH: "1"}
_WAYS = {
    "fused": _FUSED,
    "overlapped": _OVERLAPPED,
    "fused overlapped": _FUSED | _OVERLAPPED,
    "library": {products.ENVIRONMENT_SWITCH: "library"},
}


class Layer:
    """A frozen layer with a hook of given rank, the same one for the op and for its peers."""

    def __init__(self, m: int, n: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        # Numbers drawn on a CPU are the same everywhere; a gigabyte of them takes too long there.
        generator = torch.Generator(device=device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

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

    def scope(self, name: str, batch: int = 1) -> Scope:
        """The named scope for so many sequences, with what it needs of unrelated tokens."""
        if name == "cued":
            return Membership(
                correction="own",
                cues=self.s.flip(0).contiguous(),
                limits=torch.full((len(self.s),), CUE_LIMIT, device=self.s.device),
                state=blank_state(batch, len(self.s), self.s.device),
                reaches=torch.full((len(self.s),), CUE_REACH, device=self.s.device).int(),
                gaps=torch.full((len(self.s),), CUE_GAP, device=self.s.device).int(),
            )
        if name == "population":
            return Population(self.mean, self.std)
        return Membership() if name == "membership" else Sequence()


def _plain_arguments(layer: Layer, x: Tensor, load: Load) -> tuple[Any, ...]:
    lift = None if load.storage == "dense" else layer.q.to(x.dtype)
    projection = (layer.dense if load.storage == "dense" else layer.s).to(x.dtype)
    statistics: tuple[Tensor, ...] = ()
    if load.scope == "population":
        statistics = layer.mean.float(), layer.std.float()
    return x, layer.weight, layer.bias, lift, projection, ALPHA, *statistics


def _more_peers(
    layer: Layer, x: Tensor, load: Load, compiles: bool
) -> dict[str, Callable[[], object]]:
    peers: dict[str, Callable[[], object]] = {}
    if load.scope in ("sequence", "population"):
        arguments = _plain_arguments(layer, x, load)
        peers["plain PyTorch"] = partial(plain_hook, *arguments)
        if compiles:
            peers["torch.compile"] = partial(compiled_hook(), *arguments)
    if load.storage == "factored":
        lora = lora_layer(layer.weight, layer.bias, layer.q.shape[1])
        if lora is not None:
            peers["peft LoRA"] = partial(lora, x)
    return peers


def _bytes(layer: Layer, x: Tensor, load: Load) -> int:
    """Read once: x, W0, b and what the gate reads of the hook; written once: y and z."""
    tokens, m = x.numel() // x.shape[-1], layer.weight.shape[0]
    gate = [layer.dense if load.storage == "dense" else layer.s] * (1 + (load.scope == "cued"))
    read = sum(t.numel() * t.element_size() for t in (x, layer.weight, layer.bias, *gate))
    return read + tokens * (m * x.element_size() + 4)


def with_switches(
    switches: Mapping[str, str], function: Callable[[], object]
) -> Callable[[], object]:
    """``function`` with these environment switches, as they are at each call."""

    def call() -> object:
        before = {name: os.environ.get(name) for name in switches}
        os.environ.update(switches)
        try:
            return function()
        finally:
            for name, value in before.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value

    return call


def _case(layer: Layer, x: Tensor, load: Load, backend: str, compiles: bool, way: str = "") -> Case:
    m, n = layer.weight.shape
    alpha = torch.tensor(ALPHA, device=x.device)
    frozen = x, layer.weight, layer.bias
    rank = "" if load.storage == "dense" else f" r={layer.q.shape[1]}"
    shape = f"m={m} n={n} B={load.batch} T={load.tokens} {load.storage}{rank} {load.scope}"
    run = partial(
        hooked_linear,
        *frozen,
        layer.delta(load.storage),
        alpha,
        scope=layer.scope(load.scope, load.batch),
        backend=backend,
    )
    return Case(
        op="hooked_linear",
        shape=f"{shape} {way}".rstrip(),
        dtype=x.dtype,
        backend=backend,
        run=with_switches(_WAYS[way], run) if way else run,
        floor=partial(F.linear, *frozen),
        peer_name="published eager hook",
        peer=partial(published_hook, *frozen, layer.hook, layer.bias, ALPHA),
        more_peers=_more_peers(layer, x, load, compiles),
        bytes_moved=_bytes(layer, x, load),
        graphs=("op", "floor", "plain PyTorch", "peft LoRA"),
    )


def _backends(device: torch.device) -> list[str]:
    able = available_backends("hooked_linear", device)
    return [b for b, (can, _) in able.items() if can and b != "reference"] or ["reference"]


def _host_cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    m, n, rank = _QUICK_SIZE if quick else _SIZE
    for kind in [dtype] if dtype is not None else [torch.float32, torch.bfloat16]:
        layer = Layer(m, n, rank, kind, device)
        for load in _QUICK_LOADS if quick else _LOADS:
            x = torch.randn(load.batch, load.tokens, n, generator=torch.Generator().manual_seed(1))
            # Compiling takes longer than all else together: the first load stands for the others.
            compiles = not quick and load is _LOADS[0]
            for backend in _backends(device):
                yield _case(layer, x.to(device, kind), load, backend, compiles)


def _gpu_load(tokens: int, storage: str) -> Load:
    if tokens <= _DECODING_TOKENS:
        return Load(tokens, 1, "population", storage)
    return Load(1, tokens, "sequence", storage)


def _ways(tokens: int, storage: str, first: bool) -> list[tuple[str, str]]:
    """Backends, and names of the ways other than the default that they have here."""
    if tokens <= _DECODING_TOKENS:
        ways = ("fused", "overlapped", "fused overlapped") if first else ("fused", "overlapped")
        return [("cuda", way) for way in ways]
    return [("triton", "fused"), ("triton", "library")] if storage == "dense" else []


def _gpu_cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    """The most telling ones first, so that a budget leaves out the others."""
    sizes, ranks, counts = _GPU_QUICK if quick else (_GPU_SIZES, _GPU_RANKS, _GPU_TOKENS)
    for kind in [dtype] if dtype is not None else [torch.bfloat16, torch.float32]:
        for rank in ranks:
            storage = "factored" if rank else "dense"
            main = kind == torch.bfloat16 and rank in (0, _MAIN_RANK)
            for m, n in sizes if main else sizes[:1]:
                first = (m, n) == sizes[0]
                layer = Layer(m, n, rank or _MAIN_RANK, kind, device)
                if not rank:
                    layer.dense = layer.dense.to(kind)  # the floor of the goal reads it so
                for tokens in counts:
                    load = _gpu_load(tokens, storage)
                    generator = torch.Generator(device).manual_seed(1)
                    x = torch.randn(
                        load.batch, load.tokens, n, generator=generator, device=device
                    ).to(kind)
                    # Compiling takes longer than all else together: one load stands for the others.
                    compiles = main and first and bool(rank) and tokens == counts[-1]
                    backends = _backends(device)
                    for backend in backends if main and first else ["auto"]:
                        yield _case(layer, x, load, backend, compiles and backend == backends[0])
                    for backend, way in _ways(tokens, storage, first) if main else ():
                        if backend in backends:
                            yield _case(layer, x, load, backend, False, way)
            if main and rank:
                yield from _cued_cases(device, kind, sizes[0], counts)


def _cued_cases(
    device: torch.device, dtype: torch.dtype, size: tuple[int, int], counts: list[int]
) -> Iterator[Case]:
    for edits in _GPU_EDITS:
        layer = Layer(*size, edits, dtype, device)
        for tokens in counts:
            batch, length = (tokens, 1) if tokens <= _DECODING_TOKENS else (1, tokens)
            generator = torch.Generator(device).manual_seed(1)
            x = torch.randn(batch, length, size[1], generator=generator, device=device).to(dtype)
            yield _case(layer, x, Load(batch, length, "cued", "pair"), "auto", False)


@benchmark("hooked_linear", share=4.0)
def cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    """Cases of the gated layer; the peers work in the dtype of the model."""
    return (_gpu_cases if device.type == "cuda" else _host_cases)(device, dtype, quick)
