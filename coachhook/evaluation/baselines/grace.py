"""GRACE (Hartvigsen et al. 2023, "Aging with GRACE"): a codebook in place of one layer's output.

The layer gets a codebook of entries (key k, value v, deferral radius eps, label y). A token whose
input ``h`` to the layer has its nearest key within that key's radius takes the entry's value
instead of the layer's output; every other token is left alone:

    i = argmin_j ||h - k_j||,   output = v_i if ||h - k_i|| <= eps_i, else layer(h)

An edit looks up the layer's input at the last prompt token (section 3.2 and algorithm 1):

    Encode   ||h - k_i|| > eps_i + eps     a new entry (h, v, eps, y)
    Expand   else, y_i = y                 eps_i <- max(eps_i, ||h - k_i||)
    Split    else                          a new entry; both radii become ||h - k_i|| / 2

and its value is optimised by gradient until the network's answer is y.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.editing.requests import EditRequest
from coachhook.editing.suffix import Captured, Suffix
from coachhook.evaluation.baselines.base import Baseline
from coachhook.evaluation.baselines.lookup import NearestKey
from coachhook.evaluation.baselines.texts import TargetBatch, encode_targets, target_batch
from coachhook.models import get_submodule

REPLACEMENTS = ("replace_last", "replace_prompt")
VALUE_INITS = ("warm", "cold")
# Depth of the edited layer of the paper's language model: block 35 of the 48 of GPT2-XL.
_DEPTH = 0.73
# Activations of one text differ between batch shapes by rounding; closer keys than this share of
# their norm are the same key. All that a key comes of is rounded to the model's dtype.
_SAME_KEY = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class GraceConfig:
    """Settings of :class:`Grace`.

    Args:
        layer: block whose down-projection gets the codebook; None takes the block at 73 % of the
            depth, as the paper does for GPT2-XL.
        radius: initial deferral radius eps, in units of the layer's input. None takes
            ``radius_share`` of the norm of the key.
        radius_share: see ``radius``. The paper has a fixed 1.0, chosen for one layer of one model.
        replacement: "replace_last" gives the value to the token whose input matched;
            "replace_prompt" also to all tokens before it that are in the same forward.
        value_init: "warm" starts a value at the layer's own output, "cold" at uniform noise.
        steps: most Adam steps of the values of a batch.
        lr: Adam's learning rate.
        stop: an entry stops when its loss is below this (nats) and its target comes out.
        seed: of the noise of "cold".

    Raises:
        ValueError: a setting is out of range.
    """

    layer: int | None = None
    radius: float | None = None
    radius_share: float = 0.4
    replacement: str = "replace_last"
    value_init: str = "warm"
    steps: int = 100
    lr: float = 1.0
    stop: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"GraceConfig: radius must be positive or None, got {self.radius}")
        for name in ("radius_share", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"GraceConfig: {name} must be positive, got {getattr(self, name)}")
        for name in ("steps", "stop"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"GraceConfig: {name} must not be negative, got {getattr(self, name)}"
                )
        for name, known in (("replacement", REPLACEMENTS), ("value_init", VALUE_INITS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"GraceConfig: {name} must be one of {', '.join(known)}, "
                    f"got {getattr(self, name)!r}"
                )


@dataclass(frozen=True)
class Codebook:
    """N entries. Never changed in place.

    Attributes:
        keys: ``[N, n]``, float32 or float64.
        values: ``[N, m]``, of the same dtype.
        radii: ``[N]``, of the same dtype.
        labels: the target tokens of each entry.
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: tuple[tuple[int, ...], ...]

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to the nearest key and its number, for queries ``[Q, n]``; both ``[Q]``."""
        return self._nearest(queries)

    @cached_property
    def _nearest(self) -> NearestKey:
        return NearestKey(self.keys)

    def place(
        self,
        key: Tensor,
        value: Tensor,
        radius: float,
        label: tuple[int, ...],
        same: float = _SAME_KEY[torch.float32],
    ) -> tuple[Codebook, int]:
        """The codebook with one more edit, by the paper's three rules, and the entry it is in.

        An edit whose key is already there with another label takes that entry over: the radius of a
        split would be 0, which rounding alone may leave.

        Args:
            key: ``[n]``.
            value: ``[m]``, where the optimisation of a new entry starts.
            radius: eps of a new entry.
            label: target tokens.
            same: distance within which two keys are one, as a share of their norm.
        """
        key, value = key.to(self.keys.dtype), value.to(self.keys.dtype)
        if not self.labels:
            return self._append(key, value, radius, label), 0
        distances, numbers = self.nearest(key[None])
        distance, i = distances.item(), int(numbers.item())
        if distance > self.radii[i].item() + radius:
            return self._append(key, value, radius, label), len(self.labels)
        if self.labels[i] == label:
            radii = self.radii.clone()
            radii[i] = max(distance, radii[i].item())
            return replace(self, radii=radii), i
        if distance <= same * key.norm().item():
            values, labels = self.values.clone(), list(self.labels)
            values[i], labels[i] = value, label
            return replace(self, values=values, labels=tuple(labels)), i
        book = self._append(key, value, distance / 2, label)
        book.radii[i] = distance / 2  # a new tensor of this codebook's own
        return book, len(self.labels)

    def _append(
        self, key: Tensor, value: Tensor, radius: float, label: tuple[int, ...]
    ) -> Codebook:
        return Codebook(
            torch.cat((self.keys, key[None])),
            torch.cat((self.values, value[None])),
            torch.cat((self.radii, self.radii.new_tensor([radius]))),
            (*self.labels, label),
        )


@dataclass
class _Problem:
    """A batch of edits as it enters the network above the codebook.

    Attributes:
        captured: the batch at the block's output.
        rest: that output without what the layer added, ``[B, T, m]``.
        texts: tokens and targets.
        entries: entry of each request ``[B]``, as an index of the optimised values.
    """

    captured: Captured
    rest: Tensor
    texts: TargetBatch
    entries: Tensor


class Grace(Baseline):
    """GRACE on the down-projection of one block.

    Every token is looked up by itself, so the answer is the same with and without a KV cache and
    whatever follows the prompt; the published code looks up only the last prompt token, whose place
    it has to be told. Edits of a batch enter the codebook one after another; their values are
    optimised together, each by the texts of its own entry.

    Attributes:
        codebook: the present entries.
    """

    name = "grace"
    reference = (
        "Hartvigsen, Sankaranarayanan, Palangi, Kim, Ghassemi: Aging with GRACE: Lifelong Model "
        "Editing with Discrete Key-Value Adaptors. NeurIPS 2023"
    )
    config_type = GraceConfig
    config: GraceConfig

    def _start(self) -> None:
        description = self._description
        depth = int(_DEPTH * description.num_layers)
        entry = description.layer(depth if self.config.layer is None else self.config.layer)
        self._layer: Any = get_submodule(self._model, entry.path)
        self._block = get_submodule(self._model, entry.block_path)
        self._suffix = Suffix(self._model, description, entry.index)
        parameter = next(self._layer.parameters())
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        empty = torch.zeros(0, dtype=dtype, device=parameter.device)
        self.codebook = Codebook(
            empty.reshape(0, entry.in_features), empty.reshape(0, entry.out_features), empty, ()
        )
        self._on = True
        self._handle = self._layer.register_forward_hook(self._replace)

    def _replace(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        book = self.codebook
        if not self._on or not book.labels:
            return None
        states = args[0]
        distance, entry = book.nearest(states.reshape(-1, states.shape[-1]))
        fired = (distance <= book.radii[entry]).reshape(states.shape[:-1])
        entry = entry.reshape(states.shape[:-1])
        if self.config.replacement == "replace_prompt":
            fired, entry = _spread(fired, entry)
        return torch.where(fired[..., None], book.values[entry].to(output.dtype), output)

    def _edit(self, requests: list[EditRequest]) -> tuple[list[bool], list[float]]:
        pairs = [(r.text, r.target_new) for r in requests]
        rows = encode_targets("edit", self._tokenizer, pairs, self._description.max_positions)
        texts = target_batch(
            rows, self._tokenizer.pad_token_id, next(self._model.parameters()).device
        )
        captured, keys, added = self._capture(texts)
        at = torch.arange(len(rows), device=keys.device), texts.last.to(keys.device)
        labels = [r.ids[-r.target :] for r in rows]
        book, placed = self.codebook, []
        for label, request_key in zip(labels, keys[at], strict=True):
            value = self._first_value(request_key, len(book.labels))
            book, number = book.place(
                request_key, value, self._radius(request_key), label, _SAME_KEY[request_key.dtype]
            )
            placed.append(number)
        # An entry that a later request of the batch took over is that request's alone.
        mine = [
            book.labels[e] == tuple(r.ids[-r.target :]) for e, r in zip(placed, rows, strict=True)
        ]
        trained, inverse = torch.tensor(placed, device=keys.device).unique(return_inverse=True)
        problem = _Problem(captured, captured.hidden - added, texts, inverse)
        values, losses, correct = self._optimise(
            problem, book.values[trained], torch.tensor(mine, device=keys.device)
        )
        if not torch.isfinite(losses).all():
            bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
            raise ValueError(
                "edit: the model's likelihood of the target must be finite, got NaN or infinity "
                f"for requests {bad}; check the weights, or lower lr ({self.config.lr})"
            )
        final = book.values.clone()
        final[trained] = values
        self.codebook = replace(book, values=final)
        return correct.tolist(), losses.tolist()

    def _radius(self, key: Tensor) -> float:
        if self.config.radius is not None:
            return self.config.radius
        return self.config.radius_share * key.double().norm().item()

    @torch.no_grad()
    def _first_value(self, key: Tensor, number: int) -> Tensor:
        if self.config.value_init == "warm":
            own: Tensor = self._layer.forward(key.to(next(self._layer.parameters()).dtype)[None])[0]
            return own
        generator = torch.Generator().manual_seed(self.config.seed + number)
        noise = torch.rand(self.codebook.values.shape[1], generator=generator, dtype=torch.float64)
        return noise.to(key.device)

    def _capture(self, texts: TargetBatch) -> tuple[Captured, Tensor, Tensor]:
        """The batch above the block; the layer's inputs ``[B, T, n]`` and outputs ``[B, T, m]``."""
        found: list[tuple[Tensor, Tensor]] = []
        # Registered after the codebook's hook, so it sees what that hook made of the output.
        handle = self._layer.register_forward_hook(
            lambda _module, args, output: found.append((args[0].detach(), output.detach()))
        )
        try:
            captured = self._suffix.capture(texts.ids, texts.mask)
        finally:
            handle.remove()
        keys, added = found[0]
        shape = texts.ids.shape
        return captured, keys.reshape(*shape, -1), added.reshape(*shape, -1)

    def _optimise(
        self, problem: _Problem, start: Tensor, mine: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values ``[E, m]`` of the entries of a batch; losses and success of the requests."""
        values = start.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([values], lr=self.config.lr)
        for step in range(self.config.steps + 1):
            with torch.enable_grad():
                losses, correct = self._losses(problem, values)
                done = torch.ones(len(start), dtype=torch.bool, device=start.device)
                waiting = mine & ~((losses.detach() < self.config.stop) & correct)
                done[problem.entries[waiting]] = False
                if step == self.config.steps or bool(done.all()):
                    break
                objective = torch.where(mine, losses, torch.zeros_like(losses)).sum()
                values.grad = torch.autograd.grad(objective, values)[0]
            kept = values.detach()[done].clone()
            optimiser.step()
            with torch.no_grad():
                values[done] = kept
        return values.detach(), losses.detach(), correct

    def _losses(self, problem: _Problem, values: Tensor) -> tuple[Tensor, Tensor]:
        texts, hidden = problem.texts, problem.captured.hidden
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        last = texts.last.to(hidden.device)[:, None]
        here = columns <= last if self.config.replacement == "replace_prompt" else columns == last
        value = values[problem.entries][:, None].to(hidden.dtype)
        hidden = torch.where(here[..., None], problem.rest + value, hidden)
        _, final = self._suffix.run(problem.captured, hidden, None)
        return texts.losses(self._suffix.log_probs(final[texts.row, texts.column]))

    def _snapshot(self) -> Codebook:
        return self.codebook

    def _restore(self, snapshot: Codebook) -> None:
        self.codebook = snapshot

    def _disable(self) -> None:
        self._on = False

    def _enable(self) -> None:
        self._on = True

    def _close(self) -> None:
        self._handle.remove()


def _spread(fired: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
    """Every token ``[B, T]`` takes the entry of the next token, itself included, that fired."""
    if fired.dim() != 2:
        raise ValueError(
            "forward: replace_prompt must see tokens as [B, T], got a layer whose input is "
            "flattened; use replacement='replace_last'"
        )
    places = torch.arange(fired.shape[1], device=fired.device).expand_as(fired)
    missing = fired.shape[1]
    next_fired = torch.where(fired, places, missing).flip(1).cummin(1).values.flip(1)
    return next_fired < missing, entry.gather(1, next_fired.clamp(max=missing - 1))
