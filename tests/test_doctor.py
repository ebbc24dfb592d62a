"""The environment report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import coachhook
from coachhook import doctor
from coachhook.ops import _backends


def test_report_is_json_and_names_every_op() -> None:
    facts = json.loads(json.dumps(doctor.report()))
    assert facts["coachhook"] == coachhook.__version__
    assert facts["packages"]["torch"] == torch.__version__
    assert set(facts["backends"]) == set(_backends.ops())
    for backends in facts["backends"].values():
        assert backends["reference"] == {"available": True, "reason": None}
        for state in backends.values():
            assert state["available"] == (state["reason"] is None)


def test_what_is_missing_has_a_reason() -> None:
    facts = doctor.report()
    for name in ("gpu", "native", "native_cpu", "triton", "bundled_model"):
        assert facts[name]["available"] or facts[name]["reason"]


def test_text_shows_versions_and_reasons() -> None:
    facts = doctor.report()
    text = doctor.render(facts)
    assert f"coachhook {coachhook.__version__}" in text and torch.__version__ in text
    for op, backends in facts["backends"].items():
        assert op in text
        for state in backends.values():
            assert state["reason"] is None or state["reason"] in text


def test_switches_in_force_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COACHHOOK_BACKEND", "reference")
    facts = doctor.report()
    assert facts["environment"]["COACHHOOK_BACKEND"] == "reference"
    assert "COACHHOOK_BACKEND=reference" in doctor.render(facts)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("COACHHOOK_BACKEND", "fast", "must be one of auto, .* got 'fast'"),
        ("COACHHOOK_PRODUCTS", "fused,exact", "must be one of exact, .* got 'fused,exact'"),
        ("COACHHOOK_DECODING_OVERLAP", "yes", "must be 0 or 1, got 'yes'"),
        ("COACHHOOK_LAUNCH_POLICY", "/no/such/file.json", "file.json"),
    ],
)
def test_switches_that_no_op_would_take_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str
) -> None:
    assert doctor.report()["environment_problems"] == []
    monkeypatch.setenv(name, value)
    facts = doctor.report()
    (found,) = facts["environment_problems"]
    assert re.search(problem, found) and name in found
    assert found in doctor.render(facts)


def test_a_stale_extension_is_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    stale = SimpleNamespace(VERSION="0.0.0", build_info=lambda: {"version": "0.0.0"})
    monkeypatch.setattr(_backends, "_load", lambda *_: (stale, None))
    for load in (_backends._load_native, _backends._load_native_cpu):
        load.cache_clear()
        request.addfinalizer(load.cache_clear)
    assert _backends.native() is None and _backends.native_cpu() is None
    facts = doctor.report()
    assert not facts["native"]["available"]
    assert "built for version 0.0.0; install coachhook again" in facts["native"]["reason"]
    assert "built for version 0.0.0" in doctor.render(facts)


def test_gpus_are_read_from_the_drivers_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0, 143771 MiB, 580.95.05'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (device,) = doctor.report()["gpu"]["devices"]
    assert device["name"] == "NVIDIA H200" and device["compute_cap"] == "9.0"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML' >&2\nexit 9\n")
    assert doctor.report()["gpu"]["devices"] == []


def test_report_creates_no_cuda_context() -> None:
    program = (
        "import torch; from coachhook import doctor; doctor.render(doctor.report()); "
        "raise SystemExit(torch.cuda.is_initialized())"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
