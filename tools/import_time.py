"""Reports what importing coachhook costs beyond torch: one JSON object, medians in seconds."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

REPEATS = 7
STATEMENTS = {
    "import coachhook": "import coachhook",
    "import coachhook.ops": "import coachhook.ops",
    "coachhook.Editor, beyond transformers": "import coachhook; coachhook.Editor",
}
PROGRAM = """
import time
start = time.perf_counter()
import torch
{before}
middle = time.perf_counter()
{statement}
print(middle - start, time.perf_counter() - middle)
"""


def seconds(statement: str, before: str) -> float:
    """Median time of a statement in a fresh process that has torch already."""
    times = []
    for _ in range(REPEATS):
        program = PROGRAM.format(statement=statement, before=before)
        output = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout
        times.append(float(output.split()[1]))
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    result = {
        name: round(seconds(statement, "import transformers" if "transformers" in name else ""), 4)
        for name, statement in STATEMENTS.items()
    }
    print(json.dumps({"repeats": REPEATS, "seconds": result}, indent=2))


if __name__ == "__main__":
    main()
