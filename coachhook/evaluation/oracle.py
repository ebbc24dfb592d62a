"""The oracle: what an edit could reach at best, whatever the weights and the gate do.

The optimised targets v* are written straight over the output of their block (of its down-projection
where that is not added to the residual as it is) at the last subject token of the unedited model.
No closed-form edit of that position alone can beat it, so results are to be read as a share of the
oracle; edits that write at further places may exceed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from coachhook.editing.prompts import encode
from coachhook.editing.requests import EditRequest
from coachhook.evaluation.datasets import find_subject
from coachhook.evaluation.scoring import encode_pairs, score
from coachhook.models import describe, evaluating, get_submodule

if TYPE_CHECKING:
    from coachhook.hooks import HookSet


def oracle(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    targets: Tensor,
    layer: int,
    *,
    hooks: HookSet | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, Any]:
    """Teacher-forced reliability and generality with v* patched in alone.

    Args:
        model: the model; its edits are switched off meanwhile.
        tokenizer: its tokenizer, a fast one.
        requests: the facts, ``k`` of them.
        targets: v*, ``[d, k]``, one column per request: absolute outputs.
        layer: index of the block whose output v* is, the last edited layer.
        hooks: the attached hooks, if any.
        batch_size: prompts per forward pass.
        progress: show a progress bar on stderr.

    Returns:
        ``reliability`` and ``generality`` (None without paraphrases) and ``counts`` of the prompts
        asked. Paraphrases that do not hold the subject literally cannot be patched and are left
        out. Locality is 1 by construction.

    Raises:
        ValueError: ``targets`` is not ``[hidden size, len(requests)]``.
    """
    description = describe(model)
    wanted = (description.hidden_size, len(requests))
    if tuple(targets.shape) != wanted:
        raise ValueError(f"oracle: targets must be of shape {wanted}, got {tuple(targets.shape)}")
    asked = [(i, r.text, r.subject_span) for i, r in enumerate(requests)]
    for i, request in enumerate(requests):
        for text in request.paraphrases:
            start = find_subject(text, request.subject)
            if start is not None:
                asked.append((i, text, (start, start + len(request.subject))))
    pairs = [(text, requests[i].target_new) for i, text, _ in asked]
    lookups = [
        encode(tokenizer, f"{text} {target}", span, description.max_positions).lookup
        for (text, target), (_, _, span) in zip(pairs, asked, strict=True)
    ]
    block = get_submodule(model, description.layer(layer).target_path)
    columns = [i for i, _, _ in asked]
    with hooks.disabled() if hooks is not None else nullcontext(), evaluating(model):
        scores = score(
            model,
            encode_pairs(tokenizer, pairs),
            batch_size=batch_size,
            patch=_patch(block, targets, columns, lookups),
            progress="oracle" if progress else None,
        )
    edit, rest = scores[: len(requests)], scores[len(requests) :]
    paraphrases: dict[int, list[float]] = {}
    for i, this in zip(columns[len(requests) :], rest, strict=True):
        paraphrases.setdefault(i, []).append(this.accuracy)
    means = [sum(v) / len(v) for v in paraphrases.values()]
    return {
        "reliability": sum(s.accuracy for s in edit) / len(edit),
        "generality": sum(means) / len(means) if means else None,
        "counts": {"requests": len(edit), "paraphrases": len(rest)},
    }


def _patch(
    block: Any, targets: Tensor, columns: Sequence[int], lookups: Sequence[int]
) -> Callable[[list[int]], Any]:
    """A context per batch in which ``block`` answers v* at the lookup positions."""

    @contextmanager
    def patch(batch: list[int]) -> Iterator[None]:
        def write(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.clone()
            for row, index in enumerate(batch):
                hidden[row, lookups[index]] = targets[:, columns[index]].to(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = block.register_forward_hook(write)
        try:
            yield
        finally:
            handle.remove()

    return patch
