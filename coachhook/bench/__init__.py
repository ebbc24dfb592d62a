"""Microbenchmarks of the ops: ``coachhook bench [OP]``.

Each module of this package names its cases with :func:`coachhook.bench.runner.benchmark`.
"""

from __future__ import annotations

from coachhook.bench.runner import Case, benchmark, benchmarked_ops, run, time_alternately

__all__ = ["Case", "benchmark", "benchmarked_ops", "run", "time_alternately"]
