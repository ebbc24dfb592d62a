"""``coachhook stats``: the key covariance of the editable layers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coachhook.cli.common import (
    InputError,
    add_command,
    check_output,
    checking,
    emit,
    layer_list,
    log,
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
        type=Path,
        metavar="FILE_OR_DIR",
        help='plain text, one passage a line, or .jsonl with a field "text"; of a folder all '
        "*.txt and *.jsonl files are read",
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
    from coachhook.statistics import collect_statistics

    with checking():
        files = text_files(args.text)
        check_output(args.out)
        model, tokenizer = open_model(args)
        _check_layers(model, args.layers)
        if next(passages(files), None) is None:
            raise InputError(f"--text must hold text, got only empty lines in {args.text}")
    log(f"reading {len(files)} file{'s'[: len(files) > 1]} from {args.text}")
    statistics = collect_statistics(
        model,
        tokenizer,
        passages(files),
        layers=args.layers,
        max_tokens=args.tokens,
        checkpoint_dir=args.out.with_name(args.out.name + ".partial"),
        resume=args.resume,
    )
    statistics.save(args.out)
    result = {
        "out": str(args.out),
        "tokens": statistics.tokens,
        "layers": sorted(statistics.covariances),
        "fingerprint": statistics.fingerprint,
    }
    if args.json:
        emit(result)
    else:
        layers = ", ".join(map(str, result["layers"]))
        show(f"{statistics.tokens} tokens through layers {layers}; saved in {args.out}")
    return 0


def text_files(path: Path) -> list[Path]:
    """The text files at ``path``, in a fixed order.

    Raises:
        InputError: there is no such file, or the folder holds no text.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"--text must be a file or folder, got {path}, which does not exist")
    files = sorted(p for p in path.rglob("*") if p.suffix in {".txt", ".jsonl"} and p.is_file())
    if not files:
        raise InputError(f"--text must hold *.txt or *.jsonl files, got none in {path}")
    return files


def passages(files: list[Path]) -> Iterator[str]:
    """The passages of text files, one at a time.

    Raises:
        InputError: a file is not UTF-8, or a line of a .jsonl file has no "text".
    """
    for path in files:
        with path.open(encoding="utf-8") as lines:
            try:
                for number, line in enumerate(lines, start=1):
                    text = line.rstrip("\n")
                    if path.suffix == ".jsonl" and text.strip():
                        text = _text_field(path, number, text)
                    if text.strip():
                        yield text
            except UnicodeDecodeError as error:
                raise InputError(f"--text must be UTF-8 text, got {path}: {error}") from error


def _text_field(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: must be JSON, got {error.msg}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise InputError(f'{path}, line {number}: must have a string field "text"')
    return str(record["text"])


def _check_layers(model: Any, layers: list[int] | None) -> None:
    from coachhook.models import describe

    description = describe(model)
    for layer in layers or []:
        description.layer(layer)
