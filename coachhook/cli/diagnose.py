"""``coachhook doctor`` and ``coachhook bench``: what works on this machine, and how fast."""

from __future__ import annotations

import argparse
from typing import Any

from coachhook.cli.common import add_command, checking, emit, show


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
    parser.set_defaults(run=run_bench)
