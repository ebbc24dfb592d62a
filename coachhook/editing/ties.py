"""Which requests must share a correction: those about one subject.

At the tokens of a subject every request about it has the same key, so the hook can give it one
correction only. Requests of a batch about one subject get theirs together, and facts of earlier
batches about it are kept in the sum of losses, so that the new correction still says them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coachhook.editing.requests import EditRequest


@dataclass(frozen=True)
class Ties:
    """The ties of a batch.

    Attributes:
        numbers: for each request of the batch, then for each reminder, the number of its subject.
        reminders: requests of earlier batches about a subject of this one, not asked again in it.
        replaced: request of the batch -> a later one of the batch that asks the same prompt for
            something else. It takes no part.
    """

    numbers: list[int]
    reminders: list[EditRequest]
    replaced: dict[int, int]


def find_ties(requests: Sequence[EditRequest], earlier: Iterable[EditRequest]) -> Ties:
    """Finds them by the subject as it is written.

    Args:
        requests: the batch.
        earlier: what earlier batches wrote, oldest first.
    """
    latest = {request.text: i for i, request in enumerate(requests)}
    replaced = {
        i: latest[request.text]
        for i, request in enumerate(requests)
        if latest[request.text] != i
        and requests[latest[request.text]].target_new != request.target_new
    }
    subjects: dict[str, int] = {}
    for request in requests:
        subjects.setdefault(request.subject, len(subjects))
    kept = {
        request.text: request
        for request in earlier
        if request.subject in subjects and request.text not in latest
    }
    reminders = list(kept.values())
    return Ties([subjects[r.subject] for r in (*requests, *reminders)], reminders, replaced)
