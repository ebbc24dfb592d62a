"""``coachhook stats``: the key covariance of the editable layers."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coachhook.cli.common import (
    InputError,
    add_command,
    check_output,
    check_text,
    checking,
    chosen_device,
    emit,
    layer_list,
    open_model,
    positive_int,
    show,
)

if TYPE_CHECKING:
    from coachhook.statistics import Statistics

_DESCRIPTION = """\
Reads plain text through the model once and keeps, for each editable layer, the covariance of the
inputs of its down-projection (and a sample of them). Editing needs it to know which directions
unrelated text uses. The same folder serves every later edit of the same weights. With
--key-site mlp the inputs of the whole MLPs are measured, and hooks of later edits lie over those.

Started by torchrun, the processes share the work, one GPU each where there are GPUs:
  torchrun --nproc-per-node 8 -m coachhook stats MODEL --text DIR --out STATS
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
        "*.txt and *.jsonl files are read; a folder written by save_to_disk of the datasets "
        "library; - is standard input",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="STATS", help="folder to write")
    parser.add_argument(
        "--tokens",
        type=positive_int,
        metavar="N",
        help="stop after N tokens (default: all; with --minimal 10 times the layers' width)",
    )
    parser.add_argument(
        "--minimal",
        action="store_true",
        help="a quick start: little text, and covariances shrunk as much as it asks for",
    )
    parser.add_argument(
        "--layers", type=layer_list, metavar="0,1,2", help="layers to measure (default: all)"
    )
    parser.add_argument(
        "--key-site",
        choices=("down_proj", "mlp"),
        default="down_proj",
        help="what the hooks of later edits will lie over (default: %(default)s)",
    )
    parser.add_argument(
        "--store",
        choices=("float64", "float32"),
        default="float64",
        help="number format of the covariances on disk; float32 takes half the room",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run of the same command"
    )
    parser.add_argument(
        "--batch-tokens",
        type=positive_int,
        metavar="N",
        help="tokens in a forward pass, which bounds the memory (default: 2048, on a GPU 8192)",
    )
    parser.add_argument(
        "--checkpoint-seconds",
        type=positive_int,
        default=300,
        metavar="N",
        help="time between two states that --resume can go on from (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Collects and saves the statistics."""
    with _processes(args) as rank:
        statistics = _collect(args)
        if rank == 0:
            _save(args, statistics)
    return 0


def _collect(args: argparse.Namespace) -> Statistics:
    from coachhook.models import describe
    from coachhook.statistics import collect_statistics

    with checking():
        check_text(args.text)
        check_output(args.out)
        if _partial(args).exists() and not args.resume:
            raise InputError(
                f"an interrupted run left {_partial(args)}; go on with --resume, or delete it"
            )
        if args.resume and not _partial(args).exists():
            print(f"{_partial(args)} does not exist: starting anew", file=sys.stderr)
        model, tokenizer = open_model(args)
        for layer in args.layers or []:
            describe(model, args.key_site).layer(layer)
    try:
        return collect_statistics(
            model,
            tokenizer,
            args.text,
            layers=args.layers,
            max_tokens=args.tokens,
            minimal=args.minimal,
            batch_tokens=args.batch_tokens,
            checkpoint_seconds=args.checkpoint_seconds,
            checkpoint_dir=_partial(args),
            resume=args.resume,
            key_site=args.key_site,
        )
    except (TypeError, ValueError) as error:  # of the text or of another run's partial result
        raise InputError(str(error)) from error


def _save(args: argparse.Namespace, statistics: Statistics) -> None:
    import torch

    statistics.save(args.out, dtype=getattr(torch, args.store))
    shutil.rmtree(_partial(args))
    result = {
        "out": str(args.out),
        "tokens": statistics.tokens,
        "layers": statistics.layers,
        "key_site": statistics.key_site,
        "shrinkage": {str(layer): rho for layer, rho in statistics.shrinkage.items()},
        "fingerprint": statistics.fingerprint,
    }
    if args.json:
        emit(result)
        return
    layers = ", ".join(map(str, statistics.layers))
    show(f"{statistics.tokens} tokens through layers {layers}; saved in {args.out}")
    if statistics.shrinkage:
        shown = ", ".join(f"{layer}: {rho:.4f}" for layer, rho in statistics.shrinkage.items())
        show(f"shrinkage, layer by layer: {shown}")


def _partial(args: argparse.Namespace) -> Path:
    out: Path = args.out
    return out.with_name(f"{out.name}.partial")


@contextmanager
def _processes(args: argparse.Namespace) -> Iterator[int]:
    """Joins the processes that torchrun started, if it did; the rank of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    import torch
    import torch.distributed as dist

    with checking():
        if chosen_device(args).startswith("cuda"):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if chosen_device(args).startswith("cuda") else "gloo")
    try:
        yield dist.get_rank()
        # A process that leaves while another still talks to it may be aborted by gloo.
        dist.barrier()
    finally:
        dist.destroy_process_group()
