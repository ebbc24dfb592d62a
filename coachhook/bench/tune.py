"""Opt-in tuner of the Triton launch policy; nothing of it runs in a user's job.

    python -m coachhook.bench.tune --out sizes.json --size 4096x14336 --rank 128 --tokens 512 4096
    COACHHOOK_LAUNCH_POLICY=sizes.json ...

Tries other sizes in place of the built-in ones on this GPU, one field of
:class:`~coachhook.ops.hooked_linear.policy.LaunchPolicy` after the other, and writes those that are
faster by more than the noise. Candidates are measured through the same switch by which users read
the file, as CUDA graphs with cold caches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from coachhook.bench.hooked_linear import ALPHA, Layer, with_switches
from coachhook.bench.runner import captured, time_alternately
from coachhook.ops import hook_output, hooked_linear
from coachhook.ops.hooked_linear.policy import ENVIRONMENT_SWITCH, LaunchPolicy, Tile, policy
from coachhook.ops.hooked_linear.products import ENVIRONMENT_SWITCH as PRODUCTS_SWITCH

# What a candidate must gain: less is the noise of a measurement.
MARGIN = 0.03
_SECONDS = 0.1


@dataclass(frozen=True)
class Load:
    """What is optimised for.

    Attributes:
        m: outputs of the layer.
        n: inputs of the layer.
        rank: rank of the hook; 0 for a dense one.
        tokens: tokens of one sequence.
        dtype: dtype of the tokens.
        stored: dtype of the hook.
        fused: whether a dense hook's kernel computes the frozen product too.
    """

    m: int
    n: int
    rank: int
    tokens: int
    dtype: torch.dtype
    stored: torch.dtype = torch.float32
    fused: bool = False

    def fields(self) -> tuple[str, ...]:
        """Fields of the launch policy that this load depends on, in the order of their weight."""
        full = self.dtype == torch.float32
        tile = "full" if full else "single" if self.stored == self.dtype else "pair"
        if not self.rank:
            return (f"fused_{tile}" if self.fused and not full else tile,)
        correct = "correct_full" if full else "correct"
        return tile, "programs_per_token_tile", "min_chunk", correct


Measure = Callable[[LaunchPolicy, Load], float]


def candidates(name: str, sizes: LaunchPolicy) -> list[Any]:
    """Values worth trying for a field, other than the one in force.

    Tiles whose steps in flight do not fit the shared memory of a block are left out.
    """
    current = getattr(sizes, name)
    if name == "programs_per_token_tile":
        values: list[Any] = [8, 16, 32, 64]
    elif name == "min_chunk":
        values = [128, 256, 512, 1024]
    else:
        x_bytes, s_bytes = (4, 4) if name in ("full", "correct_full") else (2, 4)
        if name.endswith("single"):
            s_bytes = 2
        if name.startswith("fused"):
            s_bytes += x_bytes  # W0 beside the hook
        tokens = (16, 32, 64) if name.startswith("correct") else (32, 64, 128)
        depths = (16, 32) if x_bytes == 4 else (32, 64)
        values = [
            Tile(t, w, d, warps=k, stages=s)
            for t, w, d, k, s in product(tokens, (64, 128), depths, (4, 8), (3, 4, 6))
            if d * (t * x_bytes + w * s_bytes) * s <= sizes.shared_memory
        ]
    return [value for value in values if value != current]


def tune(
    loads: Sequence[Load],
    start: LaunchPolicy,
    measure: Measure,
    *,
    choices: Callable[[str, LaunchPolicy], Sequence[Any]] = candidates,
    report: Callable[[str], None] = lambda _: None,
) -> LaunchPolicy:
    """The sizes that suit the loads best, found one field at a time.

    Args:
        loads: what to optimise for; they weigh the same, whatever time they take.
        start: the sizes to begin with, and to keep where nothing is faster by :data:`MARGIN`.
        measure: milliseconds of a load under given sizes; a ``RuntimeError`` rules them out.
        choices: values to try for a field.
        report: receives a line for each field.
    """
    best = start
    fields = dict.fromkeys(name for load in loads for name in load.fields())
    for name in fields:
        concerned = [load for load in loads if name in load.fields()]
        before = [measure(best, load) for load in concerned]
        winner, share = getattr(best, name), 1.0 - MARGIN
        for value in choices(name, best):
            trial = replace(best, **{name: value})
            try:
                after = [measure(trial, load) for load in concerned]
            except RuntimeError:  # does not compile, or does not fit
                continue
            gained = math.exp(
                statistics.fmean(math.log(a / b) for a, b in zip(after, before, strict=True))
            )
            if gained < share:
                winner, share = value, gained
        if winner != getattr(best, name):
            report(f"{name}: {getattr(best, name)} -> {winner}: {share:.3f} of the time")
            best = replace(best, **{name: winner})
        else:
            report(f"{name}: {winner} stays")
    return best


def write(path: Path, sizes: LaunchPolicy) -> None:
    """Write what differs from the built-in sizes, beside what the file holds for other GPUs."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    default = LaunchPolicy.for_arch(*sizes.arch).to_json()
    changed = {k: v for k, v in sizes.to_json().items() if v != default[k]}
    table["sm_{}{}".format(*sizes.arch)] = changed
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


@contextmanager
def in_force(sizes: LaunchPolicy) -> Iterator[None]:
    """Run with these sizes, by the switch that users have."""
    before = os.environ.get(ENVIRONMENT_SWITCH)
    # The file is read once per path and process, so it may go when the block ends.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sizes.json"
        write(path, sizes)
        os.environ[ENVIRONMENT_SWITCH] = str(path)
        try:
            yield
        finally:
            del os.environ[ENVIRONMENT_SWITCH]
            if before is not None:
                os.environ[ENVIRONMENT_SWITCH] = before


class GraphTimer:
    """Milliseconds of the hook on a CUDA device, without the frozen product unless it is fused."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._calls: dict[Load, Callable[[], object]] = {}

    def call(self, load: Load) -> Callable[[], object]:
        """The op on tensors of this load."""
        if load not in self._calls:
            layer = Layer(load.m, load.n, load.rank or 128, load.dtype, self.device)
            x = torch.randn(1, load.tokens, load.n, device=self.device).to(load.dtype)
            base = torch.randn(1, load.tokens, load.m, device=self.device).to(load.dtype)
            delta: Any = layer.delta("factored" if load.rank else "dense")
            if load.rank:
                delta = delta[0], delta[1].to(load.stored)
            else:
                delta = delta.to(load.stored)
            alpha = torch.tensor(ALPHA, device=self.device)
            hook: Callable[[], object] = partial(
                hook_output, base, x, delta, alpha, backend="triton"
            )
            if load.fused:
                frozen = x, layer.weight, layer.bias
                whole = partial(hooked_linear, *frozen, delta, alpha, backend="triton")
                hook = with_switches({PRODUCTS_SWITCH: "fused"}, whole)
            self._calls[load] = hook
        return self._calls[load]

    def __call__(self, sizes: LaunchPolicy, load: Load) -> float:
        """As :data:`Measure`."""
        from triton.errors import TritonError

        call = self.call(load)
        try:
            with in_force(sizes):
                replay = captured(call)
        except TritonError as error:
            raise RuntimeError(f"tune: {sizes}: {error}") from error
        times = time_alternately({"hook": replay}, self.device, _SECONDS)
        return statistics.median(times["hook"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m coachhook.bench.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write or extend")
    parser.add_argument("--size", nargs="+", default=["4096x14336"], help="outputs x inputs")
    parser.add_argument("--rank", nargs="+", type=int, default=[128], help="0: a dense hook")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--stored", choices=("float32", "own"), default="float32", help="the hook")
    parser.add_argument("--fused", action="store_true", help="dense hooks: with the frozen product")
    given = parser.parse_args(arguments)
    sizes = [tuple(map(int, size.split("x"))) for size in given.size]
    if not torch.cuda.is_available():
        print("tune: needs a CUDA device, torch sees none", file=sys.stderr)
        return 2
    dtype = getattr(torch, given.dtype)
    stored = dtype if given.stored == "own" else torch.float32
    loads = [
        Load(m, n, rank, tokens, dtype, stored, given.fused and not rank)
        for (m, n), rank, tokens in product(sizes, given.rank, given.tokens)
    ]
    device = torch.device("cuda")
    found = tune(loads, policy(device), GraphTimer(device), report=print)
    write(given.out, found)
    print(f"written: {given.out}; use it with {ENVIRONMENT_SWITCH}={given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
