"""The published algorithm computed the published way: the peer that bench_targets.py times.

CoachHooK (EMNLP 2024) after its description, one request at a time: every step runs the whole
network on all prompt contexts of the request, forward and backward, with a dense hook weight that
asks for a gradient on every edited layer and a head over every position; every layer of a batch is
solved by a dense LU of the key covariance. It gives the numbers of ``EditConfig.paper``, which
bench_targets.py checks, and is fit for nothing else.

Where the way is not prescribed the cheaper one is taken: one head for both terms of the loss, and
key forwards that take a batch at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coachhook.editing.config import EditConfig
from coachhook.editing.encoding import EncodedRequest, encode_requests
from coachhook.editing.live import first_tensor
from coachhook.editing.prompts import pad_right
from coachhook.editing.requests import EditRequest
from coachhook.models import describe, get_submodule, prepare_tokenizer, weight_of
from coachhook.statistics import Statistics


class DenseHook(nn.Module):
    """The frozen layer and an edited copy of its weight beside it, a z-score choosing by token."""

    def __init__(self, base: nn.Module, alpha: float) -> None:
        super().__init__()
        frozen = weight_of(base)
        assert frozen is not None
        self.base, self.alpha, self.mode = base, alpha, "gated"
        self.frozen = frozen.detach()
        self.weight = nn.Parameter(self.frozen.clone())
        self.bias: Any = base.bias
        self.scores: Tensor | None = None
        self.inputs: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.inputs = x.detach()
        plain: Tensor = self.base(x)
        if self.mode == "off":
            return plain
        hooked = F.linear(x, self.weight, self.bias)
        if self.mode == "open":
            return hooked
        distance = (hooked - plain).detach().norm(dim=-1)
        z = (distance - distance.mean(-1, keepdim=True)) / distance.std(-1, keepdim=True)
        self.scores = z
        return torch.where((z >= self.alpha)[..., None], hooked, plain)


class PublishedWay:
    """Edits a model in consecutive batches.

    Attributes:
        hooks: layer index -> its hook.
        steps: forwards of the optimisation of every target so far.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, statistics: Statistics, config: EditConfig
    ) -> None:
        self._model, self._tokenizer, self._config = (
            model.eval(),
            prepare_tokenizer(tokenizer),
            config,
        )
        model.requires_grad_(False)
        self._description = describe(model)
        self.hooks: dict[int, DenseHook] = {}
        self._covariance: dict[int, Tensor] = {}
        for layer in config.layers:
            path = self._description.layers[layer].path
            parent, name = path.rsplit(".", 1)
            hook = DenseHook(get_submodule(model, path), config.alpha)
            setattr(get_submodule(model, parent), name, hook)
            self.hooks[layer] = hook
            self._covariance[layer] = (
                statistics.covariances[layer].float() * config.covariance_weight
            )
        self._block = get_submodule(model, self._description.layers[config.layers[-1]].block_path)
        self.steps: list[int] = []

    def edit(self, requests: Sequence[EditRequest]) -> Tensor:
        """Writes a batch; returns its targets ``[d, k]``."""
        config = self._config
        encoded = encode_requests(
            self._tokenizer, requests, config.contexts, self._description.max_positions
        )
        goal = torch.stack([self._target(request) for request in encoded], 1)
        self._mode("open")
        for position, layer in enumerate(config.layers):
            hook = self.hooks[layer]
            keys = self._keys(encoded, hook)
            present = self._outputs(encoded)
            residual = (goal - present).double() / (len(config.layers) - position)
            covariance = self._covariance[layer].double() + keys @ keys.T
            change = residual @ torch.linalg.solve(covariance, keys).T
            hook.weight.data = (hook.weight.data.double() + change).float()
            self._covariance[layer] = covariance.float()
            hook.mode = "gated"
        self._lower_alphas(encoded)
        return goal

    def _mode(self, mode: str) -> None:
        for hook in self.hooks.values():
            hook.mode = mode

    def _ids(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        return pad_right(rows, self._tokenizer.pad_token_id)

    def _target(self, request: EncodedRequest) -> Tensor:
        config, target = self._config, torch.tensor(request.target)
        rows = [c.ids + request.target[:-1] for c in request.contexts] + [request.essence.ids]
        ids, mask = self._ids(rows)
        places = torch.tensor([c.lookup for c in (*request.contexts, request.essence)])
        each = torch.arange(len(rows))
        delta = torch.zeros(self._description.hidden_size, requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=config.target_lr)
        start: Tensor | None = None

        def move(_module: nn.Module, _args: Any, output: Any) -> Any:
            nonlocal start
            hidden = first_tensor(output).clone()
            if start is None:
                start = hidden[0, places[0]].detach()
            hidden[each, places] = hidden[each, places] + delta
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        essence: Tensor | None = None
        handle = self._block.register_forward_hook(move)
        try:
            for step in range(config.target_steps):
                self.steps[len(self.steps) :] = [1] if step == 0 else []
                self.steps[-1] = step + 1
                optimiser.zero_grad()
                logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                log_probs = torch.log_softmax(logits, -1)
                likelihoods = [
                    log_probs[i, len(c.ids) - 1 : len(c.ids) - 1 + len(target)].gather(
                        1, target[:, None]
                    )
                    for i, c in enumerate(request.contexts)
                ]
                now = log_probs[-1, places[-1]]
                essence = now.detach() if essence is None else essence
                assert start is not None
                loss = -torch.stack([x.mean() for x in likelihoods]).mean()
                loss = loss + config.target_kl * (now.exp() * (now - essence)).sum()
                loss = loss + config.target_weight_decay * delta.norm() / start.norm() ** 2
                if loss < config.target_stop or step == config.target_steps - 1:
                    break
                loss.backward()
                optimiser.step()
                with torch.no_grad():
                    radius = config.target_clamp * start.norm()
                    if delta.norm() > radius:
                        delta.mul_(radius / delta.norm())
        finally:
            handle.remove()
        assert start is not None
        return start + delta.detach()

    @torch.no_grad()
    def _keys(self, encoded: list[EncodedRequest], hook: DenseHook) -> Tensor:
        prompts = [c for request in encoded for c in request.contexts]
        ids, mask = self._ids([p.ids for p in prompts])
        self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        assert hook.inputs is not None
        lookup = torch.tensor([p.lookup for p in prompts])
        keys = hook.inputs[torch.arange(len(prompts)), lookup].view(
            len(encoded), len(self._config.contexts), -1
        )
        return ((keys[:, 0] + keys[:, 1:].mean(1)) / 2).T.double()

    @torch.no_grad()
    def _outputs(self, encoded: list[EncodedRequest]) -> Tensor:
        bare = [request.contexts[0] for request in encoded]
        ids, mask = self._ids([p.ids for p in bare])
        found: list[Tensor] = []
        handle = self._block.register_forward_hook(
            lambda _module, _args, output: found.append(first_tensor(output))
        )
        try:
            self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            handle.remove()
        return found[0][torch.arange(len(bare)), torch.tensor([p.lookup for p in bare])].T

    @torch.no_grad()
    def _lower_alphas(self, encoded: list[EncodedRequest]) -> None:
        self._mode("off")
        ids, mask = self._ids([request.contexts[0].ids for request in encoded])
        self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        for hook in self.hooks.values():
            hook.mode = "gated"
            assert hook.inputs is not None
            hook(hook.inputs)
            assert hook.scores is not None
            largest = hook.scores.nan_to_num(nan=-float("inf")).amax(-1)
            hook.alpha = min(hook.alpha, float(largest.min()))
