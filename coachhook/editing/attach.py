"""Inference with saved edits: hooks on, answers out, nothing else kept in memory."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from types import TracebackType

from torch import nn

from coachhook.editing.folder import load_payloads
from coachhook.hooks import HookSet, attach_hooks
from coachhook.store import fingerprint


class Handle:
    """Edits attached to a model; made by :func:`attach`.

    A context manager: leaving the block detaches.

    Attributes:
        hooks: layer index -> :class:`~coachhook.hooks.HookedLinear`.
    """

    def __init__(self, model: nn.Module, path: str | os.PathLike[str]) -> None:
        self._model = model
        self._fingerprint = fingerprint(model)
        config, payloads = load_payloads(path, self._fingerprint)
        self.hooks: HookSet = attach_hooks(model, list(payloads), key_site=config.key_site)
        self._key_site = config.key_site
        try:
            for layer, payload in payloads.items():
                payload.apply(self.hooks[layer], config)
            self.hooks.set_state("validated")
        except BaseException:
            self.hooks.detach()
            raise

    def detach(self) -> None:
        """Takes the hooks off; the model answers as before, to the bit. Safe to call again."""
        self.hooks.detach()

    def disabled(self) -> AbstractContextManager[None]:
        """A block in which the model answers without the edits."""
        return self.hooks.disabled()

    def swap(self, path: str | os.PathLike[str]) -> None:
        """Puts other edits of the same layers in place, in the buffers a running graph reads.

        Between forwards: one that another thread runs meanwhile may read half of them.

        Raises:
            FormatError: not an EDITS folder, damaged, or of a newer version.
            FingerprintMismatchError: the edits belong to other weights.
            RuntimeError: the handle was detached.
            ValueError: they edit other layers; attach them anew.
        """
        if not self.hooks.attached:
            raise RuntimeError(
                "swap: hooks must be attached to the model, got detached ones, which would change "
                "no answer; attach the edits instead"
            )
        config, payloads = load_payloads(path, self._fingerprint)
        if sorted(payloads) != sorted(self.hooks) or config.key_site != self._key_site:
            raise ValueError(
                f"swap: edits must be of layers {sorted(self.hooks)} at {self._key_site}, got "
                f"{sorted(payloads)} at {config.key_site}; detach and attach them instead"
            )
        before = {layer: self.hooks[layer].snapshot() for layer in payloads}
        try:
            for layer, payload in payloads.items():
                payload.apply(self.hooks[layer], config)
        except BaseException:
            for layer, snapshot in before.items():
                self.hooks[layer].restore(snapshot)
            raise

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def attach(model: nn.Module, path: str | os.PathLike[str]) -> Handle:
    """Attaches saved edits to a model for inference.

    Args:
        model: the model the edits were made for, in any dtype.
        path: an EDITS folder.

    Returns:
        A handle to detach, disable or swap the edits; use it as a context manager or not.

    Raises:
        FormatError: not an EDITS folder, damaged, or of a newer version.
        FingerprintMismatchError: the edits belong to other weights; both fingerprints are named.
    """
    return Handle(model, path)
