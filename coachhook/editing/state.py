"""An edit set without its model: what was asked, and per layer the memory the hooks are made from.

Everything a hook holds follows from here, so that a batch can be taken back, or a folder read, with
no model at hand.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coachhook.editing.config import EditConfig
from coachhook.editing.memory import EditMemory
from coachhook.editing.published import PublishedMemory
from coachhook.editing.requests import EditRequest
from coachhook.editing.unrelated import Ending, SampleTokens
from coachhook.hooks import HookedLinear
from coachhook.ops import Population, gate_scores
from coachhook.ops._precision import float32_products

# Above this share of m the factors hold more numbers than Delta, and hardly run faster: hooks keep
# both in float32, so the gate reads r n numbers or m n. Times: docs/kernels/hooked_linear.md.
BREAK_EVEN = 0.8


# A prompt alone and in a padded batch differ in the last bits of a 16-bit model; the prompt that
# sets the threshold must fire in both. The published code has no such margin.
_MARGIN = 1e-3


@dataclass(frozen=True)
class HookPayload:
    """What one layer's hook is set to.

    Attributes:
        kind: "empty", "dense", "factored" or "pair".
        tensors: "delta", or "left" and "right" (Q and S, or V and A^T).
        alpha: threshold of the gate.
        population: mean and standard deviation for the population scope.
    """

    kind: str
    tensors: dict[str, Tensor]
    alpha: float
    population: tuple[float, float] | None = None

    @property
    def rank(self) -> int:
        """Rows of the factor or pair; 0 where there is none."""
        return self.tensors["right"].shape[0] if "right" in self.tensors else 0

    def apply(self, hook: HookedLinear, config: EditConfig) -> None:
        """Copies the payload into the hook's buffers."""
        hook.set_scope(
            config.scope,  # type: ignore[arg-type]
            include_padding=config.include_padding,
            population=self.population,
        )
        hook.set_alpha(self.alpha)
        if self.kind == "dense":
            hook.set_delta(self.tensors["delta"])
        elif self.kind == "factored":
            hook.set_factored(self.tensors["left"], self.tensors["right"])
        elif self.kind == "pair":
            hook.set_pair(
                self.tensors["left"],
                self.tensors["right"],
                correction=config.correction,  # type: ignore[arg-type]
            )
        else:
            hook.clear()


@dataclass
class BatchRecord:
    """One batch as it was edited.

    Attributes:
        requests: what was asked.
        targets: v* as columns ``[d, k]``.
        converged: per request, see :class:`~coachhook.editing.targets.Targets`.
        losses: last loss of each request.
        slots: (request, place) of each key, as indices into ``requests`` and ``config.places``.
        bounds: layer index -> smallest over the prompts of the largest score in the prompt; NaN
            where no prompt had a defined score.
        groups: layer index -> number of the edit that each slot's keys belong to. A slot whose key
            already fires takes that edit over.
        endings: for each slot the ids that its subject ends in, in every spelling of its prompts.
    """

    requests: list[EditRequest]
    targets: Tensor
    converged: list[bool]
    losses: list[float]
    slots: list[tuple[int, int]]
    bounds: dict[int, float]
    groups: dict[int, list[int]]
    endings: list[list[Ending]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The record without its tensors, JSON-ready."""
        return {
            "requests": [request.to_dict() for request in self.requests],
            "converged": self.converged,
            "losses": self.losses,
            "slots": [list(slot) for slot in self.slots],
            "bounds": {str(k): None if v != v else v for k, v in self.bounds.items()},
            "groups": {str(k): v for k, v in self.groups.items()},
            "endings": self.endings,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], targets: Tensor) -> BatchRecord:
        """The inverse of :meth:`to_dict`."""
        bounds = {int(k): float("nan") if v is None else v for k, v in record["bounds"].items()}
        return cls(
            [EditRequest.from_dict(r) for r in record["requests"]],
            targets,
            list(record["converged"]),
            list(record["losses"]),
            [(r, p) for r, p in record["slots"]],
            bounds,
            {int(k): list(v) for k, v in record["groups"].items()},
            [[tuple(ending) for ending in slot] for slot in record["endings"]],
        )


@dataclass
class LayerEdits:
    """The edits of one layer.

    Attributes:
        memory: keys, targets and prior.
        sample: unrelated keys ``[s, n]``; may be None.
    """

    memory: EditMemory | PublishedMemory
    sample: Tensor | None = None
    next_group: int = 0
    # What the pair was made from, and the pair: it is asked for several times between changes.
    made: tuple[tuple[object, ...], tuple[Tensor, Tensor]] | None = None


@dataclass
class EditState:
    """All edits of a model: settings, batches by number, and per layer the memory.

    Attributes:
        config: the settings.
        layers: layer index -> its edits.
        batches: batch number -> its record, in the order of editing.
        sample_tokens: what the keys of the layers' samples are keys of; may be None.
    """

    config: EditConfig
    layers: dict[int, LayerEdits]
    batches: dict[int, BatchRecord] = field(default_factory=dict)
    sample_tokens: SampleTokens | None = None

    @property
    def num_requests(self) -> int:
        """Facts in all batches."""
        return sum(len(b.requests) for b in self.batches.values())

    def alpha(self, layer: int) -> float:
        """Threshold of a layer: the initial one, lowered by the batches where it is a z-score.

        ``alpha <- min(alpha, min over prompts of max over tokens of z)``, rounded to float32, over
        the batches that are there. Undefined scores (a prompt of one token) do not count. A
        coefficient of the membership scope is on a fixed scale, and its threshold stays.
        """
        alpha = self.config.alpha
        margin = 0.0 if self.config.include_padding else _MARGIN
        if self.config.scope == "membership":
            return alpha
        for batch in self.batches.values():
            bound = batch.bounds.get(layer, float("nan"))
            if bound == bound:
                alpha = min(alpha, bound - margin * abs(bound))
        alpha = float(torch.tensor(alpha, dtype=torch.float32))
        if self.config.scope == "population":
            alpha = max(alpha, self._false_fire_score(layer))
        return alpha

    def append(
        self,
        layer: int,
        keys: Tensor,
        change: Tensor,
        record: BatchRecord,
        owners: Sequence[Hashable],
    ) -> int:
        """Adds a batch to one layer.

        Args:
            layer: its index.
            keys: ``[R, n]``, slot after slot, as many rows for each as it has keys.
            change: ``[R, m]``, wanted on top of what the hook says for these keys now.
            record: the batch; its ``groups`` of the layer are filled in.
            owners: of each slot; slots with the same owner are one edit.

        Returns:
            The number of the batch, the same in every layer.
        """
        edits = self.layers[layer]
        device = edits.memory.device
        keys = keys.detach().to(device, torch.float64)
        change = change.detach().to(device, torch.float64)
        record.groups[layer], present = self._present(layer, keys, owners)
        number = edits.memory.append(keys.T, (present + change).T)
        self.batches[number] = record
        return number

    def _present(
        self, layer: int, keys: Tensor, owners: Sequence[Hashable]
    ) -> tuple[list[int], Tensor]:
        """The edit each slot belongs to, and the hook's present correction ``[R, m]``."""
        edits = self.layers[layer]
        slots = len(owners)
        if self.config.scope != "membership":
            return [0] * slots, keys @ edits.memory.delta().to(keys).T
        groups: list[int | None] = [None] * slots
        present = keys.new_zeros(keys.shape[0], edits.memory.out_features)
        if edits.memory.batches:
            v, at = self.pair(layer)
            largest, winner = (keys @ at.T).max(dim=1)
            fired = largest >= self.config.alpha
            own = v.T[winner] if self.config.correction == "own" else keys @ at.T @ v.T
            present[fired] = own[fired]
            each = keys.shape[0] // slots
            ids = self.group_ids(layer)[winner[::each].cpu()].tolist()
            groups = [i if f else None for i, f in zip(ids, fired[::each].tolist(), strict=True)]
        of_owner: dict[Hashable, int] = {}
        for owner, group in zip(owners, groups, strict=True):
            if group is not None:
                of_owner.setdefault(owner, group)
        for owner in owners:
            if owner not in of_owner:
                of_owner[owner] = edits.next_group
                edits.next_group += 1
        return [of_owner[owner] for owner in owners], present

    def specific(self, layer: int, keys: Tensor, endings: list[list[Ending]]) -> list[bool]:
        """Whether keys ``[R, n]`` would fire on at most ``false_fire`` of the unrelated sample.

        Judged by their coefficients as if they were edited now, relative to the key's own. Only the
        membership scope looks at single keys; in the others, and without a sample, none is found
        specific.

        Args:
            layer: its index.
            keys: one for each slot in question.
            endings: of each, see :class:`BatchRecord`.
        """
        edits = self.layers[layer]
        if self.config.scope != "membership" or edits.sample is None or not len(edits.sample):
            return [False] * keys.shape[0]
        assert isinstance(edits.memory, EditMemory)
        keys = keys.detach().to(edits.memory.device, torch.float64)
        rows = edits.memory.coefficients_of(keys.T)
        own = (rows * keys).sum(dim=1)
        scores = self._sample_scores(edits.sample, rows / own[:, None], endings)
        ceiling = max(self.config.alpha, self.config.alpha_ceiling)
        share = (~(scores < ceiling)).to(rows).mean(dim=0)
        return (share <= self.config.false_fire).tolist()

    def remove(self, number: int) -> None:
        """Takes batch ``number`` back from every layer.

        Raises:
            ValueError: there is no such batch; the message lists those there are.
            NotPositiveDefiniteError: it is folded into a prior that it dominates. After any error
                nothing was changed.
        """
        if number not in self.batches:
            raise ValueError(f"revert: batch must be one of {sorted(self.batches)}, got {number!r}")
        before: dict[int, Any] = {
            layer: edits.memory.snapshot() for layer, edits in self.layers.items()
        }
        try:
            for edits in self.layers.values():
                edits.memory.remove(number)
        except BaseException:
            for layer, snapshot in before.items():
                self.layers[layer].memory.restore(snapshot)
            raise
        del self.batches[number]

    def payload(self, layer: int) -> HookPayload:
        """What the hook of ``layer`` is set to."""
        edits, config = self.layers[layer], self.config
        population = self._population(layer) if config.scope == "population" else None
        alpha = self.alpha(layer)
        if not self.batches:
            return HookPayload("empty", {}, alpha, population)
        if config.scope == "membership":
            left, right = self.pair(layer)
            return HookPayload("pair", {"left": left, "right": right}, alpha)
        m = edits.memory.out_features
        limit = config.max_rank if config.max_rank is not None else int(BREAK_EVEN * m)
        rank = min(edits.memory.num_keys + edits.memory.num_folded, m)
        # Rounding the weight leaves no exact factors.
        wide = config.storage == "auto" and rank > limit
        if isinstance(edits.memory, PublishedMemory) or config.storage == "dense" or wide:
            tensors = {"delta": edits.memory.delta()}
            return HookPayload("dense", tensors, alpha, population)
        q, s = edits.memory.factored()
        return HookPayload("factored", {"left": q, "right": s}, alpha, population)

    def pair(self, layer: int) -> tuple[Tensor, Tensor]:
        """The membership pair with one column for each edit: V ``[m, E]``, A^T ``[E, n]``.

        The coefficients of an edit's keys are summed, ``sum_j a_j^T x = (sum_j a_j)^T x``, so its
        rows of A^T are. Its column of V is the mean of the targets of the batch that wrote it last.
        With the correction "own" only the order of coefficients matters to the output, and the rows
        are scaled: the edit's own keys give 1, and an edit that unrelated keys come near is
        scaled down so that all edits share the threshold alpha, see ``EditConfig.alpha_ceiling``.
        """
        edits = self.layers[layer]
        read = edits.sample, self.sample_tokens, *self.batches.values()
        source = (*edits.memory.contents(), *read)
        if edits.made is not None and len(edits.made[0]) == len(source):
            if all(a is b for a, b in zip(edits.made[0], source, strict=True)):
                return edits.made[1]
        edits.made = None
        pair = self._make_pair(layer)
        edits.made = source, pair
        return pair

    def _make_pair(self, layer: int) -> tuple[Tensor, Tensor]:
        edits = self.layers[layer]
        v, at = edits.memory.pair()
        group_of_column, batch_of_column = self._column_groups(layer)
        groups, position = torch.unique(group_of_column, return_inverse=True)
        newest = torch.zeros(len(groups), dtype=torch.int64).scatter_reduce_(
            0, position, batch_of_column, "amax", include_self=False
        )
        latest = batch_of_column == newest[position]
        position, latest = position.to(at.device), latest.to(at)
        rows = at.new_zeros(len(groups), at.shape[1]).index_add_(0, position, at)
        total = at.new_zeros(len(groups)).index_add_(0, position, latest)
        weights = latest / total[position]
        columns = v.new_zeros(v.shape[0], len(groups)).index_add_(1, position, v * weights)
        if self.config.correction == "own":
            own = (rows[position] * edits.memory.keys().mT).sum(dim=1)
            rows /= at.new_zeros(len(groups)).index_add_(0, position, own * weights)[:, None]
            rows *= (self.config.alpha / self._thresholds(layer, rows))[:, None]
        return columns, rows

    def _thresholds(self, layer: int, rows: Tensor) -> Tensor:
        """Threshold of each edit ``[E]`` for rows that give 1 for its own keys."""
        edits = self.layers[layer]
        floor, ceiling = self.config.alpha, max(self.config.alpha, self.config.alpha_ceiling)
        if edits.sample is None or not len(edits.sample):
            return rows.new_full((rows.shape[0],), floor)
        ends: dict[int, list[Ending]] = {int(g): [] for g in self.group_ids(layer)}
        for batch in self.batches.values():
            for group, own in zip(batch.groups.get(layer, ()), batch.endings, strict=True):
                ends[group] += own
        nearest = self._sample_scores(edits.sample, rows, list(ends.values())).amax(dim=0).to(rows)
        return ((1 + nearest) / 2).clamp(floor, ceiling)

    @float32_products(tf32=False)
    def _sample_scores(self, sample: Tensor, rows: Tensor, endings: list[list[Ending]]) -> Tensor:
        """Coefficients ``[s, E]`` of the sample, -inf where a token is what the edit is about.

        In float32, which is exact beside a sample that was rounded to bfloat16.
        """
        scores = sample.to(rows.device, torch.float32) @ rows.float().T
        if self.sample_tokens is None:
            return scores
        own = self.sample_tokens.own(endings).to(scores.device)
        return scores.masked_fill_(own, -float("inf"))

    def group_ids(self, layer: int) -> Tensor:
        """The edit number of each row of the membership pair, int64 ``[E]``."""
        return torch.unique(self._column_groups(layer)[0])

    def _column_groups(self, layer: int) -> tuple[Tensor, Tensor]:
        each = len(self.config.contexts) if self.config.key_pooling == "each" else 1
        groups, batches = [], []
        for number, batch in self.batches.items():
            for group in batch.groups.get(layer, ()):
                groups += [group] * each
                batches += [number] * each
        return torch.tensor(groups, dtype=torch.int64), torch.tensor(batches, dtype=torch.int64)

    def _sample_norms(self, layer: int) -> Tensor:
        edits = self.layers[layer]
        if edits.sample is None or not len(edits.sample):
            raise ValueError(
                f"edit: statistics must hold a sample of unrelated keys of layer {layer} for the "
                "scope 'population', got none; collect them with collect_statistics"
            )
        delta = edits.memory.delta()
        plain = Population(0.0, 1.0)
        return gate_scores(edits.sample.to(delta), delta, scope=plain).flatten()

    def _population(self, layer: int) -> tuple[float, float]:
        if not self.batches:
            return 0.0, 1.0
        norms = self._sample_norms(layer)
        centre = norms.median()
        # 1.4826 makes the median absolute deviation the standard deviation of a normal sample.
        spread = 1.4826 * (norms - centre).abs().median()
        if spread <= 0:
            spread = norms.std()
        return float(centre), float(spread) if spread > 0 else 1.0

    def _false_fire_score(self, layer: int) -> float:
        if not self.batches:
            return -float("inf")
        centre, spread = self._population(layer)
        norms = self._sample_norms(layer)
        return float((torch.quantile(norms, 1 - self.config.false_fire) - centre) / spread)
