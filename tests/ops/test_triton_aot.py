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
# Everything is compiled for one architecture; for two others, whose tensor cores take other
# instructions, one of each form of product, and all the rest only where time does not matter.
MAIN_ARCH = 90
OTHER_ARCHS = (80, 100)
MORE_ARCHS = (86, 89, 120)
PRODUCTS = (
    "project, bf16 x, fp32 dense",
    "project, bf16 x, bf16 dense",
    "project, fp32",
    "project, with W0",
    "correct, bf16 y, own group",
)
KERNELS = {
    *("project", "correct", "reduce", "group sums", "gate", "list"),
    *("cue words", "cue read", "cue arm", "cue short"),
}

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


def check(archs: tuple[int, ...], *only: str) -> set[str]:
    """The kernels found for every architecture: nothing wrong with any, the table says the same."""
    import triton

    rows = run(str(SCRIPT), "--json", "--arch", *map(str, archs), *(("--only", *only) * bool(only)))
    assert [(r["name"], r["arch"], r["problems"]) for r in rows if r["problems"]] == []
    names = {r["name"] for r in rows}
    assert {(r["name"], r["arch"]) for r in rows} == {(n, a) for n in names for a in archs}
    text = TABLE.read_text(encoding="utf-8")
    for row in rows:
        line = f"| {row['name']} | {row['arch']} | {row['sizes']} |"
        if f"with Triton {triton.__version__};" in text:
            line += f" {row['registers']} |"
        assert line in text, f"{TABLE.name} is old: run {SCRIPT.name} --write"
    return {name.split(",")[0] for name in names}


def test_nothing_spills_overflows_or_loses_its_instructions() -> None:
    assert check((MAIN_ARCH,)) == KERNELS


def test_nor_do_products_on_other_tensor_cores() -> None:
    assert check(OTHER_ARCHS, *PRODUCTS) == {"project", "correct"}


@pytest.mark.slow  # 170 compilations more
def test_nor_does_anything_on_any_architecture() -> None:
    assert check((*OTHER_ARCHS, *MORE_ARCHS)) == KERNELS


def test_the_gate_sees_what_it_is_for() -> None:
    worse = {
        "spills": ({"BF": 256}, {}),
        "too much shared memory": ({"BF": 64}, {"num_stages": 16}),
        "no HGMMA": ({"BF": 16}, {}),
    }
    code = _WORSE.format(root=str(ROOT), script=str(SCRIPT), changes=list(worse.values()))
    for problem, found in zip(worse, run("-c", code), strict=True):
        assert any(problem in text for text in found), (problem, found)
