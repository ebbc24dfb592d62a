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
# Kernels that may be started early, and must wait: ACQBULK is what became of it on sm_90 and newer.
_WAITS = re.compile(r"decode_(sum|finish|select|take)")

_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")


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


def _run(*command: str, at: str | None = None) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=at)
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


def read(cubin: Path, arch: int) -> list[Row]:
    """A row per kernel of a compiled file."""
    reader, disassembler = tool("cuobjdump"), tool("nvdisasm")
    if reader is None or disassembler is None:
        raise RuntimeError("needs cuobjdump and nvdisasm of the CUDA toolkit or of package triton")
    usage = _run(reader, "-res-usage", str(cubin))
    code = _run(disassembler, "-c", str(cubin))
    sections = (part.split(",", 1) for part in re.split(r"\.section\s+\.text\.", code)[1:])
    bodies = {name: body for name, body in sections}
    rows = []
    for mangled, registers, stack, shared in _USAGE.findall(usage):
        name, body = short_name(mangled), bodies[mangled]
        spills = int(stack) + len(re.findall(r"\b(?:STL|LDL)\b", body))
        tensor = len(re.findall(r"\bHMMA\b", body))
        wide = len(re.findall(r"\bLDG(?:STS)?\.\S*128", body))
        problems = []
        if spills:
            problems.append(f"{spills} spills (stack bytes and local accesses)")
        if _WIDE.search(name) and not wide:
            problems.append("no 16-byte loads")
        if _TENSOR.search(name) and not tensor:
            problems.append("no tensor-core products")
        if arch >= 90 and _WAITS.search(name) and not re.search(r"\bACQBULK\b", body):
            problems.append("no wait for the kernel in front")
        rows.append(Row(name, arch, int(registers), spills, int(shared), tensor, wide, problems))
    return sorted(rows, key=lambda row: row.name)


def measure(source: str, arch: int) -> list[Row]:
    """Compile one file for one architecture; a row per kernel."""
    nvcc = tool("nvcc")
    if nvcc is None:
        raise RuntimeError("needs nvcc")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        csrc = ROOT / "csrc"
        flags = ("-std=c++17", "-O3", f"-I{csrc}", f"-arch=sm_{_NAMES.get(arch, arch)}", "-cubin")
        _run(nvcc, *flags, "-o", str(cubin), str(csrc / source))
        return read(cubin, arch)


def measure_extension(extension: Path, arch: int) -> list[Row]:
    """The same for every kernel that a built extension ships for an architecture."""
    reader = tool("cuobjdump")
    if reader is None:
        raise RuntimeError("needs cuobjdump of the CUDA toolkit or of package triton")
    target = f"sm_{_NAMES.get(arch, arch)}.cubin"
    listed = _run(reader, "-lelf", str(extension)).split()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in (word for word in listed if word.endswith(target)):
            _run(reader, "-xelf", name, str(extension), at=folder)
            rows += read(Path(folder) / name, arch)
    return rows


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
`python benchmarks/gpu/cuda_resources.py`; `tests/csrc/test_resources.py` fails on a spill, where
a kernel that reads aligned rows has no 16-byte load, and where one that multiplies has no
tensor-core product, in the extension as it was built. Template arguments are the types of x (or y)
and of the matrix or the reduction, the tiles of 8 tokens, and whether rows start on 16 bytes
(`decode_finish`: whether f was summed by a launch of its own). Of spills and KiB of shared memory
the largest over the architectures is given, of products and 16-byte loads, counted in the code, the
smallest.

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
