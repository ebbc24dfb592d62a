"""``benchmarks/gpu/run.sh`` without a GPU: it says so; and its plumbing, with programs in place.

The plumbing is what decides whether an hour on a GPU leaves anything behind: a stage that fails or
hangs must be reported, and the next ones must run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu" / "run.sh"

pytestmark = pytest.mark.skipif(
    not SCRIPT.is_file() or shutil.which("bash") is None, reason="needs the repository and bash"
)


def run(out: Path, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script)],
        env={**os.environ, "OUT": str(out), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there may be a GPU here")
    result = run(tmp_path / "out")
    assert result.returncode == 0
    assert "no NVIDIA GPU here" in result.stdout
    assert not (tmp_path / "out").exists()


def test_stages_that_fail_are_reported_and_the_rest_runs(tmp_path: Path) -> None:
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    program(tools / "nvidia-smi", 'case "$*" in *compute_cap*) echo 9.0;; *) echo "A card";; esac')
    program(tools / "compute-sanitizer", "echo sanitized")
    program(
        tools / "python",
        f"""case "$*" in
          *summary.py*) exec {sys.executable} "$@";;
          *pytest*) echo "one test failed"; exit 1;;
          *resources*) echo broken >&2; exit 3;;
          *setup.py*) echo "CUDA $COACHHOOK_BUILD_CUDA CPU $COACHHOOK_BUILD_CPU";;
          *"bench model"*) echo '[{{"op": "mod'; exit 1;;
          *"bench memory"*) trap 'echo "[3]"; exit 0' INT; sleep 60 & wait;;
          *bench*) echo '["'$4'"]';;
          *) echo "ran $*";;
        esac""",
    )
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    # One stage takes too long, and says what it has when it is told to stop.
    script = tmp_path / "benchmarks" / "gpu" / "run.sh"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT.read_text().replace("bench memory 25", "bench memory 1"))
    shutil.copy(SCRIPT.with_name("summary.py"), script.parent)
    result = run(out, script=script, PATH=path, PYTHON=str(tools / "python"))
    assert result.returncode == 1
    summary = json.loads((out / "summary.json").read_text())
    ended = {stage["stage"]: stage["status"] for stage in summary["stages"]}
    assert ended == {
        "build": 0,
        "doctor": 0,
        "pytest": 1,
        "memcheck": 0,
        "racecheck": 0,
        "bench-hooked_linear": 0,
        "bench-model": 1,
        "bench-cholesky": 0,
        "bench-gram": 0,
        "bench-memory": 124,
        "bench-overhead": 0,
        "bench-statistics": 0,
        "bench-edit": 0,
        "launches": 0,
        "resources": 3,
    }
    assert summary["gpu"] == "A card" and summary["versions"]["torch"]
    assert len(summary["commit"] or "") in (0, 40)
    rows = json.loads((out / "bench.json").read_text())
    assert rows == ["edit", 3, "cholesky", "statistics", "gram", "hooked_linear", "overhead"]
    assert "one test failed" in (out / "pytest.log").read_text()
    # An extension that is not needed could take the time of the one that all the rest waits for.
    assert (out / "build.log").read_text() == "CUDA 1 CPU 0\n"
    assert "broken" in result.stdout and "FAILED (1)" in result.stdout
    assert not (out / "resources.json").exists()
    assert len(list(out.iterdir())) <= 8
    assert (out / "sanitizer.log").read_text() == "sanitized\n" * 2


def test_what_a_limit_leaves_no_time_for_is_said_to_be_left_out(tmp_path: Path) -> None:
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    program(tools / "nvidia-smi", 'case "$*" in *compute_cap*) echo 9.0;; *) echo "A card";; esac')
    program(
        tools / "python",
        f'case "$*" in *summary.py*) exec {sys.executable} "$@";; *) echo "ran $*";; esac',
    )
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    result = run(out, PATH=path, PYTHON=str(tools / "python"), LIMIT="0")
    summary = json.loads((out / "summary.json").read_text())
    statuses = {stage["status"] for stage in summary["stages"] if stage["stage"] != "sanitizer"}
    assert statuses == {125} and result.returncode == 1
    assert "left out" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["summary.json"]


def test_the_limits_add_up_to_less_than_nine_minutes() -> None:
    text = SCRIPT.read_text()
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    pattern = r"^ *(?:stage|bench) \S+ (\d+) .*?(&?)$"
    found = re.findall(pattern, text.replace("\\\n", ""), re.MULTILINE)
    assert [together for _, together in found].count("&") == 5
    beside = max(int(limit) for limit, together in found if together)
    assert beside + sum(int(limit) for limit, together in found if not together) < 9 * 60


@pytest.mark.parametrize("ending", ["KeyboardInterrupt", "RuntimeError"])
def test_launches_that_end_early_leave_their_rows(ending: str, tmp_path: Path) -> None:
    # What it measures needs a GPU; what it does with the rows does not.
    code = f"""
import itertools, sys
sys.path[:0] = [{str(SCRIPT.parent)!r}, {str(ROOT)!r}]
import launches
launches.calls = lambda: zip("abc", "123", itertools.repeat(None))
def measured(op, shape, call):
    if op == "c":
        raise {ending}("no time")
    return {{"op": op, "shape": shape}}
launches.measured = measured
sys.argv = ["launches.py", "--json"]
launches.main()
"""
    out, err = tmp_path / "out", tmp_path / "err"
    assert processes.run(code, out=out, err=err) and ending in err.read_text()
    assert [row["op"] for row in json.loads(out.read_text())] == ["a", "b"]


def test_all_tests_for_a_gpu_are_run() -> None:
    tests = [p for p in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in p.read_text()]
    named = re.findall(r"tests/\S+", SCRIPT.read_text())
    asked = [path for path in tests if path.name != Path(__file__).name]
    assert asked and all(
        any(path.is_relative_to(ROOT / place) for place in named) for path in asked
    )
