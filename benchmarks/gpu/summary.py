"""Writes summary.json: what ran where, and how each stage ended. Used by run.sh.

The lists that the benchmarks appended to bench.json become one.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any


def output(*command: str) -> str | None:
    """First line of a command's output, or None where it does not run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return (result.stdout.splitlines() or [""])[0]


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def merge(path: Path) -> None:
    """Join the JSON lists that follow one another in a file; what was cut off is left out."""
    rest, rows = path.read_text(encoding="utf-8").strip(), []
    while rest:
        try:
            found, end = json.JSONDecoder().raw_decode(rest)
            rows += found
        except json.JSONDecodeError as error:
            print(f"{path.name}: {error}")
            end = rest.find("\n[") % (len(rest) + 1)  # the next list, or the end
        rest = rest[end:].strip()
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def main(stages: Path, out: Path) -> int:
    if (out / "bench.json").exists():
        merge(out / "bench.json")
    query = ("nvidia-smi", "--format=csv,noheader")
    rows = [line.split() for line in stages.read_text(encoding="utf-8").splitlines()]
    ended: list[dict[str, Any]] = [
        {"stage": n, "status": int(s), "seconds": int(t)} for n, s, t in rows
    ]
    changed = output("git", "status", "--porcelain")
    summary = {
        "gpu": output(*query, "--query-gpu=name"),
        "driver": output(*query, "--query-gpu=driver_version"),
        "memory": output(*query, "--query-gpu=memory.total"),
        "commit": os.environ.get("COMMIT") or output("git", "rev-parse", "HEAD"),
        "changed_since_commit": None if changed is None else bool(changed),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "triton", "transformers", "numpy")},
        "stages": ended,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for stage in ended:
        verdict = {0: "ok", 125: "left out"}.get(stage["status"], f"FAILED ({stage['status']})")
        print(f"{stage['stage']:<20}{stage['seconds']:>5} s  {verdict}")
    return int(any(stage["status"] for stage in ended))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
