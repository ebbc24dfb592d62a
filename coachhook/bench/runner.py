"""Timing of an op, its floor and its peer alternately in one run, and the rows that report it."""

from __future__ import annotations

import importlib
import pkgutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

_MIN_ROUNDS = 5
_MAX_ROUNDS = 200
_SECONDS = 4.0
_QUICK_SECONDS = 0.5
# Larger than any L2: between two timed calls on a GPU the cache is overwritten.
_FLUSH_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Case:
    """One op at one size, with what bounds it and what it replaces.

    Attributes:
        op: public name of the op.
        shape: the sizes, for a reader.
        dtype: dtype of the model's tensors.
        backend: the implementation that runs.
        run: the op.
        floor: the least work any implementation has to do here (for a hook: the frozen layer), or
            None.
        peer_name: what is compared with, "" for nothing.
        peer: the peer, or None.
    """

    op: str
    shape: str
    dtype: torch.dtype
    backend: str
    run: Callable[[], Any]
    floor: Callable[[], Any] | None = None
    peer_name: str = ""
    peer: Callable[[], Any] | None = None


CaseFactory = Callable[[torch.device, torch.dtype | None, bool], Iterable[Case]]
_FACTORIES: dict[str, CaseFactory] = {}


def benchmark(name: str) -> Callable[[CaseFactory], CaseFactory]:
    """Decorator: the function yields cases for (device, dtype or None, quick).

    Args:
        name: what ``coachhook bench`` calls them: the folder of the op, or of a family of ops.
    """

    def add(factory: CaseFactory) -> CaseFactory:
        _FACTORIES[name] = factory
        return factory

    return add


def _load_factories() -> dict[str, CaseFactory]:
    package = importlib.import_module("coachhook.bench")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _FACTORIES


def benchmarked_ops() -> list[str]:
    """Names that :func:`run` takes."""
    return sorted(_load_factories())


def _timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """A function that calls its argument once and returns the milliseconds it took."""
    if device.type != "cuda":

        def on_host(function: Callable[[], Any]) -> float:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3

        return on_host
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def on_device(function: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return on_device


def time_alternately(
    functions: dict[str, Callable[[], Any]], device: torch.device, seconds: float = _SECONDS
) -> dict[str, list[float]]:
    """Milliseconds of every call, the functions taking turns so that they share the machine's mood.

    Args:
        functions: what to time, by name; each is called twice before the first measurement.
        device: where they run; on a GPU the caches are cold at each call.
        seconds: budget; at least 5 and at most 200 rounds are made.
    """
    measure = _timer(device)
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for function in functions.values():
            function()
            function()
        deadline = time.perf_counter() + seconds
        for turn in range(_MAX_ROUNDS):
            if turn >= _MIN_ROUNDS and time.perf_counter() > deadline:
                break
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                times[name].append(measure(functions[name]))
    return times


def _measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    functions = {"op": case.run}
    if case.floor is not None:
        functions["floor"] = case.floor
    if case.peer is not None:
        functions["peer"] = case.peer
    with warnings.catch_warnings():
        # The published hook has no standard deviation at one token, and torch says so each time.
        warnings.filterwarnings("ignore", message=r"std\(\)")
        times = time_alternately(functions, device, seconds)
    quintiles = statistics.quantiles(times["op"], n=5, method="inclusive")
    median = statistics.median(times["op"])
    floor = statistics.median(times["floor"]) if "floor" in times else None
    peer = statistics.median(times["peer"]) if "peer" in times else None
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "backend": case.backend,
        "median_ms": median,
        "p20_ms": quintiles[0],
        "p80_ms": quintiles[-1],
        "floor_ms": floor,
        "peer": case.peer_name or None,
        "peer_ms": peer,
        "ratio": None if peer is None else peer / median,
    }


def run(
    op: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quick: bool = False,
) -> list[dict[str, Any]]:
    """Measure one op or all of them.

    Args:
        op: a name of :func:`benchmarked_ops`; None for all.
        device: where to measure.
        dtype: dtype of the model's tensors; None takes those that matter for the op.
        quick: fewer and smaller cases, shorter measurements.

    Returns:
        One row per case: op, shape, dtype, device, backend, median_ms, p20_ms, p80_ms (of the op),
        floor_ms and peer_ms (medians; None where there is none), peer, ratio = peer_ms / median_ms.

    Raises:
        ValueError: unknown op.
    """
    factories = _load_factories()
    if op is not None and op not in factories:
        raise ValueError(f"bench: op must be one of {', '.join(sorted(factories))}, got {op!r}")
    device = torch.device(device)
    seconds = _QUICK_SECONDS if quick else _SECONDS
    return [
        _measure(case, device, seconds)
        for name in (sorted(factories) if op is None else [op])
        for case in factories[name](device, dtype, quick)
    ]
