"""The targets v*: what the last edited block should say at the last subject token.

For a request with prompt ``p``, subject ``s`` and target ``o`` the state ``h`` of the last edited
block at the last token of ``s`` is replaced by ``v* = h + delta`` with

    delta = argmin  mean over contexts of -log P(o | context(p))
                    + kl KL(P(. | "s is a") || P_0(. | "s is a")) + decay ||delta|| / ||h||^2

(MEMIT, Meng et al. 2023, equation 16, with the divergence, the decay and the clamp of its
published code). Requests do not share parameters, so all of a batch are optimised in one Adam run:
their losses are summed, the gradient of each reaches its own ``delta`` only, and a request that has
converged leaves the batch. One whose target does not come out in every context may go on with a
further place (``EditConfig.places``), its deltas so far kept as the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.editing.config import EditConfig
from coachhook.editing.prompts import (
    EncodedPrompt,
    encode,
    encode_in_context,
    encode_target,
    pad_right,
)
from coachhook.editing.requests import EditRequest
from coachhook.editing.suffix import Captured, Suffix
from coachhook.models import ModelDescription

KL_PROMPT = "{} is a"


@dataclass(frozen=True)
class EncodedRequest:
    """A request's token ids.

    Attributes:
        contexts: the prompt in each context, bare first, without the target.
        target: ids of the target.
        essence: "{subject} is a", whose next-token distribution should not drift.
    """

    contexts: list[EncodedPrompt]
    target: list[int]
    essence: EncodedPrompt


@dataclass(frozen=True)
class Targets:
    """Optimised targets of a batch of k requests.

    Attributes:
        values: v* as columns ``[d, k]``, compute dtype.
        deltas: what is to be added at each place, ``[k, P, d]``; ``values`` is h plus the first.
        used: whether a request needs a place, bool ``[k, P]``.
        losses: last loss of each request.
        converged: whether the target is the model's answer to the bare prompt with the deltas in.
        steps: Adam steps taken for each request.
    """

    values: Tensor
    deltas: Tensor
    used: Tensor
    losses: list[float]
    converged: list[bool]
    steps: list[int]


def encode_requests(
    tokenizer: Any,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    max_positions: int | None,
) -> list[EncodedRequest]:
    """Tokenises all prompts of a batch and locates the subject in each.

    Raises:
        ValueError: a subject is not covered by a token, a target gives none, or a prompt with its
            target does not fit the context window; the message names the request.
    """
    encoded = []
    for number, request in enumerate(requests):
        try:
            target = encode_target(tokenizer, request.target_new)
            room = None if max_positions is None else max_positions - len(target) + 1
            start = KL_PROMPT.index("{}")
            encoded.append(
                EncodedRequest(
                    [encode_in_context(tokenizer, request, c, room) for c in contexts],
                    target,
                    encode(
                        tokenizer,
                        KL_PROMPT.replace("{}", request.subject),
                        (start, start + len(request.subject)),
                        max_positions,
                    ),
                )
            )
        except ValueError as error:
            raise ValueError(f"{error} (request {number}: {request.text!r})") from error
    return encoded


@dataclass
class _Problem:
    """A chunk of k requests, ``group`` rows each: contexts, then the essence prompt if wanted."""

    captured: Captured
    places: Tensor  # [R, P], index of each place's token, -1 where there is none
    target: Tensor  # [R, T], the id that follows each position or -100
    group: int
    contexts: int

    def select(self, requests: Tensor) -> _Problem:
        offsets = torch.arange(self.group, device=requests.device)
        rows = (requests[:, None] * self.group + offsets).flatten()
        return _Problem(
            self.captured.select(rows),
            self.places[rows],
            self.target[rows],
            self.group,
            self.contexts,
        )

    @property
    def bare(self) -> Tensor:
        """Row of each request's bare prompt."""
        return torch.arange(0, len(self.places), self.group, device=self.places.device)


def _problem(
    suffix: Suffix,
    requests: Sequence[EncodedRequest],
    places: Sequence[str],
    with_kl: bool,
    pad_id: int,
    device: torch.device,
) -> _Problem:
    rows: list[list[int]] = []
    positions: list[list[int]] = []
    spans: list[tuple[int, list[int]]] = []
    for request in requests:
        for prompt in request.contexts:
            rows.append(prompt.ids + request.target[:-1])
            positions.append([_or_none(prompt.position(place)) for place in places])
            spans.append((len(prompt.ids) - 1, request.target))
        if with_kl:
            essence = request.essence
            rows.append(essence.ids)
            positions.append(
                [-1 if p == "prompt_last" else _or_none(essence.position(p)) for p in places]
            )
            spans.append((0, []))
    ids, mask = pad_right(rows, pad_id, device)
    target = torch.full_like(ids, -100)
    for row, (start, tokens) in enumerate(spans):
        target[row, start : start + len(tokens)] = torch.tensor(tokens, device=device)
    contexts = len(requests[0].contexts)
    return _Problem(
        suffix.capture(ids, mask),
        torch.tensor(positions, device=device),
        target,
        contexts + int(with_kl),
        contexts,
    )


def _or_none(position: int | None) -> int:
    return -1 if position is None else position


@dataclass
class _Losses:
    total: Tensor  # [k], differentiable
    correct: Tensor  # [k, contexts] bool: the target is the answer
    essence: Tensor | None  # [k, V] log-probabilities


def _losses(
    suffix: Suffix,
    problem: _Problem,
    delta: Tensor,
    start_norm: Tensor,
    essence_start: Tensor | None,
    config: EditConfig,
) -> _Losses:
    base = problem.captured.hidden
    row, place = (problem.places >= 0).nonzero(as_tuple=True)
    column = problem.places[row, place]
    moved = base[row, column].to(delta.dtype) + delta[row // problem.group, place]
    hidden = base.index_put((row, column), moved.to(base.dtype))
    at_loss, final = suffix.run(problem.captured, hidden, config.target_loss_layer)

    row, column = (problem.target >= 0).nonzero(as_tuple=True)
    wanted = problem.target[row, column]
    log_probs = suffix.log_probs(at_loss[row, column])
    chosen = log_probs.gather(1, wanted[:, None])[:, 0]
    count = (problem.target >= 0).sum(1).clamp_min(1)
    nll = -torch.zeros_like(count, dtype=chosen.dtype).index_add(0, row, chosen) / count
    nll = nll.view(-1, problem.group)[:, : problem.contexts].mean(1)
    wrong = torch.zeros_like(count).index_add(0, row, (log_probs.argmax(1) != wanted).to(count))
    correct = wrong.view(-1, problem.group)[:, : problem.contexts] == 0

    total = nll + config.target_weight_decay * delta.flatten(1).norm(dim=1) / start_norm**2
    essence = None
    if problem.group > problem.contexts:
        last = problem.bare + problem.contexts
        essence = suffix.log_probs(final[last, problem.places[last, 0]])
        reference = essence.detach() if essence_start is None else essence_start
        total = total + config.target_kl * (essence.exp() * (essence - reference)).sum(-1)
    return _Losses(total, correct, essence)


@dataclass
class _Solution:
    """The targets of the requests of a chunk so far."""

    start: Tensor  # [k, d]
    delta: Tensor  # [k, P, d]
    used: Tensor  # [k, P] bool
    losses: Tensor  # [k]
    correct: Tensor  # [k, contexts] bool
    steps: Tensor  # [k]


def _optimise(
    suffix: Suffix,
    problem: _Problem,
    config: EditConfig,
    solution: _Solution,
    requests: Tensor,
    places: int,
) -> None:
    """Optimises some requests of a chunk at their first ``places`` places, from where they are."""
    running = problem.select(requests)
    running.places = running.places[:, :places]
    start_norm = solution.start[requests].norm(dim=1)
    radius = config.target_clamp * start_norm[:, None]
    delta = solution.delta[requests, :places].requires_grad_(True)
    optimiser = torch.optim.Adam([delta], lr=config.target_lr)
    solution.used[requests, :places] = problem.places[problem.bare[requests], :places] >= 0
    active = torch.arange(len(requests), device=requests.device)
    essence_start: Tensor | None = None

    for step in range(config.target_steps):
        reference = None if essence_start is None else essence_start[active]
        with torch.enable_grad():
            now = _losses(suffix, running, delta[active], start_norm[active], reference, config)
            gradient = torch.autograd.grad(now.total.sum(), delta)[0]
        if essence_start is None and now.essence is not None:
            essence_start = now.essence.detach()
        chosen = requests[active]
        solution.delta[chosen, :places] = delta.detach()[active]
        solution.losses[chosen] = now.total.detach().to(solution.losses)
        solution.correct[chosen] = now.correct
        stopped = now.total.detach() < config.target_stop
        if stopped.any():
            active = active[~stopped]
            if not len(active):
                break
            running = running.select((~stopped).nonzero().flatten())
        if step == config.target_steps - 1:
            break
        solution.steps[requests[active]] += 1
        delta.grad = gradient
        optimiser.step()
        with torch.no_grad():
            norm = delta.norm(dim=-1)
            outside = norm > radius
            delta[outside] *= (radius / norm)[outside, None]


def _optimise_chunk(
    suffix: Suffix,
    problem: _Problem,
    config: EditConfig,
    dtype: torch.dtype,
    admit: Callable[[list[int], str], list[bool]],
) -> _Solution:
    hidden, places = problem.captured.hidden, problem.places
    start = hidden[problem.bare, places[problem.bare, 0]].to(dtype)
    count, device = len(start), start.device
    solution = _Solution(
        start,
        start.new_zeros(count, places.shape[1], start.shape[1]),
        torch.zeros(count, places.shape[1], dtype=torch.bool, device=device),
        start.new_zeros(count),
        torch.zeros(count, problem.contexts, dtype=torch.bool, device=device),
        torch.zeros(count, dtype=torch.int64, device=device),
    )
    requests = torch.arange(count, device=device)
    offsets = torch.arange(problem.group, device=device)
    for number in range(1, places.shape[1] + 1):
        # A request whose prompt has no token for the new place has nothing to gain from it.
        here = requests[places[problem.bare[requests], number - 1] >= 0]
        if number > 1 and len(here):
            admitted = torch.tensor(admit(here.tolist(), config.places[number - 1]), device=device)
            rows = (here[~admitted, None] * problem.group + offsets).flatten()
            problem.places[rows, number - 1] = -1
            here = here[admitted]
        if len(here):
            _optimise(suffix, problem, config, solution, here, number)
        wrong = ~solution.correct.all(dim=1)
        requests = wrong.nonzero().flatten()
        if not len(requests):
            break
    return solution


def optimise_targets(
    model: nn.Module,
    description: ModelDescription,
    encoded: Sequence[EncodedRequest],
    config: EditConfig,
    *,
    pad_id: int,
    admit: Callable[[list[int], str], list[bool]] | None = None,
    max_tokens: int = 16384,
) -> Targets:
    """Finds v* of every request, with the hooks of the model as they are.

    Args:
        model: the model, hooks of earlier batches validated.
        description: its description.
        encoded: the k requests.
        config: contexts, places, step count, learning rate and penalties.
        pad_id: id used for padding.
        admit: asked, with the numbers of requests that need it and the place, which of them may
            take a further place; None admits all.
        max_tokens: most padded tokens differentiated at once; bounds the memory.

    Returns:
        The targets, in the order of the requests. Computed in float32, or float64 where the model
        is; the network itself runs in its own dtype.

    Raises:
        ValueError: a loss is not finite (the model gives NaN or infinite logits).
    """
    suffix = Suffix(model, description, config.layers[-1])
    parameter = next(model.parameters())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    solutions = []
    # With padding in the gate's statistics a state depends on what it is padded with; the published
    # code optimises one request at a time.
    for chunk in _chunks(encoded, max_tokens, single=config.include_padding):
        problem = _problem(
            suffix,
            [encoded[i] for i in chunk],
            config.places,
            config.target_kl > 0,
            pad_id,
            parameter.device,
        )

        def admit_here(requests: list[int], place: str, chunk: list[int] = chunk) -> list[bool]:
            return (
                [True] * len(requests)
                if admit is None
                else admit([chunk[i] for i in requests], place)
            )

        solutions.append(_optimise_chunk(suffix, problem, config, dtype, admit_here))
    losses = torch.cat([s.losses for s in solutions])
    if not torch.isfinite(losses).all():
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        raise ValueError(
            "edit: the model's likelihood of the target must be finite, got NaN or infinity for "
            f"requests {bad}; check the weights, or load the model in bfloat16 or float32"
        )
    deltas = torch.cat([s.delta for s in solutions])
    start = torch.cat([s.start for s in solutions])
    return Targets(
        (start + deltas[:, 0]).T.contiguous(),
        deltas,
        torch.cat([s.used for s in solutions]),
        losses.tolist(),
        torch.cat([s.correct[:, 0] for s in solutions]).tolist(),
        torch.cat([s.steps for s in solutions]).tolist(),
    )


def _chunks(encoded: Sequence[EncodedRequest], max_tokens: int, *, single: bool) -> list[list[int]]:
    chunks: list[list[int]] = []
    width = 0
    for i, request in enumerate(encoded):
        rows = len(request.contexts) + 1
        longest = max(len(p.ids) for p in request.contexts) + len(request.target)
        fits = chunks and (len(chunks[-1]) + 1) * rows * max(width, longest) <= max_tokens
        if single or not fits:
            chunks.append([])
            width = 0
        chunks[-1].append(i)
        width = max(width, longest)
    return chunks
