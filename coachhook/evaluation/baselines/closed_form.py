"""What the closed-form baselines share: targets v*, keys and residuals, layer after layer.

All of them see the same v* and the same keys as :class:`~coachhook.Editor` does with the same
settings of the paper's preset; they differ in the change ``Delta W`` that they make of a layer's
keys and residuals. What our default preset asks of a target beside its contexts (the model's own
rewordings, the end of the target's last word) is left out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from coachhook.editing.config import EditConfig
from coachhook.editing.encoding import EncodedRequest, encode_requests
from coachhook.editing.prompts import PLACES, EncodedPrompt
from coachhook.editing.reading import read_states
from coachhook.editing.requests import EditRequest
from coachhook.editing.targets import Targets, optimise_targets
from coachhook.evaluation.baselines.weights import WeightBaseline
from coachhook.models import get_submodule

PRESETS = ("paper", "default")
# What of our default preset is not done here, so that the settings say what is.
_LEFT_OUT = {"places": PLACES[:1], "rewordings": 0, "target_ends_word": False}


@dataclass(frozen=True)
class ClosedFormConfig:
    """Settings of a closed-form baseline.

    Args:
        edit: layers, contexts, targets and prior as for an :class:`~coachhook.Editor`. The fields
            of the gate and of the storage are not used, nor are ``rewordings`` and
            ``target_ends_word``.
    """

    edit: EditConfig


class ClosedForm(WeightBaseline):
    """A baseline that solves for a change of each layer's weight."""

    config_type: ClassVar[type] = ClosedFormConfig
    needs_statistics: ClassVar[bool] = True

    @classmethod
    def configure(cls, model: nn.Module, *, preset: str = "paper", **options: Any) -> Any:
        """The settings for ``model``.

        Args:
            model: the model.
            preset: which targets and layers: "paper" the published ones
                (:meth:`~coachhook.EditConfig.paper`), "default" those of our default preset, at the
                last subject token only, without rewordings and ends of words.
            options: fields of the baseline's own settings or of
                :class:`~coachhook.EditConfig` to set otherwise.

        Raises:
            TypeError: an option is a field of neither.
            ValueError: ``preset`` is not known, or a field is out of range.
        """
        if preset not in PRESETS:
            raise ValueError(
                f"{cls.name}: preset must be one of {', '.join(PRESETS)}, got {preset!r}"
            )
        names = {field.name for field in fields(cls.config_type)} - {"edit"}
        own = {name: value for name, value in options.items() if name in names}
        rest = {name: value for name, value in options.items() if name not in names}
        if preset == "paper":
            # Without a gate, padding has no say; counting it would only make targets slow.
            edit = EditConfig.paper(model, **{"include_padding": False, **rest})
        else:
            edit = EditConfig.for_model(model, **{**_LEFT_OUT, **rest})
        return cls.config_type(edit=edit, **own)

    def _start(self) -> None:
        site = self.config.edit.key_site
        if site != "down_proj":
            raise ValueError(
                f"{self.name}: config.edit.key_site must be 'down_proj', whose weight is changed, "
                f"got {site!r}"
            )
        layers = {i: self._description.layer(i) for i in self.config.edit.layers}
        self._weights = {i: self._plain_weight(layer.path) for i, layer in layers.items()}
        modules: list[Any] = [get_submodule(self._model, i.path) for i in layers.values()]
        self._hold([module.weight for module in modules])
        self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Makes of the statistics what :meth:`_change` needs."""

    @abstractmethod
    def _change(self, layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
        """Change ``[m, n]`` of a layer's weight for keys ``[n, k]`` and residuals ``[m, k]``.

        All float64, on :meth:`_device`.
        """

    def _finish(self, batch: Batch) -> None:
        """Called when all layers of a batch are written."""

    def _device(self, layer: int) -> torch.device:
        device = self._weights[layer].device
        # MPS has no float64.
        return torch.device("cpu") if device.type == "mps" else device

    def _covariance(self, layer: int) -> Tensor:
        statistics: Any = self._statistics
        covariance: Tensor = statistics.covariances[layer]
        return covariance.to(self._device(layer), torch.float64)

    def _edit(self, requests: list[EditRequest]) -> tuple[list[bool], list[float]]:
        config: EditConfig = self.config.edit
        encoded = encode_requests(
            self._tokenizer, requests, config.contexts, self._description.max_positions
        )
        targets = optimise_targets(
            self._model,
            self._description,
            encoded,
            config,
            pad_id=self._tokenizer.pad_token_id,
        )
        batch = Batch(self, encoded, targets)
        for position, layer in enumerate(config.layers):
            keys, residuals = batch.read(layer, len(config.layers) - position)
            self._write(layer, self._change(layer, keys, residuals))
        self._finish(batch)
        return targets.converged, targets.losses

    @torch.no_grad()
    def _write(self, layer: int, change: Tensor) -> None:
        if not bool(torch.isfinite(change).all()):
            raise ValueError(
                f"edit: the change of layer {layer} must be finite, got NaN or infinity; collect "
                "statistics over more tokens, or set a ridge"
            )
        weight = self._weights[layer]
        wide = weight.to(change.device, torch.float64) + change
        weight.copy_(wide)


class Batch:
    """Prompts and goals of one batch; reads keys and residuals in the model as it is."""

    def __init__(
        self, owner: ClosedForm, encoded: Sequence[EncodedRequest], targets: Targets
    ) -> None:
        self._owner = owner
        self._config: EditConfig = owner.config.edit
        slots = targets.used.nonzero().tolist()
        self._slots = len(slots)
        self._prompts = [
            prompt.at(targets.places[place], encoded[request].target)
            for request, place in slots
            for prompt in encoded[request].contexts
        ]
        contexts = len(self._config.contexts)
        prompts = self._prompts if self._each else self._prompts[::contexts]
        wanted = targets.deltas[targets.used]
        if self._each:
            wanted = wanted.repeat_interleave(contexts, 0)
        start = self._read(prompts, self._config.layers[-1])[1]
        self._goal = start + wanted.to(start)

    @property
    def _each(self) -> bool:
        return self._config.key_pooling == "each"

    def read(self, layer: int, left: int) -> tuple[Tensor, Tensor]:
        """Keys ``[n, K]`` and residuals ``[m, K]`` with ``left`` layers still to write, float64."""
        keys, outputs = self._read(self._prompts, layer)
        contexts = len(self._config.contexts)
        if not self._each:
            outputs = outputs[::contexts]
            keys = keys.view(self._slots, contexts, -1)
            bare, others = keys[:, 0], keys[:, 1:]
            # Half the bare prompt's key, half the mean of the others (published code of MEMIT).
            keys = (bare + others.mean(dim=1)) / 2 if contexts > 1 else bare
        share = left if self._config.sharing == "even" else 1
        device = self._owner._device(layer)
        return (
            keys.to(device, torch.float64).T.contiguous(),
            ((self._goal - outputs) / share).to(device, torch.float64).T.contiguous(),
        )

    def _read(self, prompts: list[EncodedPrompt], layer: int) -> tuple[Tensor, Tensor]:
        states = read_states(
            self._owner._model,
            self._owner._description,
            prompts,
            layer,
            self._config.layers[-1],
            pad_id=self._owner._tokenizer.pad_token_id,
        )
        return states.keys, states.outputs
