"""``coachhook demo``: the main job on the bundled model, for someone who has never heard of it."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coachhook.cli.common import (
    add_command,
    batches,
    check_output,
    checking,
    emit,
    log,
    open_model,
    show,
)

if TYPE_CHECKING:
    from coachhook.editing import EditRequest

_DESCRIPTION = """\
Edits a small real language model that comes with the package: a few facts before, three consecutive
batches of edits, the same facts after, asked in other words too, and facts that must not change.
Needs no network and no GPU.
"""

_INTRODUCTION = """\
coachhook demo: change what a language model believes, without training it again

A language model keeps what it knows in its weights. The one used here is small but real:
GPT-2's architecture, {parameters:.1f} million weights, trained on a made-up world of {facts} facts.
We ask it about {count} of them, then write other answers into it, in {batches} batches one after
the other. Its weights are never touched: every batch goes into "hooks" beside a few of its
layers, which answer only where one of the edited facts is meant, and can be taken off again.
"""
_SHOWN = 6
# Enough to settle the covariance of the bundled model's keys; the rest of the text only costs time.
_STATISTICS_TOKENS = 30_000


def register(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "demo", "watch it work on a small bundled model", _DESCRIPTION)
    parser.add_argument(
        "--out", type=Path, metavar="EDITS", help="also keep the edits in this folder"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, edits in consecutive batches, and asks again."""
    import coachhook as ch
    from coachhook import bundled
    from coachhook.evaluation import evaluate

    started = time.perf_counter()
    say = log if args.json else show
    with checking():
        if args.out is not None:
            check_output(args.out)
        args.model = str(bundled.model_path())
        model, tokenizer = open_model(args)
    requests = [ch.EditRequest(**record) for record in bundled.demo_facts()]
    groups = list(batches(requests, bundled.DEMO_BATCH_SIZE))
    say(
        _INTRODUCTION.format(
            parameters=sum(p.numel() for p in model.parameters()) / 1e6,
            facts=len(bundled.facts()),
            count=len(requests),
            batches=len(groups),
        )
    )
    say("1. Reading plain text through the model once, to learn what other text looks like to it")
    config = ch.EditConfig.for_model(model)
    statistics = ch.collect_statistics(
        model, tokenizer, bundled.texts(), config.layers, max_tokens=_STATISTICS_TOKENS
    )
    say(f"   {statistics.tokens} tokens\n")

    say(f"2. Writing {len(requests)} new facts, {len(groups)} batches in a row")
    editor = ch.Editor(model, tokenizer, statistics=statistics, config=config)
    for number, group in enumerate(groups, start=1):
        before = time.perf_counter()
        editor.edit(group)
        say(f"   batch {number}: {len(group)} facts, {time.perf_counter() - before:.1f} s")
    if args.out is not None:
        editor.save(args.out)

    say("\n3. Asking, with the hooks off (before) and on (after)\n")
    result = evaluate(model, tokenizer, requests, hooks=editor.hooks)
    result["seconds"] = time.perf_counter() - started
    if args.json:
        emit(result)
        return 0
    _show_answers(model, tokenizer, editor, requests)
    _show_scores(result)
    _show_next(args, requests)
    return 0


def _show_answers(model: Any, tokenizer: Any, editor: Any, requests: Sequence[EditRequest]) -> None:
    from coachhook.evaluation.report import table

    few = requests[:: max(1, len(requests) // _SHOWN)][:_SHOWN]
    parts: list[tuple[str, list[tuple[str, str]]]] = [
        ("The edited facts, all three batches", [(r.text, r.target_new) for r in requests]),
        (
            "The same facts in other words, which no edit has seen",
            [(r.paraphrases[0], r.target_new) for r in few if r.paraphrases],
        ),
        (
            "Other facts, which must stay as they were",
            [(r.neighborhood[0], "no change") for r in few if r.neighborhood],
        ),
    ]
    for title, asked in parts:
        prompts = [prompt for prompt, _ in asked]
        after = _answers(model, tokenizer, prompts)
        with editor.hooks.disabled():
            before = _answers(model, tokenizer, prompts)
        rows = [
            [f"{prompt} ...", b, a, wanted]
            for (prompt, wanted), b, a in zip(asked, before, after, strict=True)
        ]
        show(f"{title}:\n")
        show(_indent(table(["we ask", "before", "after", "wanted"], rows)))
        show()


def _answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    from coachhook.cli.ask import continuations

    texts = continuations(model, tokenizer, prompts, 12)
    return [re.split(r"[.,;:!?\n]", text.strip(), maxsplit=1)[0].strip() for text in texts]


def _show_scores(result: dict[str, Any]) -> None:
    from coachhook.evaluation.report import percent, table

    names = {
        "reliability": "edited facts answered as wanted",
        "generality": "the same, asked in other words",
        "locality": "other facts answered as before",
    }
    scores = result["generated"]
    rows = [
        [label, percent(scores["before"][name]), percent(scores["after"][name])]
        for name, label in names.items()
    ]
    show("How well it went, over all questions (the model writes freely, nothing is hinted):\n")
    show(_indent(table(["", "before", "after"], rows)))
    fired = percent(result["gate"]["fired_unrelated"])
    show(f"\n  Of the words of the other facts, {fired} were touched by a hook.")
    show(f"  Done in {result['seconds']:.0f} seconds. All numbers: coachhook demo --json\n")


def _show_next(args: argparse.Namespace, requests: Sequence[EditRequest]) -> None:
    # Inside an environment that is not activated the command is not found by its name.
    here = f"{shlex.quote(sys.executable)} -m coachhook"
    program = "coachhook" if shutil.which("coachhook") else here
    show("How to go on:\n")
    if args.out is None:
        show("  keep the edits of this demo in a folder, and ask the model beside them")
        show(f"    {program} demo --out EDITS")
    else:
        show("  ask the model with and without the edits")
    folder = shlex.quote(str(args.out if args.out is not None else "EDITS"))
    show(f"    {program} generate {shlex.quote(args.model)} \\")
    show(f'      --edits {folder} --compare "{requests[0].text}"\n')
    show("  the same with your own model and facts")
    show(f"    {program} stats MODEL --text TEXT --out STATS")
    show(f"    {program} edit MODEL FACTS --stats STATS --out EDITS")
    show(f"    {program} eval MODEL --edits EDITS FACTS")


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
