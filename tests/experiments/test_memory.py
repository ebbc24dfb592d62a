"""The peak memory of a run is its own."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.experiments import memory, worker

ROOT = Path(__file__).resolve().parent.parent.parent
LARGE = 256  # MiB; a small process takes a tenth of it


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc/self/status")
def test_a_small_process_has_not_the_peak_of_a_large_one_that_started_it():
    held = bytearray(b"x") * (LARGE << 20)
    assert memory.process_peak() >= len(held) / 2**20
    code = "from benchmarks.experiments.memory import process_peak; print(process_peak())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 1 < float(found.stdout) < LARGE / 2


def test_a_run_writes_down_what_its_own_process_took(tmp_path, monkeypatch):
    (tmp_path / "status").write_text("VmPeak:\t 9000 kB\nVmHWM:\t 2048 kB\nVmRSS:\t 1024 kB\n")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert worker.peak_memory({"device": "cpu"}) == 2.0


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 2**10)])
@pytest.mark.parametrize("status", [None, "Name:\tpython\n"])
def test_where_the_system_does_not_say_the_resource_usage_does(
    platform, unit, status, tmp_path, monkeypatch
):
    if status is not None:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory.sys, "platform", platform)
    usage = resource.struct_rusage([0, 0, 300 * 2**20 // unit] + [0] * 13)
    monkeypatch.setattr(memory.resource, "getrusage", lambda who: usage)
    assert memory.process_peak() == 300
