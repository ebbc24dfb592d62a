"""What the commands share: arguments, checks of input, output."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coachhook.errors import CoachhookError

if TYPE_CHECKING:
    from coachhook.editing import EditRequest
    from coachhook.evaluation import FactsFile

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


class InputError(Exception):
    """Bad input found before anything was changed: exit status 2."""


class FailedError(Exception):
    """The work itself failed: exit status 1."""


@contextmanager
def checking() -> Iterator[None]:
    """Turns errors raised while input is loaded and checked into :class:`InputError`."""
    try:
        yield
    except (CoachhookError, ValueError, TypeError, ImportError, OSError) as error:
        raise InputError(str(error)) from error


def log(message: str) -> None:
    """Writes a message for people to stderr."""
    print(message, file=sys.stderr, flush=True)


def emit(value: Any) -> None:
    """Writes the result of ``--json`` to stdout; numbers that are not finite become null."""
    text = json.dumps(_strict(value), indent=2, ensure_ascii=False, allow_nan=False)
    if _as_stdout_can(text) != text:
        text = json.dumps(_strict(value), indent=2, allow_nan=False)
    print(text, flush=True)


def _as_stdout_can(text: str) -> str:
    """Text with escapes for what the encoding of stdout lacks, such as that of a Windows pipe."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value


def show(text: str = "") -> None:
    """Writes a result for people to stdout."""
    print(_as_stdout_can(text), flush=True)


def positive_int(text: str) -> int:
    """Argument type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def layer_list(text: str) -> list[int]:
    """Argument type: layer indices such as ``0,1,2``."""
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be layer indices such as 0,1,2, got {text!r}"
        ) from None
    if min(layers) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text!r}")
    return sorted(set(layers))


def number_list(text: str) -> list[float]:
    """Argument type: numbers such as ``0.9,0.999``."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be numbers such as 0.9,0.999, got {text!r}"
        ) from None


def add_command(
    commands: Any, name: str, help: str, description: str | None = None, epilog: str | None = None
) -> argparse.ArgumentParser:
    """Adds a subcommand that has ``--json``, ``--device`` and ``--dtype``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description or help,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="number format of the model's weights (default: auto, as the model's files say)",
    )
    return parser


def add_facts(parser: argparse.ArgumentParser) -> None:
    """Adds FACTS and what belongs to it."""
    parser.add_argument(
        "facts",
        metavar="FACTS",
        help="JSON or JSON Lines: CounterFact, EasyEdit's flat records, zsRE (MEND), or "
        '{"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}',
    )
    parser.add_argument(
        "--format",
        choices=("counterfact", "flat", "zsre", "own"),
        help="format of FACTS (default: recognised)",
    )
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="use the first N good records only"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="report bad records and go on without them"
    )


def read_records(args: argparse.Namespace) -> FactsFile:
    """The facts of a command; every bad record is named, and refused unless ``--skip-bad``."""
    from coachhook.evaluation import read_facts

    facts = read_facts(args.facts, args.format, args.limit)
    for line in facts.warnings:
        log(f"warning: {args.facts}: {line}")
    _leave_out(args, facts)
    return facts


def command_line(args: argparse.Namespace, command: str, *more: object) -> str:
    """A command for the same model and facts, to be pasted into a shell.

    Args:
        args: of a command that takes MODEL and FACTS.
        command: the name of the other one.
        more: what comes behind FACTS.
    """
    words = ["coachhook", command, args.model, args.facts, *more]
    for name in ("format", "limit", "device"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", value]
    if args.dtype != "auto":
        words += ["--dtype", args.dtype]
    if args.skip_bad:
        words.append("--skip-bad")
    return shlex.join(map(str, words))


def fitting_requests(
    args: argparse.Namespace, facts: FactsFile, problems: Mapping[int, Sequence[str]]
) -> list[EditRequest]:
    """The facts that the model can take; the others are named, and refused unless ``--skip-bad``.

    Args:
        args: of the command.
        facts: as :func:`read_records` gives them.
        problems: why it cannot take the others, by their number in ``facts.requests``.
    """
    lines = [f"{facts.places[i]}: {line}" for i in sorted(problems) for line in problems[i]]
    good = [request for i, request in enumerate(facts.requests) if i not in problems]
    _leave_out(args, replace(facts, requests=good, problems=lines))
    return good


def _leave_out(args: argparse.Namespace, facts: FactsFile) -> None:
    from coachhook.evaluation.datasets import bad_records

    if facts.problems and not args.skip_bad:
        raise InputError(
            f"{bad_records(args.facts, facts)}\n"
            "nothing was changed; correct the file, or leave these records out with --skip-bad"
        )
    for line in facts.problems:
        log(f"left out: {args.facts}: {line}")
    if not facts.requests:
        raise InputError(f"{args.facts} holds no good record")


def check_text(text: str) -> None:
    """Refuses ``--text`` without text; does not look at what can be read once only, as a pipe.

    Raises:
        ImportError, InputError, OSError, ValueError: see :func:`coachhook.statistics.read_texts`.
    """
    from coachhook.statistics import read_texts

    if not read_once(text) and next(read_texts(text), None) is None:
        raise InputError(f"--text must hold text, got only empty lines in {text}")


def read_once(text: str) -> bool:
    """Whether ``--text`` is gone once it was read: standard input, or a pipe."""
    path = Path(text)
    return text == "-" or (path.exists() and not (path.is_file() or path.is_dir()))


def open_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and tokenizer of a command, checked for NaN and infinite weights.

    Raises:
        FormatError, OSError, ValueError: see :func:`coachhook.models.load_model`.
        ValueError: the environment asks for a backend that does not exist.
    """
    quiet_transformers()
    from coachhook.models import check_finite, load_model
    from coachhook.ops._backends import environment_backend

    # Else it would be seen at the first op only, when the work has begun.
    environment_backend()
    device = chosen_device(args)
    dtype = None if args.dtype == "auto" else args.dtype
    model, tokenizer = load_model(args.model, device=device, dtype=dtype)
    check_finite(model)
    return model, tokenizer


def chosen_device(args: argparse.Namespace) -> str:
    """The device of a command: the one asked for, else a GPU where torch sees one, else the CPU.

    Raises:
        ValueError: torch knows no such device, or sees none here.
    """
    import torch

    from coachhook.models import usable_device

    device: str = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    usable_device(device, "--device")
    return device


def quiet_transformers() -> None:
    """Leaves stderr to this program's own messages."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_output(path: Path, *, resume: bool | None = None) -> bool:
    """Whether ``--out`` already holds a finished folder; refuses one that cannot be used.

    Args:
        path: the folder.
        resume: of a command that can go on with a finished folder, whether it was asked to.

    Raises:
        InputError: it holds a finished folder and ``resume`` is not on.
        ValueError: it is a file, holds files that are not ours, or cannot be written.
    """
    from coachhook.store import check_writable
    from coachhook.store.folders import MANIFEST, current_folder

    check_writable(path)
    finished = (current_folder(path) / MANIFEST).is_file()
    if finished and not resume:
        remedy = "or delete it" if resume is None else "delete it, or go on with it (--resume)"
        raise InputError(
            f"--out must be a new or empty folder, got a finished one at {path}; choose another "
            f"name, {remedy}"
        )
    return finished


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
