"""``coachhook export``: the edits without their gate, for software that knows no hooks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coachhook.cli.common import (
    FailedError,
    add_command,
    checking,
    emit,
    open_model,
    positive_int,
    show,
)

_DESCRIPTION = """\
Writes the edits into weights that other software loads:
  merged  a whole model and its tokenizer, W0 + Delta in the edited layers, for transformers
  lora    an adapter folder, B A = Delta at the edited layers, for peft

Both lose the gate: the correction then acts on every token of every text, related or not. So the
facts in EDITS are asked before and after, their paraphrases and neighbours too where EDITS has
them, and perplexity is measured on unrelated text; the result shows what is lost, and is kept in
DIR as coachhook_export.json. To keep the gate, load the edits beside the model instead:
coachhook.attach(model, EDITS).
"""
# Below this share of Delta a rounding is not worth a line.
_NOTICED = 0.01
# How many times the edits' own weight was best in docs/export.md.
_HEAVIER = 30


def register(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "export", "write the edits, without their gate, as weights", _DESCRIPTION
    )
    parser.add_argument("edits", type=Path, metavar="EDITS", help="folder written by `edit`")
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="the edited model, local folder or hub name"
    )
    parser.add_argument("--format", required=True, choices=("merged", "lora"))
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="new or empty folder to write"
    )
    parser.add_argument(
        "--rank",
        type=positive_int,
        metavar="R",
        help="of a lora adapter, at most: the best approximation (default: all of Delta)",
    )
    parser.add_argument(
        "--covariance-weight",
        type=float,
        metavar="X",
        help="fit Delta again, for use without a gate, with this lambda instead of the edits' own; "
        "a larger one keeps more of other text (scope membership only)",
    )
    parser.add_argument(
        "--measure",
        type=int,
        default=100,
        metavar="N",
        help="most facts of EDITS to ask for (default: 100; 0: measure nothing)",
    )
    parser.add_argument(
        "--text",
        metavar="FILE_OR_DIR",
        help="plain text; what names an edited subject is left out (default: that of the bundled "
        "model, about an invented world)",
    )
    parser.add_argument(
        "--text-tokens",
        type=positive_int,
        default=10_000,
        metavar="N",
        help="tokens of it to use (default: 10000)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Checks everything, measures, writes."""
    with checking():
        from coachhook.integrations import Export
        from coachhook.integrations.export import check_export
        from coachhook.store import read_manifest

        settings = {
            "format": args.format,
            "rank": args.rank,
            "covariance_weight": args.covariance_weight,
            "measure": args.measure,
        }
        check_export(args.out, **settings)  # before the model is read, which may take long
        manifest = read_manifest(args.edits, "edits")
        model, tokenizer = open_model(args)
        export = Export(
            model,
            tokenizer,
            args.edits,
            args.out,
            text=args.text,
            text_tokens=args.text_tokens,
            progress=not args.json,
            **settings,
        )
    try:
        report = export.run()
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        raise FailedError(f"{type(error).__name__}: {error}\nnothing was written") from error
    if args.json:
        emit(report)
    else:
        _print(args, report, manifest["config"])
    return 0


def _print(args: argparse.Namespace, report: dict[str, Any], config: dict[str, Any]) -> None:
    from coachhook.evaluation.report import table

    what = "model" if report["format"] == "merged" else "LoRA adapter"
    show(
        f"{what} with {report['edits']} edited facts in {report['out']}, {report['dtype']}, "
        f"{report['bytes'] / 1e6:.1f} MB\n"
    )
    lora = report["format"] == "lora"
    columns = {
        "layer": "layer",
        "module": "module",
        **({"rank": "rank"} if lora else {}),
        "weight_norm": "|W0|",
        "delta_norm": "|Delta|",
        "error": "left out",
    }
    rows = [
        [layer[name] if name != "error" else f"{layer[name]:.1e}" for name in columns]
        for layer in report["layers"]
    ]
    show(table(list(columns.values()), rows))
    worst = max(layer["error"] for layer in report["layers"])
    if worst > _NOTICED:
        cause = f"The rank {args.rank}" if lora else f"Rounding to {report['dtype']}"
        remedy = "a larger --rank" if lora else "--dtype float32"
        show(f"\n{cause} leaves out {100 * worst:.1f} % of Delta; {remedy} would keep it.")
    show("\nThe gate is not part of an export: the correction acts on every token of every text.\n")
    if report["measured"] is None:
        show("Not measured; to keep the gate: coachhook.attach(model, EDITS)")
        return
    _print_measured(report["measured"])
    show("\nWhere the last column is not enough, keep the gate: coachhook.attach(model, EDITS)")
    if config["scope"] == "membership" and report["covariance_weight"] is None:
        heavier = _HEAVIER * config["covariance_weight"]
        show(f"Or fit the correction for use without one: --covariance-weight {heavier:g}")


def _print_measured(found: dict[str, Any]) -> None:
    from coachhook.evaluation.report import percent, table

    states = ("unedited", "gated", "exported")
    labels = {
        "reliability": "edited facts answered as wanted",
        "generality": "the same, asked in other words",
        "locality": "other facts answered as before",
    }
    rows = [
        [label, *(percent(found[state]["generated"][name]) for state in states)]
        for name, label in labels.items()
    ]
    rows.append(
        ["next tokens of the text unchanged", *(percent(found[s]["unchanged"]) for s in states)]
    )
    rows.append(["perplexity on the text", *(f"{found[s]['perplexity']:.4g}" for s in states)])
    ratios = (f"{found[s]['perplexity_ratio']:.4f}" for s in states)
    rows.append(["  as a multiple of the unedited", *ratios])
    source = "the bundled text" if found["text"] == "bundled" else found["text"]
    show(
        f"{found['facts']} of the facts, {found['paraphrases']} paraphrases and "
        f"{found['neighborhood']} neighbourhood prompts, answered greedily;\n"
        f"{found['text_tokens']} tokens of {source}:\n"
    )
    show(table(["", "unedited", "with the gate", "exported"], rows))
