"""Cues: what must have been read before an edit may fire.

A key says little about what stands further back: in a lower block the "Boston" of "South Boston"
has nearly the key of any other Boston, and "... was born in" ends in the same key whoever was born.
So an edit is given a *cue*, a token that its own text has read already: one at a token of the
subject an earlier token of the subject; one at the prompt's last token or in the target the
subject's last token. It can fire only in a sequence in which its cue was read, which a subject of
one token, having nothing before it, does not need.

A cue is recognised by a matched filter. Of all w with ``w^T k_j = 1`` for the keys k_j of the cue
in the request's prompts and elsewhere, that of least response ``w^T C0 w`` to the keys of text, C0
being the prior:

    w = C0^-1 K (K^T C0^-1 K)^-1 1.

It depends on no other edit, so it is computed once and stays as it is while batches come and go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coachhook.editing.memory import EditMemory
from coachhook.editing.prompts import SUBJECT_PLACES, EncodedPrompt, Place
from coachhook.ops._precision import float32_products

# A token is taken for the cue where the filter, which gives 1 for its own keys, gives this much.
# The subject's last token has more to keep apart: what follows it may be said of any subject.
_EARLIER_LIMIT, _SUBJECT_LIMIT = 0.4, 0.6
# An earlier token of the subject may be as common as "of": that of these which the unrelated sample
# shows least is taken, the nearest of them first.
_MOST_CANDIDATES = 6
# Contexts may give one key several times: relative to the mean of the diagonal of K^T C0^-1 K.
_RIDGE = 1e-6
# Bounds of the memory: keys solved for together, and rows of the sample in float32.
_KEYS_AT_ONCE = 2048
_SAMPLES_AT_ONCE = 1024


def cue_limit(place: str) -> float:
    """Least response to the cue of an edit at a place, by its name."""
    return _EARLIER_LIMIT if place in SUBJECT_PLACES else _SUBJECT_LIMIT


def cue_distances(prompts: Sequence[EncodedPrompt], place: Place) -> list[int]:
    """How far before the subject's last token the cue of an edit may be, the nearest first.

    Empty where there is nothing before it that all prompts have.

    Args:
        prompts: of one request, their subject's last token looked up.
        place: of the edit.
    """
    name, _ = place
    if name not in SUBJECT_PLACES:
        return [0]
    nearest = 1 if name == "subject_last" else 2
    farthest = min(p.lookup - p.first for p in prompts)
    return list(range(nearest, farthest + 1))[:_MOST_CANDIDATES]


def candidate_keys(
    contexts: Sequence[EncodedPrompt],
    place: Place,
    prompts: Sequence[EncodedPrompt],
    x: Tensor,
    elsewhere: Callable[[set[int]], Tensor],
) -> list[Tensor]:
    """Keys ``[v, n]`` of each token that may be the cue of an edit, the nearest first.

    Args:
        contexts: of the request, see :func:`cue_distances`.
        place: of the edit.
        prompts: where the keys are read.
        x: what the layer reads in these ``[R, T, n]``, the subject's last token at the end.
        elsewhere: gives keys ``[v, n]`` of some tokens in other text, by their ids.
    """
    candidates = []
    for away in cue_distances(contexts, place):
        at = [p.lookup - away if p.lookup - away >= p.first else -1 for p in prompts]
        keys = x[[position >= 0 for position in at], -1 - away]
        if away:
            ids = {p.ids[k] for p, k in zip(prompts, at, strict=True) if k >= 0}
            keys = torch.cat([keys, elsewhere(ids).to(keys)])
        candidates.append(keys)
    return candidates


def find_cues(
    memory: EditMemory, slots: Sequence[Sequence[Tensor]], sample: Tensor | None
) -> Tensor:
    """Filters ``[len(slots), n]``, of each slot's candidate that fewest unrelated keys answer to.

    Args:
        memory: of the layer; its prior is used.
        slots: for each the keys ``[v, n]`` of its candidates, the nearest first; zeros are given
            where it has none.
        sample: unrelated keys ``[s, n]``; without them the nearest is taken.
    """
    found = torch.zeros(len(slots), memory.in_features, device=memory.device, dtype=memory.dtype)
    some: list[int] = []
    count = 0
    for i, candidates in enumerate(slots):
        keys = sum(map(len, candidates))
        if some and count + keys > _KEYS_AT_ONCE:
            found[some] = _find_some(memory, [slots[j] for j in some], sample)
            some, count = [], 0
        if keys:
            some.append(i)
            count += keys
    if some:
        found[some] = _find_some(memory, [slots[j] for j in some], sample)
    return found


@float32_products(tf32=False)
def _find_some(
    memory: EditMemory, slots: Sequence[Sequence[Tensor]], sample: Tensor | None
) -> Tensor:
    candidates = [keys for slot in slots for keys in slot]
    keys = torch.cat(candidates).to(memory.device, memory.dtype)
    solved = memory.prior_solve(keys.mT).mT
    counts = [len(c) for c in candidates]
    filters = keys.new_empty(len(counts), keys.shape[1])
    for row, own, part in zip(filters, keys.split(counts), solved.split(counts), strict=True):
        gram = own @ part.mT
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        row.copy_(torch.linalg.solve(gram, gram.new_ones(len(gram))) @ part)
    taken = torch.zeros(len(filters), dtype=torch.int64, device=filters.device)
    if sample is not None and len(filters) > len(slots):
        looking = filters.float().mT
        for rows in sample.split(_SAMPLES_AT_ONCE):
            scores = rows.to(looking) @ looking
            taken += (scores >= _EARLIER_LIMIT).sum(dim=0)
    starts = [0]
    for slot in slots[:-1]:
        starts.append(starts[-1] + len(slot))
    best = [
        start + int(taken[start : start + len(slot)].argmin())
        for start, slot in zip(starts, slots, strict=True)
    ]
    return filters[best]
