"""What a batch did, and what a user should know of it, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from coachhook.editing.records import BatchRecord
from coachhook.editing.ties import Ties


@dataclass(frozen=True)
class EditResult:
    """What one batch did.

    Attributes:
        batch: its number, as :meth:`Editor.revert` takes it.
        alphas: layer index -> threshold after the batch.
        targets: the optimised v* ``[d, k]``, one column per request, in order.
        converged: per request, whether the target is the model's answer once v* is put in; where it
            is not, no edit at this position can make it so with these settings.
        losses: last loss of each request's target.
        steps: Adam steps of each request's target.
        warnings: what a user should know, in words.
    """

    batch: int
    alphas: dict[int, float]
    targets: Tensor = field(repr=False)  # thousands of numbers
    converged: list[bool]
    losses: list[float]
    steps: list[int]
    warnings: list[str]


def unwritten(record: BatchRecord, ties: Ties) -> list[str]:
    """Words about facts of the batch that are not written, or not well."""
    found = []
    for i, (request, converged, loss) in enumerate(
        zip(record.requests, record.converged, record.losses, strict=True)
    ):
        fact = f"{request.text!r} -> {request.target_new!r}"
        if i in ties.replaced:
            later = record.requests[ties.replaced[i]].target_new
            found.append(f"{fact} is not written: the batch asks the same for {later!r} after it")
        elif not converged:
            found.append(f"the target of {fact} did not converge (loss {loss:.2f})")
    return found


def contradictory(record: BatchRecord, ties: Ties) -> list[str]:
    """Words about facts of the batch that ask the same for different targets, each with a key.

    Their keys are equal, and least squares puts the correction between their targets.
    """
    latest = {request.text: request.target_new for request in record.requests}
    return [
        f"{r.text!r} -> {r.target_new!r}: the batch asks the same for {latest[r.text]!r} after it, "
        "and the correction lies between the two; leave one of them out"
        for i, r in enumerate(record.requests)
        if latest[r.text] != r.target_new and i not in ties.replaced
    ]


def shut(record: BatchRecord, alphas: Mapping[int, float]) -> list[str]:
    """Words about layers whose gate stays shut for a prompt of the batch.

    Args:
        record: the batch, its bounds filled in.
        alphas: layer index -> threshold after the batch.
    """
    found = []
    for layer, bound in record.bounds.items():
        if bound != bound:
            found.append(f"layer {layer}: no prompt of the batch is long enough for a z-score")
        elif bound < alphas[layer]:
            found.append(
                f"layer {layer}: the gate stays shut for at least one prompt of the batch "
                f"(score {bound:.2f}, threshold {alphas[layer]:.2f})"
            )
    return found


def replaced(number: int, batches: Mapping[int, BatchRecord]) -> list[str]:
    """Words about facts of earlier batches whose prompt is asked for something else now.

    Args:
        number: of the batch.
        batches: number -> batch, this one included, in the order of editing.
    """
    earlier = {
        r.text: (r.target_new, before)
        for before, batch in batches.items()
        if before != number
        for r in batch.requests
    }
    return [
        f"{r.text!r} -> {r.target_new!r} comes after {earlier[r.text][0]!r} of batch "
        f"{earlier[r.text][1]}, which holds again when this batch is taken back"
        for r in batches[number].requests
        if r.text in earlier and earlier[r.text][0] != r.target_new
    ]


def lost(ties: Ties, held: Sequence[bool]) -> list[str]:
    """Words about facts of earlier batches about a subject of this one that do not hold any more.

    Args:
        ties: of the batch.
        held: whether each of its reminders is answered after the batch.
    """
    return [
        f"{r.text!r} -> {r.target_new!r} of an earlier batch is about a subject of this one, and "
        "no correction was found that gives both: it is lost"
        for r, holds in zip(ties.reminders, held, strict=True)
        if not holds
    ]
