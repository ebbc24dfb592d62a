"""The package builds with and without a CUDA compiler, and its wheel holds what it should."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import coachhook

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
MAX_WHEEL_BYTES = 10e6  # of which the bundled model may take 8


def run(*command: str, cwd: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "COACHHOOK_BUILD_CPU": "0"}
    merged |= {k: v for k, v in environment.items() if v is not None}
    for name in (k for k, v in environment.items() if v is None):
        merged.pop(name, None)
    return subprocess.run(command, cwd=cwd, env=merged, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the repository holds, so that a build leaves nothing behind."""
    copy = tmp_path_factory.mktemp("source") / "coachhook"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "*.so", ".*_cache", "tests"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def wheel(source: Path, out: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools", minversion="77")
    pip = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation")
    return run(*pip, "--wheel-dir", str(out), str(source), cwd=out, **environment)


@pytest.fixture(scope="module")
def pure_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    result = wheel(source, out, COACHHOOK_BUILD_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "CUDA extension skipped: COACHHOOK_BUILD_CUDA=0" in result.stdout + result.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def source_archive(source: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in the sdist, below its one folder."""
    pytest.importorskip("setuptools", minversion="77")
    copy, out = (tmp_path_factory.mktemp("sdist") / name for name in ("source", "out"))
    shutil.copytree(source, copy)
    (copy / "tests").mkdir()
    shutil.copy(__file__, copy / "tests")
    build = "from setuptools import build_meta as b; import sys; b.build_sdist(sys.argv[1])"
    result = run(sys.executable, "-c", build, str(out), cwd=copy, COACHHOOK_BUILD_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_versions_agree() -> None:
    assert project()["version"] == coachhook.__version__


def test_changelog_names_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(coachhook.__version__)}\b", changelog, flags=re.MULTILINE)


def test_metadata_is_static() -> None:
    assert "dynamic" not in project()


def test_source_archive_contents(source_archive: set[str]) -> None:
    tops = {name.partition("/")[0] for name in source_archive}
    assert {"coachhook", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= tops
    assert not tops & {"tests", "benchmarks", "tools", "docs"}
    held = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {n for n in held if n.endswith((".h", ".cuh", ".cu", ".cpp"))} <= source_archive
    assert "coachhook/py.typed" in source_archive


def test_wheel_contents(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert pure_wheel.stat().st_size < MAX_WHEEL_BYTES
    with zipfile.ZipFile(pure_wheel) as archive:
        names = archive.namelist()
        info = next(n for n in names if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(info).decode()
        entry_points = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"coachhook", info.partition("/")[0]}
    assert "coachhook/py.typed" in names
    assert not [n for n in names if "__pycache__" in n or n.endswith((".so", ".cu", ".cuh"))]
    packaged = {n for n in names if n.endswith(".py")}
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "coachhook").rglob("*.py")}
    assert packaged == ours
    model = ROOT / "coachhook" / "bundled" / "model"
    assert {str(p.relative_to(ROOT)) for p in model.iterdir()} <= set(names)
    assert any(n.endswith("LICENSE") for n in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "coachhook = coachhook.cli:main" in entry_points


def test_no_triton_on_a_plain_machine(pure_wheel: Path) -> None:
    with zipfile.ZipFile(pure_wheel) as archive:
        info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        required = re.findall(r"^Requires-Dist: (.+)$", archive.read(info).decode(), re.MULTILINE)
    plain = {re.split(r"[^\w-]", line)[0] for line in required if "extra ==" not in line}
    assert plain == {"torch", "transformers", "safetensors", "numpy", "tqdm"}


def setup_py(source: Path, *arguments: str, **environment: str | None):
    return run(sys.executable, "setup.py", "-q", *arguments, cwd=source, **environment)


def no_nvcc(tmp_path: Path) -> dict[str, str | None]:
    return {"PATH": str(tmp_path), "CUDA_HOME": None, "CUDA_PATH": None}


def nothing_found(tmp_path: Path) -> dict[str, str | None]:
    return {"PATH": str(tmp_path), "CUDA_HOME": None, "CUDA_PATH": None, "CXX": "no-such-compiler"}


MISSING = {
    "CUDA": r"(no nvcc in CUDA_HOME/bin|.* Linux)",
    "CPU": r"(no C\+\+ compiler no-such-compiler|it serves Linux on x86_64 only)",
}


def test_without_compilers_one_line_each_says_so(source: Path, tmp_path: Path) -> None:
    unset = {f"COACHHOOK_BUILD_{kind}": None for kind in MISSING}
    result = setup_py(source, "--version", **unset, **nothing_found(tmp_path))
    assert result.returncode == 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("coachhook: ")]
    assert len(lines) == 2
    for line, (kind, missing) in zip(lines, MISSING.items(), strict=True):
        assert re.match(rf"coachhook: {kind} extension skipped: {missing}", line)


@pytest.mark.parametrize("kind", MISSING)
def test_a_demanded_extension_names_what_is_missing(
    source: Path, tmp_path: Path, kind: str
) -> None:
    demanded = {f"COACHHOOK_BUILD_{kind}": "1"}
    result = setup_py(source, "--version", **nothing_found(tmp_path), **demanded)
    assert result.returncode != 0
    assert re.search(rf"COACHHOOK_BUILD_{kind}=1 but {MISSING[kind]}", result.stderr)


@pytest.mark.parametrize("kind", MISSING)
def test_unknown_switch_value_is_refused(source: Path, kind: str) -> None:
    switches = {"COACHHOOK_BUILD_CUDA": "0", f"COACHHOOK_BUILD_{kind}": "yes"}
    result = setup_py(source, "--version", **switches)
    assert result.returncode != 0
    assert f"COACHHOOK_BUILD_{kind} must be 0, 1 or unset, got 'yes'" in result.stderr


@pytest.fixture
def failing_nvcc(tmp_path: Path) -> str:
    if sys.platform != "linux":
        pytest.skip("the extension builds on Linux only")
    pytest.importorskip("pybind11")
    script = tmp_path / "home" / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\necho 'nvcc fatal: no room left' >&2\nexit 3\n")
    script.chmod(0o755)
    return str(tmp_path / "home")


def test_a_failing_optional_build_still_installs(
    source: Path, tmp_path: Path, failing_nvcc: str
) -> None:
    result = wheel(source, tmp_path, COACHHOOK_BUILD_CUDA=None, CUDA_HOME=failing_nvcc)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert 'building extension "coachhook._C" failed: nvcc failed: nvcc fatal' in output
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        assert not [n for n in archive.namelist() if n.endswith(".so")]


def test_a_failing_demanded_build_fails(source: Path, tmp_path: Path, failing_nvcc: str) -> None:
    result = wheel(source, tmp_path, COACHHOOK_BUILD_CUDA="1", CUDA_HOME=failing_nvcc)
    assert result.returncode != 0
    assert "nvcc fatal: no room left" in result.stdout + result.stderr


def test_build_does_not_import_torch(source: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("torch", "triton", "transformers"):
        (trap / f"{name}.py").write_text(f"raise SystemExit('the build imported {name}')\n")
    result = setup_py(source, "--version", COACHHOOK_BUILD_CUDA="0", PYTHONPATH=str(trap))
    assert result.returncode == 0, result.stderr


def test_built_extension_imports_without_a_gpu() -> None:
    from coachhook.ops import _backends

    if _backends.native() is None:
        pytest.skip(str(_backends.native_error()))
    program = (
        "import coachhook._C as c, sys; print(c.build_info()['version']); "
        "sys.exit('torch' in sys.modules and 'torch was imported')"
    )
    result = run(sys.executable, "-c", program, cwd=ROOT, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == coachhook.__version__
