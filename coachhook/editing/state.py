"""An edit set without its model: what was asked, and per layer the memory the hooks are made from.

Everything a hook holds follows from here: a batch is taken back, or a folder read, without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coachhook.editing.config import EditConfig
from coachhook.editing.cues import cue_limit
from coachhook.editing.memory import EditMemory
from coachhook.editing.payload import HookPayload
from coachhook.editing.prompts import PLACES, SUBJECT_PLACES
from coachhook.editing.published import PublishedMemory
from coachhook.editing.records import BatchRecord
from coachhook.editing.segments import Written
from coachhook.editing.unrelated import Ending, SampleTokens
from coachhook.errors import NotPositiveDefiniteError
from coachhook.ops import Membership, Population, gate_scores, hook_output
from coachhook.ops._precision import float32_products
from coachhook.ops.hooked_linear.cues import MOST_APART, NEVER

# Above this share of m the factors hold more numbers than Delta, and hardly run faster: hooks keep
# both in float32, so the gate reads r n numbers or m n. Times: docs/kernels/hooked_linear.md.
BREAK_EVEN = 0.8

# Keys of the unrelated sample that would take this much of a new edit's own coefficient are kept
# apart from it, the nearest first and at most so many for each edit.
_ANCHORED = 0.5
_MOST_ANCHORS = 4
# An edit's threshold is this much below what its own prompt gives, for the rounding of 16-bit keys,
# but not below the second number: an edit drowned by others does not fire at them.
_BELOW_OWN = 0.98
_LOWEST = 0.4

# A prompt alone and in a padded batch differ in the last bits of a 16-bit model; the prompt that
# sets the threshold must fire in both. The published code has no such margin.
_MARGIN = 1e-3


@dataclass
class _About:
    place: str
    endings: list[Ending]
    # Of the batch that wrote it last; None where it needs none.
    cue: Tensor | None = None
    reach: int = NEVER
    gap: int = 0


@dataclass
class _Columns:
    """Columns of a layer's memory.

    Attributes:
        group: number of the edit ``[N]``; -1 for an anchor that is no edit's.
        batch: number of the batch ``[N]``.
        bare: whether it is the key of a bare prompt, or the one key of its slot ``[N]``.
        anchor: whether it is an anchor ``[N]``, see :meth:`EditState.append`. One whose token an
            edit is about, since a later batch brought that edit, is one more key of it.
    """

    group: Tensor
    batch: Tensor
    bare: Tensor
    anchor: Tensor


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
        writes: what was last read or written where.
    """

    config: EditConfig
    layers: dict[int, LayerEdits]
    batches: dict[int, BatchRecord] = field(default_factory=dict)
    sample_tokens: SampleTokens | None = None
    writes: dict[str, Written] = field(default_factory=dict)

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
        margin = 0.0 if self.config.counts_padding else _MARGIN
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
        inputs: Callable[[list[int]], Tensor] | None = None,
    ) -> int:
        """Adds a batch to one layer.

        With the correction "own" a few keys of the unrelated sample that the batch's edits come
        nearest to are added with it, as keys to be left as they are (the batch's *anchors*). An
        edit with a cue needs none.

        Args:
            layer: its index.
            keys: ``[R, n]``, slot after slot, as many rows for each as it has keys.
            change: ``[R, m]``, wanted on top of what the hook says for these keys now.
            record: the batch, with its cues of the layer; its ``groups`` and ``anchors`` of the
                layer are filled in.
            inputs: gives for some of the rows what the layer reads up to the key, ``[r, T, n]``,
                padded with zeros at the left: what an earlier edit adds may depend on it. None:
                there is nothing but the keys.

        Returns:
            The number of the batch, the same in every layer.

        Raises:
            ValueError: in the membership scope, see :meth:`BatchRecord.check_keys`.
        """
        edits = self.layers[layer]
        device = edits.memory.device
        keys, change = (x.detach().to(device, torch.float64) for x in (keys, change))
        if self.config.scope == "membership":
            record.check_keys(layer, keys)
        groups = self._groups(layer, record)
        targets = self.present(layer, keys, inputs) + change
        record.anchors[layer] = self._anchors(layer, keys, record)
        if record.anchors[layer]:
            assert edits.sample is not None
            keys = torch.cat([keys, edits.sample[record.anchors[layer]].to(keys)])
            targets = torch.cat(
                [targets, targets.new_zeros(len(keys) - len(targets), len(targets.T))]
            )
        number = edits.memory.append(keys.T, targets.T)
        # Only now: a lower layer's batch is among the batches, and one with groups has its keys.
        record.groups[layer] = groups
        self.batches[number] = record
        return number

    def _anchors(self, layer: int, keys: Tensor, record: BatchRecord) -> list[int]:
        """Which of the sample are to be kept apart from keys that are about to be appended.

        An edit asks for its own keys; the rest of the key space follows by least squares, and a
        stranger close to them gets half of their coefficient and more. Kept beside them, with
        nothing to add, it gets none, and other strangers like it little.
        """
        bare = [i for i, cued in enumerate(record.cued(layer)) if not cued]
        if self.config.correction != "own" or not bare:
            return []
        scores = self._as_if_edited(layer, keys, record.endings)
        if scores is None:
            return []
        scores = scores[:, bare]
        nearest = scores.topk(min(_MOST_ANCHORS, len(scores)), dim=0)
        return torch.unique(nearest.indices[nearest.values >= _ANCHORED]).tolist()

    def _as_if_edited(self, layer: int, keys: Tensor, endings: list[list[Ending]]) -> Tensor | None:
        """Coefficients ``[s, len(endings)]`` of the sample if keys ``[R, n]`` were appended.

        Relative to those of the keys themselves, of which each edit has as many. None in other
        scopes and without a sample.
        """
        edits = self.layers[layer]
        if self.config.scope != "membership" or edits.sample is None or not len(edits.sample):
            return None
        assert isinstance(edits.memory, EditMemory)
        rows = edits.memory.coefficients_of(keys.T).view(len(endings), -1, keys.shape[1]).sum(1)
        own = torch.einsum("ern,en->er", keys.view(len(endings), -1, keys.shape[1]), rows).mean(1)
        return self._sample_scores(edits.sample, rows / own[:, None], endings)

    def _groups(self, layer: int, record: BatchRecord) -> list[int]:
        """The edit each slot of a new batch belongs to."""
        edits = self.layers[layer]
        if self.config.scope != "membership":
            return [0] * len(record.slots)
        of_owner = self._numbers(layer)
        groups = []
        for owner in record.owners(self.config.places):
            if owner not in of_owner:
                of_owner[owner] = edits.next_group
                edits.next_group += 1
            groups.append(of_owner[owner])
        return groups

    def _numbers(self, layer: int) -> dict[Hashable, int]:
        """Numbers of the edits there are, by what they are about."""
        return {
            owner: group
            for batch in self.batches.values()
            if layer in batch.groups
            for owner, group in zip(
                batch.owners(self.config.places), batch.groups[layer], strict=True
            )
        }

    def corrections(self, layer: int, owners: Sequence[Hashable]) -> list[Tensor | None]:
        """What edits of their own add ``[m]``, by what they are about; None where there is none.

        Args:
            layer: its index.
            owners: see :meth:`BatchRecord.owners`.
        """
        if self.config.scope != "membership" or self.config.correction != "own":
            return [None] * len(owners)
        numbers = self._numbers(layer)
        if numbers.keys().isdisjoint(owners):
            return [None] * len(owners)
        column = {group: i for i, group in enumerate(self._about(layer))}
        v, _ = self.pair(layer)
        return [v[:, column[numbers[o]]] if o in numbers else None for o in owners]

    def present(
        self, layer: int, keys: Tensor, inputs: Callable[[list[int]], Tensor] | None
    ) -> Tensor:
        """What the hook adds for keys ``[R, n]`` now, ``[R, m]``; ``inputs`` as in append."""
        edits, config = self.layers[layer], self.config
        keys = keys.to(edits.memory.device, torch.float64)
        if config.scope != "membership":
            return keys @ edits.memory.delta().to(keys).T
        present = keys.new_zeros(keys.shape[0], edits.memory.out_features)
        if not edits.memory.batches:
            return present
        v, at = self.pair(layer)
        coefficients = keys @ at.T
        reached = coefficients >= config.alpha
        rows = reached.any(dim=1).nonzero().flatten()
        if not len(rows):
            return present
        if config.correction == "sum":
            present[rows] = coefficients[rows] @ v.T
            return present
        # Whether an edit is armed depends on what was read before the key.
        near = reached.any(dim=0)
        cues = {}
        for name, known in (self.cues(layer) or {}).items():
            dtype = keys.dtype if known.is_floating_point() else known.dtype
            cues[name] = known[near.cpu()].to(keys.device, dtype)
        x = keys[rows, None] if inputs is None else inputs(rows.tolist()).to(keys)
        added, _ = hook_output(
            present.new_zeros(*x.shape[:2], present.shape[1]),
            x,
            (v[:, near], at[near]),
            config.alpha,
            scope=Membership(correction="own", **cues),
        )
        present[rows] = added[:, -1]
        return present

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
        keys = keys.detach().to(self.layers[layer].memory.device, torch.float64)
        scores = self._as_if_edited(layer, keys, endings)
        if scores is None:
            return [False] * len(keys)
        ceiling = max(self.config.alpha, self.config.alpha_ceiling)
        share = (~(scores < ceiling)).double().mean(dim=0)
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
        before: dict[int, Any] = {i: x.memory.snapshot() for i, x in self.layers.items()}
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
            tensors = {"left": left, "right": right} | (self.cues(layer) or {})
            return HookPayload("pair", tensors, alpha)
        m = edits.memory.out_features
        limit = config.max_rank if config.max_rank is not None else int(BREAK_EVEN * m)
        rank = min(edits.memory.num_keys + edits.memory.num_folded, m)
        # Rounding the weight leaves no exact factors.
        wide = rank > limit and (config.storage == "auto" or config.max_rank is not None)
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

    def fitted_again(self, layer: int, covariance_weight: float) -> tuple[Tensor, Tensor]:
        """Delta of the membership edits fitted with another lambda, in factors [m, E], [E, n].

        The same least squares over the keys of all edits, whose targets are those of the pair (of
        several facts about one subject the latest counts), without thresholds.

        Raises:
            ValueError: keys were folded and not kept.
            NotPositiveDefiniteError: the prior is singular to rounding, beside the keys.
        """
        memory = self.layers[layer].memory
        assert isinstance(memory, EditMemory)
        keys = memory.keys().double()
        prior = memory.prior().double() * (covariance_weight / self.config.covariance_weight)
        factor, info = torch.linalg.cholesky_ex(prior + keys @ keys.mT)
        if int(info):
            raise NotPositiveDefiniteError(
                f"export: covariance_weight must leave the keys' covariance positive definite, got "
                f"{covariance_weight:g}; take a larger one"
            )
        left, _ = self.pair(layer)
        group = self._columns(layer).group.to(keys.device)
        kept = (group >= 0).nonzero().flatten()
        _, position = torch.unique(group[kept], return_inverse=True)
        at = torch.cholesky_solve(keys, factor).mT
        rows = at.new_zeros(left.shape[1], at.shape[1]).index_add_(0, position, at[kept])
        return left, rows

    def _make_pair(self, layer: int) -> tuple[Tensor, Tensor]:
        edits = self.layers[layer]
        v, at = edits.memory.pair()
        columns = self._columns(layer)
        kept = (columns.group >= 0).nonzero().flatten()
        written = ~columns.anchor[kept]
        groups, position = torch.unique(columns.group[kept], return_inverse=True)
        batch = columns.batch[kept]
        newest = torch.zeros(len(groups), dtype=torch.int64).scatter_reduce_(
            0, position[written], batch[written], "amax", include_self=False
        )
        latest = (written & (batch == newest[position])).to(at)
        kept, position = kept.to(at.device), position.to(at.device)
        rows = at.new_zeros(len(groups), at.shape[1]).index_add_(0, position, at[kept])
        total = at.new_zeros(len(groups)).index_add_(0, position, latest)
        weights = latest / total[position]
        left = v.new_zeros(v.shape[0], len(groups)).index_add_(1, position, v[:, kept] * weights)
        if self.config.correction == "own":
            own = (rows[position] * edits.memory.keys().mT[kept]).sum(dim=1)
            mean = at.new_zeros(len(groups)).index_add_(0, position, own * weights)
            rows /= mean[:, None]
            bare = (written & columns.bare[kept.cpu()]).to(at.device)
            least = mean.new_full(mean.shape, torch.inf).scatter_reduce_(
                0, position[bare], (own / mean[position])[bare], "amin"
            )
            rows *= (self.config.alpha / self._thresholds(layer, rows, least))[:, None]
        return left, rows

    def _thresholds(self, layer: int, rows: Tensor, least: Tensor) -> Tensor:
        """Threshold of each edit ``[E]``.

        Args:
            layer: its index.
            rows: of A^T ``[E, n]``, scaled to give 1 for an edit's own keys on average.
            least: what they give for its bare prompts at least ``[E]``: many edits with similar
                keys share a coefficient, and the prompt itself must fire all the same.
        """
        edits, config = self.layers[layer], self.config
        about = list(self._about(layer).values())
        after = {
            p: config.alpha_cued if p in SUBJECT_PLACES else config.alpha_answer for p in PLACES
        }
        found = rows.new_tensor([config.alpha if a.cue is None else after[a.place] for a in about])
        bare = [i for i, a in enumerate(about) if a.cue is None]
        if bare and edits.sample is not None and len(edits.sample):
            ends = [about[i].endings for i in bare]
            nearest = self._sample_scores(edits.sample, rows[bare], ends).amax(dim=0).to(rows)
            between = ((1 + nearest) / 2).clamp_max(config.alpha_ceiling)
            found[bare] = between.clamp_min(config.alpha)
        return found.minimum((least * _BELOW_OWN).clamp_min(_LOWEST))

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
        return torch.tensor(list(self._about(layer)), dtype=torch.int64)

    def _about(self, layer: int) -> dict[int, _About]:
        """What each edit is about, by its number."""
        found: dict[int, _About] = {}
        for batch in self.batches.values():
            if layer not in batch.groups:
                continue
            told = zip(
                batch.groups[layer], batch.slots, batch.endings, batch.cued(layer), strict=True
            )
            for i, (group, (_, place), ends, cued) in enumerate(told):
                about = found.setdefault(group, _About(self.config.places[place], []))
                about.endings.extend(ends)
                about.cue = batch.cues[layer][i] if cued else None
                about.reach = batch.reaches[i] if cued and batch.reaches else NEVER
                about.gap = batch.gaps[layer][i] if cued and layer in batch.gaps else 0
        return dict(sorted(found.items()))

    def cues(self, layer: int) -> dict[str, Tensor] | None:
        """What the rows of the membership pair wait for; None where none waits.

        "cues" float32 ``[E, n]``, "limits" float32 ``[E]``, -inf where an edit needs no cue, and
        "reaches" and "gaps" int32 ``[E]``, on the CPU.
        """
        about = list(self._about(layer).values())
        known = [a.cue for a in about if a.cue is not None]
        if not known:
            return None
        nothing, site = torch.zeros_like(known[0]), self.config.key_site
        filters = torch.stack([nothing if a.cue is None else a.cue for a in about])
        gaps = [min(a.gap, MOST_APART) for a in about]
        limits = [
            -torch.inf if a.cue is None else cue_limit(a.place, site, 2 if gap else 1)
            for a, gap in zip(about, gaps, strict=True)
        ]
        reaches = [min(a.reach, NEVER) for a in about]
        return {
            "cues": filters,
            "limits": torch.tensor(limits, dtype=torch.float32),
            "reaches": torch.tensor(reaches, dtype=torch.int32),
            "gaps": torch.tensor(gaps, dtype=torch.int32),
        }

    def _columns(self, layer: int) -> _Columns:
        """What the columns of the memory are."""
        each = len(self.config.contexts) if self.config.key_pooling == "each" else 1
        own: dict[int, int] = {}
        if self.sample_tokens is not None and any(
            b.anchors.get(layer) for b in self.batches.values()
        ):
            for group, about in self._about(layer).items():
                for row in self.sample_tokens.rows(about.endings):
                    own.setdefault(row, group)
        groups: list[int] = []
        batches: list[int] = []
        bare: list[bool] = []
        anchors: list[bool] = []
        for number, batch in self.batches.items():
            keys = [group for group in batch.groups.get(layer, ()) for _ in range(each)]
            apart = [own.get(row, -1) for row in batch.anchors.get(layer, ())]
            groups += keys + apart
            anchors += [False] * len(keys) + [True] * len(apart)
            bare += [i % each == 0 for i in range(len(keys))] + [False] * len(apart)
            batches += [number] * (len(keys) + len(apart))
        return _Columns(
            torch.tensor(groups, dtype=torch.int64),
            torch.tensor(batches, dtype=torch.int64),
            torch.tensor(bare, dtype=torch.bool),
            torch.tensor(anchors, dtype=torch.bool),
        )

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
