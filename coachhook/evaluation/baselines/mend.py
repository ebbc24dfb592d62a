"""MEND (Mitchell et al. 2022, "Fast Model Editing at Scale"): networks that rewrite gradients.

The gradient of a linear layer's weight is a sum over tokens of ``delta_i u_i^T``: the gradient at
its output times its input. For every edited weight a network ``g`` maps each pair to another, and
one step is taken with what comes out (equation 2 and algorithm 2):

    z_i = concat(normalised u_i, normalised delta_i)
    h_i = z_i + relu(s1 * (U1 V1 z_i + b) + o1)                                       (equation 3a)
    (u~_i, delta~_i) = h_i + relu(s2 * (U2 V2 h_i) + o2)                              (equation 3b)
    W~ = W - alpha sum_i delta~_i u~_i^T

Weights of one shape share ``U, V, b``; ``s``, ``o`` and ``alpha`` are each weight's own. They are
trained on other facts (algorithm 1) to minimise

    c_edit (-log p_W~(y | x'))  +  c_loc KL(p_W(. | x_loc) || p_W~(. | x_loc))

with ``x'`` the edit's prompt and a paraphrase of it, ``x_loc`` a prompt about something else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from coachhook.editing.requests import EditRequest
from coachhook.evaluation.baselines.networks import load_networks, save_networks
from coachhook.evaluation.baselines.texts import (
    TargetBatch,
    encode_targets,
    log_probs_at,
    target_batch,
)
from coachhook.evaluation.baselines.training_facts import TrainingFacts, check_training_requests
from coachhook.evaluation.baselines.weights import WeightBaseline
from coachhook.models import evaluating, get_submodule, weight_of
from coachhook.models.modules import is_linear_like

GRADIENTS = ("original", "edited")
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class MendConfig:
    """Settings of :class:`Mend`.

    Args:
        train_requests: facts the networks learn from, none of which is edited later; with
            paraphrases and neighbourhood prompts. Not needed where ``networks`` is given.
        layers: blocks whose MLP weights are edited; None takes the last three, as the paper does.
        rank: rank of U and V.
        steps: training steps.
        train_batch: edits of one training step; best the size of the batches edited later.
        lr: Adam's learning rate for the networks.
        alpha: edit step size that training starts from.
        alpha_lr: Adam's learning rate for the step sizes, as a share of ``alpha``.
        c_edit: weight of the edit loss.
        c_loc: weight of the locality loss.
        gradients: weights at which the gradients of an edit are taken: "original" (all batches
            together are one step from the unedited model, as the paper edits many facts at once),
            or "edited", as they are after the batches before (each batch is one more step).
        max_grad_norm: gradients of a training step are clipped to this norm.
        networks: file written by :meth:`Mend.save_networks`; nothing is trained then.
        seed: of the first weights and the order of the training facts.
        progress: show a progress bar on stderr.

    Raises:
        TypeError: ``train_requests`` is not a list of requests.
        ValueError: a setting is out of range, or there is nothing to train on.
    """

    train_requests: Sequence[EditRequest] = ()
    layers: Sequence[int] | None = None
    rank: int = 128
    steps: int = 300
    train_batch: int = 10
    lr: float = 3e-4
    alpha: float = 3e-4
    alpha_lr: float = 0.02
    c_edit: float = 0.1
    c_loc: float = 1.0
    gradients: str = "original"
    max_grad_norm: float = 100.0
    networks: str | os.PathLike[str] | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("rank", "train_batch"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"MendConfig: {name} must be at least 1, got {getattr(self, name)}"
                )
        for name in ("lr", "alpha", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"MendConfig: {name} must be positive, got {getattr(self, name)}")
        for name in ("steps", "alpha_lr", "c_edit", "c_loc"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"MendConfig: {name} must not be negative, got {getattr(self, name)}"
                )
        if self.gradients not in GRADIENTS:
            raise ValueError(
                f"MendConfig: gradients must be one of {', '.join(GRADIENTS)}, "
                f"got {self.gradients!r}"
            )
        if self.layers is not None:
            layers = tuple(self.layers)
            if not layers or list(layers) != sorted(set(layers)):
                raise ValueError(
                    "MendConfig: layers must be ascending indices without repeats, "
                    f"got {self.layers!r}"
                )
            object.__setattr__(self, "layers", layers)
        requests = check_training_requests("MendConfig", self.train_requests, self.networks)
        object.__setattr__(self, "train_requests", requests)


class GradientNetwork(nn.Module):
    """The network g of all weights of one shape, equations 3a and 3b.

    Args:
        n: width of u, the layer's input.
        m: width of delta, the gradient at its output.
        rank: of U and V.
        weights: how many weights share it.
    """

    def __init__(self, n: int, m: int, rank: int, weights: int) -> None:
        super().__init__()
        size = n + m
        rank = min(rank, size)
        self._split = (n, m)
        # U = 0 makes g the identity at first.
        self.u1 = nn.Parameter(torch.zeros(size, rank))
        self.v1 = nn.Parameter(torch.randn(rank, size) / size**0.5)
        self.b = nn.Parameter(torch.zeros(size))
        self.u2 = nn.Parameter(torch.zeros(size, rank))
        self.v2 = nn.Parameter(torch.randn(rank, size) / size**0.5)
        self.scale = nn.Parameter(torch.ones(weights, 2, size))
        self.shift = nn.Parameter(torch.zeros(weights, 2, size))
        self.register_buffer("mean", torch.zeros(weights, size))
        self.register_buffer("std", torch.ones(weights, size))
        self.mean: Tensor
        self.std: Tensor

    def forward(self, u: Tensor, delta: Tensor, weight: int) -> tuple[Tensor, Tensor]:
        """``(u~, delta~)`` for tokens ``u [N, n]``, ``delta [N, m]`` of one of the weights."""
        z = (torch.cat((u, delta), dim=-1) - self.mean[weight]) / (self.std[weight] + 1e-7)
        scale, shift = self.scale[weight], self.shift[weight]
        # clamp, unlike relu, has a gradient at 0, where everything starts.
        h = z + (scale[0] * (z @ self.v1.T @ self.u1.T + self.b) + shift[0]).clamp(min=0)
        out = h + (scale[1] * (h @ self.v2.T @ self.u2.T) + shift[1]).clamp(min=0)
        u_new, delta_new = out.split(self._split, dim=-1)
        return u_new, delta_new


@dataclass(frozen=True)
class _Target:
    """An edited weight: path of its layer, network and place in it, orientation."""

    path: str
    network: str
    number: int
    transposed: bool


Factors = dict[str, tuple[Tensor, Tensor]]


class Mend(WeightBaseline):
    """MEND on the MLP weights of some blocks; trained when it is made.

    Attributes:
        losses: edit and locality loss of every training step.
    """

    name = "mend"
    reference = (
        "Mitchell, Lin, Bosselut, Finn, Manning: Fast Model Editing at Scale. ICLR 2022 (MEND)"
    )
    config_type = MendConfig
    config: MendConfig

    def _start(self) -> None:
        config, description = self.config, self._description
        layers = config.layers or range(max(description.num_layers - 3, 0), description.num_layers)
        self._targets: list[_Target] = []
        shapes: dict[str, list[int]] = {}  # network -> n, m, number of weights
        for path in [p for i in layers for p in self._linears(description.layer(i).path)]:
            m, n = self._plain_weight(path).shape
            module = get_submodule(self._model, path)
            shape = shapes.setdefault(f"{n}x{m}", [n, m, 0])
            transposed = weight_of(module) is not module.weight
            self._targets.append(_Target(path, f"{n}x{m}", shape[2], transposed))
            shape[2] += 1
        self._hold([get_submodule(self._model, t.path).weight for t in self._targets])  # type: ignore[misc]
        parameter = self._parameters[0]
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        # The steps of all batches: added to a 16-bit weight one by one, small ones would be lost.
        self._total = [torch.zeros((), dtype=dtype, device=p.device) for p in self._parameters]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self._networks = nn.ModuleDict(
                {
                    k: GradientNetwork(n, m, config.rank, count)
                    for k, (n, m, count) in shapes.items()
                }
            ).to(parameter.device, dtype)
        self._alphas = nn.Parameter(
            torch.full((len(self._targets),), config.alpha, dtype=dtype, device=parameter.device)
        )
        self.losses: list[tuple[float, float]] = []
        if config.networks is not None:
            self._load(config.networks)
        else:
            with evaluating(self._model), torch.inference_mode(False), torch.enable_grad():
                self._train()
        self._networks.requires_grad_(False)
        self._alphas.requires_grad_(False)

    def _linears(self, down: str) -> list[str]:
        """The linear layers beside a down-projection, itself included, in the model's order."""
        parent, _, _ = down.rpartition(".")
        children = get_submodule(self._model, parent).named_children()
        return [f"{parent}.{name}" for name, module in children if is_linear_like(module)]

    def save_networks(self, path: str | os.PathLike[str]) -> None:
        """Writes the trained networks to a safetensors file, for ``MendConfig.networks``."""
        self._check_open("save_networks")
        with self.disabled():
            tensors = {**self._networks.state_dict(), "alphas": self._alphas}
            save_networks(path, self.name, self._model, self._shape(), tensors)

    def _load(self, path: str | os.PathLike[str]) -> None:
        tensors = load_networks(path, self.name, self._model, self._shape())
        with torch.no_grad():
            self._alphas.copy_(tensors.pop("alphas"))
        self._networks.load_state_dict(tensors)

    def _shape(self) -> dict[str, Any]:
        return {"rank": self.config.rank, "weights": [t.path for t in self._targets]}

    def _train(self) -> None:
        config = self.config
        facts = TrainingFacts(
            self.name, self._tokenizer, config.train_requests, self._description.max_positions
        )
        self._normalise(facts)
        trained = [*self._networks.parameters(), self._alphas]
        optimiser = torch.optim.Adam(
            [
                {"params": trained[:-1], "lr": config.lr},
                {"params": trained[-1:], "lr": config.alpha_lr * config.alpha},
            ]
        )
        generator = torch.Generator().manual_seed(config.seed)
        bar = tqdm(range(config.steps), desc="mend: training", disable=not config.progress)
        for _ in bar:
            chosen = facts.draw(config.train_batch, generator)
            edit, locality = self._training_losses(facts, chosen, generator)
            loss = config.c_edit * edit + config.c_loc * locality
            # Not backward(), which would leave gradients in the model's own parameters.
            for parameter, gradient in zip(
                trained, torch.autograd.grad(loss, trained), strict=True
            ):
                parameter.grad = gradient
            norm = nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            if not torch.isfinite(norm):
                raise ValueError(
                    f"{self.name}: the training loss must be finite, got {loss.item()} at step "
                    f"{len(self.losses)}; lower lr ({config.lr}) or alpha ({config.alpha})"
                )
            optimiser.step()
            self.losses.append((edit.item(), locality.item()))
            bar.set_postfix(edit=f"{edit.item():.2f}", locality=f"{locality.item():.3f}")

    def _training_losses(
        self, facts: TrainingFacts, chosen: list[int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Edit and locality loss after one edit of the facts ``chosen``, differentiable."""
        factors = self._factors(self._batch([facts.edits[i] for i in chosen]), self._original)
        weights = self._oriented(self._updated(self._original, self._steps(factors)))
        outer = self._batch(
            [facts.edits[i] for i in chosen] + [facts.paraphrase(i, generator) for i in chosen]
        )
        near = self._batch([facts.neighbor(i, generator) for i in chosen])
        edit, _ = outer.losses(self._log_probs(outer, weights))
        after = self._log_probs(near, weights)
        with torch.no_grad():
            before = self._log_probs(near)
        return edit.mean(), (before.exp() * (before - after)).sum(-1).mean()

    def _normalise(self, facts: TrainingFacts) -> None:
        """Mean and deviation of every weight's u and delta over the training edits."""
        moments: dict[str, list[Tensor]] = {}
        for start in range(0, len(facts.edits), _ROWS_AT_ONCE):
            texts = self._batch(facts.edits[start : start + _ROWS_AT_ONCE])
            factors = self._factors(texts, self._original)
            for path, pair in factors.items():
                z = torch.cat(pair, dim=-1).double()
                total = moments.setdefault(path, [z.new_zeros(()), z.new_zeros(1), z.new_zeros(1)])
                total[0] = total[0] + len(z)
                total[1] = total[1] + z.sum(0)
                total[2] = total[2] + z.square().sum(0)
        for target in self._targets:
            count, first, second = moments[target.path]
            network: Any = self._networks[target.network]
            mean = first / count
            network.mean[target.number] = mean
            network.std[target.number] = (second / count - mean.square()).clamp(min=0).sqrt()

    def _batch(self, rows: Sequence[Any]) -> TargetBatch:
        return target_batch(rows, self._tokenizer.pad_token_id, self._parameters[0].device)

    def _log_probs(self, batch: TargetBatch, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log-probabilities ``[M, V]`` at the places of a batch, with other weights put in."""
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
        output: Any = functional_call(self._model, dict(weights or {}), (), inputs)
        return log_probs_at(output.logits, batch.row, batch.column)

    def _factors(self, batch: TargetBatch, values: Sequence[Tensor]) -> Factors:
        """``(u [N, n], delta [N, m])`` of every edited weight, the parameters being ``values``.

        ``delta`` is the gradient of the sum over requests of the mean negative log-likelihood per
        target token, so that it does not depend on the size of the batch. Tokens without a gradient
        are left out.
        """
        with torch.enable_grad(), self._probed() as (inputs, probes):
            losses, _ = batch.losses(self._log_probs(batch, self._oriented(values)))
            deltas = torch.autograd.grad(losses.sum(), list(probes.values()))
        dtype = self._alphas.dtype
        factors = {}
        for (path, u), delta in zip(inputs.items(), deltas, strict=True):
            u, delta = u.reshape(-1, u.shape[-1]), delta.reshape(-1, delta.shape[-1])
            real = (delta != 0).any(1)
            factors[path] = (u[real].to(dtype), delta[real].to(dtype))
        return factors

    @contextmanager
    def _probed(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Within the block the edited layers note their input and add a zero to their output.

        The gradient at that zero is delta, whether or not the model's parameters ask for gradients.
        """
        inputs: dict[str, Tensor] = {}
        probes: dict[str, Tensor] = {}

        def note(path: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                inputs[path] = args[0].detach()
                probes[path] = torch.zeros_like(output, requires_grad=True)
                return output + probes[path]

            return hook

        handles = [
            get_submodule(self._model, t.path).register_forward_hook(note(t.path))
            for t in self._targets
        ]
        try:
            yield inputs, probes
        finally:
            for handle in handles:
                handle.remove()

    def _steps(self, factors: Factors) -> list[Tensor]:
        """``alpha sum_i delta~_i u~_i^T [m, n]`` of every edited weight."""
        steps = []
        for target, alpha in zip(self._targets, self._alphas, strict=True):
            u, delta = self._networks[target.network](*factors[target.path], target.number)
            steps.append(alpha * (delta.T @ u))
        return steps

    def _updated(self, values: Sequence[Tensor], steps: Sequence[Tensor]) -> list[Tensor]:
        """The parameters after the steps, in their own orientation and dtype."""
        return [
            value - (step.T if target.transposed else step).to(value.dtype)
            for target, value, step in zip(self._targets, values, steps, strict=True)
        ]

    def _oriented(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        return {f"{t.path}.weight": v for t, v in zip(self._targets, values, strict=True)}

    def _snapshot(self) -> Any:
        return super()._snapshot(), self._total

    def _restore(self, snapshot: Any) -> None:
        values, self._total = snapshot
        super()._restore(values)

    def _edit(self, requests: list[EditRequest]) -> tuple[list[bool], list[float]]:
        pairs = [(r.text, r.target_new) for r in requests]
        rows = encode_targets("edit", self._tokenizer, pairs, self._description.max_positions)
        chunks = [rows[i : i + _ROWS_AT_ONCE] for i in range(0, len(rows), _ROWS_AT_ONCE)]
        steps = self._total
        at = self._original if self.config.gradients == "original" else self._values()
        for chunk in chunks:
            factors = self._factors(self._batch(chunk), at)
            with torch.no_grad():
                steps = [a + b for a, b in zip(steps, self._steps(factors), strict=True)]
        values = self._updated(self._original, steps)
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise ValueError(
                "edit: the edited weights must be finite, got NaN or infinity; the model's "
                "outputs are not finite, or the networks diverged in training"
            )
        self._set(values)
        self._total = steps
        correct, losses = [], []
        with torch.no_grad():
            for chunk in chunks:
                batch = self._batch(chunk)
                nll, right = batch.losses(self._log_probs(batch))
                losses += nll.tolist()
                correct += right.tolist()
        return correct, losses
