"""Floor 5: the command line. ``coachhook COMMAND --help`` tells what each command does.

Exit status: 0 done, 1 failed while working, 2 bad usage or bad input (nothing was changed).
Results go to stdout, as text or with ``--json`` as one JSON value; progress and messages to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from coachhook._version import __version__
from coachhook.cli import ask, demo, diagnose, edit, export, folder, stats, suggest
from coachhook.cli.common import FailedError, InputError, log
from coachhook.errors import CoachhookError, FactsError

_DESCRIPTION = """\
Rewrite facts inside a frozen language model, batch after batch, without retraining.

  coachhook demo                 watch it work on a small bundled model, in about a minute
  coachhook stats MODEL ...      1. measure the model once on plain text
  coachhook edit MODEL FACTS ... 2. write facts into hooks beside the model
  coachhook eval MODEL ...       3. measure what changed and what did not
  coachhook generate MODEL ...   4. ask the edited model
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Imports nothing heavy, so that help is quick."""
    parser = argparse.ArgumentParser(
        prog="coachhook",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit status: 0 done, 1 failed while working, 2 bad usage or bad input",
    )
    parser.add_argument("--version", action="version", version=f"coachhook {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (demo, stats, suggest, edit, ask, folder, export, diagnose):
        module.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` by default.

    Returns:
        The exit status. Bad usage leaves through ``SystemExit(2)``, as argparse does.
    """
    # Where they are closed what is said goes nowhere, and no file that is opened takes their place.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (InputError, FactsError) as error:
        log(f"coachhook {args.command}: {error}")
        return 2
    except BrokenPipeError:
        # Whoever read the output has enough, as `head` has. What is still buffered goes nowhere, or
        # Python complains when it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FailedError, CoachhookError, OSError) as error:
        log(f"coachhook {args.command}: failed: {error}")
        return 1
    except KeyboardInterrupt:
        log(f"coachhook {args.command}: interrupted")
        return 130
