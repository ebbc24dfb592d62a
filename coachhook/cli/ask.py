"""``coachhook generate`` and ``coachhook eval``: ask the edited model, and measure it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coachhook.cli.common import (
    FailedError,
    InputError,
    add_command,
    add_facts,
    check_text,
    checking,
    emit,
    fitting_requests,
    open_model,
    positive_int,
    read_once,
    read_records,
    show,
)

if TYPE_CHECKING:
    from coachhook.editing import EditRequest, Handle

_EVAL = """\
Asks the edited model for every fact of FACTS, its paraphrases and its neighbours, and the same
model with the edits off, in one run. Three families of numbers, never mixed:
  teacher_forced  EasyEdit's token-level definitions, comparable with papers, but optimistic
  probability     CounterFact's ES, PS, NS: is the new answer more likely than the old one
  generated       greedy decoding with KV cache and natural stop: what a user sees
Beside `generated`, which wants the answer at once, `contained` finds it anywhere in the
continuation. With --chat also the replies to the prompts as messages of a chat: the answer stands
in them, a neighbour's begins as before. With --text also what the edits do to unrelated text.
"""


def register(commands: Any) -> None:
    """Adds the commands."""
    parser = add_command(commands, "generate", "ask the edited model")
    parser.add_argument("model", metavar="MODEL", help="local folder or hub name")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument(
        "--edits", required=True, type=Path, metavar="EDITS", help="folder written by `edit`"
    )
    parser.add_argument("--max-new-tokens", type=positive_int, default=30, metavar="N")
    parser.add_argument(
        "--compare", action="store_true", help="show the unedited model's answer beside it"
    )
    add_chat(parser, "ask each PROMPT as a user's message")
    parser.set_defaults(run=run_generate)

    parser = add_command(commands, "eval", "measure what changed and what did not", _EVAL)
    parser.add_argument("model", metavar="MODEL", help="local folder or hub name")
    add_facts(parser)
    parser.add_argument(
        "--edits", required=True, type=Path, metavar="EDITS", help="folder written by `edit`"
    )
    parser.add_argument("--batch-size", type=positive_int, default=64, metavar="N")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=30,
        metavar="N",
        help="limit of a continuation, the same for all prompts (default: 30)",
    )
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="also the optimised targets patched in at the last subject token of the unedited "
        "model: what no edit of that position alone can exceed",
    )
    add_chat(parser, "also ask each prompt as a user's message")
    parser.add_argument(
        "--text",
        metavar="FILE_OR_DIR",
        help="unrelated plain text: perplexity, drift and share of gated tokens on it",
    )
    parser.add_argument(
        "--text-tokens",
        type=positive_int,
        default=20_000,
        metavar="N",
        help="tokens of --text to use (default: 20000)",
    )
    parser.add_argument(
        "--fluency",
        type=positive_int,
        metavar="N",
        help="n-gram entropy of greedy texts of N tokens, prompt included (CounterFact: 100)",
    )
    parser.add_argument(
        "--cache-check",
        type=positive_int,
        metavar="N",
        help="decode N prompts with and without KV cache and explain every difference",
    )
    parser.add_argument(
        "--details", action="store_true", help="with --json: also everything fact by fact"
    )
    parser.set_defaults(run=run_eval)


def add_chat(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds ``--chat``."""
    parser.add_argument(
        "--chat", action="store_true", help=f"{what}, through the tokenizer's chat template"
    )


def run_generate(args: argparse.Namespace) -> int:
    """Greedy continuations of the edited model."""
    from coachhook.editing import attach
    from coachhook.store import read_manifest

    with checking():
        if not all(prompt.strip() for prompt in args.prompts):
            raise InputError("prompts must not be empty")
        read_manifest(args.edits, "edits")  # before the model is read, which may take long
        model, tokenizer = open_model(args)
        asked = check_window(model, tokenizer, args.prompts, chat=args.chat)
        handle = attach(model, args.edits)
    with handle:
        edited = continue_(model, tokenizer, asked, args.max_new_tokens)
        rows = [{"prompt": p, "edited": e} for p, e in zip(args.prompts, edited, strict=True)]
        if args.compare:
            with handle.disabled():
                plain = continue_(model, tokenizer, asked, args.max_new_tokens)
            for row, text in zip(rows, plain, strict=True):
                row["unedited"] = text
    if args.json:
        emit(rows)
        return 0
    for row in rows:
        show(row["prompt"])
        if args.compare:
            show(f"  unedited: {one_line(row['unedited'])}")
            show(f"  edited:   {one_line(row['edited'])}")
        else:
            show(f"  {one_line(row['edited'])}")
    return 0


def run_eval(args: argparse.Namespace) -> int:
    """The metrics of ``coachhook.evaluation``, before and after."""
    from coachhook.editing import attach
    from coachhook.evaluation import evaluate, render_evaluation, table
    from coachhook.evaluation.language import text_rows
    from coachhook.evaluation.metrics import long_prompts
    from coachhook.store import read_manifest

    with checking():
        facts = read_records(args)
        if args.text is not None:
            check_text(args.text)
        read_manifest(args.edits, "edits")  # before the model is read, which may take long
        model, tokenizer = open_model(args)
        requests = fitting_requests(
            args, facts, long_prompts(model, tokenizer, facts.requests, args.chat)
        )
        if args.text is not None and not read_once(args.text):
            text_rows(model, tokenizer, args.text, args.text_tokens)
        handle = attach(model, args.edits)
    with handle:
        try:
            result = evaluate(
                model,
                tokenizer,
                requests,
                hooks=handle.hooks,
                batch_size=args.batch_size,
                max_new_tokens=args.max_new_tokens,
                chat=args.chat,
                text=args.text,
                text_tokens=args.text_tokens,
                fluency_tokens=args.fluency or 0,
                cache_prompts=args.cache_check or 0,
                details=args.details,
            )
        except ValueError as error:  # of text from a pipe that is too short
            raise FailedError(str(error)) from error
        if args.oracle:
            result["oracle"] = _oracle(args, model, tokenizer, handle, requests)
    if args.json:
        emit(result)
        return 0
    show(render_evaluation(result))
    if args.oracle and result["oracle"] is None:
        show("\noracle: EDITS holds none of these facts")
    elif args.oracle:
        show("\noracle, the targets put in at the last subject token alone (teacher-forced):\n")
        names = ("reliability", "generality")
        show(table(names, [[result["oracle"][name] for name in names]]))
    return 0


def _oracle(
    args: argparse.Namespace, model: Any, tokenizer: Any, handle: Handle, facts: list[EditRequest]
) -> dict[str, Any] | None:
    """The oracle over the facts that EDITS holds; None where it holds none of them."""
    import torch

    from coachhook.editing.folder import load_records
    from coachhook.evaluation import oracle

    config, batches = load_records(args.edits)
    columns = {
        (request.text, request.target_new): batch.targets[:, column]
        for batch in batches.values()
        for column, request in enumerate(batch.requests)
    }
    known = [r for r in facts if (r.text, r.target_new) in columns]
    if not known:
        return None
    targets = torch.stack([columns[r.text, r.target_new] for r in known], dim=1)
    return oracle(
        model,
        tokenizer,
        known,
        targets,
        config.layers[-1],
        hooks=handle.hooks,
        batch_size=args.batch_size,
    )


def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Greedy continuations as text."""
    from coachhook.evaluation.scoring import encode_prompts

    return continue_(model, tokenizer, encode_prompts(tokenizer, prompts), max_new_tokens)


def continue_(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[int, ...]], max_new_tokens: int
) -> list[str]:
    """Greedy continuations of token ids as text."""
    from coachhook.evaluation.scoring import decode_each, greedy
    from coachhook.models import describe

    window = describe(model).max_positions
    found = greedy(model, tokenizer, prompts, max_new_tokens=max_new_tokens, max_positions=window)
    return decode_each(tokenizer, found)


def one_line(text: str) -> str:
    """Text for a line of a terminal: white space of any kind becomes one blank."""
    return " ".join(text.split())


def check_window(
    model: Any, tokenizer: Any, prompts: Sequence[str], chat: bool = False
) -> list[tuple[int, ...]]:
    """Token ids of prompts, or of messages of a chat, that leave room in the context window.

    Raises:
        InputError: naming every prompt that does not; or one is not text.
        ValueError: ``chat``, and the tokenizer has no chat template.
    """
    from coachhook.editing.requests import is_text
    from coachhook.evaluation.scoring import encode_chat, encode_prompts
    from coachhook.models import describe

    for prompt in prompts:  # what is no UTF-8 on the command line comes as surrogates
        if not is_text(prompt):
            raise InputError(f"prompts must be Unicode text, got {prompt!r}")
    asked = (
        encode_chat("generate", tokenizer, prompts) if chat else encode_prompts(tokenizer, prompts)
    )
    window = describe(model).max_positions
    bad = [
        f"  {len(ids)} tokens: {p[:60]!r}..."
        for p, ids in zip(prompts, asked, strict=True)
        if window is not None and len(ids) >= window
    ]
    if bad:
        raise InputError(
            f"prompts must be shorter than the context window of {window} tokens, got\n"
            + "\n".join(bad)
        )
    return asked
