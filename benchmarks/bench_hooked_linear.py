"""pytest-benchmark face of ``coachhook bench hooked_linear``.

    pytest benchmarks/bench_hooked_linear.py --benchmark-group-by=param:case

Ratios are to be read from ``coachhook bench hooked_linear --json``, which times the op, the frozen
layer and the published hook in turns; here each is timed on its own.
"""

from __future__ import annotations

import pytest
import torch

from coachhook.bench.hooked_linear import cases

CASES = {
    f"{case.shape} {str(case.dtype).removeprefix('torch.')}": case
    for case in cases(torch.device("cpu"), None, False)
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["run", "floor", "peer"])
def test_hooked_linear(benchmark, case, what):
    function = getattr(CASES[case], what)
    with torch.inference_mode():
        benchmark(function)
