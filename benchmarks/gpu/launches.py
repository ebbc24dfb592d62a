"""What one call of each op spends on the GPU, kernel by kernel, and what its host needs.

    python benchmarks/gpu/launches.py --json

For each row: ``gpu_us``, the kernels' own time; ``host_us``, what Python and the libraries need to
enqueue a call; ``eager_us``, one call after another on warm caches, the larger of the two and the
gaps between; and the kernels with their number and time, per call. Medians of several calls, sums
of the profiler. Used by run.sh.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from coachhook.bench.cholesky import synthetic_keys, synthetic_prior
from coachhook.bench.hooked_linear import ALPHA, Layer, with_switches
from coachhook.bench.memory import append, filled, targets_of
from coachhook.ops import cholesky_update_solve_, gram_update_, hooked_linear
from coachhook.ops.hooked_linear.products import ENVIRONMENT_SWITCH as PRODUCTS

_CALLS = 10
_WARM = 3
_NAME = 70

Call = tuple[str, str, Callable[[], object]]


def short(name: str) -> str:
    """A kernel's name without its namespaces and arguments."""
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::|coachhook::", "", name)
    return name.split("(")[0][:_NAME]


def measured(op: str, shape: str, call: Callable[[], object]) -> dict[str, Any]:
    """One row."""
    for _ in range(_WARM):
        call()
    torch.cuda.synchronize()
    host, start = [], time.perf_counter()
    for _ in range(_CALLS):
        begin = time.perf_counter()
        call()
        host.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    eager = (time.perf_counter() - start) / _CALLS
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize()
    kernels = [
        {
            "kernel": short(event.key),
            "launches": event.count / _CALLS,
            "us": event.self_device_time_total / _CALLS,
        }
        for event in seen.key_averages()
        if event.device_type.name == "CUDA"
    ]
    return {
        "op": op,
        "shape": shape,
        "gpu_us": sum(kernel["us"] for kernel in kernels),
        "host_us": 1e6 * statistics.median(host),
        "eager_us": 1e6 * eager,
        "launches": sum(kernel["launches"] for kernel in kernels),
        "kernels": sorted(kernels, key=lambda kernel: -kernel["us"]),
    }


def hooked(
    size: tuple[int, int], rank: int, tokens: int, dense: bool = False, way: str = "exact"
) -> Call:
    """A hook in bfloat16; decoding against a population, prompts against themselves."""
    device, (m, n) = torch.device("cuda"), size
    layer = Layer(m, n, rank, torch.bfloat16, device)
    few = tokens <= 64
    shape = (tokens, 1, n) if few else (1, tokens, n)
    x = torch.randn(shape, device=device).to(torch.bfloat16)
    delta = layer.dense.to(torch.bfloat16) if dense else layer.delta("factored")
    call = partial(
        hooked_linear,
        *(x, layer.weight, layer.bias, delta),
        torch.tensor(ALPHA, device=device),
        scope=layer.scope("population" if few else "sequence", len(x)),
    )
    kind = "dense" if dense else f"r={rank}"
    return "hooked_linear", f"{m}x{n} T={tokens} {kind} {way}", with_switches({PRODUCTS: way}, call)


def cued(size: tuple[int, int], edits: int, tokens: int) -> Call:
    """The default preset's scope."""
    device, (m, n) = torch.device("cuda"), size
    layer = Layer(m, n, edits, torch.bfloat16, device)
    shape = (tokens, 1, n) if tokens <= 64 else (1, tokens, n)
    x = torch.randn(shape, device=device).to(torch.bfloat16)
    call = partial(
        hooked_linear,
        *(x, layer.weight, layer.bias, layer.delta("factored")),
        torch.tensor(ALPHA, device=device),
        scope=layer.scope("cued", len(x)),
    )
    return "hooked_linear", f"{m}x{n} T={tokens} {edits} edits, cued", call


def calls() -> Iterator[Call]:
    """The calls that docs/kernels has predictions of."""
    device, large, small = torch.device("cuda"), (4096, 14336), (1600, 6400)
    for size in (large, small):
        for tokens in (1, 8, 64, 512, 4096):
            yield hooked(size, 128, tokens)
    for tokens in (1, 64):
        yield hooked(large, 128, tokens, way="fused")
    for way in ("exact", "fused", "library"):
        yield hooked(large, 128, 4096, dense=True, way=way)
    for edits in (128, 2048):
        for tokens in (1, 512, 4096):
            yield cued(large, edits, tokens)
    for n in (6400, 16384):
        prior = synthetic_prior(n, torch.float64, device)
        keys = synthetic_keys(n, 32, torch.float64, device)
        factor = torch.linalg.cholesky(prior)
        yield (
            "cholesky_update_solve_",
            f"n={n} k=32",
            partial(cholesky_update_solve_, factor, keys),
        )
        for count in (0, 1024):
            memory = filled(prior, keys, count)
            yield (
                "EditMemory.append",
                f"n={n} k=32 keys={count}",
                partial(append, memory, keys.roll(-1, 0), targets_of(keys)),
            )
    n = 4096
    gram = torch.zeros(n, n, dtype=torch.float64, device=device)
    rows = torch.randn(2048, n, device=device).to(torch.bfloat16)
    shape = f"n={n} tokens=2048 bfloat16 in float64"
    yield "gram_update_", shape, partial(gram_update_, gram, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="rows as JSON, with their kernels")
    as_json = parser.parse_args().json
    rows: list[dict[str, Any]] = []
    try:
        with torch.inference_mode():
            for call in calls():
                rows.append(measured(*call))
                row = rows[-1]
                if not as_json:
                    print(
                        f"{row['op']:<24}{row['shape']:<36} gpu {row['gpu_us']:9.1f} us  "
                        f"host {row['host_us']:8.1f}  eager {row['eager_us']:9.1f}  "
                        f"{row['launches']:.0f}"
                    )
    finally:
        # Interrupted, or at a call that fails, it still says what it has found so far.
        if as_json:
            print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
