"""The facts that the networks of a baseline learn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from coachhook.editing.requests import EditRequest
from coachhook.evaluation.baselines.texts import encode_targets
from coachhook.evaluation.scoring import Row, encode_prompts


def check_training_requests(
    op: str, requests: Sequence[EditRequest], networks: Any
) -> tuple[EditRequest, ...]:
    """Checks the training facts of a configuration.

    Raises:
        TypeError: not a list of requests.
        ValueError: fewer than two facts, and no trained networks either.
    """
    if isinstance(requests, EditRequest | str) or not all(
        isinstance(r, EditRequest) for r in requests
    ):
        raise TypeError(
            f"{op}: train_requests must be a list of EditRequest, got {str(requests)[:80]}"
        )
    if networks is None and len(requests) < 2:
        raise ValueError(
            f"{op}: train_requests must hold at least two facts to train on, got {len(requests)}; "
            "give facts that are not edited later, or trained networks"
        )
    return tuple(requests)


class TrainingFacts:
    """Training facts, tokenised.

    Attributes:
        edits: the prompt of each with its target.
        paraphrases: per fact its paraphrases with its target; the prompt itself where it has none.
        neighbors: per fact the prompts of its neighbourhood, or the next fact's prompt where it has
            none. A token that nobody reads follows, so that what is judged is the prompt's end.

    Raises:
        ValueError: a text does not fit the context window.
    """

    def __init__(
        self,
        op: str,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        max_positions: int | None,
    ) -> None:
        self.edits = encode_targets(
            op, tokenizer, [(r.text, r.target_new) for r in requests], max_positions
        )
        self.paraphrases = [
            encode_targets(op, tokenizer, [(p, r.target_new) for p in r.paraphrases], max_positions)
            or [self.edits[i]]
            for i, r in enumerate(requests)
        ]
        self.neighbors = []
        for i, request in enumerate(requests):
            texts = request.neighborhood or (requests[(i + 1) % len(requests)].text,)
            rows = encode_prompts(tokenizer, texts)
            _check_room(op, texts, rows, max_positions)
            self.neighbors.append([Row((*ids, ids[-1]), 1) for ids in rows])

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """Numbers of up to ``count`` facts, no fact twice."""
        return torch.randperm(len(self.edits), generator=generator)[:count].tolist()

    def paraphrase(self, fact: int, generator: torch.Generator) -> Row:
        """One of a fact's paraphrases."""
        return _pick(self.paraphrases[fact], generator)

    def neighbor(self, fact: int, generator: torch.Generator) -> Row:
        """One of a fact's neighbours."""
        return _pick(self.neighbors[fact], generator)


def _check_room(
    op: str, texts: Sequence[str], rows: Sequence[tuple[int, ...]], max_positions: int | None
) -> None:
    for text, ids in zip(texts, rows, strict=True):
        if not ids:
            raise ValueError(f"{op}: neighborhood must give at least one token, got {text!r}")
        if max_positions is not None and len(ids) >= max_positions:
            raise ValueError(
                f"{op}: neighborhood must fit the context window of {max_positions} tokens with "
                f"one more, got {len(ids)} tokens in {text[:60]!r}..."
            )


def _pick(rows: Sequence[Row], generator: torch.Generator) -> Row:
    return rows[int(torch.randint(len(rows), (1,), generator=generator))]
