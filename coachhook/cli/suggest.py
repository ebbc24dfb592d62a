"""``coachhook suggest-layers``: which layer to edit, found by probing."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from coachhook.cli.common import (
    InputError,
    add_command,
    add_facts,
    checking,
    command_line,
    emit,
    fitting_requests,
    layer_list,
    open_model,
    positive_int,
    read_records,
    show,
)

_DESCRIPTION = """\
For a sample of FACTS, puts the optimised target in at the last subject token of each layer's block,
without writing any weights, and asks the facts and their paraphrases. Where the answer follows, the
layer can be edited; where also the keys of a paraphrase are nearest to those of its own fact, the
edit will be found again. Takes about a second for each fact and layer of a small model on a CPU.
"""
_SAMPLE = 24


def register(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "suggest-layers", "which layer to edit, found by probing", _DESCRIPTION
    )
    parser.add_argument("model", metavar="MODEL", help="local folder or hub name")
    add_facts(parser)
    parser.add_argument(
        "--layers", type=layer_list, metavar="0,1,2", help="candidates (default: all)"
    )
    parser.add_argument(
        "--sample",
        type=positive_int,
        default=_SAMPLE,
        metavar="N",
        help=f"facts to ask, spread over FACTS (default: {_SAMPLE})",
    )
    parser.add_argument(
        "--target-steps", type=positive_int, metavar="N", help="most steps of a target"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Probes the layers and prints a table and the advice."""
    from coachhook.cli.edit import unfit_prompts
    from coachhook.editing import EditConfig
    from coachhook.evaluation.layers import suggest_layers
    from coachhook.evaluation.metrics import long_prompts
    from coachhook.models import describe

    with checking():
        facts = read_records(args)
        facts = facts.some(spread(len(facts.requests), args.sample))
        model, tokenizer = open_model(args)
        description = describe(model)
        for layer in args.layers or []:
            description.layer(layer)
        problems = unfit_prompts(model, tokenizer, facts.requests, EditConfig.for_model(model))
        # Their neighbours are not asked.
        asked = [replace(r, neighborhood=(), neighborhood_targets=()) for r in facts.requests]
        problems = long_prompts(model, tokenizer, asked) | problems
        requests = fitting_requests(args, facts, problems)
        if not any(r.paraphrases for r in requests):
            raise InputError(
                "FACTS must hold paraphrases: without them every layer that gives the answer "
                "looks alike"
            )
    steps = {} if args.target_steps is None else {"target_steps": args.target_steps}
    advice = suggest_layers(model, tokenizer, requests, layers=args.layers, **steps)
    if args.json:
        emit(advice.to_dict())
        return 0
    _print(args, advice)
    return 0


def spread(total: int, wanted: int) -> list[int]:
    """``wanted`` places spread evenly over ``total``, or all of them."""
    wanted = min(wanted, total)
    return [i * total // wanted for i in range(wanted)]


def _print(args: argparse.Namespace, advice: Any) -> None:
    from coachhook.evaluation.report import table

    headers = ("layer", "reliability", "generality", "addressed", "score", "")
    rows = [
        [
            probe.layer,
            probe.reliability,
            probe.generality,
            probe.addressed,
            probe.score,
            "<- edit here" if probe.layer == advice.layer else "",
        ]
        for probe in advice.probes
    ]
    show(f"{advice.facts} facts, {advice.paraphrases} paraphrases that name the subject\n")
    show(table(headers, rows))
    show()
    show(f"edit it: {command_line(args, 'edit', '--layers', advice.layer)} ...")
