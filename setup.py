"""Builds the optional extensions ``coachhook._C`` and ``coachhook._cpu``.

Everything else is in pyproject.toml.

COACHHOOK_BUILD_CUDA=0 skips the one for CUDA, =1 demands it; unset, it is built where nvcc is
found, and the package installs without it otherwise. COACHHOOK_BUILD_CPU is the same for the one of
the CPU and a C++ compiler. torch is never imported: the extensions have no torch symbols. See
docs/building.md.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CUDA, CPU = "coachhook._C", "coachhook._cpu"
CUDA_SOURCES = [
    *("csrc/bindings.cpp", "csrc/gate.cu"),
    *("csrc/bindings_cholesky.cpp", "csrc/cholesky.cu", "csrc/append.cu"),
    *("csrc/bindings_decode.cpp", "csrc/decode.cu"),
]
CPU_SOURCES = ["csrc/cpu/bindings.cpp", "csrc/cpu/pair_product.cpp"]
# A cubin also runs on higher minor versions of its architecture (90a does not); the PTX serves
# whatever has none.
DEFAULT_ARCHS = "80+PTX;90a;100;120+PTX"
BYTES_PER_JOB = 2 << 30


def say(line: str) -> None:
    print(f"coachhook: {line}", file=sys.stderr, flush=True)


def mode(switch: str) -> str:
    value = os.environ.get(switch, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"coachhook: {switch} must be 0, 1 or unset, got {value!r}")
    return value


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (nvcc := shutil.which("nvcc", path=os.path.join(home, "bin"))):
            return nvcc
    return shutil.which("nvcc")


def why_no_pybind11() -> str | None:
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed; build with isolation, or pip install pybind11"
    return None


def why_no_cpu() -> str | None:
    """The reason why the CPU extension cannot be built here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"it serves Linux on x86_64 only, this is {sys.platform} on {platform.machine()}"
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler {compiler.split()[0]}; install one, or set CXX"
    return why_no_pybind11()


def why_no_cuda() -> str | None:
    """The reason why the CUDA extension cannot be built here, or None."""
    if sys.platform != "linux":
        return f"the CUDA extension builds on Linux only, this is {sys.platform}"
    if find_nvcc() is None:
        return "no nvcc in CUDA_HOME/bin or on PATH; install the CUDA toolkit, or set CUDA_HOME"
    return why_no_pybind11()


def run(command: list[str]) -> str:
    """Output of a command; a failing one fails the build with the first line it printed."""
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode:
        print(" ".join(command), output, sep="\n", flush=True)
        first = (output.strip() or f"exit status {result.returncode}").splitlines()[0]
        raise CompileError(f"{Path(command[0]).name} failed: {first}")
    return output


def library_folders(nvcc: str) -> list[str]:
    """Where libcudart_static may lie. nvcc may be a wrapper script, so it is asked for its root."""
    dryrun = run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull])
    roots = re.findall(r"^#\$ TOP=(.+)$", dryrun, flags=re.MULTILINE)
    folders = [Path(root.strip()) / name for root in roots for name in ("lib64", "lib")]
    return [str(folder) for folder in folders if folder.is_dir()]


def gencode_flags(nvcc: str) -> tuple[list[str], str]:
    """One -gencode per architecture of COACHHOOK_CUDA_ARCHS, and the list as built.

    An architecture is a number with an optional letter, and "+PTX" adds its PTX: "80+PTX;90a".
    Those this nvcc does not know are left out of the default list, and are an error in a given one.
    """
    given = os.environ.get("COACHHOOK_CUDA_ARCHS", "")
    known = set(re.findall(r"compute_(\d+[a-z]?)", run([nvcc, "--list-gpu-arch"])))
    flags: list[str] = []
    built: list[str] = []
    for entry in re.split(r"[;,\s]+", (given or DEFAULT_ARCHS).strip()):
        match = re.fullmatch(r"(\d+[a-z]?)(\+PTX)?", entry)
        if match is None:
            raise CompileError(
                f"COACHHOOK_CUDA_ARCHS must be like 80+PTX;90a, got {given!r} (at {entry!r})"
            )
        arch, ptx = match.groups()
        # Lists of older toolkits leave out the lettered variants that they do compile.
        if arch not in known and arch.rstrip("abcdef") not in known:
            if given:
                raise CompileError(
                    f"COACHHOOK_CUDA_ARCHS names {arch}, this nvcc knows {', '.join(sorted(known))}"
                )
            say(f"this nvcc does not know sm_{arch}: left out")
            continue
        code = f"[sm_{arch},compute_{arch}]" if ptx else f"sm_{arch}"
        flags += ["-gencode", f"arch=compute_{arch},code={code}"]
        built.append(entry)
    return flags, ";".join(built)


def parallel_jobs() -> int:
    """As many compilers at once as cores and free memory allow."""
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, flags=re.MULTILINE)
    by_memory = int(match.group(1)) * 1024 // BYTES_PER_JOB if match else 1
    return max(1, min(os.cpu_count() or 1, by_memory))


def package_version() -> str:
    text = (ROOT / "coachhook" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, flags=re.MULTILINE)
    if match is None:
        raise CompileError("coachhook/_version.py holds no __version__")
    return match.group(1)


class Build(build_ext):
    """Compiles and links CUDA with nvcc alone: it knows its headers, libraries, host compiler."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CPU:
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            # g++ warns of its own headers, whose undefined vectors are meant to be undefined.
            quiet = "-Wno-maybe-uninitialized"
            ext.extra_compile_args += ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", quiet]
            ext.extra_link_args.append("-Wl,--strip-all")
            ext.define_macros.append(("COACHHOOK_VERSION", f'"{package_version()}"'))
            super().build_extension(ext)
        else:
            self.build_cuda(ext)

    def build_cuda(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError("nvcc is gone")
        import pybind11

        jobs = parallel_jobs()
        gencode, archs = gencode_flags(nvcc)
        includes = [str(ROOT / "csrc"), pybind11.get_include(), *self.include_dirs]
        compile_flags = [
            "-std=c++17",
            "-O3",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            f'-DCOACHHOOK_VERSION="{package_version()}"',
            f'-DCOACHHOOK_ARCHITECTURES="{archs}"',
            *(f"-I{path}" for path in includes),
        ]
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            target = str(Path(self.build_temp) / (Path(source).name + ".o"))
            device = [*gencode, f"--threads={jobs}"] if source.endswith(".cu") else []
            run([nvcc, *compile_flags, *device, "-c", str(ROOT / source), "-o", target])
            return target

        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        folders = [f"-L{path}" for path in library_folders(nvcc)]
        run(
            [
                *(nvcc, "-shared", "-cudart=static", "-Xlinker=--strip-all"),
                *(*gencode, *folders, *objects, "-o", str(output)),
            ]
        )
        say(f"CUDA extension built for {archs}, {output.stat().st_size / 1e6:.2f} MB")


def wanted(
    kind: str, switch: str, name: str, sources: list[str], why_not: Callable[[], str | None]
) -> list[Extension]:
    value = mode(switch)
    if value == "0":
        say(f"{kind} extension skipped: {switch}=0")
        return []
    reason = why_not()
    if reason is not None:
        if value == "1":
            raise SystemExit(f"coachhook: {switch}=1 but {reason}")
        say(f"{kind} extension skipped: {reason}")
        return []
    # A failing optional extension is reported in one line by setuptools, and the rest installs.
    return [Extension(name, sources, language="c++", optional=value != "1")]


extensions = [
    *wanted("CUDA", "COACHHOOK_BUILD_CUDA", CUDA, CUDA_SOURCES, why_no_cuda),
    *wanted("CPU", "COACHHOOK_BUILD_CPU", CPU, CPU_SOURCES, why_no_cpu),
]
setup(ext_modules=extensions, cmdclass={"build_ext": Build})
