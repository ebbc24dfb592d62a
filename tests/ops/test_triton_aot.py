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

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
    ),
]

_TOO_LARGE = """
import dataclasses, runpy, sys
sys.path.insert(0, {root!r})
gate = runpy.run_path({script!r})
case = next(c for c in gate["cases"](90) if c.name == "project, bf16 x, fp32 S")
sizes = {{**case.constants, **{constants!r}}}
options = {{**case.options, **{options!r}}}
row = gate["compile_case"](dataclasses.replace(case, constants=sizes, options=options), 90)
print("; ".join(row.problems))
"""


def run(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert result.returncode in (0, 1) and "Traceback" not in result.stderr, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(str(SCRIPT), "--json").splitlines()]


def test_nothing_spills_overflows_or_loses_its_instructions(rows) -> None:
    assert [(r["name"], r["arch"], r["problems"]) for r in rows if r["problems"]] == []


def test_every_kernel_is_compiled_for_every_architecture(rows) -> None:
    names = {r["name"] for r in rows}
    assert {(r["name"], r["arch"]) for r in rows} == {(n, a) for n in names for a in ARCHS}
    kernels = {name.split(",")[0] for name in names}
    assert kernels == {"project", "correct", "reduce", "group sums", "gate", "list"}


def test_the_kept_table_is_this_one(rows) -> None:
    import triton

    text = TABLE.read_text(encoding="utf-8")
    if f"with Triton {triton.__version__};" not in text:
        pytest.skip(f"{TABLE.name} was written with another release than {triton.__version__}")
    for row in rows:
        line = f"| {row['name']} | {row['arch']} | {row['sizes']} | {row['registers']} |"
        assert line in text, f"{TABLE.name} is old: run {SCRIPT.name} --write"


@pytest.mark.parametrize(
    ("constants", "options", "problem"),
    [
        ({"BT": 256, "BF": 256}, {"num_warps": 4}, "spills"),
        ({}, {"num_stages": 8}, "too much shared memory"),
        ({"BF": 16}, {}, "no HGMMA"),
    ],
)
def test_the_gate_sees_what_it_is_for(constants, options, problem) -> None:
    code = _TOO_LARGE.format(
        root=str(ROOT), script=str(SCRIPT), constants=constants, options=options
    )
    assert problem in run("-c", code)
