"""The sample of unrelated text, less what an edit itself is about.

The text that key statistics were taken from may well mention a subject that is edited later. Such a
key is no stranger: it is what the edit should fire on, and must not raise the edit's threshold. It
is told from a stranger by its tokens, which the sample keeps beside the keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from coachhook.editing.prompts import EncodedPrompt

Ending = tuple[int, ...]


def endings(prompts: Iterable[EncodedPrompt], width: int) -> list[Ending]:
    """The ids from the subject's first token to the one looked up, at most the last ``width``.

    One for each way the prompts spell it: with and without a space before it, for instance.
    """
    found = (tuple(p.ids[p.first : p.lookup + 1][-width:]) for p in prompts)
    return sorted(set(found))


class SampleTokens:
    """Finds sampled tokens by what they and the tokens before them are.

    Args:
        tokens: int32 ``[s, w]``, see :attr:`coachhook.statistics.Statistics.sample_tokens`.

    Attributes:
        tokens: the same.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self._rows: dict[Ending, list[int]] = defaultdict(list)
        for row, ids in enumerate(tokens.tolist()):
            for start in range(len(ids)):
                self._rows[tuple(ids[start:])].append(row)

    @property
    def width(self) -> int:
        """Ids kept for each token."""
        return self.tokens.shape[1]

    def rows(self, endings: Iterable[Ending]) -> set[int]:
        """Which sampled tokens end like one of these."""
        return {row for ending in endings for row in self._rows.get(ending, ())}

    def own(self, edits: Sequence[Iterable[Ending]]) -> Tensor:
        """Whether a sampled token ends like one of an edit's prompts, bool ``[s, len(edits)]``."""
        found = torch.zeros(len(self.tokens), len(edits), dtype=torch.bool)
        for column, wanted in enumerate(edits):
            for ending in wanted:
                found[self._rows.get(ending, []), column] = True
        return found
