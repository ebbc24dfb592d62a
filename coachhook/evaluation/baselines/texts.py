"""Prompts with their targets as padded tensors, and the likelihood of the targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coachhook.editing.prompts import pad_right
from coachhook.evaluation.scoring import Row, encode_pairs


@dataclass(frozen=True)
class TargetBatch:
    """R texts, padded at the right, whose last tokens are targets.

    Attributes:
        ids: token ids ``[R, T]``.
        mask: attention mask ``[R, T]`` int64.
        row: row of each target token ``[M]``.
        column: place of the token that predicts it ``[M]``.
        wanted: the target tokens ``[M]``.
        sizes: target tokens of each row ``[R]``.
    """

    ids: Tensor
    mask: Tensor
    row: Tensor
    column: Tensor
    wanted: Tensor
    sizes: Tensor

    @property
    def last(self) -> Tensor:
        """Place of the last prompt token of each row ``[R]``."""
        return self.mask.sum(1) - self.sizes - 1

    def losses(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood per target token, and whether all tokens come out.

        Args:
            log_probs: log-probabilities ``[M, V]`` at the places ``(row, column)``.

        Returns:
            Losses ``[R]``, differentiable, and bool ``[R]``.
        """
        chosen = log_probs.gather(1, self.wanted[:, None])[:, 0]
        total = torch.zeros(len(self.sizes), dtype=chosen.dtype, device=chosen.device)
        nll = -total.index_add(0, self.row, chosen) / self.sizes
        wrong = (log_probs.argmax(1) != self.wanted).to(chosen.dtype)
        return nll, total.index_add(0, self.row, wrong) == 0


def encode_targets(
    op: str, tokenizer: Any, pairs: Sequence[tuple[str, str]], max_positions: int | None
) -> list[Row]:
    """Tokenises prompts with their targets as the metrics do.

    Args:
        op: the operation that error messages name.
        tokenizer: the tokenizer.
        pairs: prompt and target, without the space between them.
        max_positions: the context window, in tokens.

    Raises:
        ValueError: a target gives no token, or a text does not fit the context window.
    """
    rows = encode_pairs(tokenizer, pairs)
    for (prompt, target), row in zip(pairs, rows, strict=True):
        if row.target < 1 or len(row.ids) <= row.target:
            raise ValueError(
                f"{op}: prompt and target must give at least one token each, got {prompt!r} with "
                f"{target!r}"
            )
        if max_positions is not None and len(row.ids) > max_positions:
            raise ValueError(
                f"{op}: prompt and target must fit the context window of {max_positions} tokens, "
                f"got {len(row.ids)} tokens in {prompt[:60]!r}..."
            )
    return rows


def target_batch(rows: Sequence[Row], pad_id: int, device: torch.device | str) -> TargetBatch:
    """Pads tokenised texts at the right."""
    ids, mask = pad_right([r.ids for r in rows], pad_id, device)
    places = [
        (i, at) for i, r in enumerate(rows) for at in range(len(r.ids) - r.target, len(r.ids))
    ]
    row, at = torch.tensor(places, device=device).T
    sizes = torch.tensor([r.target for r in rows], device=device)
    return TargetBatch(ids, mask, row, at - 1, ids[row, at], sizes)


def log_probs_at(logits: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Log-probabilities ``[M, V]`` at some places of logits ``[R, T, V]``, float32 or better."""
    picked = logits[row.to(logits.device), column.to(logits.device)]
    return torch.log_softmax(picked if picked.dtype == torch.float64 else picked.float(), dim=-1)
