"""Builds the kernels of csrc/ for the host and runs single cases on them.

The kernels and their launch code are compiled unchanged by g++ against tests/csrc/shim, see there.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
# Unoptimised: the sanitizers triple the time g++ needs to optimise, and the cases are small.
SANITIZE = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
REDUCTIONS = {"norm": 0, "max": 1}
SCOPES = {"sequence": 0, "population": 1, "direct": 2}


class KernelFailure(Exception):
    """The driver ended with an error: a sanitizer report, a deadlock, or a refused argument."""


def require_compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    return compiler


def build(output: Path, *flags: str, csrc: Path = CSRC, driver: str = "gate_driver.cpp") -> Path:
    command = [
        *(require_compiler(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"),
        *("-Wno-unknown-pragmas", "-DCOACHHOOK_HOST_SHIM", f"-I{csrc}", f"-I{HERE / 'shim'}"),
        *(*flags, str(HERE / driver), "-o", str(output)),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if "cannot find -lasan" in result.stderr or "cannot find -lubsan" in result.stderr:
        pytest.skip("g++ has no sanitizer libraries here")
    assert result.returncode == 0, result.stderr
    return output


# What orders the accesses of threads, blocks, copies and kernels.
STEP = re.compile(
    r"(?:__sync(?:threads|warp)|__threadfence|wait_for_previous_kernel|wait_for_copies<[^>]*>)\(\);"
)


def build_watched(
    folder: Path, driver: str, kernels: Sequence[str], change: tuple[str, str, str] | None = None
) -> tuple[Path, list[str]]:
    """A driver that finds races, and the steps of its kernels that ``SHIM_SKIP`` may leave out.

    ``change`` is a file of csrc/, what is in it, and what takes its place.
    """
    copy, steps = folder / "csrc", []
    shutil.copytree(CSRC, copy)
    if change is not None:
        path, old, new = copy / change[0], *change[1:]
        assert old in path.read_text(), old
        path.write_text(path.read_text().replace(old, new))
    for name in kernels:
        lines = (copy / name).read_text().split("\n")
        for i, line in enumerate(lines):
            found = STEP.search(line)
            if found is None:
                continue
            lines[i] = STEP.sub(lambda m: f"if (shim::keeps({len(steps)})) {m[0]}", line)
            steps.append(f"{name}:{i + 1} {found[0]}")
        (copy / name).write_text("\n".join(lines))
    # g++ then calls what races.cpp defines; its own library for that is left out.
    watched = ["-fno-pie", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
    defines = ["-DSHIM_RACES", "-g1", "-c"]
    objects = [folder / "driver.o", folder / "races.o"]
    build(objects[0], *watched, *defines, csrc=copy, driver=driver)
    build(objects[1], "-fno-pie", "-O2", "-c", csrc=copy, driver="shim/races.cpp")
    program = folder / "watched"
    link = [require_compiler(), "-no-pie", *map(str, objects), "-o", str(program)]
    result = subprocess.run(link, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return program, steps


def where(program: Path, message: str) -> str:
    """The report of a race with its lines of code, where binutils are installed."""
    codes = re.findall(r"at (0x[0-9a-f]+)$", message, re.MULTILINE)
    if not codes or shutil.which("addr2line") is None:
        return message
    command = ["addr2line", "-e", str(program), *codes]
    return message + subprocess.run(command, capture_output=True, text=True).stdout


def _array(values: np.ndarray | None) -> bytes:
    data = b"" if values is None else np.ascontiguousarray(values).tobytes()
    return struct.pack("<q", len(data)) + data


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values in the storage of ``dtype``; bfloat16 must be exact already."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def from_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def representable(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that ``dtype`` holds exactly."""
    values = np.asarray(values, np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return values.astype(dtype).astype(np.float32)


@dataclass
class Gate:
    """One call of row_norm_zscore_gate; ``coefficients`` is [rows, rank], exact in ``dtype``."""

    coefficients: np.ndarray
    sequences: int = 1
    dtype: str = "float32"
    reduction: str = "norm"
    scope: str = "sequence"
    alpha: float = 1.5
    mask: np.ndarray | None = None
    cu_seqlens: np.ndarray | None = None
    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    padding: int = 0  # unused elements between rows
    offset: int = 0  # elements in front of the matrix
    state: bool = True

    @property
    def rows(self) -> int:
        return self.coefficients.shape[0]

    def encode(self) -> bytes:
        rows, rank = self.coefficients.shape
        stored = np.full((rows, rank + self.padding), np.nan, np.float32)
        stored[:, :rank] = self.coefficients
        # The last row ends with its last element: what lies behind is not ours to read.
        flat = stored.reshape(-1)[: stored.size - self.padding]
        flat = np.concatenate([np.full(self.offset, np.nan, np.float32), flat])
        header = (
            *(0, DTYPES[self.dtype], rows, rank, rank + self.padding),
            *(REDUCTIONS[self.reduction], SCOPES[self.scope], self.sequences),
            *(int(self.mean is not None and self.mean.size > 1), int(self.state), self.offset),
        )
        arrays = (
            to_bits(flat, self.dtype),
            None if self.cu_seqlens is None else self.cu_seqlens.astype(np.int32),
            None if self.mask is None else self.mask.astype(np.uint8),
            None if self.mean is None else self.mean.astype(np.float64),
            None if self.std is None else self.std.astype(np.float64),
            np.array([self.alpha], np.float32),
        )
        return struct.pack(f"<{len(header)}q", *header) + b"".join(map(_array, arrays))


@dataclass
class GateResult:
    magnitude: np.ndarray
    z: np.ndarray
    fired: np.ndarray
    state: np.ndarray


@dataclass
class Correction:
    """One call of add_correction: y [rows, m], q [m, rank], s [rows, rank], fired [rows]."""

    y: np.ndarray
    q: np.ndarray
    s: np.ndarray
    fired: np.ndarray
    dtype: str = "float32"

    def encode(self) -> bytes:
        (rows, m), rank = self.y.shape, self.q.shape[1]
        header = (1, DTYPES[self.dtype], rows, m, m, rank, rank, rank)
        arrays = (
            to_bits(self.y, self.dtype),
            self.q.astype(np.float32),
            self.s.astype(np.float32),
            self.fired.astype(np.uint8),
        )
        return struct.pack(f"<{len(header)}q", *header) + b"".join(map(_array, arrays))


@dataclass
class Host:
    """A built driver."""

    program: Path
    environment: dict[str, str] = field(default_factory=dict)

    def _run(self, case: bytes, order: int) -> bytes:
        result = subprocess.run(
            [str(self.program)],
            input=case,
            capture_output=True,
            env={**os.environ, "SHIM_ORDER": str(order), **self.environment},
        )
        if result.returncode != 0:
            raise KernelFailure(result.stderr.decode(errors="replace"))
        return result.stdout

    def gate(self, case: Gate, order: int = 0) -> GateResult:
        out = self._run(case.encode(), order)
        rows = case.rows
        return GateResult(
            magnitude=np.frombuffer(out, np.float32, rows),
            z=np.frombuffer(out, np.float32, rows, rows * 4),
            fired=np.frombuffer(out, np.uint8, rows, rows * 8),
            state=np.frombuffer(out, np.float64, case.sequences * 3, rows * 9).reshape(-1, 3),
        )

    def correction(self, case: Correction, order: int = 0) -> np.ndarray:
        out = self._run(case.encode(), order)
        stored = np.float32 if case.dtype == "float32" else np.uint16
        if case.dtype == "float16":
            stored = np.float16
        return from_bits(np.frombuffer(out, stored), case.dtype).reshape(case.y.shape)
