"""The targets v*: what the last edited block should say at the last subject token.

For a request with prompt ``p``, subject ``s`` and target ``o`` the state ``h`` of the last edited
block at the last token of ``s`` is replaced by ``v* = h + delta`` with

    delta = argmin  mean over contexts of -log P(o | context(p))
                    + kl KL(P(. | "s is a") || P_0(. | "s is a")) + decay ||delta|| / ||h||^2

(MEMIT, Meng et al. 2023, equation 16, with the divergence, the decay and the clamp of its
published code). Requests do not share parameters, so all of a batch are optimised in one Adam run:
their losses are summed, the gradient of each reaches its own ``delta`` only, and a request that has
converged, or whose loss no longer falls, leaves the batch. Its rewordings join once its contexts
have converged, for the steps that are left. One whose target does not come out in every context may
go on with a further place (``EditConfig.places``), its deltas so far kept as the start, beside
those that are still at their first. A target of several tokens has a delta at each of its tokens
but the last, too, which says the next one: one vector at the subject would have to name them all.
In the bare prompt the target's word must end, too (:mod:`coachhook.editing.word_ends`): its loss
has ``-log P(no letter or digit | p o)`` as well.

Requests about one subject are another matter: they have one key, and one correction must do for all
of them. Such requests are *tied*: they have one ``delta`` at the subject's tokens, under the sum of
their losses, and leave the batch together. Where an earlier batch wrote there, its correction is in
the state of those prompts that its edit fires in. So ``delta`` takes its place: it is added to the
state without it, and is the same in every prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from coachhook.editing.adam import ClampedAdam
from coachhook.editing.config import EditConfig
from coachhook.editing.encoding import EncodedRequest
from coachhook.editing.held import Held
from coachhook.editing.problem import Earlier, Problem, find_losses, make_problem
from coachhook.editing.prompts import (
    SUBJECT_PLACES,
    Place,
    expand_places,
)
from coachhook.editing.room import chunks, tokens_at_once
from coachhook.editing.suffix import Suffix
from coachhook.models import ModelDescription

_log = logging.getLogger(__name__)

# Steps over which a loss has to fall, from which on: Adam's first may raise it.
_SPAN, _FROM = 2, 5


@dataclass(frozen=True)
class Targets:
    """Optimised targets of a batch of k requests.

    Attributes:
        values: v* as columns ``[d, k]``, compute dtype.
        deltas: what is to be added at each place, ``[k, P, d]``, to h without what an earlier batch
            wrote there (:class:`Earlier`); ``values`` is that h plus the first.
        used: whether a request needs a place, bool ``[k, P]``.
        places: the P places.
        losses: last loss of each request.
        converged: whether the target is the model's answer to the bare prompt with the deltas in,
            and ends there where that is asked.
        steps: Adam steps taken for each request.
    """

    values: Tensor
    deltas: Tensor
    used: Tensor
    places: list[Place]
    losses: list[float]
    converged: list[bool]
    steps: list[int]

    def select(self, columns: Sequence[int], without: Sequence[int] = ()) -> Targets:
        """The targets of some requests in some order; those at ``without`` need no place."""
        used = self.used[list(columns)]
        used[list(without)] = False
        converged = [self.converged[i] for i in columns]
        for i in without:
            converged[i] = False
        return Targets(
            self.values[:, list(columns)],
            self.deltas[list(columns)],
            used,
            self.places,
            [self.losses[i] for i in columns],
            converged,
            [self.steps[i] for i in columns],
        )


@dataclass
class _Solution:
    """The targets of the requests of a chunk so far."""

    start: Tensor  # [k, d]
    delta: Tensor  # [k, P, d]
    used: Tensor  # [k, P] bool
    losses: Tensor  # [k]
    correct: Tensor  # [k, asked] bool
    ended: Tensor  # [k] bool
    steps: Tensor  # [k]
    ties: Tensor  # [k], equal for tied requests


class _Course:
    """Which places the requests of a chunk have, and which they take next.

    Nobody has one at the start.

    Attributes:
        there: token of each place ``[R, P]`` that rows may be given, -1 for none.
    """

    def __init__(
        self,
        problem: Problem,
        solution: _Solution,
        names: Sequence[Place],
        stages: Sequence[tuple[str, ...]],
        admit: Callable[[list[tuple[int, Place]]], list[bool]],
    ) -> None:
        self._problem, self._solution, self._names, self._admit = problem, solution, names, admit
        self._stages = [(s, [i for i, p in enumerate(names) if p[0] in s]) for s in stages]
        self.there = problem.places.clone()
        problem.places.fill_(-1)
        self._at = torch.full_like(solution.steps, -1)

    def advance(self, requests: Tensor) -> Tensor:
        """Gives requests that are done where they are their next places.

        Tied requests must be given together.

        Returns:
            Those that have one more, or are tied to one that has ``[r]``.
        """
        problem, solution, device = self._problem, self._solution, requests.device
        offsets = torch.arange(problem.group, device=device)
        moved = []
        for number, (stage, columns) in enumerate(self._stages):
            here = self._at[requests] == number - 1
            there, requests = requests[here], requests[~here]
            if not len(there):
                continue
            self._at[there] = number
            # A request whose prompt has no token for the new place has nothing to gain from it.
            able = self._asking(stage)[there, None]
            able = able & (self.there[problem.bare[there]][:, columns] >= 0)
            found = able.nonzero().tolist()
            pairs = [(int(there[i]), self._names[columns[j]]) for i, j in found if columns[j]]
            if pairs:
                first = int(columns[0] == 0)
                admitted = torch.tensor(self._admit(pairs), device=device)
                able[:, first:][able[:, first:].clone()] = admitted
            row, column = able.nonzero(as_tuple=True)
            rows = there[row, None] * problem.group + offsets
            column = torch.tensor(columns, device=device)[column, None]
            problem.places[rows, column] = self.there[rows, column]
            solution.used[there] = problem.places[problem.bare[there]] >= 0
            on = _any_tied(able.any(dim=1), solution.ties[there])
            moved.append(there[on])
            requests = torch.cat([requests, there[~on]])
        return torch.cat(moved) if moved else requests[:0]

    def _asking(self, stage: tuple[str, ...]) -> Tensor:
        """Whether a request has something that the places of a stage can help, bool ``[k]``."""
        solution = self._solution
        # A tied request's key at a subject token is that of the others; the prompt's last token
        # can only help the prompt's own words, the target's last what comes after it.
        if "prompt_last" in stage:
            return ~solution.correct[:, : self._problem.contexts].all(dim=1)
        if "target_last" in stage:
            return ~solution.ended
        return _any_tied(~solution.correct.all(dim=1), solution.ties)


def _optimise(
    suffix: Suffix,
    problem: Problem,
    config: EditConfig,
    solution: _Solution,
    names: Sequence[Place],
    course: _Course,
    bar: tqdm[Any],
) -> None:
    """Optimises all requests of a chunk, each at the places that its course gives it.

    They are at different places meanwhile: one that is done at its first goes on at its next beside
    the others. Of tied requests the parameters of the first serve for all.
    """
    lead = _first_of_each(solution.ties)
    shared = _shared(names, lead.device)
    start_norm = solution.start.norm(dim=1)
    steps = ClampedAdam(
        solution.delta,
        config.target_lr,
        (config.target_betas[0], config.target_betas[1]),
        config.target_clamp * start_norm[:, None],
        config.target_scaling,
    )
    forwards = torch.zeros_like(solution.steps)
    essence_start: Tensor | None = None  # [k, V], NaN for requests that are new at a place
    past = solution.losses.new_full((_SPAN, len(lead)), float("nan"))

    # Most rewordings hold once the contexts do, so they are run with what is left only.
    plain = ~_any_tied(problem.prompts > problem.contexts, solution.ties)
    asking = plain.clone()
    finished = torch.arange(len(lead), device=lead.device)
    active = finished[:0]
    rows: Problem | None = None
    held: Held | None = None
    while True:
        if len(finished):
            new = course.advance(finished)
            forwards[new], past[:, new], asking[new] = 0, float("nan"), plain[new]
            steps.restart(new)
            if essence_start is not None:
                essence_start[new] = float("nan")
            active = torch.cat([active, new]).sort().values
        if not len(active):
            break
        if Held.suits(suffix, problem):
            if held is None or not held.serves(active):
                held = Held(suffix, problem, course.there, active)
        elif rows is None:
            held, rows = None, problem.select(suffix, active, asking[active])
        delta = steps.deltas().requires_grad_(True)
        with torch.enable_grad(), suffix.frozen():
            moved = torch.where(shared, delta[lead[active]], delta[active])
            moved = moved.where(solution.used[active][..., None], 0)
            if held is not None:
                now = held.losses(active, asking[active], moved, start_norm, essence_start, config)
            else:
                assert rows is not None
                known = None if essence_start is None else essence_start[active]
                now = find_losses(suffix, rows, moved, start_norm[active], known, config)
            total = now.total.sum()
        if held is not None and held.refused:
            _log.info("steps are not replayed from CUDA graphs: %s", sorted(held.refused))
            held = None
        if now.essence is not None:
            if essence_start is None:
                essence_start = now.essence.new_full((len(lead), now.essence.shape[1]), torch.nan)
            unknown = essence_start[active].isnan()
            essence_start[active] = now.essence.detach().where(unknown, essence_start[active])
        solution.delta[active] = moved.detach()
        solution.correct[active], solution.ended[active] = now.correct, now.ended
        losses = now.total.detach().to(past)
        solution.losses[active] = losses
        forwards[active] += 1
        high = losses >= config.target_stop
        if config.target_progress:
            # What does not move the contexts will not move the rewordings.
            stuck = high & (losses > (1 - config.target_progress) * past[0, active])
            stuck &= forwards[active] > _FROM
            forwards[active[stuck]] = config.target_steps
        past = past.roll(-1, dims=0)
        past[-1, active] = losses
        going = high & (forwards[active] < config.target_steps)
        going = _any_tied(going, solution.ties[active])
        left, done = active[going], ~going & asking[active]
        bar.update(int((now.correct[done].all(1) & now.ended[done]).sum()))
        if len(left):
            solution.steps[left] += 1
            gradient = torch.autograd.grad(total, delta)[0]
            steps.take(gradient, torch.unique(torch.cat([left, lead[left]])))
        joining = active[~going & ~done]
        asking[joining], past[:, joining] = True, float("nan")
        finished = active[done]
        if len(left) < len(active):
            active, rows = active[~done], None


def _first_of_each(ties: Tensor) -> Tensor:
    """Index of the first request with the same tie, for each request; both int64 ``[k]``."""
    return (ties[:, None] == ties).to(torch.int64).argmax(dim=1)


def _optimise_chunk(
    suffix: Suffix,
    problem: Problem,
    config: EditConfig,
    names: Sequence[Place],
    earlier: Sequence[Mapping[Place, Earlier]],
    ties: Tensor,
    dtype: torch.dtype,
    admit: Callable[[list[tuple[int, Place]]], list[bool]],
    bar: tqdm[Any],
) -> _Solution:
    places, start = problem.places, problem.start(dtype)
    count, device = len(start), start.device
    delta = start.new_zeros(count, places.shape[1], start.shape[1])
    for i, known in enumerate(earlier):
        for place, there in known.items():
            delta[i, names.index(place)] = there.value.to(delta)
    indirect = problem.indirect
    if indirect is not None:
        indirect = indirect.tied(_first_of_each(ties), _shared(names, device))
        problem.indirect, delta = indirect, delta / indirect.unit
    solution = _Solution(
        start,
        delta,
        torch.zeros(count, places.shape[1], dtype=torch.bool, device=device),
        start.new_zeros(count),
        torch.zeros(count, problem.asked, dtype=torch.bool, device=device),
        torch.ones(count, dtype=torch.bool, device=device),
        torch.zeros(count, dtype=torch.int64, device=device),
        ties,
    )
    course = _Course(problem, solution, names, _stages(config.places), admit)
    _optimise(suffix, problem, config, solution, names, course, bar)
    if indirect is not None:
        solution.start = indirect.own[problem.bare, 0].to(dtype)
        if problem.added is not None:
            solution.start = solution.start - problem.added[problem.bare, 0]
        solution.delta = solution.delta * indirect.unit
    return solution


def _shared(names: Sequence[Place], device: torch.device) -> Tensor:
    """At which places tied requests have one delta, bool ``[P, 1]``."""
    return torch.tensor([p[0] in SUBJECT_PLACES for p in names], device=device)[:, None]


def _stages(places: Sequence[str]) -> list[tuple[str, ...]]:
    """The places in the order they are added; those of the target are there from the start."""
    first, *rest = places
    if "target" not in rest:
        return [(place,) for place in places]
    return [(first, "target"), *((place,) for place in rest if place != "target")]


def _any_tied(which: Tensor, ties: Tensor) -> Tensor:
    """Whether a request or one tied to it is among ``which``, bool ``[k]``."""
    return ((ties[:, None] == ties) & which).any(dim=1)


def optimise_targets(
    model: nn.Module,
    description: ModelDescription,
    encoded: Sequence[EncodedRequest],
    config: EditConfig,
    *,
    pad_id: int,
    ties: Sequence[int] | None = None,
    earlier: Sequence[Mapping[Place, Earlier]] | None = None,
    admit: Callable[[list[tuple[int, Place]]], list[bool]] | None = None,
    continuing: Tensor | None = None,
    max_tokens: int | None = None,
    progress: str | None = None,
    suffix: Suffix | None = None,
) -> Targets:
    """Finds v* of every request, with the hooks of the model as they are.

    Args:
        model: the model, hooks of earlier batches validated.
        description: its description.
        encoded: the k requests.
        config: contexts, places, step count, learning rate and penalties.
        pad_id: id used for padding.
        ties: a number for each request; those with the same share their deltas at the subject's
            tokens. None ties none.
        earlier: for each request what earlier batches wrote at the subject's tokens, the same for
            tied ones. None: nothing.
        admit: asked, with numbers of requests and the further places they need, which of these
            may be taken; None admits all.
        continuing: ids that go on with a word, bool ``[V]``: the bare prompt's answer must end with
            the target. None: nothing is asked after it.
        max_tokens: most padded tokens differentiated at once; bounds the memory. Those before the
            first that may change count as what they take. None: as many as half of the memory that
            is free has room for. Halved where the device runs out all the same.
        progress: label of a progress bar of requests on stderr, or None for no bar.
        suffix: the network above the last edited block, as of an earlier call; None makes one.

    Returns:
        The targets, in the order of the requests. Computed in float32, or float64 where the model
        is; the network itself runs in its own dtype.

    Raises:
        ValueError: a loss is not finite (the model gives NaN or infinite logits).
    """
    if suffix is None:
        suffix = Suffix(model, description, config.layers[-1])
    parameter = next(model.parameters())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    ties = list(range(len(encoded))) if ties is None else list(ties)
    earlier = [{} for _ in encoded] if earlier is None else earlier
    if max_tokens is None:
        max_tokens = tokens_at_once(parameter.device, suffix.bytes_per_token)
    places = expand_places(config.places, (request.target for request in encoded))
    kept: float | None = suffix.bytes_per_kept_token / max(suffix.bytes_per_token, 1)
    solutions: list[tuple[list[int], _Solution]] = []
    bar = tqdm(
        total=len(encoded), desc=progress, disable=progress is None, unit="fact", leave=False
    )

    def split(some: Sequence[int], kept: float | None) -> list[list[int]]:
        return chunks(encoded, ties, max_tokens, kept, among=some)

    def solved(chunk: list[int]) -> _Solution | None:
        # The problem, which holds most of the memory, is gone before the next chunk's is made.
        some = [earlier[i] for i in chunk]

        def admit_here(pairs: list[tuple[int, Place]]) -> list[bool]:
            if admit is None:
                return [True] * len(pairs)
            return admit([(chunk[i], place) for i, place in pairs])

        requests, device = [encoded[i] for i in chunk], parameter.device
        with suffix.fused():
            problem = make_problem(
                suffix, requests, places, some, config, pad_id, device, continuing
            )
            if kept is not None and not suffix.keeps and len(split(chunk, None)) > 1:
                return None  # there may be no room to differentiate all tokens
            tied = torch.tensor([ties[i] for i in chunk], device=device)
            return _optimise_chunk(
                suffix, problem, config, places, some, tied, dtype, admit_here, bar
            )

    waiting = split(range(len(encoded)), kept)
    while waiting:
        chunk = waiting.pop(0)
        try:
            solution = solved(chunk)
        except torch.cuda.OutOfMemoryError:
            smaller = [chunk]
            while len(smaller) == 1 and max_tokens > 0:
                max_tokens //= 2
                smaller = split(chunk, kept)
            if len(smaller) == 1:
                raise
            waiting[:0] = smaller
            continue
        if solution is None:
            kept = None
            waiting = split([*chunk, *(i for others in waiting for i in others)], kept)
        else:
            solutions.append((chunk, solution))
            done = sum(len(requests) for requests, _ in solutions)
            bar.update(done - bar.n)
            bar.refresh()
    bar.close()
    return _collect(solutions, places)


def _collect(solutions: Sequence[tuple[list[int], _Solution]], places: list[Place]) -> Targets:
    order = torch.tensor([i for chunk, _ in solutions for i in chunk]).argsort()

    def together(name: str) -> Tensor:
        values = torch.cat([getattr(solution, name) for _, solution in solutions])
        return values[order.to(values.device)]

    # Chunks have prompts of their own number of wordings; the bare one is the first of all.
    bare = torch.cat([solution.correct[:, 0] for _, solution in solutions])
    losses = together("losses")
    if not torch.isfinite(losses).all():
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        raise ValueError(
            "edit: the model's likelihood of the target must be finite, got NaN or infinity for "
            f"requests {bad}; check the weights, or load the model in bfloat16 or float32"
        )
    deltas = together("delta")
    return Targets(
        (together("start") + deltas[:, 0]).T.contiguous(),
        deltas,
        together("used"),
        places,
        losses.tolist(),
        (bare[order.to(bare.device)] & together("ended")).tolist(),
        together("steps").tolist(),
    )
