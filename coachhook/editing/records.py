"""One batch as it was edited: what was asked, found and written, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from coachhook.editing.prompts import SUBJECT_PLACES
from coachhook.editing.requests import EditRequest
from coachhook.editing.unrelated import Ending


@dataclass
class BatchRecord:
    """One batch as it was edited.

    Attributes:
        requests: what was asked.
        targets: v* as columns ``[d, k]``.
        converged: per request, see :class:`~coachhook.editing.targets.Targets`.
        losses: last loss of each request.
        slots: (request, place) of each key, as indices into ``requests`` and ``config.places``.
        bounds: layer index -> smallest over the prompts of the largest score in the prompt; NaN
            where no prompt had a defined score.
        groups: layer index -> number of the edit that each slot's keys belong to, see
            :meth:`owners`.
        endings: for each slot the ids that its subject ends in, in every spelling of its prompts.
        anchors: layer index -> which of the unrelated sample are kept apart from the batch's keys,
            see :meth:`~coachhook.editing.state.EditState.append`. Their keys come after those of
            the slots.
        cues: layer index -> filter of each slot's cue, float32 ``[len(slots), n]``; a row of zeros
            where an edit needs none. See :mod:`coachhook.editing.cues`.
        reaches: for how many tokens after its cue each slot's edit may fire, see
            :func:`~coachhook.editing.cues.cue_reach`; empty: for ever, as before there were such.
        gaps: layer index -> how many tokens before its cue each slot's edit must have read another
            one, see :class:`~coachhook.ops.Membership`; 0, and where the layer has none, as before
            there were such: the cue is one token. Without reaches it is, too.
    """

    requests: list[EditRequest]
    targets: Tensor
    converged: list[bool]
    losses: list[float]
    slots: list[tuple[int, int]]
    bounds: dict[int, float]
    groups: dict[int, list[int]]
    endings: list[list[Ending]] = field(default_factory=list)
    anchors: dict[int, list[int]] = field(default_factory=dict)
    cues: dict[int, Tensor] = field(default_factory=dict)
    reaches: list[int] = field(default_factory=list)
    gaps: dict[int, list[int]] = field(default_factory=dict)

    def cued(self, layer: int) -> list[bool]:
        """Which slots have a cue."""
        if layer not in self.cues:
            return [False] * len(self.slots)
        return self.cues[layer].any(dim=1).tolist()

    def check_keys(self, layer: int, keys: Tensor) -> None:
        """Checks that something can be written at the keys of each slot.

        Args:
            layer: its index.
            keys: ``[R, n]``, slot after slot, as many rows for each as it has keys.

        Raises:
            ValueError: those of a slot are all zero: any change of the weight gives them nothing.
        """
        there = keys.reshape(len(self.slots), -1).any(dim=1).tolist()
        if not all(there):
            request = self.requests[self.slots[there.index(False)][0]]
            raise ValueError(
                f"edit: the keys of layer {layer} must not be zero, got zeros for "
                f"{request.text!r}: nothing can be written there; leave the fact out, or edit "
                "other layers (EditConfig.layers)"
            )

    def owners(self, places: Sequence[str]) -> list[Hashable]:
        """What the edit of each slot is about: slots with the same are one edit, in any batch.

        At its tokens a subject, elsewhere a prompt, in its target a token of it.

        Args:
            places: of the settings.
        """
        found: list[Hashable] = []
        seen: Counter[int] = Counter()
        for r, p in self.slots:
            request, place = self.requests[r], places[p]
            if place in SUBJECT_PLACES:
                found.append((place, request.subject))
            elif place == "target":
                found.append((place, request.text, request.target_new, seen[r]))
                seen[r] += 1
            elif place == "target_last":
                found.append((place, request.text, request.target_new))
            else:
                found.append((place, request.text))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The record without its tensors, JSON-ready."""
        return {
            "requests": [request.to_dict() for request in self.requests],
            "converged": self.converged,
            "losses": self.losses,
            "slots": [list(slot) for slot in self.slots],
            "bounds": {str(k): None if v != v else v for k, v in self.bounds.items()},
            "groups": {str(k): v for k, v in self.groups.items()},
            "endings": self.endings,
            "anchors": {str(k): v for k, v in self.anchors.items()},
            "reaches": self.reaches,
            "gaps": {str(k): v for k, v in self.gaps.items()},
        }

    @classmethod
    def from_dict(
        cls, record: Mapping[str, Any], targets: Tensor, cues: dict[int, Tensor] | None = None
    ) -> BatchRecord:
        """The inverse of :meth:`to_dict`."""
        bounds = {int(k): float("nan") if v is None else v for k, v in record["bounds"].items()}
        return cls(
            [EditRequest.from_dict(r) for r in record["requests"]],
            targets,
            list(record["converged"]),
            list(record["losses"]),
            [(r, p) for r, p in record["slots"]],
            bounds,
            {int(k): list(v) for k, v in record["groups"].items()},
            [[tuple(ending) for ending in slot] for slot in record["endings"]],
            {int(k): list(v) for k, v in record.get("anchors", {}).items()},
            cues or {},
            list(record.get("reaches", [])),
            {int(k): list(v) for k, v in record.get("gaps", {}).items()},
        )
