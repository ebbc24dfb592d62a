"""``coachhook inspect``, ``revert`` and ``export``: what is done with a folder of edits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coachhook.cli.common import (
    InputError,
    add_command,
    checking,
    emit,
    log,
    open_model,
    positive_int,
    show,
)

_INSPECT = """\
Shows what a folder of edits holds: batches, thresholds, ranks, sizes. With --model and --text also
which tokens of a text take the hook in which layer, as text or as a picture (--out).
"""


def register(commands: Any) -> None:
    """Adds the commands."""
    parser = add_command(commands, "inspect", "look into a folder of edits", _INSPECT)
    parser.add_argument("edits", type=Path, metavar="EDITS")
    parser.add_argument("--model", metavar="MODEL", help="the edited model, for --text")
    parser.add_argument(
        "--text", action="append", metavar="TEXT", help="a text to run the gates on; repeatable"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="picture of the gates, .png or .html"
    )
    parser.add_argument(
        "--facts", action="store_true", help="also list every fact of every batch"
    )
    parser.set_defaults(run=run_inspect)

    parser = add_command(
        commands,
        "revert",
        "take one batch back",
        "Takes one batch out of a folder of edits, exactly as if it had never been there, in any\n"
        "order. Needs no model.",
    )
    parser.add_argument("edits", type=Path, metavar="EDITS")
    parser.add_argument(
        "--batch", type=positive_int, required=True, metavar="N", help="number shown by `inspect`"
    )
    parser.set_defaults(run=run_revert)

    parser = add_command(
        commands,
        "export",
        "write the edits as merged weights or LoRA (comes with a later version)",
        "Writes the edits, without their gate, as merged weights or as a LoRA adapter.\n"
        "Not in this version: it comes with a later one.",
    )
    parser.add_argument("edits", type=Path, metavar="EDITS")
    parser.add_argument("--model", metavar="MODEL")
    parser.add_argument("--format", choices=("merged", "lora"))
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Says that this command comes later."""
    raise InputError(
        "not in this version; to use the edits, load them beside the model with "
        "coachhook.attach(model, EDITS)"
    )
