"""Adam (Kingma and Ba 2015, algorithm 1) for corrections that come and go one by one."""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-8


class ClampedAdam:
    """Adam on the corrections of k requests at P places, each kept in a ball.

    A request is a parameter of its own: one that has left keeps its moments for when it is back.

    Args:
        deltas: where they start ``[k, P, d]``.
        lr: the learning rate.
        betas: what the mean gradient and the mean square gradient keep in a step.
        radius: largest norm of each correction ``[k, 1]``.
        scaling: "coordinate", Adam's own, or "vector": one mean square gradient for all of a
            correction's coordinates, as Adam-mini has one for a block (Zhang et al. 2024).
    """

    def __init__(
        self,
        deltas: Tensor,
        lr: float,
        betas: tuple[float, float],
        radius: Tensor,
        scaling: str,
    ) -> None:
        self._deltas = deltas.clone()
        self._mean, self._square = torch.zeros_like(deltas), torch.zeros_like(deltas)
        self._taken = deltas.new_zeros(len(deltas), 1, 1)
        self._lr, self._betas, self._by_vector = lr, betas, scaling == "vector"
        self._radius = radius

    def deltas(self) -> Tensor:
        """The present ones ``[k, P, d]``, a copy."""
        return self._deltas.clone()

    def restart(self, which: Tensor) -> None:
        """Some requests begin again from where they are, without moments."""
        for moment in (self._mean, self._square, self._taken):
            moment[which] = 0

    @torch.no_grad()
    def take(self, gradient: Tensor, which: Tensor) -> None:
        """One step of some requests, given the gradient ``[k, P, d]`` of all."""
        gradient = gradient[which]
        first, second = self._betas
        square = gradient**2
        if self._by_vector:
            square = square.mean(-1, keepdim=True)
        self._taken[which] += 1
        taken = self._taken[which]
        mean = self._mean[which].lerp(gradient, 1 - first)
        square = self._square[which].lerp(square.expand_as(gradient), 1 - second)
        self._mean[which], self._square[which] = mean, square
        scale = (square / (1 - second**taken)).sqrt() + _EPSILON
        deltas = self._deltas[which] - self._lr * mean / (1 - first**taken) / scale
        norm = deltas.norm(dim=-1)
        radius = self._radius[which].expand_as(norm)
        outside = norm > radius
        deltas[outside] *= (radius / norm)[outside, None]
        self._deltas[which] = deltas
