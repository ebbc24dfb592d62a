"""Nothing but luck may order two accesses of a kernel: tests/csrc/shim/races.cpp watches them.

Every barrier, fence and wait is left out in turn, which must be found: so each is needed, and the
cases reach each of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from coachhook.ops import Membership, Population, Prefix, Sequence
from tests.csrc import test_cholesky_host as cholesky
from tests.csrc import test_decode_host as decode
from tests.csrc import test_gate_host as gate
from tests.csrc.decode_host import decode as run_decode
from tests.csrc.host import (
    CSRC,
    STEP,
    Correction,
    Host,
    KernelFailure,
    _array,
    build_watched,
    where,
)

Case = Callable[[Host, int], object]


def gate_cases() -> list[Case]:
    fired = np.arange(9) % 2
    corrected = Correction(np.zeros((9, 11)), np.ones((11, 5)), np.ones((9, 5)), fired)
    packed = {"cu_seqlens": np.array([0, 3, 3, 39]), "sequences": 3}
    return [
        lambda host, order: host.gate(gate.make(600, 3, sequences=2), order),
        lambda host, order: host.gate(gate.make(40, 16, "float16", **packed), order),
        lambda host, order: host.correction(corrected, order),
    ]


def decode_cases() -> list[Case]:
    own = Membership(torch.arange(40) % 7 + 20, "own")
    moments = torch.zeros(2, 3, dtype=torch.float64)
    cases = [
        lambda: decode.crowded(Population(60.0, 20.0), fused=True, alpha=-1.0),
        lambda: decode.crowded(Sequence(), alpha=0.5),
        lambda: decode.crowded(Prefix(moments.clone()), dtype=torch.bfloat16, alpha=0.5),
        lambda: decode.crowded(own, rank=40, alpha=0.5, fused=True, dtype=torch.bfloat16),
        lambda: decode.waiting(decode.make(2, 3, rank=600, alpha=0.5), state=False),
        lambda: decode.waiting(decode.make(3, 4, n=37, m=270, rank=300, fused=True, offset=4)),
        lambda: decode.make(1, 17, n=24, rank=500, scope=Membership(), alpha=-float("inf")),
    ]
    runs = [lambda host, order, case=case: run_decode(host, case(), order) for case in cases]
    # And with the partial sums added up by a launch of their own.
    return [*runs, *(under(run, APART="1") for run in runs)]


def under(case: Case, **variables: str) -> Case:
    """The case with further environment variables."""
    return lambda host, order: case(Host(host.program, {**host.environment, **variables}), order)


def run_batch(host: Host, order: int) -> np.ndarray:
    keys = np.arange(70.0 * 5).reshape(70, 5)
    out = host._run(struct.pack("<5q", 4, 1, 5, 32, 70) + _array(keys), order)
    return np.frombuffer(out).reshape(3, -1)


def cholesky_cases() -> list[Case]:
    wide, narrow = cholesky.make(99, 33), cholesky.make(70, 5, "float32", -1)

    def solve(host: Host, order: int) -> None:
        for case, rows in ((wide, 64), (narrow, 128)):
            cholesky.run_solve(host, case, "aligned", order, rows=rows, workers=7)
            cholesky.run_solve(host, case, "columns", order, True, False, rows=rows, workers=7)

    return [
        lambda host, order: cholesky.run_rotations(host, wide, order),
        lambda host, order: cholesky.run_rotations(host, narrow, order),
        lambda host, order: cholesky.run_apply(host, wide, "columns", order),
        lambda host, order: cholesky.run_apply(host, narrow, "odd", order),
        lambda host, order: cholesky.run_invert(host, wide, 128, "columns", order),
        solve,
        # Less shared memory than an H200 has: fewer copies under way.
        under(solve, SHIM_SHARED=str(160 << 10)),
        under(solve, SHIM_SHARED=str(99 << 10)),
        run_batch,
    ]


@dataclass(frozen=True)
class Kernels:
    """The files of kernels that a driver runs, and cases that reach all of their steps."""

    driver: str
    files: tuple[str, ...]
    cases: Callable[[], list[Case]]
    change: tuple[str, str, str] | None = None

    def steps(self) -> int:
        return sum(len(STEP.findall((CSRC / name).read_text())) for name in self.files)


KERNELS = {
    "gate": Kernels("gate_driver.cpp", ("gate.cuh", "common/numeric.cuh"), gate_cases),
    "decode": Kernels(
        "decode_driver.cpp",
        ("decode.cuh", "decode_own.cuh", "decode_project.cuh"),
        decode_cases,
        ("decode.cu", "> kRepeatedBytes", '> (std::getenv("APART") ? -1 : kRepeatedBytes)'),
    ),
    "cholesky": Kernels(
        "cholesky_driver.cpp",
        ("append.cu", *sorted(path.name for path in CSRC.glob("cholesky*.cuh"))),
        cholesky_cases,
    ),
}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[str]]]:
    built: dict[str, tuple[Path, list[str]]] = {}

    def get(name: str) -> tuple[Path, list[str]]:
        if name not in built:
            kernels = KERNELS[name]
            built[name] = build_watched(
                tmp_path_factory.mktemp(name), kernels.driver, kernels.files, kernels.change
            )
        return built[name]

    return get


def test_every_kernel_is_watched() -> None:
    """A step in a file that no driver above runs would be looked at by nobody."""
    watched = {CSRC / name for kernels in KERNELS.values() for name in kernels.files}
    for path in (*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh")):
        defines = path.parent.name == "common" and path not in watched
        assert path in watched or defines or not STEP.search(path.read_text()), path


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("order", [0, 7])
def test_no_access_races_with_another(watched, name: str, order: int) -> None:
    program, _ = watched(name)
    for case in KERNELS[name].cases():
        try:
            case(Host(program), order)
        except KernelFailure as failure:
            pytest.fail(where(program, str(failure)))


@pytest.mark.parametrize(
    "name, step", [(name, step) for name in KERNELS for step in range(KERNELS[name].steps())]
)
def test_every_barrier_is_needed(watched, name: str, step: int) -> None:
    program, steps = watched(name)
    broken = Host(program, {"SHIM_SKIP": str(step)})
    for case in KERNELS[name].cases():
        try:
            case(broken, 0)
        except KernelFailure as failure:
            # A warp that goes on alone may come to a barrier that the others do not reach.
            assert str(failure).startswith(("race:", "shim:")), failure
            return
    pytest.fail(f"nobody misses {steps[step]}")


def test_a_fence_covers_its_own_thread(tmp_path: Path) -> None:
    """And others only where a barrier has brought them behind it."""
    fence = "__threadfence();\n      __syncwarp();"
    either = """if (lane == 0 && !std::getenv("LATE")) __threadfence();
      __syncwarp();
      if (lane == 0 && std::getenv("LATE")) __threadfence();"""
    change = ("cholesky_solve.cuh", fence, either)
    program, _ = build_watched(tmp_path, "cholesky_driver.cpp", (), change)
    case = cholesky.make(99, 33)
    cholesky.run_solve(Host(program, {"LATE": "1"}), case, rows=64, workers=7)
    with pytest.raises(KernelFailure, match="^race:"):
        cholesky.run_solve(Host(program), case, rows=64, workers=7)
