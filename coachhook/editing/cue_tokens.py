"""Which tokens may be an edit's cue, see :mod:`coachhook.editing.cues`, and the keys they have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coachhook.editing.prompts import SUBJECT_PLACES, EncodedPrompt, Place

# An earlier token of the subject may be as common as "of": that of these which the unrelated sample
# shows least are taken, the nearest of them first.
_MOST_CANDIDATES = 6
# A single token that is the cue is at most seven before another token of the subject. What is said
# of the subject may follow further behind, and so may its last words be said again, where two make
# the cue.
_REACH_OF_ONE = 8
_REACH = 40


def cue_distances(prompts: Sequence[EncodedPrompt], place: Place) -> list[int]:
    """How far before the subject's last token one of the cue of an edit may be, the nearest first.

    Behind the subject it may be its last token itself, 0.

    Empty where there is nothing before it that all prompts have.

    Args:
        prompts: of one request, their subject's last token looked up.
        place: of the edit.
    """
    name, _ = place
    nearest = 0 if name not in SUBJECT_PLACES else 1 if name == "subject_last" else 2
    farthest = min(p.lookup - p.first for p in prompts)
    return list(range(nearest, farthest + 1))[:_MOST_CANDIDATES]


def of_other_words(
    distances: Sequence[int],
    prompt: EncodedPrompt,
    place: Place,
    decode: Callable[[list[int]], str],
) -> list[bool]:
    """Which of the tokens so far before the subject's last one are of another word than it.

    Than the one before it, of an edit there. Words are what white space parts.

    Args:
        distances: see :func:`cue_distances`.
        prompt: of the request, the subject's last token looked up.
        place: of the edit.
        decode: gives the text of token ids.
    """
    end = prompt.lookup + (place[0] != "subject_previous")
    between = (decode(prompt.ids[prompt.lookup - away : end]) for away in distances)
    return [any(map(str.isspace, text.strip())) for text in between]


def cue_reach(
    prompts: Sequence[EncodedPrompt], place: Place, target: Sequence[int], tokens: int = 1
) -> int:
    """For how many tokens after its cue an edit may fire: as far as it is from it in its prompts,
    and as far as other words may put it.

    Args:
        prompts: of one request.
        place: of the edit.
        target: ids of the request's target.
        tokens: how many make the cue.
    """
    name, _ = place
    if name in SUBJECT_PLACES:
        return _REACH_OF_ONE if tokens == 1 else _REACH
    there = [(p.position(place, target), p.lookup) for p in prompts]
    farthest = max((at - lookup for at, lookup in there if at is not None), default=0)
    return max(_REACH, farthest + _MOST_CANDIDATES)


def candidate_keys(
    wanted: Sequence[tuple[Sequence[int], Sequence[EncodedPrompt], int]],
    x: Tensor,
    sample: Tensor | None,
    elsewhere: Callable[[set[int]], list[int]],
) -> list[list[Tensor]]:
    """Keys ``[v, n]`` of each token that may be one of the cue of some edits.

    Args:
        wanted: for each edit how far before the subject's last token these are, the prompts where
            the keys are read, and the first one's row in ``x``.
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
    for distances, prompts, row in wanted:
        counts.append([])
        for away in distances:
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
