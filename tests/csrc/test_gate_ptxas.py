"""What nvcc makes of the gate's kernels: resources per architecture and the width of the loads."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.host import CSRC

# 3 element types x 2 reductions x aligned or not, 3 scopes, 3 output types.
KERNELS = 12 + 3 + 3
# Eight blocks of 256 threads fill an SM's 2048 threads at 32 registers; half of that is the floor.
MAX_REGISTERS = 64


def nvcc(*arguments: str) -> str:
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("needs nvcc")
    result = subprocess.run(
        [compiler, "-std=c++17", "-O3", f"-I{CSRC}", *arguments, str(CSRC / "gate.cu")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """One entry per kernel and architecture, from ptxas -v."""
    target = tmp_path_factory.mktemp("ptxas") / "gate.o"
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a", "100")]
    log = nvcc(*archs, "--threads=2", "-Xptxas=-v", "-c", "-o", str(target))
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'"
        r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads"
        r".*?Used (?P<registers>\d+) registers",
        flags=re.DOTALL,
    )
    return [match.groupdict() for match in pattern.finditer(log)]


def test_every_kernel_is_built(resources: list[dict[str, str]]) -> None:
    count = {
        arch: sum(r["arch"] == arch for r in resources) for arch in ("sm_80", "sm_90a", "sm_100")
    }
    assert set(count.values()) == {KERNELS}, count


def test_no_spills_and_few_registers(resources: list[dict[str, str]]) -> None:
    for r in resources:
        assert (r["stack"], r["stores"], r["loads"]) == ("0", "0", "0"), r
        assert int(r["registers"]) <= MAX_REGISTERS, r


def test_aligned_rows_are_read_in_16_bytes(tmp_path: Path) -> None:
    target = tmp_path / "gate.ptx"
    nvcc("-arch=compute_80", "-ptx", "-o", str(target))
    bodies = re.split(r"\.visible \.entry ", target.read_text())[1:]
    kernels = {body.splitlines()[0]: body for body in bodies}
    aligned = [n for n in kernels if "row_magnitude_kernel" in n and "ReductionELb1E" in n]
    assert len(aligned) == 6
    for name in aligned:
        assert "ld.global.v4" in kernels[name], name
