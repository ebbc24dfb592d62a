"""Forward passes of the metrics: scoring given targets, and greedy continuations.

Sequences are grouped by their exact length, so that no batch holds padding: every result is that of
one prompt at a time (to rounding), whatever the tokenizer's padding side and whether or not the
gate counts padded positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from coachhook.editing.prompts import encode_target, gap_after
from coachhook.models import end_tokens


@dataclass(frozen=True)
class Row:
    """A tokenised text whose last ``target`` tokens are judged."""

    ids: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class Score:
    """How a model scores one target.

    Args:
        tokens: the target's tokens.
        argmax: the most likely token at each of their places, earlier target tokens given.
        nll: mean negative log-likelihood per target token, in nats.
    """

    tokens: tuple[int, ...]
    argmax: tuple[int, ...]
    nll: float

    @property
    def accuracy(self) -> float:
        """Share of target tokens that are the most likely ones."""
        return sum(a == t for a, t in zip(self.argmax, self.tokens, strict=True)) / len(self.tokens)


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """Tokenises ``prompt + " " + target``.

    The target's tokens are those of the whole text beyond the number of tokens of the prompt alone,
    as in EasyEdit. Where that leaves nothing, the target is tokenised on its own. After a prompt
    that ends in white space it follows directly, as in edits.
    """
    if not pairs:
        return []
    whole = tokenizer([f"{prompt} {target}" for prompt, target in pairs])["input_ids"]
    alone = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    rows = []
    for (text, target), full, prompt in zip(pairs, whole, alone, strict=True):
        if gap_after(text):
            full = prompt + encode_target(tokenizer, target, text)
        elif len(full) <= len(prompt):
            full = prompt + tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
        rows.append(Row(tuple(full), len(full) - len(prompt)))
    return rows


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of each prompt, the tokenizer's special tokens included."""
    return [tuple(ids) for ids in tokenizer(list(prompts))["input_ids"]] if prompts else []


def encode_chat(op: str, tokenizer: Any, messages: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of each text as a user's message, up to where the reply begins.

    A template that can leave out the model's thinking leaves it out.

    Args:
        op: the operation that error messages name.
        tokenizer: the tokenizer, with a chat template.
        messages: the texts, each a conversation of its own.

    Raises:
        ValueError: the tokenizer has no chat template, or one that refuses such a conversation.
        ImportError: templates cannot be read, as jinja2 is not installed.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{op}: tokenizer must have a chat template to be asked in a chat, got none; ask a "
            "model that was trained for chats, or leave the chat out"
        )
    if not messages:
        return []
    # What the template raises is jinja2's, which transformers only needs, and imports, for them.
    try:
        from jinja2 import TemplateError
    except ImportError as error:
        raise ImportError(
            f"{op}: chat must have the package jinja2 to read the tokenizer's chat template, got "
            "none; pip install jinja2, or leave the chat out"
        ) from error
    try:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": message}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for message in messages
        ]
    except TemplateError as error:
        raise ValueError(
            f"{op}: tokenizer must have a chat template that takes one message of a user, got one "
            f"that fails: {error}; mend the template, or leave the chat out"
        ) from error
    # The template has written the start token itself.
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def decode_each(tokenizer: Any, rows: Sequence[tuple[int, ...]]) -> list[str]:
    """The text of each row of tokens, without special tokens."""
    # batch_decode is of no use: of an empty list some versions make one empty text.
    return [tokenizer.decode(list(row), skip_special_tokens=True) for row in rows]


def equal_length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of one length each, short ones first; the order is fixed."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    for length in sorted(groups):
        group = groups[length]
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def input_device(model: Any) -> torch.device:
    """The device that token ids must be on."""
    return model.get_input_embeddings().weight.device


@torch.no_grad()
def score(
    model: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 64,
    patch: Callable[[list[int]], AbstractContextManager[Any]] | None = None,
    progress: str | None = None,
) -> list[Score]:
    """Scores the target of every row with teacher forcing.

    Args:
        model: a causal language model.
        rows: tokenised texts.
        batch_size: rows per forward pass.
        patch: entered around each forward pass with the indices of its rows.
        progress: label of a progress bar on stderr, or None for no bar.

    Returns:
        One score per row, in order. Log-likelihoods are computed in float32, in float64 for a
        float64 model.
    """
    takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    device = input_device(model)
    results: dict[int, Score] = {}
    with tqdm(total=len(rows), desc=progress, disable=progress is None, leave=False) as bar:
        for batch in equal_length_batches([len(r.ids) for r in rows], batch_size):
            ids = torch.tensor([rows[i].ids for i in batch], device=device)
            keep = {"logits_to_keep": 1 + max(rows[i].target for i in batch)} if takes_keep else {}
            with patch(batch) if patch else nullcontext():
                logits = model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep
                ).logits
            sizes = [rows[i].target for i in batch]
            # The prediction of the last k tokens stands one place before them.
            judged = torch.cat([logits[b, -k - 1 : -1] for b, k in enumerate(sizes)])
            targets = torch.cat([ids[b, -k:] for b, k in enumerate(sizes)]).to(judged.device)
            argmax, nll = _judge(judged, targets)
            for index, a, t, n in zip(
                batch,
                argmax.split(sizes),
                targets.cpu().split(sizes),
                nll.split(sizes),
                strict=True,
            ):
                results[index] = Score(tuple(t.tolist()), tuple(a.tolist()), n.mean().item())
            bar.update(len(batch))
    return [results[i] for i in range(len(rows))]


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely tokens and negative log-likelihoods, on the CPU: logits [M, V], targets [M]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nll = -wide.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return logits.argmax(-1).cpu(), nll.double().cpu()


@torch.no_grad()
def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    max_positions: int | None = None,
    batch_size: int = 64,
    use_cache: bool = True,
    progress: str | None = None,
) -> list[tuple[int, ...]]:
    """Greedy continuations, ended by the model's end-of-text token or the limit.

    Args:
        model: a causal language model.
        tokenizer: gives the padding and end-of-text tokens.
        prompts: token ids, not empty.
        max_new_tokens: the limit; it does not depend on any expected answer.
        max_positions: context window; a continuation ends where the window does.
        batch_size: rows per forward pass.
        use_cache: decode with a KV cache, or read the whole sequence again for every token.
        progress: label of a progress bar on stderr, or None for no bar.

    Returns:
        The new tokens of each prompt, without the end-of-text token.
    """
    ends = end_tokens(model, tokenizer)
    device = input_device(model)
    own: dict[str, Any] = {}
    if "use_model_defaults" in inspect.signature(model.generate).parameters:
        # Before transformers 5 a setting that has its usual value counts as unset.
        own["use_model_defaults"] = False
    results: dict[int, tuple[int, ...]] = {}
    with tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False) as bar:
        for batch in equal_length_batches([len(p) for p in prompts], batch_size):
            ids = torch.tensor([prompts[i] for i in batch], device=device)
            room = max_new_tokens
            if max_positions is not None:
                room = min(room, max_positions - ids.shape[1])
            if room > 0:
                config = _greedy_config(tokenizer, room, ends, use_cache)
                with _only(model, config):
                    out = model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        generation_config=config,
                        **own,
                    )
                new = out[:, ids.shape[1] :].tolist()
            else:
                new = [[] for _ in batch]
            for index, tokens in zip(batch, new, strict=True):
                results[index] = _cut(tokens, ends)
            bar.update(len(batch))
    return [results[i] for i in range(len(prompts))]


@contextmanager
def _only(model: Any, config: Any) -> Iterator[None]:
    """A block in which the model has no generation settings but these.

    What a config leaves unset is filled in from the model's own, tokens it never says among it, and
    not everything has a value that means none.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _greedy_config(tokenizer: Any, max_new_tokens: int, ends: list[int], use_cache: bool) -> Any:
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=pad,
        eos_token_id=ends or None,
    )


def _cut(tokens: list[int], ends: list[int]) -> tuple[int, ...]:
    for at, token in enumerate(tokens):
        if token in ends:
            return tuple(tokens[:at])
    return tuple(tokens)
