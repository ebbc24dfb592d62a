"""What nvcc makes of the decoding kernels: resources, tensor-core products, width of the loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests.csrc.host import CSRC

SCRIPT = CSRC.parent / "benchmarks" / "gpu" / "cuda_resources.py"
TABLE = CSRC.parent / "docs" / "kernels" / "resources.md"
# Types of x and of the matrix, by the kernels for 8 and 64 aligned tokens and for any rows; 3 types
# of y by 3 forms of the gate; the sums.
KERNELS = 5 * 3 + 3 * 3 + 1


# Six architectures are 100 s of compiling.
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_every_kernel_on_every_architecture(arch: int) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    pytest.importorskip("triton", reason="its nvdisasm reads the code")
    command = [sys.executable, str(SCRIPT), "--json", "--source", "decode.cu", "--arch", str(arch)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode in (0, 1) and not result.stderr, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(r["name"], r["problems"]) for r in rows if r["problems"]] == []
    assert len({r["name"] for r in rows}) == len(rows) == KERNELS
    text = TABLE.read_text(encoding="utf-8")
    assert [r["name"] for r in rows if f"| `{r['name']}` |" not in text] == []
