"""What nvcc made of the kernels: resources, tensor-core products, width of the loads; no GPU."""

from __future__ import annotations

import importlib.util
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coachhook.ops import _backends
from tests.csrc.host import CSRC
from tests.csrc.test_cholesky_ptxas import KERNELS as CHOLESKY
from tests.csrc.test_cholesky_ptxas import MAX_REGISTERS, SHARED

SCRIPT = CSRC.parent / "benchmarks" / "gpu" / "cuda_resources.py"
TABLE = CSRC.parent / "docs" / "kernels" / "resources.md"
# 3 element types x 2 reductions x aligned or not, 3 scopes, 3 output types.
GATE = 12 + 3 + 3
# Types of x and of the matrix, by the kernels for 8 and 64 aligned tokens and for any rows; 3 types
# of y by 3 forms of the gate; the sums; which edit a token takes, and 3 types of y to take it.
DECODE = 5 * 3 + 3 * 3 + 1 + 1 + 3
# Eight blocks of 256 threads fill an SM's 2048 threads at 32 registers; half of that is the floor.
GATE_REGISTERS = 64
# What the driver keeps of a block's shared memory, in what cuobjdump says of sm_90 and newer.
RESERVED = 1 << 10
_OF_GATE = ("row_magnitude", "zscore_gate", "add_correction")


def check(rows: list[dict[str, Any]]) -> None:
    """Every kernel of gate.cu and decode.cu is there, in the table, and has nothing wrong."""
    gate = [row for row in rows if row["name"].startswith(_OF_GATE)]
    decode = [row for row in rows if row["name"].startswith("decode_")]
    assert len({row["name"] for row in gate}) == len(gate) == GATE
    assert len({row["name"] for row in decode}) == len(decode) == DECODE
    assert [(row["name"], row["problems"]) for row in rows if row["problems"]] == []
    assert [row["name"] for row in gate if row["registers"] > GATE_REGISTERS] == []
    text = TABLE.read_text(encoding="utf-8")
    assert [row["name"] for row in gate + decode if f"| `{row['name']}` |" not in text] == []


def check_cholesky(rows: list[dict[str, Any]]) -> None:
    """Those of cholesky.cu are there, within the limits that their blocks are made for."""
    kinds = {kind: [r for r in rows if r["name"].startswith(kind)] for kind in MAX_REGISTERS}
    assert sum(map(len, kinds.values())) == CHOLESKY
    for kind, found in kinds.items():
        assert found and max(row["registers"] for row in found) <= MAX_REGISTERS[kind], kind
        assert max(row["shared"] for row in found) <= SHARED + RESERVED, kind


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_of_the_built_extension(arch: int) -> None:
    extension = _backends.native()
    if extension is None:
        pytest.skip(str(_backends.native_error()))
    script = runpy.run_path(str(SCRIPT))
    if script["tool"]("cuobjdump") is None or script["tool"]("nvdisasm") is None:
        pytest.skip("needs cuobjdump and nvdisasm of the CUDA toolkit or of the package triton")
    rows = script["measure_extension"](Path(extension.__file__), arch)
    if not rows:
        pytest.skip(f"the extension was built without sm_{arch}")
    found = [vars(row) for row in rows]
    check(found)
    check_cholesky(found)


# Six architectures are 100 s of compiling.
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_every_kernel_on_every_architecture(arch: int) -> None:
    if shutil.which("nvcc") is None or importlib.util.find_spec("triton") is None:
        pytest.skip("needs nvcc, and the package triton, whose nvdisasm reads the code")
    command = [sys.executable, str(SCRIPT), "--json", "--arch", str(arch)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode in (0, 1) and not result.stderr, result.stderr
    check([json.loads(line) for line in result.stdout.splitlines()])


def test_a_narrowed_load_is_seen(tmp_path: Path) -> None:
    """The net has no holes: a kernel that reads element by element is reported."""
    if shutil.which("nvcc") is None or importlib.util.find_spec("triton") is None:
        pytest.skip("needs nvcc, and the package triton, whose nvdisasm reads the code")
    source = tmp_path / "csrc"
    shutil.copytree(CSRC, source)
    path = source / "gate.cuh"
    script = runpy.run_path(str(SCRIPT))
    script["measure"].__globals__["ROOT"] = tmp_path
    text = path.read_text()
    assert "if (kAligned && " in text
    path.write_text(text.replace("if (kAligned && ", "if (false && "))
    found = script["measure"]("gate.cu", 90)
    broken = {row.name.split("<")[0] for row in found if "no 16-byte loads" in row.problems}
    assert "row_magnitude" in broken
