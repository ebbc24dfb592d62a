"""Cues: what must have been read before an edit may fire.

A key says little about what stands further back: in a lower block the "Boston" of "South Boston"
has nearly the key of any other Boston, and "... was born in" ends in the same key whoever was born.
So an edit is given a *cue*, a token that its own text has read already: one at a token of the
subject an earlier token of the subject; one at the prompt's last token or in the target the
subject's last token, or, where that is as common in text as the "." of "Inc.", an earlier one in
its place. It can fire only in a sequence in which its cue was read, which a subject of one token,
having nothing before it, does not need.

A cue is recognised by a matched filter. Of all w with ``w^T k_j = 1`` for the keys k_j of the cue
in the request's prompts and elsewhere, that of least response ``w^T C0 w`` to the keys of text, C0
being the prior:

    w = C0^-1 K (K^T C0^-1 K)^-1 1.

It depends on no other edit, so it is computed once and stays as it is while batches come and go.

An edit stays armed for some tokens after its cue: those of a subject stand together, and what is
said of it follows soon. Else more and more edits would be armed in a long text, by whatever is like
one of their cues somewhere in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coachhook.editing.memory import EditMemory
from coachhook.editing.prompts import SUBJECT_PLACES, EncodedPrompt, Place
from coachhook.ops._precision import float32_products

# A token is taken for the cue where the filter, which gives 1 for its own keys, gives this much:
# for an earlier token of the subject, and for the subject's last, which has more to keep apart, as
# what follows it may be said of any subject. What an MLP reads is narrower than its hidden layer:
# other tokens answer more, and the cue itself differs less between contexts.
_LIMITS = {"down_proj": (0.4, 0.6), "mlp": (0.6, 0.85)}
# An earlier token of the subject may be as common as "of": that of these which the unrelated sample
# shows least is taken, the nearest of them first.
_MOST_CANDIDATES = 6
# A cue is at most seven tokens before another token of the subject. What is said of the subject may
# follow further behind.
_REACH_IN_SUBJECT = 8
_REACH = 40
# After the subject its last token is the cue, unless a larger share of the sample would be taken
# for it.
_COMMON = 1e-3
# Contexts may give one key several times: relative to the mean of the diagonal of K^T C0^-1 K.
_RIDGE = 1e-6
# Bounds of the memory: keys solved for together, padded, and rows of the sample in float32.
_KEYS_AT_ONCE = 2048
_SAMPLES_AT_ONCE = 1024


def cue_limit(place: str, key_site: str) -> float:
    """Least response to the cue of an edit at a place, by its name, whose keys are of a site."""
    earlier, subject = _LIMITS[key_site]
    return earlier if place in SUBJECT_PLACES else subject


def cue_distances(prompts: Sequence[EncodedPrompt], place: Place) -> list[int]:
    """How far before the subject's last token the cue of an edit may be, the nearest first.

    After the subject it may be its last token itself, 0.

    Empty where there is nothing before it that all prompts have.

    Args:
        prompts: of one request, their subject's last token looked up.
        place: of the edit.
    """
    name, _ = place
    nearest = 0 if name not in SUBJECT_PLACES else 1 if name == "subject_last" else 2
    farthest = min(p.lookup - p.first for p in prompts)
    return list(range(nearest, farthest + 1))[:_MOST_CANDIDATES]


def cue_reach(prompts: Sequence[EncodedPrompt], place: Place, target: Sequence[int]) -> int:
    """For how many tokens after its cue an edit may fire: as far as it is from it in its prompts,
    and as far as other words may put it.

    Args:
        prompts: of one request.
        place: of the edit.
        target: ids of the request's target.
    """
    name, _ = place
    if name in SUBJECT_PLACES:
        return _REACH_IN_SUBJECT
    there = [(p.position(place, target), p.lookup) for p in prompts]
    farthest = max((at - lookup for at, lookup in there if at is not None), default=0)
    return max(_REACH, farthest + _MOST_CANDIDATES)


def candidate_keys(
    wanted: Sequence[tuple[Sequence[EncodedPrompt], Place, Sequence[EncodedPrompt], int]],
    x: Tensor,
    sample: Tensor | None,
    elsewhere: Callable[[set[int]], list[int]],
) -> list[list[Tensor]]:
    """Keys ``[v, n]`` of each token that may be the cue of some edits, the nearest first.

    Args:
        wanted: for each edit its request's contexts and its place, see :func:`cue_distances`, the
            prompts where the keys are read, and the first one's row in ``x``.
        x: what the layer reads in prompts ``[R, T, n]``, the subject's last token at the end.
        sample: keys in other text ``[s, n]``, or None.
        elsewhere: gives rows of the sample that are keys of some tokens, by their ids.
    """
    own: list[int] = []  # rows of x, its first two dimensions as one
    other: list[int] = []  # rows of the sample
    own_at: list[int] = []  # where these go among all keys
    other_at: list[int] = []
    counts: list[list[int]] = []
    width = x.shape[1]
    for contexts, place, prompts, row in wanted:
        counts.append([])
        for away in cue_distances(contexts, place):
            before, ids = len(own) + len(other), set()
            for i, prompt in enumerate(prompts):
                position = prompt.lookup - away
                if position >= prompt.first:
                    own_at.append(len(own) + len(other))
                    own.append((row + i) * width + width - 1 - away)
                    ids.add(prompt.ids[position])
            if away and sample is not None:
                for number in elsewhere(ids):
                    other_at.append(len(own) + len(other))
                    other.append(number)
            counts[-1].append(len(own) + len(other) - before)
    # Few copies and gathers, whatever the number of edits.
    keys = x.new_empty(len(own) + len(other), x.shape[2])
    keys[_numbers(own_at, x)] = x.reshape(-1, x.shape[2])[_numbers(own, x)]
    if sample is not None and other:
        keys[_numbers(other_at, x)] = sample[_numbers(other, sample)].to(keys)
    parts = iter(keys.split([count for mine in counts for count in mine]))
    return [[next(parts) for _ in mine] for mine in counts]


def _numbers(values: list[int], of: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(of.device)


def find_cues(
    memory: EditMemory,
    slots: Sequence[Sequence[Tensor]],
    sample: Tensor | None,
    key_site: str = "down_proj",
    places: Sequence[str] | None = None,
) -> Tensor:
    """Filters ``[len(slots), n]``, of each slot's candidate that fewest unrelated keys answer to.

    After the subject the first candidate, its last token, is taken unless it is common.

    Args:
        memory: of the layer; its prior is used.
        slots: for each the keys ``[v, n]`` of its candidates, the nearest first; zeros are given
            where it has none, or none with a key that is not zero.
        sample: unrelated keys ``[s, n]``; without them the nearest is taken.
        key_site: what the keys are of.
        places: the name of each slot's place; None: all are at the subject.
    """
    names = list(places or ["subject_last"] * len(slots))
    limits = [cue_limit(name, key_site) for name in names]
    behind = [name not in SUBJECT_PLACES for name in names]
    first = [slot[:1] if after else slot for slot, after in zip(slots, behind, strict=True)]
    found, often = _find(memory, first, sample, limits)
    common = (often > _COMMON * (0 if sample is None else len(sample))).tolist()
    again = [i for i, after in enumerate(behind) if after and common[i] and len(slots[i]) > 1]
    if again:
        wanted = [slots[i] for i in again]
        found[again], _ = _find(memory, wanted, sample, [limits[i] for i in again])
    return found


def _find(
    memory: EditMemory,
    slots: Sequence[Sequence[Tensor]],
    sample: Tensor | None,
    limits: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Filters ``[len(slots), n]``, and how many of the sample answer to each."""
    found = torch.zeros(len(slots), memory.in_features, device=memory.device, dtype=memory.dtype)
    often = torch.zeros(len(slots), dtype=torch.int64, device=memory.device)
    some: list[int] = []

    def solve() -> None:
        chosen = [slots[i] for i in some], sample, [limits[i] for i in some]
        found[some], often[some] = _find_some(memory, *chosen)

    count = longest = 0
    for i, candidates in enumerate(slots):
        most = max(map(len, candidates), default=0)
        if some and (count + len(candidates)) * max(longest, most) > _KEYS_AT_ONCE:
            solve()
            some, count, longest = [], 0, 0
        if most:
            some.append(i)
            count, longest = count + len(candidates), max(longest, most)
    if some:
        solve()
    return found, often


@float32_products(tf32=False)
def _find_some(
    memory: EditMemory,
    slots: Sequence[Sequence[Tensor]],
    sample: Tensor | None,
    limits: Sequence[float],
) -> tuple[Tensor, Tensor]:
    candidates = [keys for slot in slots for keys in slot]
    keys = torch.cat(candidates).to(memory.device, memory.dtype)
    solved = memory.prior_solve(keys.mT).mT
    # Padded with zeros to the longest of them: in few calls, which a GPU's host has to make.
    own, real = _padded(list(map(len, candidates)), keys.device)
    padded, solutions = (torch.cat([x, x.new_zeros(1, x.shape[1])])[own] for x in (keys, solved))
    gram = padded @ solutions.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal.sum(dim=1) / real.sum(dim=1)
    dead = mean == 0  # keys of zeros, to which no filter responds
    diagonal += torch.where(real & ~dead[:, None], _RIDGE * mean[:, None], 1)
    weights = torch.linalg.solve(gram, real.to(gram.dtype))
    filters = (weights[:, None] @ solutions)[:, 0]
    taken = torch.zeros(len(filters), dtype=torch.int64, device=filters.device)
    if sample is not None:
        looking = filters.float().mT
        each = [limit for slot, limit in zip(slots, limits, strict=True) for _ in slot]
        least = torch.tensor(each, device=looking.device)
        for rows in sample.split(_SAMPLES_AT_ONCE):
            scores = rows.to(looking) @ looking
            taken += (scores >= least).sum(dim=0)
    taken = torch.where(dead, taken.max() + 1, taken)
    of_slot, there = _padded(list(map(len, slots)), filters.device)
    often = torch.cat([taken, taken.new_zeros(1)])[of_slot].masked_fill(~there, taken.max() + 1)
    best = of_slot.gather(1, often.argmin(dim=1, keepdim=True))[:, 0]
    return filters[best], taken[best]


def _padded(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of so many things for each row, all things in order, and which of them there are.

    Returns:
        int64 ``[len(counts), max(counts)]``, beyond a row's things the number of all; and bool.
    """
    many = torch.tensor(counts)
    there = torch.arange(int(many.max())) < many[:, None]
    numbers = (many.cumsum(0) - many)[:, None] + torch.arange(there.shape[1])
    return numbers.where(there, int(many.sum())).to(device), there.to(device)
