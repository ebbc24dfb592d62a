"""What nvcc makes of the Cholesky kernels: resources, tensor cores and the width of the loads."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.host import CSRC

# Updates of L and narrow products: 2 element types x 32 or 64 keys x 3 layouts; doubled inverses:
# 2 x 3; panels: 4; prefix sums and inverses: 2 each.
KERNELS = 12 + 12 + 6 + 4 + 2 + 2
# Static shared memory of a block on every architecture.
SHARED = 48 << 10
# A register file holds 65,536: one block of 256 threads (of 384 and 168 registers with 32 keys),
# three of 128, sixteen of 64.
MAX_REGISTERS = {
    "apply": 255,
    "panel": 168,
    "prefix": 64,
    "invert": 255,
    "narrow": 255,
    "double": 255,
}

PATTERN = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    flags=re.DOTALL,
)


def nvcc(*arguments: str, source: str = "cholesky.cu") -> str:
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("needs nvcc")
    result = subprocess.run(
        [compiler, "-std=c++17", "-O3", f"-I{CSRC}", *arguments, str(CSRC / source)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


# 25 s of compiling each; test_resources.py reads what the built extension has of them.
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "86", "89", "90a", "100", "120"])
def test_no_spills_within_limits(tmp_path: Path, arch: str) -> None:
    flags = (f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v")
    log = nvcc(*flags, "-c", "-o", str(tmp_path / "cholesky.o"))
    found = [match.groupdict() for match in PATTERN.finditer(log)]
    assert len(found) == KERNELS
    for kernel in found:
        assert (kernel["stack"], kernel["stores"], kernel["loads"]) == ("0", "0", "0"), kernel
        registers = int(kernel["registers"])
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        assert (int(shared[1]) if shared else 0) <= SHARED, kernel
        kind = next(kind for kind in MAX_REGISTERS if kind in kernel["kernel"])
        assert registers <= MAX_REGISTERS[kind], kernel


def test_float64_runs_on_tensor_cores_and_loads_16_bytes(tmp_path: Path) -> None:
    target = tmp_path / "cholesky.ptx"
    nvcc("-arch=compute_80", "-ptx", "-o", str(target))
    bodies = re.split(r"\.visible \.entry ", target.read_text())[1:]
    named = {body.splitlines()[0]: body for body in bodies}
    kernels = {name: body for name, body in named.items() if "apply_rotations_kernel" in name}
    assert len(kernels) == 12
    for name, body in kernels.items():
        is_double = "kernelId" in name
        by_rows, by_columns = "LayoutE1" in name, "LayoutE2" in name
        columns = 64 if "Li64E" in name else 32
        # Two tiles of 8 rows; L G of a diagonal block is the same code as that of the others, and
        # G_jj is lower triangular in tiles of 8 x 8.
        products = 2 * 8 * (columns // 8) + 2 * 2 * (4 + 3 + 2 + 1) + 2 * (columns // 4) * 4
        assert body.count("mma.sync.aligned.m8n8k4") == is_double * products, name
        # 16 rows of 32 numbers by 32 lanes, before the loop and in it.
        if by_rows:
            wide = re.findall(r"ld\.global\.(?:v2\.\w64|v4\.\w32)", body)
            assert len(wide) >= 2 * (8 if is_double else 4), name
        if by_columns:
            pairs = re.findall(r"ld\.global\.v2\." + (r"\w64" if is_double else r"\w32"), body)
            assert len(pairs) >= 2 * 8, name
    kernels = {name: body for name, body in named.items() if "narrow_product_kernel" in name}
    assert len(kernels) == 12
    for name, body in kernels.items():
        size = 8 if "kernelId" in name else 4
        columns = 64 if "Li64E" in name else 32
        # What a thread copies of A, 64 x 32, and of B, before the loop and in it.
        numbers = 64 * 32 // 256, 32 * columns // 256
        wide = len(re.findall(r"cp\.async\.cg\.shared\.global\S* \[%\w+\], \[%\w+\], 16,", body))
        by_one = "LayoutE0" in name
        assert wide == 2 * (0 if by_one else numbers[0] * size // 16) + 2 * numbers[1] * size // 16
        assert len(re.findall(r"cp\.async\.ca", body)) == 2 * by_one * numbers[0], name
        # 32 or 16 rows and 8 or 16 terms of a warp, on sm_80 in products of 8 x 8 x 4.
        products = columns if size == 8 else 0
        assert body.count("mma.sync.aligned.m8n8k4") == products, name


@pytest.mark.slow
def test_a_batch_is_loaded_without_spills(tmp_path: Path) -> None:
    arches = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "100")]
    log = nvcc(*arches, "-Xptxas=-v", "-c", "-o", str(tmp_path / "append.o"), source="append.cu")
    found = [match.groupdict() for match in PATTERN.finditer(log)]
    assert len(found) == 2 * len(arches)
    for kernel in found:
        assert (kernel["stack"], kernel["stores"], kernel["loads"]) == ("0", "0", "0"), kernel
        assert int(kernel["registers"]) <= 64, kernel
