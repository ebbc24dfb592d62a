"""``coachhook edit``: write facts into hooks, batch after batch."""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coachhook.cli.common import (
    FailedError,
    InputError,
    add_command,
    add_facts,
    batches,
    check_output,
    checking,
    command_line,
    emit,
    fitting_requests,
    layer_list,
    log,
    number_list,
    open_model,
    positive_int,
    read_records,
    show,
)

if TYPE_CHECKING:
    from coachhook.editing import EditConfig, Editor, EditRequest

_DESCRIPTION = """\
Edits a model in consecutive batches and keeps the edits in a folder of their own; the model's files
are never touched. All input is checked before the first batch. After every batch the folder holds
everything done so far, so an interrupted run goes on with --resume; the same option adds the facts
of another file to a finished folder.
"""

# EditConfig fields that can be set from the command line, with their types or choices.
_OVERRIDES: dict[str, tuple[Any, str]] = {
    "covariance_weight": (float, "weight lambda of the covariance"),
    "ridge": (float, "share of the covariance's mean diagonal added to its diagonal"),
    "alpha": (float, "initial gate threshold"),
    "alpha_ceiling": (float, "membership scope: highest threshold of a single edit"),
    "alpha_cued": (float, "threshold of an edit that has a cue, at a token of its subject"),
    "alpha_answer": (float, "the same at a prompt's last token and in the target"),
    "false_fire": (float, "population scope: share of unrelated tokens that may fire"),
    "target_steps": (positive_int, "most optimisation steps of a target"),
    "target_lr": (float, "learning rate of a target"),
    "target_betas": (
        number_list,
        "what Adam's mean gradient and mean square gradient keep in a step, such as 0.4,0.95",
    ),
    "target_loss_layer": (int, "layer whose output is judged while a target is optimised"),
    "target_weight_decay": (float, "weight decay of a target"),
    "target_clamp": (float, "largest change of a target, as a share of its norm"),
    "target_kl": (float, "weight of the KL term of a target"),
    "target_stop": (float, "a target is done when its loss is below this"),
    "target_progress": (float, "and leaves a place where two steps lower it by a smaller share"),
    "rewordings": (int, "most of the model's own rewordings that a target must hold in; 0: none"),
    "places": (
        lambda text: text.split(","),
        "where a fact may be written, in the order they are taken",
    ),
    "max_rank": (positive_int, "largest rank of a factored hook"),
    "max_keys": (positive_int, "keys kept apart before the oldest are folded away"),
}
_CHOICES = {
    "scope": ("sequence", "prefix", "population", "membership"),
    "storage": ("auto", "dense", "factored"),
    "key_pooling": ("mean", "each"),
    "correction": ("own", "sum"),
    "sharing": ("even", "first"),
    "target_scaling": ("coordinate", "vector"),
    "state_dtype": ("float64", "float32"),
}
_SWITCHES = {
    "include_padding": "count padded positions in the gate's statistics",
    "cues": "an edit fires only soon after its subject's earlier tokens, or its subject",
    "target_ends_word": "a target's last word must end with it: Lyon must not go on to Lyons",
}
_SAMPLES = 3


def register(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "edit", "write facts into hooks beside the model", _DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="local folder or hub name")
    add_facts(parser)
    parser.add_argument(
        "--stats", type=Path, metavar="STATS", help="folder written by `coachhook stats`"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="EDITS", help="folder to write")
    parser.add_argument("--batch-size", type=positive_int, default=10, metavar="N")
    parser.add_argument(
        "--preset",
        choices=("default", "paper"),
        help="settings: ours (default), or the published algorithm's",
    )
    parser.add_argument("--layers", type=layer_list, metavar="0,1,2", help="layers to edit")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with EDITS: its settings hold, facts it already has are left out",
    )
    group = parser.add_argument_group("settings (default: those of the preset)")
    for name, choices in _CHOICES.items():
        group.add_argument(f"--{name.replace('_', '-')}", choices=choices)
    for name, help in _SWITCHES.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            action=argparse.BooleanOptionalAction,
            default=None,
            help=help,
        )
    for name, (kind, help) in _OVERRIDES.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=help)
    group.add_argument(
        "--context",
        action="append",
        metavar="TEMPLATE",
        help='context template with one {}, repeatable; the bare "{}" comes first by itself',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Checks everything, then edits batch after batch."""
    from coachhook.store import read_manifest

    with checking():
        overrides = _overrides(args)
        facts = read_records(args)
        resumed = check_output(args.out, resume=args.resume)
        if not resumed and args.stats is None:
            raise InputError("--stats is needed; `coachhook stats` writes it")
        # Before the model is read, which may take long.
        read_manifest(*((args.out, "edits") if resumed else (args.stats, "statistics")))
        model, tokenizer = open_model(args)
        start = _resume if resumed else _start
        editor = start(args, model, tokenizer, overrides)
        problems = unfit_prompts(model, tokenizer, facts.requests, editor.config)
        requests = fitting_requests(args, facts, problems)
        todo = _not_yet(editor, requests) if resumed else requests
    summary = _edit(args, editor, todo)
    summary["already_there"] = len(requests) - len(todo)
    summary["samples"] = _samples(model, tokenizer, editor, todo)
    if args.json:
        emit(summary)
    else:
        _print(args, summary)
    return 0


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    names = [*_OVERRIDES, *_CHOICES, *_SWITCHES, "layers"]
    values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name.replace('_', '-')} must be finite, got {value}")
    if args.context:
        values["contexts"] = ("{}", *(c for c in args.context if c != "{}"))
    return values


def _start(
    args: argparse.Namespace, model: Any, tokenizer: Any, overrides: dict[str, Any]
) -> Editor:
    from coachhook.editing import Editor
    from coachhook.statistics import Statistics

    statistics = Statistics.load(args.stats)
    config = _config(args, model, {**overrides, "key_site": statistics.key_site})
    return Editor(model, tokenizer, statistics=statistics, config=config)


def _config(args: argparse.Namespace, model: Any, overrides: dict[str, Any]) -> EditConfig:
    from coachhook.editing import EditConfig

    preset = EditConfig.paper if args.preset == "paper" else EditConfig.for_model
    return preset(model, **overrides)


def _resume(
    args: argparse.Namespace, model: Any, tokenizer: Any, overrides: dict[str, Any]
) -> Editor:
    """The editor of a finished folder; settings given again must be those of the folder."""
    from coachhook.editing import Editor

    editor = Editor.load(model, tokenizer, args.out)
    kept = editor.config.to_dict()
    asked = _config(args, model, {**overrides, "key_site": kept["key_site"]}).to_dict()
    names = [name for name in kept if args.preset or name in overrides]
    other = [f"{name} {asked[name]!r}" for name in names if asked[name] != kept[name]]
    if other:
        raise InputError(
            f"--resume keeps the settings of {args.out}, got other ones: {', '.join(other)}; "
            "leave them out, or write to another folder"
        )
    return editor


def _not_yet(editor: Editor, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests that the folder does not hold yet, or holds no longer.

    One that is there counts once, and not where a later fact about its prompt has taken its place
    and is not asked for again.
    """
    written = [r for batch in editor.batches.values() for r in batch.requests]
    there = Counter((r.text, r.target_new) for r in written)
    holds = {r.text: r.target_new for r in written}
    last = {r.text: i for i, r in enumerate(requests)}
    todo = []
    for i, request in enumerate(requests):
        fact = request.text, request.target_new
        replaced = last[request.text] == i and holds.get(request.text) != request.target_new
        if there[fact] and not replaced:
            there[fact] -= 1
        else:
            todo.append(request)
    return todo


def unfit_prompts(
    model: Any, tokenizer: Any, requests: Sequence[EditRequest], config: EditConfig
) -> dict[int, list[str]]:
    """Why facts do not fit the model, by their number.

    In one of the contexts, with its target, a prompt is longer than the context window, or the
    tokenizer does not show where its subject ends.
    """
    from coachhook.editing.encoding import encode_requests
    from coachhook.models import describe

    window = describe(model).max_positions
    problems = {}
    for number, request in enumerate(requests):
        try:
            encode_requests(tokenizer, [request], config.contexts, window)
        except ValueError as error:
            name = "" if request.id is None else f" (id {request.id})"
            problems[number] = [f"{request.text[:60]!r}{name}: {error.__cause__ or error}"]
    return problems


def _edit(args: argparse.Namespace, editor: Editor, todo: Sequence[EditRequest]) -> dict[str, Any]:
    total = math.ceil(len(todo) / args.batch_size)
    missed: list[dict[str, Any]] = []
    kept = bool(editor.batches)
    warnings: list[str] = []
    alphas: dict[int, float] = dict(editor.alphas)
    started, done = time.perf_counter(), 0
    for number, batch in enumerate(batches(todo, args.batch_size), start=1):
        try:
            label = None if args.json else f"batch {number}/{total}, targets"
            result = editor.edit(batch, progress=label)
            editor.save(args.out, replace=False)
        except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
            what = f"batch {number} of {total}: {type(error).__name__}: {error}"
            raise FailedError(f"{what}\n{_kept(kept, args.out)}") from error
        except KeyboardInterrupt:
            log(f"interrupted in batch {number} of {total}; {_kept(kept, args.out)}")
            raise
        done, kept = done + len(batch), True
        alphas = result.alphas
        failed = [r for r, ok in zip(batch, result.converged, strict=True) if not ok]
        missed += [{"id": r.id, "prompt": r.text, "target_new": r.target_new} for r in failed]
        for line in result.warnings:
            warnings.append(f"batch {result.batch}: {line}")
            log(f"warning: batch {result.batch}: {line}")
        rate = done / (time.perf_counter() - started)
        log(
            f"batch {number}/{total}: {len(batch)} facts, {len(failed)} not converged, "
            f"{rate:.2f} edits/s, alpha "
            + ", ".join(f"{layer}: {alpha:.3g}" for layer, alpha in alphas.items())
        )
    seconds = time.perf_counter() - started
    return {
        "out": str(args.out),
        "edits": done,
        "batches": total,
        "seconds": seconds,
        "edits_per_second": done / seconds if done else None,
        "alphas": {str(layer): alpha for layer, alpha in alphas.items()},
        "not_converged": missed,
        "warnings": warnings,
    }


def _kept(kept: bool, out: Path) -> str:
    return (
        f"what was written before it is in {out}; go on with --resume"
        if kept
        else "nothing was written"
    )


def _samples(
    model: Any, tokenizer: Any, editor: Editor, requests: Sequence[EditRequest]
) -> list[dict[str, str]]:
    """A few of the facts asked before and after, so that a failed run shows at once."""
    from coachhook.cli.ask import continuations

    chosen = requests[:_SAMPLES]
    prompts = [r.text for r in chosen]
    after = continuations(model, tokenizer, prompts, 8)
    with editor.hooks.disabled():
        before = continuations(model, tokenizer, prompts, 8)
    return [
        {"prompt": r.text, "target_new": r.target_new, "before": b, "after": a}
        for r, b, a in zip(chosen, before, after, strict=True)
    ]


def _print(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    from coachhook.cli.ask import one_line
    from coachhook.evaluation.report import table

    if summary["already_there"]:
        show(f"{summary['already_there']} facts were already in {args.out}")
    if not summary["edits"]:
        show("nothing to do")
        return
    show(
        f"{summary['edits']} facts in {summary['batches']} batches, {summary['seconds']:.1f} s; "
        f"{len(summary['not_converged'])} did not converge; saved in {args.out}"
    )
    show()
    names = ("prompt", "target_new", "before", "after")
    rows = [[one_line(sample[name]) for name in names] for sample in summary["samples"]]
    show(table(["prompt", "wanted", "before", "after"], rows))
    show()
    show(f"measure: {command_line(args, 'eval', '--edits', args.out)}")
