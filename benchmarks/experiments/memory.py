"""The memory of the process itself; imports nothing large, so that a small process can ask."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def process_peak() -> float:
    """Largest resident memory of this process so far, in MiB."""
    if _STATUS.is_file():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    # Only where there is no such line: this survives fork and exec, so that a run started by a
    # process that was larger than it gets the peak of that process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
