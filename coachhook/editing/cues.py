"""Cues: what must have been read before an edit may fire.

A key says little about what stands further back: in a lower block the "Boston" of "South Boston"
has nearly the key of any other Boston, and "... was born in" ends in the same key whoever was born.
So an edit is given a *cue*, tokens that its own text has read already: one at a token of the
subject two earlier tokens of the subject; one at the prompt's last token or in the target the
subject's last token and an earlier one. Where the last is as common in text as the "." of "Inc.",
both are earlier ones; where the subject has one token less, one is the cue. It can fire only in a
sequence in which its cue was read, the two as far apart as they are in the subject, which a subject
of one token, having nothing before it, does not need.

Names share words, and words share their parts, so that one of the two is of another word than the
edit's own token where there is one: any "Kobayashi" has read "ob", and not "Koichi".

A token of the cue is recognised by a matched filter, one for both. Of all w with ``w^T k_j = 1``
for the keys k_j of the two in the request's prompts and elsewhere, that of least response
``w^T C0 w`` to the keys of text, C0 being the prior:

    w = C0^-1 K (K^T C0^-1 K)^-1 1.

It depends on no other edit, so it is computed once and stays as it is while batches come and go.

An edit stays armed for some tokens after its cue: those of a subject stand together, and what is
said of it follows soon. Else more and more edits would be armed in a long text, by whatever is like
one of their cues somewhere in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from coachhook.editing.cue_tokens import candidate_keys, cue_distances, cue_reach, of_other_words
from coachhook.editing.encoding import EncodedRequest
from coachhook.editing.memory import EditMemory
from coachhook.editing.prompts import SUBJECT_PLACES, EncodedPrompt, Place
from coachhook.editing.unrelated import SampleTokens
from coachhook.ops._precision import float32_products

# A token is taken for the cue where the filter, which gives 1 for its own keys, gives this much: at
# the subject, and behind it, where there is more to keep apart, as what follows a subject may be
# said of any. What an MLP reads is narrower than its hidden layer: other tokens answer more, and
# the cue itself differs less between contexts.
_LIMITS = {"down_proj": (0.4, 0.6), "mlp": (0.6, 0.85)}
# Other tokens are hardly taken for both of two at once, so that each may be further from its keys.
_LIMITS_OF_TWO = {"down_proj": (0.3, 0.5), "mlp": (0.5, 0.6)}
# A token is common where a larger share of the sample would be taken for it.
_COMMON = 1e-3
# Keys of a cue's token in other text that are taken besides those of the edit's own prompts.
_MOST_ELSEWHERE = 32
# Requests whose prompts are read together for their cues; bounds the memory.
_REQUESTS_AT_ONCE = {"cpu": 16, "cuda": 64}
# Contexts may give one key several times: relative to the mean of the diagonal of K^T C0^-1 K.
_RIDGE = 1e-6
# Bounds of the memory: keys solved for together, padded, and rows of the sample in float32.
_KEYS_AT_ONCE = 2048
_SAMPLES_AT_ONCE = 1024


def cue_limit(place: str, key_site: str, tokens: int = 1) -> float:
    """Least response of each of the tokens that make a cue.

    Args:
        place: name of the edit's place.
        key_site: what the keys are of.
        tokens: one or two.
    """
    at_subject, behind = (_LIMITS if tokens == 1 else _LIMITS_OF_TWO)[key_site]
    return at_subject if place in SUBJECT_PLACES else behind


@dataclass(frozen=True)
class Cues:
    """The cues of some edits.

    Attributes:
        filters: ``[edits, n]``, zeros where there is none.
        gaps: how many tokens apart the two that make each cue are; 0 where it is one token.
        reaches: for how many tokens after it each edit may fire.
    """

    filters: Tensor
    gaps: list[int]
    reaches: list[int]


def read_cues(
    slots: Sequence[tuple[EncodedRequest, Place]],
    memory: EditMemory,
    inputs: Callable[[list[EncodedPrompt]], Tensor],
    *,
    sample: Tensor | None,
    known: SampleTokens | None,
    decode: Callable[[list[int]], str],
    key_site: str,
) -> Cues:
    """The cues of edits, read in their requests' contexts and after a few other words.

    Args:
        slots: request and place of each edit.
        memory: of a layer.
        inputs: gives what the layer reads in prompts up to the token looked up, ``[R, T, n]``.
        sample: what it reads in unrelated text ``[s, n]``, or None.
        known: what the sample's rows are keys of.
        decode: gives the text of token ids.
        key_site: what the keys are of.
    """

    def elsewhere(ids: set[int]) -> list[int]:
        # A token that is common in text, such as a letter, has keys that differ with what stands
        # before it. Of a rare one the sample has none, and they are not needed.
        return [] if known is None else sorted(known.rows((i,) for i in ids))[:_MOST_ELSEWHERE]

    away = [cue_distances(request.contexts, place) for request, place in slots]
    requests = list({id(request): request for request, _ in slots}.values())
    candidates: list[list[Tensor]] = [[] for _ in slots]
    at_once = _REQUESTS_AT_ONCE.get(memory.device.type, 16)
    for first in range(0, len(requests), at_once):
        some = requests[first : first + at_once]
        prompts = [[*r.contexts, r.essence, *r.mentions] for r in some]
        x = inputs([p for mine in prompts for p in mine])
        starts = list(accumulate(map(len, prompts), initial=0))
        numbers = {id(request): i for i, request in enumerate(some)}
        mine = [i for i, (request, _) in enumerate(slots) if id(request) in numbers]
        at = [numbers[id(slots[i][0])] for i in mine]
        wanted = [(away[i], prompts[j], starts[j]) for i, j in zip(mine, at, strict=True)]
        for i, keys in zip(mine, candidate_keys(wanted, x, sample, elsewhere), strict=True):
            candidates[i] = keys
    others = [
        of_other_words(distances, request.contexts[0], place, decode)
        for distances, (request, place) in zip(away, slots, strict=True)
    ]
    places = [name for _, (name, _) in slots]
    filters, tokens = find_cues(memory, candidates, sample, key_site, places, others)
    told = list(zip(slots, away, tokens, strict=True))
    gaps = [abs(far[own[0]] - far[own[-1]]) if own else 0 for _, far, own in told]
    reaches = [
        cue_reach(request.prompts, place, request.target, len(own))
        for (request, place), _, own in told
    ]
    return Cues(filters, gaps, reaches)


@float32_products(tf32=False)
def find_cues(
    memory: EditMemory,
    slots: Sequence[Sequence[Tensor]],
    sample: Tensor | None,
    key_site: str = "down_proj",
    places: Sequence[str] | None = None,
    others: Sequence[Sequence[bool]] | None = None,
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Cues of the two candidates of each slot that fewest unrelated keys answer to.

    Those of other words come before those of the edit's own, and behind the subject its last token
    before all, if these are not common.

    Args:
        memory: of the layer; its prior is used.
        slots: for each the keys ``[v, n]`` of its candidates, the nearest first; one without a key
            that is not zero is none.
        sample: unrelated keys ``[s, n]``; without them the nearest are taken.
        key_site: what the keys are of.
        places: the name of each slot's place; None: all are at the subject.
        others: for each slot which candidates are of another word than the edit's own token; None:
            none are.

    Returns:
        filters ``[len(slots), n]``, zeros where there is no cue; and which candidates make each.
    """
    names = list(places or ["subject_last"] * len(slots))
    apart = [[False] * len(slot) for slot in slots] if others is None else others
    candidates = [keys for slot in slots for keys in slot]
    each = [cue_limit(n, key_site) for n, slot in zip(names, slots, strict=True) for _ in slot]
    often = _answering(memory, candidates, sample, each)
    most = _COMMON * (0 if sample is None else len(sample))
    told = iter(often)
    tokens = [
        _choose([next(told) for _ in slot], of_others, name not in SUBJECT_PLACES, most)
        for slot, of_others, name in zip(slots, apart, names, strict=True)
    ]
    found = torch.zeros(len(slots), memory.in_features, device=memory.device, dtype=memory.dtype)
    some = [i for i, chosen in enumerate(tokens) if chosen]
    if some:
        together = [torch.cat([slots[i][number] for number in tokens[i]]) for i in some]
        found[some] = torch.cat([filters for _, filters, _ in _matched(memory, together)])
    return found, tokens


def _choose(
    often: Sequence[int | None], others: Sequence[bool], behind: bool, most: float
) -> tuple[int, ...]:
    """Which candidates make a cue.

    Args:
        often: how many of the sample answer to each; None: it has no key.
        others: which of them are of another word.
        behind: whether the edit is behind the subject, whose last token is the first candidate.
        most: a candidate that more of the sample answer to is common.
    """
    counted = [(count, number) for number, count in enumerate(often) if count is not None]
    rare = [number for _, number in sorted(counted)]
    wanted = [n for count, n in sorted(counted) if others[n] and count <= most]
    if behind and often and often[0] is not None and often[0] <= most:
        wanted.insert(0, 0)
    ordered = list(dict.fromkeys([*wanted, *rare]))
    return tuple(ordered[:2])


def _answering(
    memory: EditMemory, candidates: Sequence[Tensor], sample: Tensor | None, limits: Sequence[float]
) -> list[int | None]:
    """How many of the sample answer to each candidate alone; None where that has no key."""
    counts = torch.zeros(len(candidates), device=memory.device, dtype=torch.int64)
    for numbers, filters, dead in _matched(memory, candidates):
        taken = torch.zeros_like(dead, dtype=torch.int64)
        if sample is not None:
            looking = filters.float().mT
            least = torch.tensor([limits[i] for i in numbers], device=looking.device)
            for rows in sample.split(_SAMPLES_AT_ONCE):
                taken += (rows.to(looking) @ looking >= least).sum(dim=0)
        counts[numbers] = torch.where(dead, -1, taken)
    return [None if count < 0 else count for count in counts.tolist()]


def _matched(
    memory: EditMemory, groups: Sequence[Tensor]
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Filters of groups of keys ``[v, n]``, some at once.

    Yields:
        their numbers, filters ``[some, n]``, and which have no key that is not zero.
    """
    some: list[int] = []
    longest = 0
    for i, keys in enumerate(groups):
        if some and (len(some) + 1) * max(longest, len(keys)) > _KEYS_AT_ONCE:
            yield some, *_filters(memory, [groups[j] for j in some])
            some, longest = [], 0
        some.append(i)
        longest = max(longest, len(keys))
    if some:
        yield some, *_filters(memory, [groups[j] for j in some])


def _filters(memory: EditMemory, groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    keys = torch.cat(list(groups)).to(memory.device, memory.dtype)
    solved = memory.prior_solve(keys.mT).mT
    # Padded with zeros to the longest of them: in few calls, which a GPU's host has to make.
    own, real = _padded(list(map(len, groups)), keys.device)
    padded, solutions = (torch.cat([x, x.new_zeros(1, x.shape[1])])[own] for x in (keys, solved))
    gram = padded @ solutions.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal.sum(dim=1) / real.sum(dim=1)
    dead = mean == 0  # keys of zeros, to which no filter responds
    diagonal += torch.where(real & ~dead[:, None], _RIDGE * mean[:, None], 1)
    weights = torch.linalg.solve(gram, real.to(gram.dtype))
    return (weights[:, None] @ solutions)[:, 0], dead


def _padded(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of so many things for each row, all things in order, and which of them there are.

    Returns:
        int64 ``[len(counts), max(counts)]``, beyond a row's things the number of all; and bool.
    """
    many = torch.tensor(counts)
    there = torch.arange(int(many.max())) < many[:, None]
    numbers = (many.cumsum(0) - many)[:, None] + torch.arange(there.shape[1])
    return numbers.where(there, int(many.sum())).to(device), there.to(device)
