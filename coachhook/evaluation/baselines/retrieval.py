"""Retrieval in the prompt: an edited fact is put before the texts it is related to.

``model(...)`` and ``model.generate(...)`` are replaced on the instance: every row is decoded,
related facts are looked up, and the row is run with their tokens before its own. What comes back
has the shape of what went in, so that nothing else need know of it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from coachhook.editing.requests import EditRequest
from coachhook.evaluation.baselines.base import Baseline
from coachhook.evaluation.baselines.descent import encode_rows
from coachhook.evaluation.scoring import score
from coachhook.hooks.cache_state import CACHE_NAMES

Retriever = Callable[[str, Sequence[EditRequest]], Sequence[int]]
# Arguments of a forward that would have to be rewritten for the longer row.
_REFUSED = (*CACHE_NAMES, "inputs_embeds", "labels", "position_ids", "cache_position")
# Limits of generate for the whole text, and those for the new tokens alone, which go before them.
_LENGTHS = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}


def subject_retriever(text: str, facts: Sequence[EditRequest]) -> list[int]:
    """Numbers of the facts whose subject stands in ``text`` as whole words, nearest first.

    The nearest shares most words of its prompt, those of its subject apart, with the text; of equal
    facts the later one comes first.
    """
    words = _words(text)
    found = []
    for number, fact in enumerate(facts):
        if fact.subject not in text:  # what most facts fail, before a pattern is made
            continue
        if re.search(rf"(?<!\w){re.escape(fact.subject)}(?!\w)", text):
            shared = len(words & _words(fact.template.replace("{}", " ")))
            found.append((shared, number))
    return [number for _, number in sorted(found, reverse=True)]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


@dataclass(frozen=True)
class RetrievalConfig:
    """Settings of :class:`Retrieval`.

    Args:
        template: how facts are put before a prompt, with one ``{}`` for them.
        most: most facts put before one prompt.
        retriever: function of a text and the facts so far that gives the numbers of those related
            to it, the most related first.

    Raises:
        ValueError: ``template`` has not exactly one ``{}``, or ``most`` is not positive.
    """

    template: str = "New fact: {}.\n"
    most: int = 1
    retriever: Retriever = subject_retriever

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ValueError(
                f"retrieval: template must have exactly one '{{}}', got {self.template!r}"
            )
        if self.most < 1:
            raise ValueError(f"retrieval: most must be at least 1, got {self.most!r}")


class Retrieval(Baseline):
    """Facts are kept as text and put before the prompts that they are related to.

    The tokens of the prompt stay as they are. Limits: ``model(...)`` takes ``input_ids`` and a mask
    only and gives logits only, no cache and no loss, wherever a fact was found; ``generate`` gives
    the sequences only; facts that do not fit into the context window are left out. The retriever
    sees the whole row, in teacher forcing with the answer that is scored.
    """

    name: ClassVar[str] = "retrieval"
    reference: ClassVar[str] = (
        "after Zheng et al. 2023, Can We Edit Factual Knowledge by In-Context Learning?, EMNLP"
    )
    config_type: ClassVar[type] = RetrievalConfig
    needs_projections: ClassVar[bool] = False

    def _start(self) -> None:
        self._facts: list[EditRequest] = []
        self._off = False
        self._inside = False
        self._own = {
            name: vars(self._model)[name]
            for name in ("forward", "generate")
            if name in vars(self._model)
        }
        self._forward: Any = self._model.forward
        self._generate: Any = self._model.generate
        self._signature = inspect.signature(self._forward)

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._off or self._inside or not self._facts:
                return self._forward(*args, **kwargs)
            return self._prefixed_forward(args, kwargs)

        @functools.wraps(self._generate)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if self._off or not self._facts:
                return self._generate(*args, **kwargs)
            inside, self._inside = self._inside, True
            try:
                return self._prefixed_generate(args, kwargs)
            finally:
                self._inside = inside

        self._model.forward = forward
        self._model.generate = generate

    def _edit(self, requests: list[EditRequest]) -> tuple[list[bool], list[float]]:
        rows = encode_rows(self._tokenizer, requests, self._description.max_positions)
        # A fact asked for in the same words replaces the one before it.
        new = {request.text for request in requests}
        kept = [fact for fact in self._facts if fact.text not in new]
        self._facts = kept + list({request.text: request for request in requests}.values())
        scores = score(self._model, rows)
        return [s.accuracy == 1.0 for s in scores], [s.nll for s in scores]

    def _snapshot(self) -> list[EditRequest]:
        return self._facts

    def _restore(self, snapshot: list[EditRequest]) -> None:
        self._facts = snapshot

    def _disable(self) -> None:
        self._off = True

    def _enable(self) -> None:
        self._off = False

    def _close(self) -> None:
        for name in ("forward", "generate"):
            delattr(self._model, name)
            if name in self._own:
                setattr(self._model, name, self._own[name])

    def _rows(self, ids: Tensor, mask: Tensor | None, room: int) -> list[tuple[Tensor, list[int]]]:
        """Per row its real places and its tokens with the facts before them; [] without facts."""
        rows = []
        for b, row in enumerate(ids):
            places = torch.arange(len(row), device=ids.device)
            if mask is not None:
                places = places[mask[b].to(ids.device).bool()]
            tokens = row[places].tolist()
            rows.append((places, self._with_facts(tokens, room)))
        return rows

    def _with_facts(self, tokens: list[int], room: int) -> list[int]:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        chosen = list(self.config.retriever(text, self._facts))[: self.config.most]
        limit = self._description.max_positions
        while chosen:
            facts = ". ".join(
                f"{self._facts[i].text} {self._facts[i].target_new.strip()}" for i in chosen
            )
            prefix = list(self._tokenizer(self.config.template.format(facts))["input_ids"])
            # A start token stands before the facts, and so not before the prompt again.
            start = self._tokenizer.bos_token_id
            again = bool(tokens) and tokens[0] == start and prefix[0] == start
            whole = prefix + tokens[int(again) :]
            if limit is None or len(whole) + room <= limit:
                return whole
            chosen.pop()
        return []

    def _prefixed_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        given = dict(self._signature.bind(*args, **kwargs).arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        for name in _REFUSED:
            if given.get(name) is not None:
                raise ValueError(
                    f"retrieval: {name} must be None, got {type(given[name]).__name__}; pass "
                    "input_ids and attention_mask, and decode with model.generate"
                )
        ids, mask = given["input_ids"], given.get("attention_mask")
        rows = self._rows(ids, mask, 0)
        if not any(tokens for _, tokens in rows):
            return self._forward(*args, **kwargs)
        logits: Tensor | None = None
        for group in _groups(tokens or ids[b, p].tolist() for b, (p, tokens) in enumerate(rows)):
            batch = [rows[b][1] or ids[b, rows[b][0]].tolist() for b in group]
            out = self._forward(
                input_ids=torch.tensor(batch, device=ids.device),
                attention_mask=torch.ones(len(batch), len(batch[0]), device=ids.device).long(),
                use_cache=False,
            ).logits
            if logits is None:
                logits = out.new_zeros(*ids.shape, out.shape[-1])
            for b, own in zip(group, out, strict=True):
                places = rows[b][0]
                # Before a start token that was left out stands the last token of the facts.
                logits[b, places] = own[-len(places) :]
        if logits is None:
            raise ValueError(f"retrieval: input_ids must hold a row, got {list(ids.shape)}")
        keep = given.get("logits_to_keep", 0)
        if isinstance(keep, int):
            logits = logits[:, -keep:] if keep else logits
        else:
            logits = logits[:, keep]
        result = CausalLMOutputWithPast(logits=logits)
        return result if given.get("return_dict") is not False else result.to_tuple()

    def _new_tokens(self, given: dict[str, Any], settings: Any, tokens: int) -> dict[str, int]:
        """Limits of a generation, of the new tokens alone: those of the text would count the facts.

        Args:
            given: arguments of the generation.
            settings: its generation config, if any.
            tokens: length of the prompts as they were given.
        """
        usual, own = type(self._model.generation_config)(), self._model.generation_config
        limits = {}
        for length, new in _LENGTHS.items():
            for name, prompt in ((new, 0), (length, tokens)):
                found = given.get(name)
                for config in (settings, own):
                    value = getattr(config, name, None)
                    if found is None and value != getattr(usual, name):
                        found = value
                if found is not None:
                    limits[new] = max(found - prompt, 0)
                    break
        return limits

    def _prefixed_generate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(kwargs)
        ids = given.pop("input_ids", None)
        if ids is None:
            ids = args[0] if args else given.pop("inputs", None)
        args = args[1:]
        if ids is None:
            raise ValueError("retrieval: input_ids must be given to generate, got none")
        settings = given.get("generation_config") or (args[0] if args else None)
        for name in ("return_dict_in_generate", "streamer"):
            value = given.get(name, getattr(settings, name, None))
            if value:
                raise ValueError(f"retrieval: {name} must not be set in generate, got {value!r}")
        mask = given.pop("attention_mask", None)
        lengths = self._new_tokens(given, settings, ids.shape[1])
        rows = self._rows(ids, mask, lengths.get("max_new_tokens", 0))
        if not any(tokens for _, tokens in rows):
            return self._generate(ids, *args, attention_mask=mask, **given)
        given = {k: v for k, v in given.items() if k not in _LENGTHS} | lengths
        found: dict[int, Tensor] = {}
        for group in _groups(tokens or ids[b, p].tolist() for b, (p, tokens) in enumerate(rows)):
            batch = torch.tensor(
                [rows[b][1] or ids[b, rows[b][0]].tolist() for b in group], device=ids.device
            )
            out = self._generate(batch, *args, attention_mask=torch.ones_like(batch), **given)
            for b, own in zip(group, out.split(len(out) // len(group)), strict=True):
                found[b] = own[:, batch.shape[1] :]
        longest = max(new.shape[1] for new in found.values())
        pad = self._tokenizer.pad_token_id
        return torch.cat(
            [
                torch.cat(
                    [
                        ids[b].expand(len(new), -1),
                        torch.nn.functional.pad(new, (0, longest - new.shape[1]), value=pad),
                    ],
                    dim=1,
                )
                for b, new in sorted(found.items())
            ]
        )


def _groups(rows: Iterable[Sequence[int]]) -> list[list[int]]:
    """Numbers of the rows, those of one length together, so that no batch needs padding."""
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(len(row), []).append(number)
    return list(groups.values())
