"""Other wordings of a fact, in the model's own words.

A target that is optimised on one wording of a fact may not come out in another. A model that knows
a fact also says it by itself: continuations of the subject are sampled, and wherever the model
would go on with what it answers to the request's prompt, the text so far is another wording of that
prompt. Nothing but the model and the request is needed; where the model has no answer that it would
give elsewhere, there are no rewordings.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from coachhook.editing.prompts import EncodedPrompt
from coachhook.hooks.cache_state import cache_argument, returned_cache

# Texts sampled from each start, and their length in tokens.
SAMPLES = 3
LENGTH = 8
# A token is drawn among so many, the likeliest (top-k sampling, Fan et al. 2018).
CHOICES = 40
# A text is a rewording where the answer's first token is at least as likely as this.
LEAST_PROBABILITY = 0.5
# Rows of a forward; a GPU needs as long for many as for few.
_ROWS_AT_ONCE = {"cpu": 256, "cuda": 1024}

Item = TypeVar("Item")
Found = TypeVar("Found")


@torch.no_grad()
def find_rewordings(
    model: nn.Module,
    prompts: Sequence[EncodedPrompt],
    starts: Sequence[Sequence[EncodedPrompt]],
    *,
    most: int,
    ends: Collection[int],
    pad_id: int,
    max_positions: int | None = None,
) -> list[list[EncodedPrompt]]:
    """Other prompts to which the model gives the answer of a prompt, those it says most first.

    Args:
        model: the model, hooks of earlier batches in place.
        prompts: k prompts.
        starts: for each of them texts with the subject, whose tokens up to the subject's last are
            continued.
        most: at most so many rewordings of a prompt.
        ends: ids after which a text has ended.
        pad_id: id used for padding.
        max_positions: context window; starts without room for a text are left out.

    Returns:
        For each prompt its rewordings, which go on after the subject otherwise than the prompt.
    """
    # A prompt that starts with its subject is continued as the subject alone is: that counts twice.
    alike: dict[tuple[int, tuple[int, ...]], list[EncodedPrompt]] = {}
    for number, texts in enumerate(starts):
        for start in texts:
            if max_positions is None or start.lookup + 1 + LENGTH <= max_positions:
                head = tuple(start.ids[: start.lookup + 1])
                alike.setdefault((number, head), []).append(start)
    heads = list(alike)
    rows_at_once = _ROWS_AT_ONCE.get(next(model.parameters()).device.type, 256)

    def answered(some: Sequence[EncodedPrompt]) -> list[int]:
        logits = Reader(model, [prompt.ids for prompt in some], pad_id).logits
        tokens: list[int] = logits.argmax(1).tolist()
        return tokens

    answers = in_parts(answered, prompts, rows_at_once)

    def sampled(some: Sequence[tuple[int, tuple[int, ...]]]) -> list[list[list[int]]]:
        wanted = [answers[number] for number, _ in some]
        return _sample(model, [list(head) for _, head in some], wanted, ends, pad_id)

    found: list[dict[tuple[int, ...], list[EncodedPrompt]]] = [{} for _ in prompts]
    tails = in_parts(sampled, heads, rows_at_once // SAMPLES)
    for (number, head), here in zip(heads, tails, strict=True):
        for tail in here:
            found[number].setdefault(tuple(tail), []).extend(
                EncodedPrompt([*head, *tail], start.first, start.lookup)
                for start in alike[number, head]
            )
    own = [tuple(prompt.ids[prompt.lookup + 1 :]) for prompt in prompts]
    return [
        [said[0] for said in sorted(others, key=len, reverse=True)][:most]
        for others in (
            [said for words, said in theirs.items() if words != mine]
            for theirs, mine in zip(found, own, strict=True)
        )
    ]


def in_parts(
    run: Callable[[Sequence[Item]], list[Found]], items: Sequence[Item], most: int
) -> list[Found]:
    """What ``run`` gives for the items, so many at a time; fewer where a GPU has no room for them.

    Raises:
        torch.cuda.OutOfMemoryError: there is none for a single one.
    """
    found: list[Found] = []
    while len(found) < len(items):
        some = items[len(found) : len(found) + most]
        try:
            found += run(some)
        except torch.cuda.OutOfMemoryError:
            if len(some) == 1:
                raise
            most = len(some) // 2
    return found


def _sample(
    model: nn.Module,
    starts: Sequence[Sequence[int]],
    answers: Sequence[int],
    ends: Collection[int],
    pad_id: int,
) -> list[list[list[int]]]:
    """Of SAMPLES texts after each start those that lead up to its answer, without it.

    The Gumbel maximum with noise of each text's own, so that it does not depend on the rows beside
    it. A text that has led to its answer, or past it, is not run further, which generate() would.
    """
    reader = Reader(model, starts, pad_id)
    reader.repeat(SAMPLES)
    each = [(number, i) for number in range(len(starts)) for i in range(SAMPLES)]
    seeds = [zlib.crc32(repr((list(starts[number]), i)).encode()) for number, i in each]
    device = reader.logits.device
    noise = torch.stack([_gumbel(seed) for seed in seeds]).to(device)
    texts: list[list[int]] = [[] for _ in each]
    leading: set[int] = set()
    alive = list(range(len(each)))
    for step in range(LENGTH):
        logits = reader.logits.float()
        wanted = torch.tensor([answers[each[row][0]] for row in alive], device=device)
        log_chances = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
        chances = log_chances.exp().tolist()
        likeliest = logits.topk(min(CHOICES, logits.shape[1]), dim=1)
        drawn = noise[torch.tensor(alive, device=device), step, : likeliest.values.shape[1]]
        chosen = (likeliest.values + drawn).argmax(1, keepdim=True)
        tokens = likeliest.indices.gather(1, chosen)[:, 0].tolist()
        left = []
        for place, (row, chance, token) in enumerate(zip(alive, chances, tokens, strict=True)):
            number, _ = each[row]
            # Right after the subject the answer would be read off the very token that is edited.
            if step and chance >= LEAST_PROBABILITY:
                leading.add(row)
            elif token != answers[number] and token not in ends:
                texts[row].append(token)
                left.append(place)
        alive = [alive[place] for place in left]
        if not alive or step + 1 == LENGTH:
            break
        reader.read(left, [texts[row][-1] for row in alive])
    return [
        [texts[row] for row in range(first, first + SAMPLES) if row in leading]
        for first in range(0, len(each), SAMPLES)
    ]


def _gumbel(seed: int) -> Tensor:
    """Gumbel noise of one text ``[LENGTH, CHOICES]``."""
    # Whatever dtype and device the caller made the default ones.
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.empty(LENGTH, CHOICES, dtype=torch.float32, device="cpu")
    return -noise.exponential_(generator=generator).log()


class Reader:
    """Reads rows of tokens, padded at the left, on and on.

    Attributes:
        logits: of the token after each row ``[R, V]``.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> None:
        width = max(len(row) for row in rows)
        ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        self._model: Any = model
        self._names = signature(model.forward).parameters
        self._device = next(model.parameters()).device
        self._ids, self._mask = ids.to(self._device), mask.to(self._device)
        self._cache: Any = None
        self.logits: Tensor
        self._forward(self._ids)

    def repeat(self, times: int) -> None:
        """Every row so many times, beside each other."""
        self.logits = self.logits.repeat_interleave(times, dim=0)
        self._choose(torch.arange(len(self._mask), device=self._device).repeat_interleave(times))

    def read(self, places: Sequence[int], tokens: Sequence[int]) -> None:
        """One more token of the rows at ``places``; the others are dropped."""
        if len(places) < len(self._mask):
            self._choose(torch.tensor(places, device=self._device))
        self._mask = pad(self._mask, (0, 1), value=1)
        last = torch.tensor(tokens, device=self._device)[:, None]
        self._ids = torch.cat([self._ids, last], dim=1)
        self._forward(self._ids if self._cache is None else last)

    def _choose(self, index: Tensor) -> None:
        """Rows by index, any number of each."""
        self._ids, self._mask = self._ids[index], self._mask[index]
        if self._cache is not None:
            # Of all ways to choose rows the one that states of linear attention know, too.
            self._cache.reorder_cache(index)

    def _forward(self, ids: Tensor) -> None:
        given: dict[str, Any] = {}
        if self._cache is not None:
            given = cache_argument(self._model, self._cache)
        if "position_ids" in self._names:
            given["position_ids"] = (self._mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._names:
            given["logits_to_keep"] = 1
        output = self._model(input_ids=ids, attention_mask=self._mask, use_cache=True, **given)
        self.logits, cache = output.logits[:, -1], returned_cache(output)
        # Of some hybrids there is none, or one whose rows cannot be chosen: all is read again.
        self._cache = cache if type(cache) is DynamicCache else None
