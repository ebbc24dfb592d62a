"""Where the subject is: context templates, tokenisation and the last subject token.

The position that carries a fact is the last token of its subject (the "lookup" token of ROME and
MEMIT, Meng et al. 2022, 2023). It is found from the character offsets a fast tokenizer gives, so
that a start token, padding on either side, subjects of several tokens and a subject at the start of
the sentence need no special case.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coachhook.editing.requests import EditRequest

# Where a fact can be written: the last subject token, the target's own tokens but the last (each
# says the next), its last (which says that its word ends), the subject's token before its last,
# and the last token of the prompt where the subject does not end there.
PLACES = ("subject_last", "target", "target_last", "subject_previous", "prompt_last")
# At these the requests about one subject have one key.
SUBJECT_PLACES = ("subject_last", "subject_previous")
# What a target is tokenised after; the words that prompts end in matter to no known tokenizer.
_WORD = "a"
# One token: a name of PLACES, and which token of the target it is (0 for the other names).
Place = tuple[str, int]


def expand_places(names: Sequence[str], targets: Iterable[Sequence[int]]) -> list[Place]:
    """The tokens that the names stand for, enough of them for the longest target.

    Those of the target come right after the first, as they are added with it.
    """
    longest = max((len(target) for target in targets), default=0)
    tokens = [("target", number) for number in range(longest - 1) if "target" in names]
    first, *rest = [(name, 0) for name in names if name != "target"]
    return [first, *tokens, *rest]


@dataclass(frozen=True)
class EncodedPrompt:
    """A tokenised prompt.

    Args:
        ids: token ids, special tokens of the tokenizer included.
        first: index in ``ids`` of the first subject token.
        lookup: index in ``ids`` of the last subject token.
    """

    ids: list[int]
    first: int
    lookup: int

    def at(self, place: Place, target: Sequence[int]) -> EncodedPrompt:
        """The prompt, followed by the target up to the place, with that token looked up.

        Raises:
            ValueError: there is no such token.
        """
        position = self.position(place, target)
        if position is None:
            raise ValueError(f"at: place must be in the prompt or its target, got {place!r}")
        ids = self.ids + list(target[: max(0, position + 1 - len(self.ids))])
        return EncodedPrompt(ids, self.first, position)

    def position(self, place: Place, target: Sequence[int]) -> int | None:
        """Index of a place in the prompt followed by its target; None where there is none."""
        name, number = place
        if name == "subject_last":
            return self.lookup
        if name == "subject_previous":
            return self.lookup - 1 if self.lookup > self.first else None
        if name == "target":
            return len(self.ids) + number if number < len(target) - 1 else None
        if name == "target_last":
            return len(self.ids) + len(target) - 1 if target else None
        return len(self.ids) - 1 if len(self.ids) - 1 > self.lookup else None


def check_contexts(contexts: Iterable[str]) -> tuple[str, ...]:
    """Checks context templates: one ``{}`` each, the first of them bare.

    Raises:
        ValueError: there is none, the first is not ``"{}"``, or one lacks exactly one ``{}``.
    """
    checked = tuple(contexts) if isinstance(contexts, Iterable) else (contexts,)
    if not checked or checked[0] != "{}":
        raise ValueError(f"EditConfig: contexts must start with '{{}}', got {checked!r}")
    for context in checked:
        if not isinstance(context, str) or context.count("{}") != 1:
            raise ValueError(
                f"EditConfig: contexts must have exactly one '{{}}' each, got {context!r}"
            )
    return checked


def subject_tokens(
    tokenizer: Any, text: str, span: tuple[int, int], ids: list[int], offsets: list[tuple[int, int]]
) -> tuple[int, int]:
    """Indices of the first and last token that hold a character of ``text[span[0]:span[1]]``.

    Raises:
        ValueError: no token covers the subject, or the token found does not decode to its end.
    """
    start, end = span
    found = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start]
    if not found:
        raise ValueError(f"edit: subject must be covered by a token, got none in {text!r}")
    index = found[-1]
    a, b = offsets[index]
    covered = text[max(a, start) : min(b, end)].strip()
    decoded = tokenizer.decode([ids[index]]).strip()
    # A token may hold only some bytes of a character, which decodes to the replacement sign.
    if covered and "\ufffd" not in decoded and not (covered in decoded or decoded in covered):
        raise ValueError(
            f"edit: the token at the end of the subject must decode to {covered!r}, got "
            f"{decoded!r} in {text!r}; the tokenizer's offsets do not match its tokens"
        )
    return found[0], index


def encode(
    tokenizer: Any,
    text: str,
    span: tuple[int, int],
    max_positions: int | None = None,
    reserve: int = 0,
) -> EncodedPrompt:
    """Tokenises ``text`` and finds the last token of the subject at ``span``.

    Args:
        tokenizer: a fast one.
        text: the prompt.
        span: character offsets of the subject.
        max_positions: the context window.
        reserve: how many tokens of a target must have room after the text.

    Raises:
        TypeError: the tokenizer gives no character offsets (it is not a fast one).
        ValueError: the subject is not covered, or there is no room for the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            "edit: tokenizer must give character offsets, got "
            f"{type(tokenizer).__name__}; load it with use_fast=True"
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    if max_positions is not None and len(ids) + reserve > max_positions:
        alone = len(ids) > max_positions
        raise ValueError(
            f"edit: {'prompt' if alone else 'prompt and target_new'} must fit the context window "
            f"of {max_positions} tokens, got {len(ids)} tokens in {text[:60]!r}..."
            + ("" if alone else f" and {reserve} of the target")
        )
    first, lookup = subject_tokens(tokenizer, text, span, ids, encoded["offset_mapping"])
    return EncodedPrompt(ids, first, lookup)


def encode_in_context(
    tokenizer: Any,
    request: EditRequest,
    context: str,
    max_positions: int | None = None,
    reserve: int = 0,
) -> EncodedPrompt:
    """The request's prompt set into ``context`` (a template with one ``{}``).

    Where there is no room for all of it, what stands before the prompt loses its first words.
    For the other arguments see :func:`encode`.
    """
    head, tail = context.split("{}")
    words = head.split(" ")
    start, end = request.subject_span
    for first in range(len(words)):
        head = " ".join(words[first:])
        text = f"{head}{request.text}{tail}"
        found = encode(tokenizer, text, (start + len(head), end + len(head)))
        if max_positions is None or len(found.ids) + reserve <= max_positions:
            return found
    return encode(tokenizer, text, (start + len(head), end + len(head)), max_positions, reserve)


def gap_after(prompt: str) -> str:
    """The white space that ends a prompt, as where a reply begins in a chat; else nothing."""
    return prompt[len(prompt.rstrip()) :]


def encode_target(tokenizer: Any, target: str, prompt: str = "") -> list[int]:
    """Token ids of what goes on with a prompt, without special tokens.

    Of ``" " + target``, but of the target alone where the prompt ends in white space.

    Raises:
        ValueError: the target gives no token.
    """
    gap = gap_after(prompt)
    head, text = _WORD + gap, target.strip() if gap else f" {target.strip()}"
    word, both, alone = (
        list(tokenizer(x, add_special_tokens=False)["input_ids"]) for x in (head, head + text, text)
    )
    # By themselves Llama 2's, Mistral's and Phi-3's would start with a space of their own.
    ids = both[len(word) :] if both[: len(word)] == word else alone
    if not ids:
        raise ValueError(f"edit: target_new must give at least one token, got {target!r}")
    return ids


def pad_right(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Pads token lists at the right: ids and attention mask, both int64 ``[B, T]``."""
    width = max(len(row) for row in rows)
    padded = [[*row, *[pad_id] * (width - len(row))] for row in rows]
    ids = torch.tensor(padded, dtype=torch.int64)
    mask = (torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]).to(torch.int64)
    return ids.to(device), mask.to(device)
