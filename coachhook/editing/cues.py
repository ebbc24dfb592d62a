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

from collections.abc import Sequence

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


@float32_products(tf32=False)
def find_cue(memory: EditMemory, candidates: Sequence[Tensor], sample: Tensor | None) -> Tensor:
    """Filter ``[n]`` of the candidate that fewest unrelated keys would be taken for.

    Args:
        memory: of the layer; its prior is used.
        candidates: keys ``[v, n]`` of each, at least one, the nearest first.
        sample: unrelated keys ``[s, n]``; without them the nearest is taken.
    """
    keys = torch.cat(list(candidates)).to(memory.device, memory.dtype)
    solved = memory.prior_solve(keys.mT).mT
    filters = []
    for own, part in zip(
        keys.split([len(c) for c in candidates]),
        solved.split([len(c) for c in candidates]),
        strict=True,
    ):
        gram = own @ part.mT
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        weights = torch.linalg.solve(gram, gram.new_ones(len(gram)))
        filters.append(weights @ part)
    if len(filters) == 1 or sample is None or not len(sample):
        return filters[0]
    scores = sample.to(keys.device, torch.float32) @ torch.stack(filters).float().mT
    taken = (scores >= _EARLIER_LIMIT).sum(dim=0)
    return filters[int(taken.argmin())]
