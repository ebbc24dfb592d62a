"""Every shipped configuration of the Triton kernels, compiled ahead of time; needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "resources.py"
TABLE = ROOT / "docs" / "kernels" / "resources.md"
ARCHS = (80, 90, 100)
MORE_ARCHS = (86, 89, 120)

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
    ),
]

_WORSE = """
import dataclasses, json, runpy, sys
sys.path.insert(0, {root!r})
gate = runpy.run_path({script!r})
case = next(c for c in gate["cases"](90) if c.name == "project, bf16 x, fp32 S")
for constants, options in {changes!r}:
    sizes, warps = {{**case.constants, **constants}}, {{**case.options, **options}}
    changed = dataclasses.replace(case, constants=sizes, options=warps)
    print(json.dumps(gate["compile_case"](changed, 90).problems))
"""


def run(*arguments: str) -> list[Any]:
    """The JSON lines that a process prints; interpreted kernels cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert result.returncode in (0, 1) and "Traceback" not in result.stderr, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(rows: list[dict[str, Any]], archs: tuple[int, ...]) -> None:
    """Every kernel for every architecture, nothing wrong with any, and the table says the same."""
    import triton

    assert [(r["name"], r["arch"], r["problems"]) for r in rows if r["problems"]] == []
    names = {r["name"] for r in rows}
    assert {(r["name"], r["arch"]) for r in rows} == {(n, a) for n in names for a in archs}
    kernels = {name.split(",")[0] for name in names}
    cues = {"cue words", "cue read", "cue arm", "cue short"}
    assert kernels == {"project", "correct", "reduce", "group sums", "gate", "list"} | cues
    text = TABLE.read_text(encoding="utf-8")
    for row in rows:
        line = f"| {row['name']} | {row['arch']} | {row['sizes']} |"
        if f"with Triton {triton.__version__};" in text:
            line += f" {row['registers']} |"
        assert line in text, f"{TABLE.name} is old: run {SCRIPT.name} --write"


def test_nothing_spills_overflows_or_loses_its_instructions() -> None:
    check(run(str(SCRIPT), "--json", "--arch", *map(str, ARCHS)), ARCHS)


@pytest.mark.slow  # 69 compilations more
def test_nor_on_the_other_architectures() -> None:
    check(run(str(SCRIPT), "--json", "--arch", *map(str, MORE_ARCHS)), MORE_ARCHS)


def test_the_gate_sees_what_it_is_for() -> None:
    worse = {
        "spills": ({"BF": 256}, {}),
        "too much shared memory": ({"BF": 64}, {"num_stages": 16}),
        "no HGMMA": ({"BF": 16}, {}),
    }
    code = _WORSE.format(root=str(ROOT), script=str(SCRIPT), changes=list(worse.values()))
    for problem, found in zip(worse, run("-c", code), strict=True):
        assert any(problem in text for text in found), (problem, found)
