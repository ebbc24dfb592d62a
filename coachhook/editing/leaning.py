"""What a batch leans on: corrections of earlier batches that its targets were found beside.

A fact that is asked for again, or another one about its subject, is optimised with the earlier
correction in place, and may need fewer places than the earlier batch took. Its answer then rests on
what stands at the others, and goes with the earlier batch when that is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

from coachhook.editing.encoding import EncodedRequest
from coachhook.editing.prompts import SUBJECT_PLACES, EncodedPrompt, Place
from coachhook.editing.requests import EditRequest
from coachhook.editing.state import EditState


def leaned_on(
    state: EditState,
    requests: Sequence[EditRequest],
    encoded: Sequence[EncodedRequest],
    asked: Iterable[int],
    written: Iterable[Hashable],
    inputs: Callable[[list[EncodedPrompt], int], Tensor],
) -> list[tuple[int, Place]]:
    """(request, place) of what a batch should write as it is, to have it of its own.

    Those where an earlier edit of the request's subject, or of its prompt, fires in every context,
    and which the batch does not write anew. Only with one edited layer: with several, what lower
    ones write changes what upper ones would have to keep.

    Args:
        state: the edits so far, without the batch.
        requests: the batch.
        encoded: the same, encoded.
        asked: which of them take part.
        written: what the batch's own edits are about, see
            :meth:`~coachhook.editing.records.BatchRecord.owners`.
        inputs: gives what a layer reads up to the token looked up, ``[R, T, n]``.
    """
    config = state.config
    if len(config.layers) > 1:
        return []
    names = [n for n in config.places if n in SUBJECT_PLACES or n == "prompt_last"]
    seen = set(written)
    found: dict[Hashable, tuple[int, Place]] = {}
    for r in asked:
        for name in names:
            about = requests[r].subject if name in SUBJECT_PLACES else requests[r].text
            if (name, about) not in seen:
                found.setdefault((name, about), (r, (name, 0)))
    layer = config.layers[0]
    kept = []
    for slot, value in zip(found.values(), state.corrections(layer, list(found)), strict=True):
        r, place = slot
        target, contexts = encoded[r].target, encoded[r].contexts
        if value is None or any(p.position(place, target) is None for p in contexts):
            continue
        x = inputs([p.at(place, target) for p in contexts], layer)
        if torch.allclose(state.present(layer, x[:, -1], x.__getitem__), value):
            kept.append(slot)
    return kept
