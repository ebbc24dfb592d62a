"""A request as token ids: its prompt in every context, its target, and its subject elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from coachhook.editing.prompts import (
    EncodedPrompt,
    encode,
    encode_in_context,
    encode_target,
)
from coachhook.editing.requests import EditRequest
from coachhook.editing.word_ends import ends_word

KL_PROMPT = "{} is a"
# In prompts and contexts a subject often stands at the start of a sentence; its first token has
# another key after a word.
_MENTIONS = ("of {}", "in {}", ", {}")


@dataclass(frozen=True)
class EncodedRequest:
    """A request's token ids.

    Attributes:
        contexts: the prompt in each context, bare first, without the target.
        target: ids of the target.
        essence: "{subject} is a", whose next-token distribution should not drift.
        rewordings: other prompts that should give the target.
        mentions: the subject after other words, for its cue.
        ends_word: whether the target ends a word, and there is room to ask what comes after it.
    """

    contexts: list[EncodedPrompt]
    target: list[int]
    essence: EncodedPrompt
    rewordings: list[EncodedPrompt] = field(default_factory=list)
    mentions: list[EncodedPrompt] = field(default_factory=list)
    ends_word: bool = False

    @property
    def prompts(self) -> list[EncodedPrompt]:
        """All prompts that should give the target, the contexts first."""
        return [*self.contexts, *self.rewordings]


def encode_requests(
    tokenizer: Any,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    max_positions: int | None,
    vocabulary: int | None = None,
) -> list[EncodedRequest]:
    """Tokenises all prompts of a batch and locates the subject in each.

    Args:
        tokenizer: of the model, a fast one.
        requests: the batch.
        contexts: templates.
        max_positions: the context window; None is any number.
        vocabulary: tokens the model knows; None does not check.

    Raises:
        ValueError: a subject is not covered by a token, a target gives none, a prompt with its
            target does not fit the context window, or has a token that the model does not know; the
            message names the request.
    """
    encoded = []
    for number, request in enumerate(requests):
        try:
            target = encode_target(tokenizer, request.target_new, request.text)
            if max_positions is not None and len(target) > max_positions:
                raise ValueError(
                    f"edit: target_new must fit the context window of {max_positions} tokens, got "
                    f"{len(target)} tokens in {request.target_new[:60]!r}..."
                )
            # The last token of a target is only predicted.
            reserve = len(target) - 1
            ends = ends_word(request.target_new.strip())
            if max_positions is not None and ends:
                # What comes after the target is asked where its last token has room, too.
                ends = len(tokenizer(request.text)["input_ids"]) + len(target) <= max_positions
                reserve += int(ends)
            essence, *mentions = (
                encode(
                    tokenizer,
                    text.replace("{}", request.subject),
                    (text.index("{}"), text.index("{}") + len(request.subject)),
                    max_positions,
                )
                for text in (KL_PROMPT, *_MENTIONS)
            )
            prompts = [
                encode_in_context(tokenizer, request, c, max_positions, reserve) for c in contexts
            ]
            largest = max([*target, *(i for p in [*prompts, *mentions] for i in p.ids)])
            if vocabulary is not None and largest >= vocabulary:
                raise ValueError(
                    f"edit: tokens must be of the model's vocabulary of {vocabulary}, got "
                    f"{tokenizer.convert_ids_to_tokens(largest)!r} with id {largest}; use the "
                    "model's own tokenizer"
                )
            encoded.append(EncodedRequest(prompts, target, essence, [], mentions, ends))
        except ValueError as error:
            raise ValueError(f"{error} (request {number}: {request.text!r})") from error
    return encoded
