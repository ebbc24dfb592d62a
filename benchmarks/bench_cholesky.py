"""pytest-benchmark face of ``coachhook bench cholesky``.

    pytest benchmarks/bench_cholesky.py --benchmark-group-by=param:case

Ratios are to be read from ``coachhook bench cholesky --json``, which times op, floor and peer in
turns; here each is timed on its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coachhook.bench.cholesky import cases

CASES = {
    f"{case.op} {case.shape} {str(case.dtype).removeprefix('torch.')}": case
    for case in cases(torch.device("cpu"), None, True)
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["run", "floor", "peer"])
def test_cholesky(benchmark: Any, case: str, what: str) -> None:
    function = getattr(CASES[case], what)
    with torch.inference_mode():
        benchmark(function)
