"""What a hook is set to: the edits of one layer as inference reads them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from coachhook.editing.config import EditConfig
from coachhook.hooks import HookedLinear


@dataclass(frozen=True)
class HookPayload:
    """What one layer's hook is set to.

    Attributes:
        kind: "empty", "dense", "factored" or "pair".
        tensors: "delta", or "left" and "right" (Q and S, or V and A^T), and with cues "cues",
            "limits", "reaches" and "gaps", see :meth:`~coachhook.editing.state.EditState.cues`.
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
            include_padding=config.counts_padding,
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
                cues=self.tensors.get("cues"),
                limits=self.tensors.get("limits"),
                reaches=self.tensors.get("reaches"),
                gaps=self.tensors.get("gaps"),
            )
        else:
            hook.clear()
