"""Other wordings of a fact, in the model's own words.

A target that is optimised on one wording of a fact may not come out in another. A model that knows
a fact also says it by itself: continuations of the subject are sampled, and wherever the model
would go on with what it answers to the request's prompt, the text so far is another wording of that
prompt. Nothing but the model and the request is needed; where the model has no answer that it would
give elsewhere, there are no rewordings.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.editing.prompts import EncodedPrompt

# Texts sampled from each start, and their length in tokens.
SAMPLES = 4
LENGTH = 8
# A text is a rewording where the answer's first token is at least as likely as this.
LEAST_PROBABILITY = 0.5
_ROWS_AT_ONCE = 256


class _Sample:
    """Samples by the Gumbel maximum with noise of each row's own, and watches one token of a row.

    Sampling in generate() draws one stream for the whole batch; here a row's text does not depend
    on the rows beside it.
    """

    def __init__(self, seeds: Sequence[int], watched: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._watched = torch.tensor(watched)[:, None]
        self.chances: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.chances.append(
            scores.float().softmax(-1).gather(1, self._watched.to(scores.device))[:, 0]
        )
        noise = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self._generators]
        )
        return scores.float() - noise.to(scores.device).log()


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
    answers = [
        text[0]
        for begin in range(0, len(prompts), _ROWS_AT_ONCE)
        for text in _continue(
            model, [p.ids for p in prompts[begin : begin + _ROWS_AT_ONCE]], 1, ends, pad_id
        )
    ]
    found: list[dict[tuple[int, ...], list[EncodedPrompt]]] = [{} for _ in prompts]
    for begin in range(0, len(heads), _ROWS_AT_ONCE // SAMPLES):
        some = heads[begin : begin + _ROWS_AT_ONCE // SAMPLES]
        rows = [list(head) for _, head in some for _ in range(SAMPLES)]
        seeds = [zlib.crc32(repr((row, i % SAMPLES)).encode()) for i, row in enumerate(rows)]
        sample = _Sample(seeds, [answers[number] for number, _ in some for _ in range(SAMPLES)])
        continued = _continue(model, rows, LENGTH, ends, pad_id, sample)
        chances = torch.stack(sample.chances, 1).tolist()
        for row, (text, chance) in enumerate(zip(continued, chances, strict=True)):
            number, _ = some[row // SAMPLES]
            length = _length(text, chance, {answers[number], *ends})
            if length:
                found[number].setdefault(tuple(text[:length]), []).extend(
                    EncodedPrompt(rows[row] + text[:length], start.first, start.lookup)
                    for start in alike[some[row // SAMPLES]]
                )
    own = [tuple(prompt.ids[prompt.lookup + 1 :]) for prompt in prompts]
    return [
        [said[0] for said in sorted(others, key=len, reverse=True)][:most]
        for others in (
            [said for tail, said in texts.items() if tail != mine]
            for texts, mine in zip(found, own, strict=True)
        )
    ]


def _length(text: Sequence[int], chances: Sequence[float], stops: Collection[int]) -> int:
    """Tokens of a text before the answer is likely; 0 where it never is."""
    for step, (token, chance) in enumerate(zip(text, chances, strict=True)):
        # Right after the subject the answer would be read off the very token that is edited.
        if step and chance >= LEAST_PROBABILITY:
            return step
        if token in stops:
            return 0
    return 0


def _padded_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids.to(device), mask.to(device)


def _continue(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    length: int,
    ends: Collection[int],
    pad_id: int,
    sample: _Sample | None = None,
) -> list[list[int]]:
    """What follows each row: up to ``length`` tokens, the most likely ones or sampled ones."""
    ids, mask = _padded_left(rows, pad_id, next(model.parameters()).device)
    generate: Any = model.generate
    out = generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=length,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=pad_id,
        eos_token_id=list(ends) or None,
        logits_processor=[] if sample is None else [sample],
    )
    return out[:, ids.shape[1] :].tolist()
