"""Editing systems side by side, one command for each experiment.

    python -m benchmarks.experiments consecutive MODEL FACTS... --text TEXT --out DIR

single       every batch on the unedited model: what one batch does
consecutive  batch after batch on the same model: what a thousand edits leave of the first
ablation     the same with many checkpoints: our gate, no gate, MEMIT
zscores      how far the gate tells edited keys from all others
report       the report of a folder again, from what is there

Every run is a process of its own and goes on where it was cut off: give the same command again.
DIR gets results.csv, results.jsonl, checkpoints.csv, figures and report.html.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments import checks, plan
from benchmarks.experiments.systems import TITLES, known_systems


def numbers(text: str) -> list[int]:
    """Argument type: positive integers such as ``1,10,30``."""
    try:
        found = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers such as 1,10, got {text!r}") from None
    if min(found, default=1) < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text!r}")
    return found


def setting(text: str) -> tuple[str, str, Any]:
    """Argument type: ``SYSTEM.NAME=VALUE``, the value as JSON or as it stands."""
    name, equals, value = text.partition("=")
    system, dot, field = name.partition(".")
    if not equals or not dot or system not in known_systems():
        raise argparse.ArgumentTypeError(
            f"must be SYSTEM.NAME=VALUE with a system of {', '.join(known_systems())}, got {text!r}"
        )
    try:
        return system, field, json.loads(value)
    except json.JSONDecodeError:
        return system, field, value


def settings_of(changes: Sequence[tuple[str, str, Any]]) -> dict[str, dict[str, Any]]:
    """System -> its changed settings."""
    found: dict[str, dict[str, Any]] = {}
    for system, field, value in changes:
        found.setdefault(system, {})[field] = value
    return found


def build_parser() -> argparse.ArgumentParser:
    """The parser of all experiments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, (systems, size, checkpoints) in plan.DEFAULTS.items():
        experiment = commands.add_parser(name)
        add = experiment.add_argument
        add("model", metavar="MODEL", help="local folder or hub name")
        add("facts", nargs="+", type=Path, metavar="FACTS", help="facts files; they are mixed")
        add(
            "--text",
            required=True,
            type=Path,
            help="plain text: statistics from its beginning, unrelated text from its end",
        )
        add("--out", required=True, type=Path, metavar="DIR")
        add("--stats", type=Path, help="folder of `coachhook stats`; without it, they are made")
        add("--tokens", type=int, default=60_000, help="tokens of the statistics")
        add("--known", type=Path, help="JSON: which records the model knows")
        add("--count", type=int, metavar="N", help="facts to edit (default: all)")
        add(
            "--systems",
            type=lambda text: text.split(","),
            default=list(systems),
            help=f"of {', '.join(TITLES)} (default: {','.join(systems)})",
        )
        add("--batch-sizes", type=numbers, default=[size], help=f"(default: {size})")
        add(
            "--checkpoints",
            type=numbers,
            default=list(checkpoints),
            help="facts after which all so far are measured",
        )
        add(
            "--first",
            type=int,
            help="facts whose retention is followed (default: the first batch, at least 10)",
        )
        add("--sample", type=int, help="facts measured in full at the end (default: all)")
        add(
            "--set",
            dest="changes",
            type=setting,
            action="append",
            default=[],
            metavar="SYSTEM.NAME=VALUE",
            help="a setting of a system, repeatable",
        )
        add("--text-tokens", type=int, default=20_000, help="tokens of unrelated text")
        add("--seed", type=int, default=0)
        add("--save-every", type=float, default=60.0, metavar="SECONDS")
        add("--evaluation-batch", type=int, default=64)
        add("--device", default="cpu")
        add("--dtype", default="float32")
    again = commands.add_parser("report")
    again.add_argument("out", type=Path, metavar="DIR")
    run = commands.add_parser("run")
    run.add_argument("folder", type=Path)
    return parser


def refuse(args: argparse.Namespace, error: Exception) -> int:
    """Says in one line what is wrong with the input; the exit status."""
    print(f"{args.experiment}: {' '.join(str(error).splitlines())}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs an experiment; exit status as of `coachhook`."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    if args.experiment == "run":
        from benchmarks.experiments import worker

        try:
            with plan.locked(args.folder):
                worker.main(args.folder)
        except plan.ExperimentError as error:
            return refuse(args, error)
        return 0
    from benchmarks.experiments.report import write_report

    if args.experiment == "report":
        try:
            print(write_report(args.out))
        except (plan.ExperimentError, OSError) as error:
            return refuse(args, error)
        return 0
    args.settings = settings_of(args.changes)
    kept = f"what is done is in {args.out}; give the same command again to go on"
    begun = False
    try:
        checks.check_arguments(args)
        inputs = plan.read_inputs(args)
        args.out.mkdir(parents=True, exist_ok=True)
        with plan.locked(args.out):
            shared = plan.prepare(args, inputs)
            begun = True
            del inputs  # the runs need the model's memory
            command = shlex.join(["python", "-m", "benchmarks.experiments", *words])
            (args.out / "command.txt").write_text(command + "\n", encoding="utf-8")
            results = plan.run_all(args.out, plan.specs(args, shared))
            print(write_report(args.out))
    except (plan.ExperimentError, ValueError, OSError) as error:
        if begun and isinstance(error, OSError):  # a full disk, say
            print(f"{args.experiment}: failed: {error}; {kept}", file=sys.stderr)
            return 1
        return refuse(args, error)
    except KeyboardInterrupt:
        print(f"{args.experiment}: interrupted; {kept}", file=sys.stderr)
        return 130
    failed = [run for run in results if "error" in run]
    for run in failed:
        print(f"{run['spec']['label']}: failed: {run['error']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
