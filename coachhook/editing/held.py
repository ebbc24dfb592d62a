"""Requests that stay in one run while some of them leave it, so that its steps can be replayed.

On a GPU a step of a batch is a few thousand short kernels, and the host needs longer to launch them
than the GPU to run them. The run of the blocks and its gradient are therefore captured in CUDA
graphs, of fixed shapes: requests that are done, and prompts nothing is asked of yet, are run along
until so few are left that a smaller run is worth another capture. What is asked for, the losses and
the steps are outside the graphs. Requests share nothing: who is run along changes rounding alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coachhook.editing.config import EditConfig
from coachhook.editing.live import Live
from coachhook.editing.packing import group_cost
from coachhook.editing.problem import Losses, Problem, find_losses
from coachhook.editing.replay import Replayed
from coachhook.editing.suffix import Captured, Suffix

# A smaller run is made where this many times fewer requests are left, unless the present one takes
# as long as its kernels take to start: captures of .1 to .2 s each would gain nothing.
_FEWER = 3


class Held:
    """Some requests of a problem with all their prompts, from the first token any place may change.

    Args:
        suffix: the network above the last edited block.
        problem: the requests, captured with what runs of the live tokens need.
        there: token of each place that its rows may be changed at ``[R, P]``, -1 for none.
        requests: their numbers, ascending ``[h]``.
    """

    def __init__(self, suffix: Suffix, problem: Problem, there: Tensor, requests: Tensor) -> None:
        self._suffix, self._problem, self._requests = suffix, problem, requests
        self._rows = rows = problem.rows(requests)
        self._target, self._ends, may = problem.target[rows], problem.ends[rows], there[rows]
        self._added = None if problem.added is None else problem.added[rows]
        indirect = problem.indirect
        self._indirect = None if indirect is None else indirect.select(rows, requests)
        wanted = problem.wanted(self._target, self._ends, may)
        live = suffix.select(problem.captured, rows, problem.first(may), wanted)
        if not isinstance(live, Live):
            raise TypeError(f"Held: problem must be captured for live runs, got {type(live)}")
        self._run = Replayed(live, watched=suffix.replays is True)
        self._is_small = live.tokens <= group_cost(live.hidden.device)

    @staticmethod
    def suits(suffix: Suffix, problem: Problem) -> bool:
        """Whether runs of a problem could be captured, as far as is known."""
        captured = problem.captured
        live = isinstance(captured, Captured) and captured.kept is not None
        if not live or suffix.replays is False or not captured.hidden.is_cuda:
            return False
        # torch refuses to capture what autocast keeps for later.
        return not torch.is_autocast_enabled("cuda")

    @property
    def refused(self) -> set[str]:
        """Why its run cannot be captured, as far as is known."""
        return self._run.refused or set()

    def serves(self, active: Tensor) -> bool:
        """Whether these requests, all among its own, are enough of them."""
        return self._is_small or _FEWER * len(active) >= len(self._requests)

    def losses(
        self,
        active: Tensor,
        reworded: Tensor,
        delta: Tensor,
        start_norm: Tensor,
        essence_start: Tensor | None,
        config: EditConfig,
    ) -> Losses:
        """As :func:`find_losses` of some of its requests.

        Args:
            active: their numbers, ascending ``[a]``.
            reworded: whether their rewordings are asked too ``[a]``.
            delta: of each ``[a, P, d]``.
            start_norm: of all requests of the problem ``[k]``.
            essence_start: likewise ``[k, V]``, or None.
            config: penalties.
        """
        problem, requests = self._problem, self._requests
        at = torch.searchsorted(requests, active)
        count, group = len(requests), problem.group
        asked = torch.zeros(count, group, dtype=torch.bool, device=at.device)
        first = torch.arange(group, device=at.device) < problem.contexts
        asked[at] = reworded[:, None] | first
        view = Problem(
            self._run,
            problem.places[self._rows],
            self._added,
            self._target.masked_fill(~asked.view(-1, 1), -100),
            self._ends & asked.view(-1, 1),
            problem.continuing,
            group,
            problem.contexts,
            problem.asked,
            self._indirect,
        )
        moved = delta.new_zeros(count, *delta.shape[1:]).index_copy(0, at, delta)
        reference = None if essence_start is None else essence_start[requests]
        now = find_losses(self._suffix, view, moved, start_norm[requests], reference, config)
        if self._suffix.replays is None:
            self._suffix.replays = not self._run.refused
        essence = None if now.essence is None else now.essence[at]
        return Losses(now.total[at], now.correct[at], now.ended[at], essence)
