"""From a stream of texts to batches of tokens with little padding, and a sample of the tokens.

Everything here depends on the texts and the settings alone, so that a run that was killed is taken
up again with the same batches and the same sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_TEXTS_AT_ONCE = 64
_EMPTY = np.iinfo(np.uint64).max
# Which half a text belongs to and which tokens are sampled must not depend on each other.
_HALVES_SEED = 0x5851F42D4C957F2D

Ints = npt.NDArray[np.int64]


class TokenStream:
    """Cuts a stream of texts into windows of token sequences.

    Args:
        texts: non-blank texts.
        tokenizer: a transformers tokenizer; the special tokens it adds by default are kept.
        max_length: longer sequences are cut to this many tokens.
        max_tokens: the stream ends after this many tokens, its last sequence cut to fit.
        window_tokens: a window is closed once it holds this many tokens.

    Attributes:
        counts: so far, "read": texts taken from the stream; "used": texts that gave tokens;
            "tokens": tokens of all windows; "truncated": texts cut to `max_length`.
    """

    def __init__(
        self,
        texts: Iterator[str],
        tokenizer: Any,
        *,
        max_length: int,
        max_tokens: int | None,
        window_tokens: int,
    ) -> None:
        self._texts = texts
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._max_tokens = max_tokens
        self._window_tokens = window_tokens
        self._digest = hashlib.sha256()
        self.counts = {"read": 0, "used": 0, "tokens": 0, "truncated": 0}

    @property
    def digest(self) -> str:
        """A digest of all texts read."""
        return self._digest.hexdigest()

    def skip_to(self, counts: dict[str, int]) -> None:
        """Read on to where `counts` were taken, without tokenising."""
        for text in islice(self._texts, counts["read"] - self.counts["read"]):
            self._take(text)
        self.counts = dict(counts)

    def window(self) -> list[Ints]:
        """Return the sequences of the next window, in the order of the texts; [] at the end."""
        counts = self.counts
        end = counts["tokens"] + self._window_tokens
        if self._max_tokens is not None:
            end = min(end, self._max_tokens)
        sequences: list[Ints] = []
        while counts["tokens"] < end:
            texts = list(islice(self._texts, _TEXTS_AT_ONCE))
            if not texts:
                break
            for text in texts:
                self._take(text)
            encoded = self._tokenizer(texts, return_attention_mask=False, verbose=False)
            for ids in encoded["input_ids"]:
                length = min(len(ids), self._max_length)
                if self._max_tokens is not None:
                    length = min(length, self._max_tokens - counts["tokens"])
                if length:
                    sequences.append(np.asarray(ids[:length], dtype=np.int64))
                    counts["used"] += 1
                    counts["tokens"] += length
                    counts["truncated"] += len(ids) > self._max_length
        return sequences

    def _take(self, text: str) -> None:
        self.counts["read"] += 1
        self._digest.update(text.encode("utf-8", "surrogatepass"))
        self._digest.update(b"\xff")  # never part of UTF-8: keeps the texts apart


class TokenBatch(NamedTuple):
    """Sequences padded on the right.

    Attributes:
        input_ids: int64 [B, T].
        mask: bool [B, T], True at real tokens; None when there is no padding.
        real: int64 [N], the places of the real tokens in the flattened [B * T]; None as `mask`.
        positions: int64 [N], the place of each real token in the whole stream.
        half: which half of the texts these are from, 0 or 1; 0 where they are not halved.
    """

    input_ids: Tensor
    mask: Tensor | None
    real: Tensor | None
    positions: Ints
    half: int


def make_batches(
    sequences: list[Ints], first_position: int, batch_tokens: int, *, halves: bool = False
) -> list[TokenBatch]:
    """Sort `sequences` by length and pack them into batches of at most `batch_tokens` tokens.

    The budget counts padding. A sequence longer than the budget makes a batch of its own.

    Args:
        sequences: token sequences in the order of the stream.
        first_position: the place of the first token in the whole stream.
        batch_tokens: budget of a batch.
        halves: draw for every sequence one of two halves, by a hash of its place in the stream, and
            pack the halves apart.
    """
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    starts = first_position + np.concatenate(([0], np.cumsum(lengths)[:-1]))
    order = np.argsort(-lengths, kind="stable")
    half_of = _halves(starts) if halves else np.zeros_like(starts)
    batches = []
    for half in range(2):
        rest = order[half_of[order] == half]
        while len(rest):
            width = int(lengths[rest[0]])
            chosen, rest = np.split(rest, [max(batch_tokens // width, 1)])
            batches.append(_pad([sequences[i] for i in chosen], starts[chosen], width, half))
    return batches


def _halves(starts: Ints) -> Ints:
    ranks = _splitmix64(starts.astype(np.uint64) + np.uint64(_HALVES_SEED))
    return (ranks >> np.uint64(63)).astype(np.int64)


def _pad(sequences: list[Ints], starts: Ints, width: int, half: int) -> TokenBatch:
    mask = np.arange(width) < np.array([[len(s)] for s in sequences])
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = np.concatenate(sequences)
    positions = np.concatenate(
        [start + np.arange(len(s)) for start, s in zip(starts, sequences, strict=True)]
    )
    input_ids = torch.from_numpy(ids)
    if mask.all():
        return TokenBatch(input_ids, None, None, positions, half)
    real = torch.from_numpy(np.flatnonzero(mask))
    return TokenBatch(input_ids, torch.from_numpy(mask), real, positions, half)


def windows(batch: TokenBatch, rows: Tensor, width: int) -> Tensor:
    """The ids of some tokens and of those before them in their sequence.

    Args:
        batch: the batch.
        rows: indices among its real tokens, int64 [r].
        width: ids per token.

    Returns:
        int32 [r, width]; the token itself last, -1 before the start of its sequence.
    """
    places = rows if batch.real is None else batch.real[rows]
    padded = torch.nn.functional.pad(batch.input_ids, (width, 0), value=-1)
    columns = (places % batch.input_ids.shape[1])[:, None] + torch.arange(1, width + 1)
    return padded[(places // batch.input_ids.shape[1])[:, None], columns].to(torch.int32)


class Reservoir:
    """A uniform sample of token positions, the same in whatever order they are offered.

    Each position has a pseudo-random rank (the splitmix64 permutation of position + seed), and
    the `size` lowest ranks stay: bottom-k sampling, uniform without replacement.

    Attributes:
        positions: int64 [size], the position in each slot; -1 where the slot is empty.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.positions = np.full(size, -1, dtype=np.int64)
        self._seed = seed
        self._ranks = np.full(size, _EMPTY, dtype=np.uint64)

    def offer(self, positions: Ints) -> tuple[Ints, Ints]:
        """Take in some of `positions`, none of them offered before.

        Returns:
            The slots to overwrite, and for each the index into `positions` of its new holder.
        """
        size = len(self.positions)
        ranks = _splitmix64(positions.astype(np.uint64) + np.uint64(self._seed))
        candidates = np.flatnonzero(ranks < self._ranks.max(initial=0))
        merged = np.concatenate((self._ranks, ranks[candidates]))
        kept = np.argsort(merged, kind="stable")[:size]
        rows = candidates[np.sort(kept[kept >= size]) - size]
        stays = np.zeros(size, dtype=bool)
        stays[kept[kept < size]] = True
        slots = np.flatnonzero(~stays)
        self.positions[slots] = positions[rows]
        self._ranks[slots] = ranks[rows]
        return slots, rows

    def restore(self, positions: Ints) -> None:
        """Set the slots as another reservoir of the same size and seed had them."""
        filled = positions >= 0
        self.positions = positions.copy()
        self._ranks[filled] = _splitmix64(
            positions[filled].astype(np.uint64) + np.uint64(self._seed)
        )

    def order(self) -> Ints:
        """Return the filled slots in the order of their positions."""
        filled = np.flatnonzero(self.positions >= 0)
        return filled[np.argsort(self.positions[filled])]


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
