"""The prompts of a batch as one optimisation problem: what is changed, asked for, and lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coachhook.editing.config import EditConfig
from coachhook.editing.encoding import EncodedRequest
from coachhook.editing.live import Live
from coachhook.editing.prompts import SUBJECT_PLACES, EncodedPrompt, Place, pad_right
from coachhook.editing.replay import Replayed
from coachhook.editing.suffix import Captured, Suffix


@dataclass(frozen=True)
class Earlier:
    """What an earlier batch wrote at one place of a request.

    Attributes:
        value: its correction ``[d]``, where the new one starts.
        added: how much of it is in the state of the last edited block now, in each of the contexts,
            the rewordings and the essence prompt ``[p, d]``: all of it, or none where the edit does
            not fire.
    """

    value: Tensor
    added: Tensor


@dataclass(frozen=True)
class Indirect:
    """Corrections of a down-projection whose output is not added to the residual as it is.

    Attributes:
        own: that output at each place of a row, ``[R, P, d]``.
        unit: length of a correction that moves the residual by about 1, at each place of the k
            requests ``[k, P, 1]``: deltas are optimised in this unit, so that steps, clamps and
            penalties mean the same in every model.
    """

    own: Tensor
    unit: Tensor

    def select(self, rows: Tensor, requests: Tensor) -> Indirect:
        """Some requests and their rows."""
        return Indirect(self.own[rows], self.unit[requests])

    def tied(self, lead: Tensor, shared: Tensor) -> Indirect:
        """With units of the requests ``lead [k]`` at the places ``shared [P, 1]`` (bool)."""
        return Indirect(self.own, self.unit[lead].where(shared, self.unit))


@dataclass
class Problem:
    """A chunk of k requests, ``group`` rows each.

    A request's rows are its contexts, its rewordings, without targets where it has fewer than
    another request of the chunk, and its essence prompt if wanted.
    """

    captured: Captured | Live | Replayed
    places: Tensor  # [R, P], index of each place's token, -1 where there is none
    added: Tensor | None  # [R, P, d], what is taken off the state there
    target: Tensor  # [R, T], the id that follows each position or -100
    ends: Tensor  # [R, T] bool, where the target's word must end
    continuing: Tensor | None  # [V] bool, ids that go on with a word
    group: int
    contexts: int
    asked: int  # contexts and rewordings
    indirect: Indirect | None = None

    def select(self, suffix: Suffix, requests: Tensor, reworded: Tensor) -> Problem:
        """Some requests, rewordings of those ``reworded`` only."""
        offsets = torch.arange(self.group, device=requests.device)
        rows = self.rows(requests)
        here = self.places[rows]
        asked = reworded[:, None] | (offsets < self.contexts)
        target = self.target[rows].masked_fill(~asked.flatten()[:, None], -100)
        ends = self.ends[rows] & asked.flatten()[:, None]
        return Problem(
            suffix.select(self.captured, rows, self.first(here), self.wanted(target, ends, here)),
            here,
            None if self.added is None else self.added[rows],
            target,
            ends,
            self.continuing,
            self.group,
            self.contexts,
            self.asked,
            None if self.indirect is None else self.indirect.select(rows, requests),
        )

    def rows(self, requests: Tensor) -> Tensor:
        """All rows of some requests ``[r group]``."""
        offsets = torch.arange(self.group, device=requests.device)
        return (requests[:, None] * self.group + offsets).flatten()

    def first(self, places: Tensor) -> Tensor:
        """The first token that rows with places ``[R, P]`` change ``[R]``; T for none."""
        return places.masked_fill(places < 0, self.target.shape[1]).amin(1)

    def wanted(self, target: Tensor, ends: Tensor, places: Tensor) -> Tensor:
        """The tokens of whole requests that are asked for, bool ``[R, T]``."""
        wanted = (target >= 0) | ends
        if self.group > self.asked:
            last = torch.arange(self.asked, len(target), self.group, device=target.device)
            wanted[last, places[last, 0]] = True
        return wanted

    def start(self, dtype: torch.dtype) -> Tensor:
        """State of the stream at the first place of each bare prompt ``[k, d]``.

        Where corrections are added to it, without what earlier ones added.
        """
        start = self.captured.hidden[self.bare, self.places[self.bare, 0]].to(dtype)
        if self.added is None or self.indirect is not None:
            return start
        return start - self.added[self.bare, 0]

    @property
    def prompts(self) -> Tensor:
        """Prompts of each request that have a target ``[k]``."""
        return (self.target >= 0).any(1).view(-1, self.group).sum(1)

    @property
    def bare(self) -> Tensor:
        """Row of each request's bare prompt."""
        return torch.arange(0, len(self.places), self.group, device=self.places.device)


def make_problem(
    suffix: Suffix,
    requests: Sequence[EncodedRequest],
    places: Sequence[Place],
    earlier: Sequence[Mapping[Place, Earlier]],
    config: EditConfig,
    pad_id: int,
    device: torch.device,
    continuing: Tensor | None = None,
) -> Problem:
    """Runs the network once on the prompts of k requests.

    Args:
        suffix: the network above the last edited block.
        requests: the k requests.
        places: the P places that may be written at.
        earlier: for each request what earlier batches wrote.
        config: contexts and penalties.
        pad_id: id used for padding.
        device: of the model.
        continuing: ids that go on with a word, bool ``[V]``; None asks for no word's end.
    """
    with_kl = config.target_kl > 0
    asked = max(len(request.prompts) for request in requests)
    rows: list[list[int]] = []
    positions: list[list[int]] = []
    spans: list[tuple[int, list[int]]] = []
    ending: list[tuple[int, int]] = []

    def add(
        prompt: EncodedPrompt, target: list[int], at: Sequence[Place], ends: bool = False
    ) -> None:
        if ends:
            ending.append((len(rows), len(prompt.ids) + len(target) - 1))
        ids = prompt.ids + (target if ends else target[:-1])
        found = [prompt.position(p, target) if p in at else None for p in places]
        positions.append([-1 if p is None or p >= len(ids) else p for p in found])
        spans.append((len(prompt.ids) - 1, target))
        rows.append(ids)

    for request in requests:
        # How a subject is cut into tokens may differ between contexts: a place must be in all.
        common = [
            p
            for p in places
            if all(c.position(p, request.target) is not None for c in request.contexts)
        ]
        # The last token of another wording has another key: nothing will be written there.
        others = [p for p in common if p[0] != "prompt_last"]
        for number, prompt in enumerate(request.contexts):
            # In the bare prompt alone: more prompts have more tokens and give no more.
            ends = continuing is not None and request.ends_word and number == 0
            add(prompt, request.target, common, ends)
        for prompt in request.rewordings:
            add(prompt, request.target, others)
        for _ in range(asked - len(request.prompts)):
            add(request.essence, [], [])
        if with_kl:
            add(request.essence, [], [p for p in places if p[0] in SUBJECT_PLACES])
    ids, mask = pad_right(rows, pad_id, device)
    target = torch.full_like(ids, -100)
    for row, (start, tokens) in enumerate(spans):
        target[row, start : start + len(tokens)] = torch.tensor(tokens, device=device)
    ends_at = torch.zeros_like(ids, dtype=torch.bool)
    for row, column in ending:
        ends_at[row, column] = True
    contexts = len(requests[0].contexts)
    group = asked + int(with_kl)
    # With padding in the gate's statistics a state depends on what it is padded with; the published
    # code takes one request at a time.
    captured = suffix.capture(
        ids,
        mask,
        apart=group if config.counts_padding else None,
        keep=True,
        loss_layer=config.target_loss_layer,
    )
    added = None
    if any(earlier):
        added = captured.hidden.new_zeros(len(rows), len(places), captured.hidden.shape[2])
        for first, request, known in zip(
            range(0, len(rows), group), requests, earlier, strict=True
        ):
            mine = [*range(len(request.prompts)), *([asked] if with_kl else [])]
            for place, there in known.items():
                at = torch.tensor(mine, device=device) + first
                added[at, places.index(place)] = there.added[: len(mine)].to(added)
    at_places = torch.tensor(positions, device=device)
    return Problem(
        captured,
        at_places,
        added,
        target,
        ends_at,
        continuing,
        group,
        contexts,
        asked,
        _indirect(suffix, captured, at_places, group),
    )


def _indirect(suffix: Suffix, captured: Captured, places: Tensor, group: int) -> Indirect | None:
    if suffix.passed is None:
        return None
    assert captured.own is not None
    rows = torch.arange(len(places), device=places.device)[:, None]
    own = captured.own[rows, places.clamp_min(0)]
    with torch.no_grad():
        bare = own[::group]
        unit = bare.float().norm(dim=2) / suffix.passed(bare).float().norm(dim=2)
    usable = unit.isfinite() & (unit > 0)
    return Indirect(own, unit.where(usable, 1)[..., None])


@dataclass
class Losses:
    """What one forward says of k requests.

    Attributes:
        total: the loss ``[k]``, differentiable.
        correct: whether the target is a prompt's answer, or none is asked for, bool ``[k, asked]``.
        ended: whether its word ends with it in the bare prompt, or need not, bool ``[k]``.
        essence: log-probabilities of the essence prompt ``[k, V]``, where it is asked.
    """

    total: Tensor
    correct: Tensor
    ended: Tensor
    essence: Tensor | None


def find_losses(
    suffix: Suffix,
    problem: Problem,
    delta: Tensor,
    start_norm: Tensor,
    essence_start: Tensor | None,
    config: EditConfig,
) -> Losses:
    """Runs the suffix with ``delta`` ``[k, P, d]`` in, and judges the answers.

    Args:
        suffix: the network above the last edited block.
        problem: the requests and what is asked of them.
        delta: what is added at each place, in units of ``problem.indirect``, compute dtype.
        start_norm: norm of the state at the first place ``[k]``.
        essence_start: the essence prompt's log-probabilities before ``[k, V]``; NaN, or None for
            all: the present ones.
        config: penalties.
    """
    base = problem.captured.hidden
    row, place = (problem.places >= 0).nonzero(as_tuple=True)
    column = problem.places[row, place]
    stream, indirect = base[row, column], problem.indirect
    own = stream if indirect is None else indirect.own[row, place]
    shift = delta if indirect is None else delta * indirect.unit
    moved = own.to(delta.dtype) + shift[row // problem.group, place]
    if problem.added is not None:
        moved = moved - problem.added[row, place]
    if suffix.passed is not None:
        change = suffix.passed(moved.to(own.dtype)) - suffix.passed(own)
        moved = stream.to(delta.dtype) + change.to(delta.dtype)
    hidden = base.index_put((row, column), moved.to(base.dtype))
    at_loss, final = suffix.run(problem.captured, hidden, config.target_loss_layer)

    row, column = ((problem.target >= 0) | problem.ends).nonzero(as_tuple=True)
    wanted = problem.target[row, column]
    log_probs = suffix.log_probs(at_loss[row, column])
    chosen = log_probs.gather(1, wanted.clamp_min(0)[:, None])[:, 0]
    good = (log_probs.argmax(1) == wanted) | (wanted < 0)
    ended = torch.ones_like(start_norm, dtype=torch.bool)
    if problem.continuing is not None:
        end = (wanted < 0).nonzero()[:, 0]
        stop = log_probs[end].masked_fill(problem.continuing, float("-inf"))
        chosen = chosen.index_put((end,), stop.logsumexp(1))
        ended[row[end] // problem.group] = ~problem.continuing[log_probs[end].argmax(1)]
    count = (problem.target >= 0).sum(1).clamp_min(1)
    nll = -torch.zeros_like(count, dtype=chosen.dtype).index_add(0, row, chosen) / count
    wrong = torch.zeros_like(count).index_add(0, row, (~good).to(count))
    correct = wrong.view(-1, problem.group)[:, : problem.asked] == 0

    penalty = config.target_weight_decay * delta.flatten(1).norm(dim=1) / start_norm**2
    essence = None
    if problem.group > problem.asked:
        last = problem.bare + problem.asked
        essence = suffix.log_probs(final[last, problem.places[last, 0]])
        reference = essence.detach()
        if essence_start is not None:
            reference = reference.where(essence_start.isnan(), essence_start)
        penalty = penalty + config.target_kl * (essence.exp() * (essence - reference)).sum(-1)
    # A request that is only run along has no prompt with a target.
    total = nll.view(-1, problem.group).sum(1) / problem.prompts.clamp_min(1) + penalty
    return Losses(total, correct, ended, essence)
