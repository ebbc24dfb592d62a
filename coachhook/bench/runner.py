"""Timing of an op, its floor and its peers alternately in one run, and the rows that report it."""

from __future__ import annotations

import importlib
import logging
import math
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any

import torch

from coachhook.models import usable_device

_LOG = logging.getLogger(__name__)

_GRAPH = " in a graph"
_MIN_ROUNDS = 5
_MAX_ROUNDS = 200
# Per case. A GPU has many more cases, and its clock is quieter.
_SECONDS = {"cpu": 4.0, "cuda": 0.2}
_QUICK_SECONDS = 0.5
# Larger than the caches: between two timed calls they are overwritten.
_FLUSH_BYTES = {"cpu": 64 * 1024**2, "cuda": 256 * 1024**2}
_COPY_BYTES = {"cpu": 64 * 1024**2, "cuda": 512 * 1024**2}


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
        more_peers: further peers, by name.
        bytes_moved: bytes that the op has to read and write at least, None where that says nothing.
        graphs: names of the functions ("op", "floor", or of further peers) that can be captured in
            a CUDA graph: on a GPU they are also timed as such.
        cold: whether the caches are overwritten before each call.
        warm: calls before the first measurement.
        rounds: measurements at least.
        items: what a call works through (tokens, facts), for a rate; None where there is none.
    """

    op: str
    shape: str
    dtype: torch.dtype
    backend: str
    run: Callable[[], Any]
    floor: Callable[[], Any] | None = None
    peer_name: str = ""
    peer: Callable[[], Any] | None = None
    more_peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    bytes_moved: int | None = None
    graphs: tuple[str, ...] = ()
    cold: bool = True
    warm: int = 2
    rounds: int = _MIN_ROUNDS
    items: int | None = None


CaseFactory = Callable[[torch.device, torch.dtype | None, bool], Iterable[Case]]
_FACTORIES: dict[str, CaseFactory] = {}
_SHARES: dict[str, float] = {}


def benchmark(name: str, share: float = 1.0) -> Callable[[CaseFactory], CaseFactory]:
    """Decorator: the function yields cases for (device, dtype or None, quick).

    Args:
        name: what ``coachhook bench`` calls them: the folder of the op, or of a family of ops.
        share: how much of a budget for several families they get, against the others'.
    """

    def add(factory: CaseFactory) -> CaseFactory:
        _FACTORIES[name] = factory
        _SHARES[name] = share
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


def _host_clock() -> tuple[str, Callable[[], float]]:
    """Seconds that count: where torch runs one thread, only those in which this process ran.

    Not those of the calling thread alone: a peer may have threads of its own.
    """
    if torch.get_num_threads() == 1:
        return "process", time.process_time
    return "wall", time.perf_counter


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "cpu"


def _timer(device: torch.device, cold: bool) -> Callable[[Callable[[], Any]], float]:
    """A function that calls its argument once and returns the milliseconds it took."""
    flush = torch.empty(
        _FLUSH_BYTES[_kind(device)] if cold else 0, dtype=torch.uint8, device=device
    )
    if device.type != "cuda":
        _, clock = _host_clock()

        def on_host(function: Callable[[], Any]) -> float:
            flush.zero_()
            start = clock()
            function()
            return (clock() - start) * 1e3

        return on_host

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
    functions: dict[str, Callable[[], Any]],
    device: torch.device,
    seconds: float = _SECONDS["cpu"],
    *,
    cold: bool = True,
    warm: int = 2,
    rounds: int = _MIN_ROUNDS,
    times: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every call, the functions taking turns so that they share the machine's mood.

    Args:
        functions: what to time, by name.
        device: where they run.
        seconds: budget; at most 200 rounds are made.
        cold: whether the caches are overwritten before each call.
        warm: calls of each before the first measurement.
        rounds: made at least, whatever the budget.
        times: where they are put, so that an interrupted caller still has them; None is a new one.
    """
    measure = _timer(device, cold)
    names = list(functions)
    times = {} if times is None else times
    times.update((name, []) for name in names)
    with torch.inference_mode():
        for function in functions.values():
            for _ in range(warm):
                function()
        deadline = time.perf_counter() + seconds
        for turn in range(_MAX_ROUNDS):
            if turn >= rounds and time.perf_counter() > deadline:
                break
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                times[name].append(measure(functions[name]))
    return times


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that fits no cache: what a kernel can reach."""
    source = torch.zeros(_COPY_BYTES[_kind(device)], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_alternately({"copy": lambda: target.copy_(source)}, device, 0.0)
    return 2e3 * source.numel() / statistics.median(times["copy"])


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """A function that replays the CUDA graph of ``function``, captured after three calls.

    It keeps ``function`` alive, and with it what it reads: a graph knows addresses alone.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # torch's own stream is of the device that the process has first captured on.
        with torch.cuda.graph(graph, stream=stream):
            function()

    def replay(_alive: Callable[[], Any] = function) -> None:
        graph.replay()

    return replay


def _functions(
    case: Case, device: torch.device
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What to time, and why the rest of the further peers and graphs cannot be timed."""
    functions = {"op": case.run}
    if case.floor is not None:
        functions["floor"] = case.floor
    if case.peer is not None:
        functions["peer"] = case.peer
    left_out: dict[str, str] = {}

    def add(name: str, function: Callable[[], Callable[[], Any]]) -> None:
        try:
            functions[name] = function()
        except Exception as error:  # a peer that fails is reported, and the op still measured
            left_out[name] = _text(error)

    with torch.inference_mode():
        for name, peer in case.more_peers.items():
            add(name, lambda peer=peer: (peer(), peer)[1])  # type: ignore[misc]
        for name in case.graphs if device.type == "cuda" else ():
            if name in functions:
                add(f"{name}{_GRAPH}", lambda name=name: captured(functions[name]))  # type: ignore[misc]
    return functions, left_out


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _measure(case: Case, device: torch.device, seconds: float, rows: list[dict[str, Any]]) -> None:
    """Append the row of a case; interrupted, of the rounds that were made."""
    functions, left_out = _functions(case, device)
    times: dict[str, list[float]] = {}
    try:
        time_alternately(
            functions,
            device,
            seconds,
            cold=case.cold,
            warm=case.warm,
            rounds=case.rounds,
            times=times,
        )
    except KeyboardInterrupt:
        if times and all(times.values()):
            rows.append(_row(case, device, times, left_out))
        raise
    rows.append(_row(case, device, times, left_out))


def _row(
    case: Case, device: torch.device, times: dict[str, list[float]], left_out: dict[str, str]
) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    own = times["op"] if len(times["op"]) > 1 else times["op"] * 2
    quintiles = statistics.quantiles(own, n=5, method="inclusive")
    median, floor, peer = medians["op"], medians.get("floor"), medians.get("peer")
    graphs = {n.removesuffix(_GRAPH): ms for n, ms in medians.items() if n.endswith(_GRAPH)}
    best = graphs.get("op", median)
    rate = None if case.bytes_moved is None else 1e3 * case.bytes_moved / best
    return _head(case, device) | {
        "median_ms": median,
        "p20_ms": quintiles[0],
        "p80_ms": quintiles[-1],
        "floor_ms": floor,
        "peer": case.peer_name or None,
        "peer_ms": peer,
        "ratio": None if peer is None else peer / median,
        "times_floor": None if floor is None else best / graphs.get("floor", floor),
        "peers_ms": {name: medians[name] for name in case.more_peers if name in medians},
        "graph_ms": graphs or None,
        "gb_per_s": None if rate is None else rate / 1e9,
        "items_per_s": None if case.items is None else 1e3 * case.items / best,
        "copy_share": None if rate is None else rate / copy_bandwidth(device),
        "min_ms": min(times["op"]),
        "rounds": len(times["op"]),
        "clock": "events" if device.type == "cuda" else _host_clock()[0],
        "left_out": left_out or None,
        "error": None,
    }


def _head(case: Case, device: torch.device) -> dict[str, Any]:
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "backend": case.backend,
    }


def _failed(case: Case, device: torch.device, error: Exception) -> dict[str, Any]:
    numbers = ("median_ms", "p20_ms", "p80_ms", "floor_ms", "peer", "peer_ms", "ratio")
    return _head(case, device) | dict.fromkeys(numbers) | {"error": _text(error)}


def run(
    op: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quick: bool = False,
    budget: float | None = None,
) -> list[dict[str, Any]]:
    """Measure one op or all of them.

    Args:
        op: a name of :func:`benchmarked_ops`; None for all.
        device: where to measure.
        dtype: dtype of the model's tensors; None takes those that matter for the op.
        quick: fewer and smaller cases, shorter measurements.
        budget: seconds after which no further case is begun, shared among the ops; what was left
            out is logged.

    Returns:
        One row per case (those so far, where interrupted, the last of the rounds it had): op,
        shape, dtype, device, backend, median_ms, p20_ms, p80_ms (of the op), floor_ms and peer_ms
        (medians; None where there is none), peer, ratio = peer_ms / median_ms;
        times_floor = op / floor, gb_per_s, items_per_s (tokens, facts) and copy_share (of a copy's
        bandwidth), these four as CUDA graphs where there are any; peers_ms and graph_ms (medians by
        name); min_ms; rounds;
        clock ("events"; on the CPU "process" where torch runs one thread, so that a busy machine
        does not count, and else "wall"); left_out, peers and graphs that failed; error, None or why
        the case could not be measured.

    Raises:
        ValueError: unknown op, a device torch does not see, or a budget that is not finite.
    """
    factories = _load_factories()
    if op is not None and op not in factories:
        raise ValueError(f"bench: op must be one of {', '.join(sorted(factories))}, got {op!r}")
    if budget is not None and not math.isfinite(budget):
        raise ValueError(f"bench: budget must be finite or None, got {budget}")
    device = usable_device(device, "bench: device")
    seconds = _QUICK_SECONDS if quick else _SECONDS[_kind(device)]
    names = sorted(factories) if op is None else [op]
    end = time.perf_counter() + (math.inf if budget is None else budget)
    rows: list[dict[str, Any]] = []
    # Events, and streams to capture on, are of the present device.
    present = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with present:
            _run(names, device, dtype, quick, seconds, end, rows)
    except KeyboardInterrupt:
        _LOG.warning("bench: interrupted after %d cases", len(rows))
    return rows


def _run(
    names: list[str],
    device: torch.device,
    dtype: torch.dtype | None,
    quick: bool,
    seconds: float,
    end: float,
    rows: list[dict[str, Any]],
) -> None:
    """Append a row for each case of the ops; seconds per case, no case begun after ``end``."""
    factories = _load_factories()
    for i, name in enumerate(names):
        shares = [_SHARES.get(other, 1.0) for other in names[i:]]
        now = time.perf_counter()
        deadline = now + (end - now) * shares[0] / sum(shares)
        cases = iter(factories[name](device, dtype, quick))
        for done in count():
            # Asked before the next case is made, which may take as long as to measure it.
            if time.perf_counter() > deadline:
                _LOG.warning("bench: %s: no time left after %d cases", name, done)
                break
            case = Case(name, f"case {done + 1}", dtype or torch.float32, "auto", lambda: None)
            try:  # whatever fails is reported, and the rest still measured
                case = next(cases)
                _measure(case, device, seconds, rows)
            except StopIteration:
                break
            except Exception as error:
                rows.append(_failed(case, device, error))
