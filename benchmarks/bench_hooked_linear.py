"""pytest-benchmark face of ``coachhook bench hooked_linear``.

    pytest benchmarks/bench_hooked_linear.py --benchmark-group-by=param:case

Runs on the GPU where there is one, on the smaller grid. Ratios are to be read from
``coachhook bench hooked_linear --json``, which times the op, the frozen layer and the peers in
turns, with cold caches and in CUDA graphs; here each is timed on its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coachhook.bench.hooked_linear import cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {
    f"{case.shape} {str(case.dtype).removeprefix('torch.')} {case.backend}": case
    for case in cases(DEVICE, None, DEVICE.type == "cuda")
}
PAIRS = [
    (name, what)
    for name, case in CASES.items()
    for what in ("run", "floor", case.peer_name, *case.more_peers)
]


@pytest.mark.parametrize(("case", "what"), PAIRS)
def test_hooked_linear(benchmark: Any, case: str, what: str) -> None:
    chosen = CASES[case]
    functions = {"run": chosen.run, "floor": chosen.floor, chosen.peer_name: chosen.peer}
    function = (functions | chosen.more_peers)[what]
    if function is None:
        pytest.skip(f"{case} has no {what}")

    def call() -> None:
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        benchmark(call)
