"""``coachhook inspect`` and ``revert``: what is done with a folder of ours."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coachhook.cli.ask import check_window
from coachhook.cli.common import (
    FailedError,
    InputError,
    add_command,
    checking,
    emit,
    open_model,
    positive_int,
    show,
)

if TYPE_CHECKING:
    from coachhook.inspecting import GatePicture

_INSPECT = """\
Shows what a folder of edits holds: batches, thresholds, ranks, sizes on disk. With --model and
--text also which tokens of a text take the hook in which layer, as text or as a picture (--out).
Of a folder of statistics it shows tokens, layers, shrinkage and sizes on disk.
"""

_SITES = {"down_proj": "down-projections", "mlp": "whole MLPs"}


def register(commands: Any) -> None:
    """Adds the commands."""
    parser = add_command(commands, "inspect", "look into a folder of edits or statistics", _INSPECT)
    parser.add_argument("folder", type=Path, metavar="EDITS_OR_STATS")
    parser.add_argument("--model", metavar="MODEL", help="the edited model, for --text")
    parser.add_argument(
        "--text", action="append", metavar="TEXT", help="a text to run the gates on; repeatable"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="picture of the gates, .png or .html"
    )
    parser.add_argument("--facts", action="store_true", help="also list every fact of every batch")
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


def run_inspect(args: argparse.Namespace) -> int:
    """Summary of a folder, and the gates over texts."""
    from coachhook.inspecting import save_pictures, to_text
    from coachhook.store import folder_kind

    with checking():
        if folder_kind(args.folder) == "statistics":
            return _inspect_statistics(args)
        summary = _summary(args.folder)
        _check_picture(args)
    pictures = _pictures(args) if args.text else []
    if args.out is not None:
        save_pictures(pictures, args.out)
    if args.json:
        emit({**summary, "gates": [picture.to_dict() for picture in pictures]})
        return 0
    _show_summary(summary, facts=args.facts)
    for picture in pictures:
        show(f"\n{picture.text}\n{to_text(picture)}")
    if args.out is not None:
        show(f"\npicture: {args.out}")
    return 0


def _pictures(args: argparse.Namespace) -> list[GatePicture]:
    from coachhook.editing import attach
    from coachhook.inspecting import gate_pictures

    with checking():
        model, tokenizer = open_model(args)
        check_window(model, tokenizer, args.text)
        handle = attach(model, args.folder)
    with handle:
        return gate_pictures(model, tokenizer, handle.hooks, args.text)


def _check_picture(args: argparse.Namespace) -> None:
    if bool(args.text) != bool(args.model):
        raise InputError("--text and --model go together: the gates are run on the model")
    if not all(text.strip() for text in args.text or ()):
        raise InputError("--text must not be empty")
    if args.out is None:
        return
    if not args.text:
        raise InputError("--out is a picture of the gates and needs --model and --text")
    from coachhook.inspecting import check_picture_path

    check_picture_path(args.out)


def _summary(path: Path) -> dict[str, Any]:
    """What the manifest of an EDITS folder says."""
    from coachhook.store import folder_sizes, read_manifest

    manifest = read_manifest(path, "edits")
    batches = [
        {
            "batch": int(number),
            "edits": len(batch["requests"]),
            "not_converged": batch["converged"].count(False),
            "bounds": batch["bounds"],
            "requests": batch["requests"],
        }
        for number, batch in manifest["batches"].items()
    ]
    layers = [
        {
            "layer": int(index),
            "alpha": layer["alpha"],
            "storage": layer["kind"],
            "rank": layer["rank"],
            "population": layer["population"],
        }
        for index, layer in manifest["layers"].items()
    ]
    sizes = folder_sizes(path, "edits")
    return {
        "edits": sum(len(batch["requests"]) for batch in manifest["batches"].values()),
        "model": manifest["model"],
        "fingerprint": manifest["fingerprint"],
        "version": manifest["coachhook_version"],
        "bytes": sizes.total,
        "sizes": asdict(sizes)["groups"],
        "config": manifest["config"],
        "layers": layers,
        "batches": batches,
    }


def _show_summary(summary: dict[str, Any], *, facts: bool) -> None:
    from coachhook.evaluation.report import table

    config = summary["config"]
    show(
        f"{summary['edits']} edits in {len(summary['batches'])} batches, "
        f"{summary['bytes'] / 1e6:.1f} MB, written by coachhook {summary['version']}"
    )
    show(f"model {summary['model'] or '(unnamed)'}, fingerprint {summary['fingerprint']}")
    show(
        f"scope {config['scope']}, covariance weight {config['covariance_weight']:g}, "
        f"initial alpha {config['alpha']:g}\n"
    )
    names = ("layer", "alpha", "storage", "rank")
    show(table(names, [[layer[name] for name in names] for layer in summary["layers"]]))
    show()
    indices = [layer["layer"] for layer in summary["layers"]]
    rows = [
        [
            batch["batch"],
            batch["edits"],
            batch["not_converged"],
            *(batch["bounds"].get(str(index)) for index in indices),
        ]
        for batch in summary["batches"]
    ]
    # A bound is the smallest over a batch's prompts of the largest score: the gate opens for all
    # of them where alpha is not above it.
    headers = ["batch", "edits", "not converged", *(f"bound, layer {i}" for i in indices)]
    show(table(headers, rows))
    _show_sizes(summary)
    if facts:
        for batch in summary["batches"]:
            show(f"\nbatch {batch['batch']}")
            rows = [[r["prompt"], r["subject"], r["target_new"]] for r in batch["requests"]]
            show(table(["prompt", "subject", "target"], rows))


def _inspect_statistics(args: argparse.Namespace) -> int:
    """Summary of a folder of statistics."""
    from coachhook.evaluation.report import table

    if args.model or args.text or args.out or args.facts:
        raise InputError(
            f"--model, --text, --out and --facts are for a folder of edits, got statistics in "
            f"{args.folder}"
        )
    summary = _statistics_summary(args.folder)
    if args.json:
        emit(summary)
        return 0
    show(
        f"statistics of {summary['tokens']} tokens, {summary['bytes'] / 1e6:.1f} MB, written by "
        f"coachhook {summary['version']}"
    )
    show(f"model {summary['model'] or '(unnamed)'}, fingerprint {summary['fingerprint']}")
    show(f"keys are inputs of {_SITES[summary['key_site']]}\n")
    names = ("layer", "width", "shrinkage", "sample")
    rows = [
        [row["layer"], row["width"], _shrinkage(row["shrinkage"]), row["sample"]]
        for row in summary["layers"]
    ]
    show(table(names, rows))
    _show_sizes(summary)
    return 0


def _shrinkage(rho: float | None) -> str:
    return "none" if rho is None else f"{rho:.4f}"


def _statistics_summary(path: Path) -> dict[str, Any]:
    from coachhook.statistics import Statistics
    from coachhook.store import folder_sizes, read_manifest

    statistics = Statistics.load(path)
    sizes = folder_sizes(path, "statistics")
    layers = [
        {
            "layer": layer,
            "width": statistics.covariances.order(layer),
            "shrinkage": statistics.shrinkage.get(layer),
            "sample": len(statistics.samples.get(layer, ())),
        }
        for layer in statistics.layers
    ]
    return {
        "tokens": statistics.tokens,
        "key_site": statistics.key_site,
        "model": statistics.meta.get("model"),
        "fingerprint": statistics.fingerprint,
        "version": read_manifest(path, "statistics")["coachhook_version"],
        "bytes": sizes.total,
        "sizes": asdict(sizes)["groups"],
        "meta": statistics.meta,
        "layers": layers,
    }


def _show_sizes(summary: dict[str, Any]) -> None:
    from coachhook.evaluation.report import table

    groups = summary["sizes"]
    rows = [[g["name"], g["dtype"], g["tensors"], f"{g['bytes'] / 1e6:.2f}"] for g in groups]
    rest = summary["bytes"] - sum(g["bytes"] for g in groups)
    rows.append(["manifest, headers", "", "", f"{rest / 1e6:.2f}"])
    rows.append(["all", "", "", f"{summary['bytes'] / 1e6:.2f}"])
    show()
    show(table(["on disk", "dtype", "tensors", "MB"], rows))


def run_revert(args: argparse.Namespace) -> int:
    """Takes one batch back in the folder."""
    from coachhook.editing import revert_folder

    with checking():
        before = _summary(args.edits)
        numbers = [batch["batch"] for batch in before["batches"]]
        if args.batch not in numbers:
            raise InputError(f"--batch must be one of {numbers}, got {args.batch}")
        try:
            revert_folder(args.edits, args.batch)  # whole or not at all
        except OSError as error:  # such as a full disk: the input was good
            raise FailedError(str(error)) from error
    after = _summary(args.edits)
    left = [batch["batch"] for batch in after["batches"]]
    if args.json:
        emit({"reverted": args.batch, "edits": after["edits"], "batches": left})
    else:
        taken = before["edits"] - after["edits"]
        show(f"batch {args.batch} taken back ({taken} edits); {after['edits']} edits are left")
    return 0
