"""``coachhook doctor`` and ``coachhook bench``: what works on this machine, and how fast."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from coachhook.cli.common import InputError, add_command, checking, chosen_device, emit, show

if TYPE_CHECKING:
    from coachhook.selftest import Check

# What fits a terminal; --json has the quantiles and the name of the peer too.
_COLUMNS = (
    "op",
    "shape",
    "dtype",
    "device",
    "backend",
    "median_ms",
    "floor_ms",
    "peer_ms",
    "ratio",
)


def register(commands: Any) -> None:
    """Adds the commands."""
    parser = add_command(
        commands, "doctor", "what is available on this machine, what is not and why"
    )
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="also run each op against its reference on this machine; status 1 if one is wrong",
    )
    parser.set_defaults(run=run_doctor)

    parser = add_command(
        commands,
        "bench",
        "time the ops on this machine",
        "Microbenchmarks of the ops, each beside a plain peer and the time the memory or the\n"
        "arithmetic alone would take (floor).",
    )
    parser.add_argument("op", nargs="?", metavar="OP", help="one op only (default: all)")
    parser.add_argument("--quick", action="store_true", help="few sizes, few repeats")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="begin no further case after so long (default: measure all)",
    )
    parser.set_defaults(run=run_bench)


def run_doctor(args: argparse.Namespace) -> int:
    """The report of ``coachhook.doctor``, and the self-test on request."""
    from coachhook.doctor import render, report

    facts = report()
    checks = []
    if args.selftest:
        from coachhook.selftest import selftest

        checks = selftest()
        facts["selftest"] = [check.to_dict() for check in checks]
    if args.json:
        emit(facts)
    else:
        show(render(facts))
        if checks:
            show()
            show(_selftest_table(checks))
    return 0 if all(check.ok for check in checks) else 1


def _selftest_table(checks: list[Check]) -> str:
    from coachhook.evaluation.report import table

    rows = [
        [
            c.op,
            c.case,
            c.backend,
            c.device,
            c.dtype,
            "-" if c.error is None else f"{c.error:.1e}",
            f"{c.tolerance:.0e}",
            "ok" if c.ok else f"WRONG {c.message or ''}".strip(),
        ]
        for c in checks
    ]
    wrong = sum(not c.ok for c in checks)
    verdict = f"{wrong} of {len(checks)} checks failed" if wrong else f"all {len(checks)} checks ok"
    headers = ["op", "case", "backend", "device", "dtype", "error", "allowed", ""]
    return f"{table(headers, rows)}\n\n{verdict}"


def run_bench(args: argparse.Namespace) -> int:
    """The microbenchmarks of ``coachhook.bench``."""
    import torch

    from coachhook import bench
    from coachhook.evaluation.report import table

    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    with checking():
        device = chosen_device(args)
        names = bench.benchmarked_ops()
        if args.op is not None and args.op not in names:
            raise InputError(f"OP must be one of {', '.join(names)}, got {args.op!r}")
        if args.budget is not None and not 0 < args.budget < math.inf:
            raise InputError(
                f"--budget must be positive and finite, got {args.budget}; leave it out to "
                "measure all"
            )
    rows = bench.run(args.op, device=device, dtype=dtype, quick=args.quick, budget=args.budget)
    failed = [row for row in rows if row["error"] is not None]
    if args.json:
        emit(rows)
    elif rows:
        show(table(_COLUMNS, [[_cell(row[name]) for name in _COLUMNS] for row in rows]))
        for row in failed:
            show(f"{row['op']}, {row['shape']}: {row['error']}")
    else:
        show("nothing to time here")
    return 1 if failed else 0


def _cell(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
