"""What nvcc makes of the kernels of csrc/, per architecture; needs nvcc and no GPU.

    python benchmarks/gpu/cuda_resources.py                    print the table
    python benchmarks/gpu/cuda_resources.py --arch 90 --json   one row a line

Part of docs/kernels/resources.md, which resources.py writes. The exit status is 1 where a kernel
spills registers, or has lost the 16-byte loads or the tensor-core products it is built on.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("gate.cu", "decode.cu")
ARCHS = (80, 86, 89, 90, 100, 120)
# sm_90 is built with its own features, as setup.py does.
_NAMES = {90: "90a"}

# Kernels that read aligned rows, and those that multiply.
_WIDE = re.compile(r"(row_magnitude|decode_project)<.*true>|decode_finish|add_correction")
_TENSOR = re.compile(r"decode_project")

_ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '\w+'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    flags=re.DOTALL,
)


@dataclass(frozen=True)
class Row:
    """What a kernel became on one architecture."""

    name: str
    arch: int
    registers: int
    spills: int
    shared: int
    tensor: int
    wide_loads: int
    problems: list[str]


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, or the copy that triton brings."""
    found = shutil.which(name)
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        copy = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        found = str(copy) if copy.is_file() else None
    return found


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {result.stderr.strip()[:2000]}")
    return result.stdout + result.stderr


def short_name(mangled: str) -> str:
    """``decode_project<bf16, fp32, 8, true>`` for the symbol of a kernel."""
    name = re.sub(r"^void |coachhook::|_kernel|Reduction", "", _run("c++filt", mangled).strip())
    name = re.sub(r"\((int|bool|Scope)\)", "", name).split("(")[0]
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32")):
        name = name.replace(long, short)
    return name


def measure(source: str, arch: int) -> list[Row]:
    """Compile one file for one architecture; a row per kernel."""
    nvcc, disassembler = tool("nvcc"), tool("nvdisasm")
    if nvcc is None or disassembler is None:
        raise RuntimeError("needs nvcc, and nvdisasm of the CUDA toolkit or of the package triton")
    target = f"sm_{_NAMES.get(arch, arch)}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        csrc = ROOT / "csrc"
        flags = ("-std=c++17", "-O3", f"-I{csrc}", f"-arch={target}", "-cubin", "-Xptxas=-v")
        log = _run(nvcc, *flags, "-o", cubin, str(csrc / source))
        code = _run(disassembler, "-c", cubin)
    bodies = dict(re.findall(r"\.section\s+\.text\.(\w+),(.*?)(?=\.section\s|\Z)", code, re.DOTALL))
    rows = []
    for match in _ENTRY.finditer(log):
        name, body = short_name(match["kernel"]), bodies[match["kernel"]]
        spills = int(match["stack"]) + int(match["stores"]) + int(match["loads"])
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        tensor = len(re.findall(r"\bHMMA\b", body))
        wide = len(re.findall(r"\bLDG\.\S*128", body))
        problems = []
        if spills:
            problems.append(f"{spills} bytes of stack and spills")
        if _WIDE.search(name) and not wide:
            problems.append("no 16-byte loads")
        if _TENSOR.search(name) and not tensor:
            problems.append("no tensor-core products")
        registers = int(match["registers"])
        held = int(shared[1]) if shared else 0
        rows.append(Row(name, arch, registers, spills, held, tensor, wide, problems))
    return sorted(rows, key=lambda row: row.name)


def section(rows: list[Row]) -> str:
    """The rows as a section of docs/kernels/resources.md: one line per kernel."""
    archs = sorted({row.arch for row in rows})
    names = " / ".join(map(str, archs))
    lines = [
        f"| kernel | registers, sm_{names} | spills | KiB | HMMA | wide loads |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row.name for row in rows):
        same = sorted((row for row in rows if row.name == name), key=lambda row: row.arch)
        lines.append(
            f"| `{name}` | {' / '.join(str(row.registers) for row in same)} "
            f"| {max(row.spills for row in same)} | {max(row.shared for row in same) / 1024:.3g} "
            f"| {min(row.tensor for row in same)} | {min(row.wide_loads for row in same)} |"
        )
    release = re.search(r"release ([\d.]+)", _run(str(tool("nvcc")), "--version"))
    return f"""## CUDA C++

Compiled by nvcc {release[1] if release else "?"} from `csrc/`, printed by
`python benchmarks/gpu/cuda_resources.py`; `tests/csrc/test_decode_ptxas.py` fails on a spill, where
a kernel that reads aligned rows has no 16-byte load, and where one that multiplies has no
tensor-core product. Template arguments are the types of x (or y) and of the matrix or the
reduction, the tiles of 8 tokens, and whether rows start on 16 bytes (`decode_finish`: whether f was
summed by a launch of its own). Of spills and KiB of shared memory the largest over the
architectures is given, of products and 16-byte loads, counted in the code, the smallest.

{chr(10).join(lines)}
"""


def main() -> int:
    """Compile, print, and say whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--source", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--json", action="store_true", help="print JSON, one row a line")
    arguments = parser.parse_args()
    rows = [row for s in arguments.source for arch in arguments.arch for row in measure(s, arch)]
    for row in rows:
        if arguments.json:
            print(json.dumps(asdict(row)))
        elif row.problems:
            print(f"{row.name}, sm_{row.arch}: {'; '.join(row.problems)}")
    if not arguments.json:
        print(section(rows))
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
