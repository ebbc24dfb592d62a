"""``coachhook stats``: the key covariance of the editable layers."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from coachhook.cli.common import (
    InputError,
    add_command,
    check_output,
    checking,
    emit,
    layer_list,
    open_model,
    positive_int,
    show,
)

_DESCRIPTION = """\
Reads plain text through the model once and keeps, for each editable layer, the covariance of the
inputs of its down-projection (and a sample of them). Editing needs it to know which directions
unrelated text uses. The same file serves every later edit of the same weights.
"""


def register(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "stats", "measure the model once on plain text", _DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="local folder or hub name")
    parser.add_argument(
        "--text",
        required=True,
        metavar="FILE_OR_DIR",
        help='plain text, one passage a line, or .jsonl with a field "text"; of a folder all '
        "*.txt and *.jsonl files are read; - is standard input",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="STATS", help="folder to write")
    parser.add_argument(
        "--tokens", type=positive_int, metavar="N", help="stop after N tokens (default: all)"
    )
    parser.add_argument(
        "--layers", type=layer_list, metavar="0,1,2", help="layers to measure (default: all)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run of the same command"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Collects and saves the statistics."""
    from coachhook.models import describe
    from coachhook.statistics import collect_statistics, read_texts

    partial = args.out.with_name(f"{args.out.name}.partial")
    with checking():
        if args.text != "-" and next(read_texts(args.text), None) is None:
            raise InputError(f"--text must hold text, got only empty lines in {args.text}")
        check_output(args.out)
        if partial.exists() and not args.resume:
            raise InputError(
                f"an interrupted run left {partial}; go on with --resume, or delete it"
            )
        model, tokenizer = open_model(args)
        for layer in args.layers or []:
            describe(model).layer(layer)
    try:
        statistics = collect_statistics(
            model,
            tokenizer,
            args.text,
            layers=args.layers,
            max_tokens=args.tokens,
            checkpoint_dir=partial,
            resume=args.resume,
        )
    except (TypeError, ValueError) as error:  # of the text or of another run's partial result
        raise InputError(str(error)) from error
    statistics.save(args.out)
    shutil.rmtree(partial)
    result = {
        "out": str(args.out),
        "tokens": statistics.tokens,
        "layers": statistics.layers,
        "fingerprint": statistics.fingerprint,
    }
    if args.json:
        emit(result)
    else:
        layers = ", ".join(map(str, statistics.layers))
        show(f"{statistics.tokens} tokens through layers {layers}; saved in {args.out}")
    return 0
