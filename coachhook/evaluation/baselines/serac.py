"""SERAC (Mitchell et al. 2022, "Memory-Based Model Editing at Scale"): edits kept as text.

Edits go into a memory ``{z_i}``; no weight changes. For an input x the scope classifier g says
whether one of them applies, and then a counterfactual model h answers in the place of the base
model, with that edit before the input (equations 1 and 2):

    i = argmax_j g(z_j, x),   answer = h(z_i, x) if g(z_i, x) > 1/2, else base(x)

Both are trained on other facts, apart from each other: g by binary cross-entropy (equation 3), h by
the likelihood of the edit's target (equation 4). ``serac_networks`` tells what they are here.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.editing.requests import EditRequest
from coachhook.evaluation.baselines.base import Baseline
from coachhook.evaluation.baselines.lookup import NearestKey
from coachhook.evaluation.baselines.networks import load_networks, save_networks
from coachhook.evaluation.baselines.serac_networks import (
    BlockStates,
    ScopeClassifier,
    counterfactual_copy,
    in_context_row,
    train_classifier,
    train_counterfactual,
)
from coachhook.evaluation.baselines.texts import encode_targets, log_probs_at, target_batch
from coachhook.evaluation.baselines.training_facts import TrainingFacts, check_training_requests
from coachhook.evaluation.scoring import Row, encode_prompts
from coachhook.hooks.cache_state import (
    GateState,
    follow,
    given_cache,
    is_cache,
    returned_cache,
    state_of,
)
from coachhook.hooks.context import token_mask
from coachhook.models import evaluating

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class SeracConfig:
    """Settings of :class:`Serac`.

    Args:
        train_requests: facts the networks learn from, none of which is edited later; with
            paraphrases and neighbourhood prompts. Not needed where ``networks`` is given.
        threshold: an edit applies where ``g`` is above this; the paper's 1/2.
        heads: attentions of the scope classifier.
        width: of its embedding.
        classifier_steps: its training steps.
        classifier_batch: facts of one of them.
        classifier_lr: its learning rate (AdamW).
        blocks: blocks of the base model that the counterfactual model copies, from below; None
            copies all.
        counterfactual_steps: training steps of the counterfactual model.
        counterfactual_batch: texts of one of them.
        counterfactual_lr: its first learning rate (AdamW), which falls to 0 linearly.
        networks: file written by :meth:`Serac.save_networks`; nothing is trained then.
        seed: of the first weights and the order of the training facts.
        progress: show progress bars on stderr.

    Raises:
        TypeError: ``train_requests`` is not a list of requests.
        ValueError: a setting is out of range, or there is nothing to train on.
    """

    train_requests: Sequence[EditRequest] = ()
    threshold: float = 0.5
    heads: int = 2
    width: int = 128
    classifier_steps: int = 500
    classifier_batch: int = 32
    classifier_lr: float = 1e-3
    blocks: int | None = None
    counterfactual_steps: int = 300
    counterfactual_batch: int = 16
    counterfactual_lr: float = 1e-3
    networks: str | os.PathLike[str] | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(
                f"SeracConfig: threshold must lie between 0 and 1, got {self.threshold}"
            )
        for name in ("heads", "width", "classifier_batch", "counterfactual_batch"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"SeracConfig: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"SeracConfig: blocks must be at least 1 or None, got {self.blocks}")
        for name in ("classifier_lr", "counterfactual_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"SeracConfig: {name} must be positive, got {getattr(self, name)}")
        for name in ("classifier_steps", "counterfactual_steps"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"SeracConfig: {name} must not be negative, got {getattr(self, name)}"
                )
        requests = check_training_requests("SeracConfig", self.train_requests, self.networks)
        object.__setattr__(self, "train_requests", requests)


@dataclass(frozen=True)
class Memory:
    """N edits. Never changed in place.

    Attributes:
        prompts: the prompt of each, which is what identifies it.
        statements: tokens of its prompt with its target.
        embeddings: of its prompt, ``[N, e]``.
    """

    prompts: tuple[str, ...]
    statements: tuple[Row, ...]
    embeddings: Tensor

    def with_edit(self, prompt: str, row: Row, embedding: Tensor) -> Memory:
        """The memory with one more edit; an earlier one of the same prompt is dropped."""
        kept = [i for i, p in enumerate(self.prompts) if p != prompt]
        return Memory(
            (*(self.prompts[i] for i in kept), prompt),
            (*(self.statements[i] for i in kept), row),
            torch.cat((self.embeddings[kept], embedding[None])),
        )

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """``max_i g(z_i, x)`` and the number of that edit, for embeddings ``[..., e]``."""
        distance, number = self._nearest(queries.flatten(0, -2))
        similarity = torch.exp(-distance.square())
        return similarity.view(queries.shape[:-1]), number.view(queries.shape[:-1])

    @cached_property
    def _nearest(self) -> NearestKey:
        return NearestKey(self.embeddings)


class _Past(GateState):
    """What SERAC knows of the tokens of a KV cache; follows it as the gate's statistics do.

    Attributes:
        rows: token ids, mask, middle states and hits, each ``[B, T, ...]``; None when empty.
    """

    rows: list[Tensor] | None = None

    @property
    def tokens(self) -> int:
        """How many tokens it knows of."""
        return 0 if self.rows is None else self.rows[0].shape[1]

    def clear(self) -> None:
        self.rows = None

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.rows is not None:
            self.rows = [change(x) for x in self.rows]

    def take_back(self, columns: int) -> None:
        if self.rows is not None and columns:
            self.rows = [x[:, :-columns] for x in self.rows]

    def append(self, rows: list[Tensor]) -> list[Tensor]:
        """Adds columns; returns all of them."""
        self.rows = (
            rows
            if self.rows is None
            else [torch.cat(pair, dim=1) for pair in zip(self.rows, rows, strict=True)]
        )
        return self.rows


class Serac(Baseline):
    """SERAC; its two networks are trained when it is made.

    Every token is asked whether the text up to it is in the scope of an edit. If so, the
    counterfactual model answers for as many tokens as the edit's target has; then the base model
    goes on. The same with and without a KV cache. Where edit and text together exceed the context
    window, the base model answers.

    Attributes:
        memory: the present edits.
        losses: losses of the training steps of the classifier and of the counterfactual model.
    """

    name = "serac"
    reference = (
        "Mitchell, Lin, Bosselut, Manning, Finn: Memory-Based Model Editing at Scale. ICML 2022 "
        "(SERAC)"
    )
    config_type = SeracConfig
    needs_projections = False
    config: SeracConfig

    def _start(self) -> None:
        config, description = self.config, self._description
        parameter = next(self._model.parameters())
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        eos = self._tokenizer.eos_token_id
        self._separator = self._tokenizer.pad_token_id if eos is None else eos
        self._counterfactual = counterfactual_copy(self._model, description, config.blocks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self._classifier = ScopeClassifier(description.hidden_size, config.heads, config.width)
        self._classifier.to(parameter.device, dtype)
        self.losses: dict[str, list[float]] = {"classifier": [], "counterfactual": []}
        self._states = BlockStates(self._model, description)
        try:
            if config.networks is not None:
                self._load(config.networks)
            else:
                with evaluating(self._model), torch.inference_mode(False), torch.enable_grad():
                    self._train()
        except BaseException:
            self._states.remove()
            raise
        self._counterfactual.requires_grad_(False)
        self._classifier.requires_grad_(False)
        empty = torch.zeros(0, config.width, dtype=dtype, device=parameter.device)
        self.memory = Memory((), (), empty)
        self._on = True
        self._names = tuple(inspect.signature(self._model.forward).parameters)
        self._before = 0
        self._handles = [
            self._model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._model.register_forward_hook(self._answer, with_kwargs=True),
        ]

    def _train(self) -> None:
        config, room = self.config, self._description.max_positions
        facts = TrainingFacts(self.name, self._tokenizer, config.train_requests, room)
        self.losses["classifier"] = train_classifier(
            self._model,
            self._states,
            facts,
            self._classifier,
            pad_id=self._tokenizer.pad_token_id,
            steps=config.classifier_steps,
            batch=config.classifier_batch,
            lr=config.classifier_lr,
            seed=config.seed,
            progress=config.progress,
        )
        self.losses["counterfactual"] = train_counterfactual(
            self._counterfactual,
            self._tokenizer,
            config.train_requests,
            separator=self._separator,
            max_positions=room,
            steps=config.counterfactual_steps,
            batch=config.counterfactual_batch,
            lr=config.counterfactual_lr,
            seed=config.seed,
            progress=config.progress,
        )

    def save_networks(self, path: str | os.PathLike[str]) -> None:
        """Writes the trained networks to a safetensors file, for ``SeracConfig.networks``."""
        self._check_open("save_networks")
        save_networks(path, self.name, self._model, self._shape(), self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        # Parameters, not the state: tied weights would be there twice.
        parts = (("classifier", self._classifier), ("counterfactual", self._counterfactual))
        return {f"{part}.{k}": v for part, net in parts for k, v in net.named_parameters()}

    def _load(self, path: str | os.PathLike[str]) -> None:
        tensors = load_networks(path, self.name, self._model, self._shape())
        with torch.no_grad():
            for name, parameter in self._tensors().items():
                parameter.copy_(tensors[name])

    def _shape(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in ("heads", "width", "blocks")}

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes how many tokens the cache holds before the forward fills it further."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = given_cache(given)
        self._before = int(cache.get_seq_length()) if is_cache(cache) else 0

    @torch.no_grad()
    def _answer(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Puts the counterfactual model's logits where an edit applies."""
        if not self._on or not self.memory.prompts:
            return None
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or given.get("labels") is not None:
            raise ValueError(
                "forward: with SERAC the input must be input_ids without labels, got "
                f"{'labels' if isinstance(ids, Tensor) else 'none'}; take the loss of the logits"
            )
        ids_all, mask, active = self._scopes(ids, given, output)
        columns = _kept_columns(given.get("logits_to_keep", 0), ids.shape[1], ids.device)
        offset = ids_all.shape[1] - ids.shape[1]
        # (row, place among the logits, place in the text) of every answer to be replaced.
        hits = (active[:, columns + offset] >= 0).nonzero()
        if not len(hits):
            return None
        answers = self._counterfactual_logits(ids_all, mask, active, hits, columns + offset)
        if answers is None:
            return None
        (rows, places), logits = answers
        # With return_dict=False the logits come first in a tuple, as there is no loss.
        plain = isinstance(output, tuple)
        replaced = (output[0] if plain else output.logits).clone()
        replaced[rows, places] = logits.to(replaced)
        if plain:
            return (replaced, *output[1:])
        output.logits = replaced
        return output

    def _scopes(
        self, ids: Tensor, given: dict[str, Any], output: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens so far, their mask and the edit that answers after each (-1: none)."""
        mask = token_mask(given.get("attention_mask"), (len(ids), ids.shape[1]), None)
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        cache = given_cache(given)
        past = state_of(cache) if self._before else _Past()
        if not isinstance(past, _Past) or past.tokens != self._before:
            raise ValueError(
                f"forward: SERAC must have read all of the text, got a cache of {self._before} "
                "tokens filled without it; start from an empty cache"
            )
        device = self.memory.embeddings.device
        middle, last = self._states.middle.to(device), self._states.last.to(device)
        dtype = self.memory.embeddings.dtype
        seen_middle, seen_mask = middle.to(dtype), mask.to(device)
        if past.rows is not None:
            seen_middle = torch.cat((past.rows[2], seen_middle), dim=1)
            seen_mask = torch.cat((past.rows[1], seen_mask), dim=1)
        similarity, number = self.memory.nearest(
            self._classifier(seen_middle, last.to(dtype), seen_mask)
        )
        inside = (similarity > self.config.threshold) & mask.to(device)
        hits = torch.where(inside, number, -1)
        cache = cache if is_cache(cache) else returned_cache(output)
        new = [ids.to(device), mask.to(device), middle.to(dtype), hits]
        ids_all, mask_all, _, hits_all = past.append(new)
        if is_cache(cache):
            follow(cache, past)
        return ids_all, mask_all, _windows(hits_all, [s.target for s in self.memory.statements])

    def _counterfactual_logits(
        self, ids: Tensor, mask: Tensor, active: Tensor, hits: Tensor, columns: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
        """Rows and places among the logits, and the counterfactual model's logits there."""
        room = self._description.max_positions
        wanted: dict[tuple[int, int], list[int]] = {}
        for row, place in hits.tolist():
            entry = int(active[row, columns[place]])
            wanted.setdefault((row, entry), []).append(place)
        texts, asked = [], []
        for (row, entry), places in wanted.items():
            real = mask[row].nonzero().flatten()
            text = Row(tuple(ids[row, real].tolist()), 1)
            text = in_context_row(self.memory.statements[entry], self._separator, text)
            if room is not None and len(text.ids) > room:
                continue
            shift = len(text.ids) - len(real)
            texts.append(text)
            asked.append([(row, p, shift + int(mask[row, : columns[p]].sum())) for p in places])
        found, rows, at = [], [], []
        device = self._counterfactual.get_input_embeddings().weight.device
        for start in range(0, len(texts), _ROWS_AT_ONCE):
            chunk = target_batch(
                texts[start : start + _ROWS_AT_ONCE], self._tokenizer.pad_token_id, device
            )
            logits = self._counterfactual(
                input_ids=chunk.ids, attention_mask=chunk.mask, use_cache=False
            ).logits
            for i, places_ in enumerate(asked[start : start + _ROWS_AT_ONCE]):
                for row, place, column in places_:
                    rows.append(row)
                    at.append(place)
                    found.append(logits[i, column])
        if not found:
            return None
        return (torch.tensor(rows), torch.tensor(at)), torch.stack(found)

    def _edit(self, requests: list[EditRequest]) -> tuple[list[bool], list[float]]:
        room = self._description.max_positions
        pairs = [(r.text, r.target_new) for r in requests]
        rows = encode_targets("edit", self._tokenizer, pairs, room)
        prompts = encode_prompts(self._tokenizer, [r.text for r in requests])
        for request, row, ids in zip(requests, rows, prompts, strict=True):
            need = len(in_context_row(row, self._separator, Row(tuple(ids), 1)).ids)
            if room is not None and need > room:
                raise ValueError(
                    f"edit: a prompt must fit the context window of {room} tokens twice, with its "
                    f"target, got {need} tokens for {request.text!r}"
                )
        memory = self.memory
        for request, row, ids in zip(requests, rows, prompts, strict=True):
            memory = memory.with_edit(request.text, row, self._embedding(ids))
        if not torch.isfinite(memory.embeddings).all():
            raise ValueError(
                "edit: the model's states must be finite, got NaN or infinity; check the weights"
            )
        self.memory = memory
        correct, losses = [], []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            texts = target_batch(
                rows[start : start + _ROWS_AT_ONCE],
                self._tokenizer.pad_token_id,
                self._model.get_input_embeddings().weight.device,
            )
            with torch.no_grad():
                logits = self._model(
                    input_ids=texts.ids, attention_mask=texts.mask, use_cache=False
                ).logits
                nll, right = texts.losses(log_probs_at(logits, texts.row, texts.column))
            correct += right.tolist()
            losses += nll.tolist()
        return correct, losses

    @torch.no_grad()
    def _embedding(self, ids: Sequence[int]) -> Tensor:
        """The embedding ``[e]`` of a prompt, read by the base model alone."""
        tokens = torch.tensor([ids], device=self._model.get_input_embeddings().weight.device)
        with self.disabled():
            self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        like = self.memory.embeddings
        middle, last = self._states.middle.to(like), self._states.last.to(like)
        mask = torch.ones(middle.shape[:2], dtype=torch.bool, device=like.device)
        embedded: Tensor = self._classifier(middle, last[:, -1:], mask)[0, 0]
        return embedded

    def _snapshot(self) -> Memory:
        return self.memory

    def _restore(self, snapshot: Memory) -> None:
        self.memory = snapshot

    def _disable(self) -> None:
        self._on = False

    def _enable(self) -> None:
        self._on = True

    def _close(self) -> None:
        self._states.remove()
        for handle in self._handles:
            handle.remove()


def _kept_columns(keep: Any, tokens: int, device: torch.device) -> Tensor:
    """Places of the tokens whose logits a forward returns."""
    places = torch.arange(tokens, device=device)
    if isinstance(keep, Tensor):
        return places[keep.to(device)]
    return places[-keep:] if keep else places


def _windows(hits: Tensor, sizes: Sequence[int]) -> Tensor:
    """The edit that answers after each token ``[B, T]``, -1 for none.

    A hit opens a window as long as its edit's target, in which further hits do not count.
    """
    active = torch.full_like(hits, -1)
    until = [0] * len(hits)
    for row, at in (hits >= 0).nonzero().tolist():
        if at >= until[row]:
            edit = int(hits[row, at])
            until[row] = at + sizes[edit]
            active[row, at : until[row]] = edit
    return active
