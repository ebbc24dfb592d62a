"""The extension module built for the host, once for all tests of all workers."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

from tests.csrc.host import CSRC, HERE, require_compiler


def run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def build_extension(target: Path, compiler: str, *includes: str) -> None:
    flags = [
        *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"),
        *("-DCOACHHOOK_HOST_SHIM", '-DCOACHHOOK_VERSION="host"', '-DCOACHHOOK_ARCHITECTURES=""'),
        *(f"-I{path}" for path in (CSRC, HERE / "shim", *includes)),
    ]
    root, objects, bindings = CSRC.parent, [], []
    for source in re.findall(r'"(csrc/[^"]+)"', (root / "setup.py").read_text(encoding="utf-8")):
        if source.endswith(".cu"):
            objects.append(str(target.with_name(f"{Path(source).stem}.o")))
            run(compiler, *flags, "-O1", "-x", "c++", "-c", str(root / source), "-o", objects[-1])
        elif not source.startswith("csrc/cpu/"):
            bindings.append(str(root / source))
    # pybind11 unoptimised: half the compile time.
    part = target.with_name("extension.part")
    run(compiler, *flags, "-shared", *bindings, *objects, "-o", str(part))
    part.rename(target)


@pytest.fixture(scope="session")
def extension(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """``coachhook._C`` from the sources of setup.py: its kernels run on CPU tensors."""
    compiler = require_compiler()
    pybind11 = pytest.importorskip("pybind11")
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        pytest.skip(f"no Python.h in {headers}")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # what the workers of a run share
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    with FileLock(folder / "extension.lock"):
        if not target.exists():
            build_extension(target, compiler, pybind11.get_include(), headers)
    spec = importlib.util.spec_from_file_location("_C", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
