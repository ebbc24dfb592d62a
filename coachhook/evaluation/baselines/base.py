"""What every baseline has in common: one batch whole or not at all, off, and undone."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from coachhook.editing.requests import EditRequest, check_requests
from coachhook.errors import UnsupportedModelError
from coachhook.hooks import attached_hooks
from coachhook.models import (
    check_finite,
    check_whole,
    describe,
    evaluating,
    prepare_tokenizer,
)
from coachhook.statistics import Statistics

_Self = TypeVar("_Self", bound="Baseline")


@dataclass(frozen=True)
class BaselineResult:
    """What one batch did.

    Attributes:
        seconds: wall-clock time of the batch.
        converged: per request, whether the baseline's own objective was met: the target is the
            edited model's answer to the bare prompt, or the optimised state gives it.
        losses: per request the last loss of the baseline's own objective.
    """

    seconds: float
    converged: list[bool]
    losses: list[float]


class Baseline(ABC):
    """An editing system beside ours: ``model`` answers with the edits until :meth:`close`.

    One baseline at a time may hold a model, and no hooks may be attached to it; a model that is
    held must not be copied. Use as a context manager that closes at the end.

    A subclass sets the class attributes and implements :meth:`_start`, :meth:`_edit`,
    :meth:`_snapshot`, :meth:`_restore`, :meth:`_disable`, :meth:`_enable` and :meth:`_close`.

    Args:
        model: a transformers causal language model.
        tokenizer: its (fast) tokenizer.
        statistics: key covariances of the edited layers, for the systems that need them.
        config: settings, of the class :attr:`config_type`; its defaults for the model if None.

    Attributes:
        name: as :func:`make_baseline` takes it.
        reference: the paper.
        config_type: class of the settings, a frozen dataclass.
        needs_statistics: whether ``statistics`` must be given.
        needs_projections: whether every block must have one down-projection, and no experts.
        config: the settings.

    Raises:
        FingerprintMismatchError: the statistics belong to other weights.
        TypeError: ``config`` is of another class.
        UnsupportedModelError: nothing editable was found in the model, it has experts, or several
            processes hold it together (tensor parallelism, FSDP2).
        ValueError: statistics are missing, hooks are attached, a weight is not finite, or a setting
            does not fit the model.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    config_type: ClassVar[type]
    needs_statistics: ClassVar[bool] = False
    needs_projections: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        statistics: Statistics | None = None,
        config: Any | None = None,
    ) -> None:
        check_whole(self.name, model)
        if attached_hooks(model) is not None:
            raise ValueError(
                f"{self.name}: model must have no hooks, got one with hooks attached; detach them"
            )
        self._description = describe(model)
        experts = next((layer.path for layer in self._description.layers if layer.experts), None)
        if experts is not None and self.needs_projections:
            raise UnsupportedModelError(
                f"{self.name}: every block must have one down-projection, got experts in "
                f"{experts}; of such models our own edits, retrieval and serac can be compared"
            )
        if config is None:
            config = self.configure(model)
        if not isinstance(config, self.config_type):
            raise TypeError(
                f"{self.name}: config must be a {self.config_type.__name__}, "
                f"got {type(config).__name__}"
            )
        if statistics is None and self.needs_statistics:
            raise ValueError(
                f"{self.name}: statistics must be given, got None; see coachhook.collect_statistics"
            )
        if statistics is not None:
            if self.needs_statistics and statistics.key_site != "down_proj":
                raise ValueError(
                    f"{self.name}: statistics must be of key_site 'down_proj', got "
                    f"{statistics.key_site!r}; the weights it changes are down-projections"
                )
            statistics.check(model)
        check_finite(model)
        self.config: Any = config
        self._model: Any = model
        self._tokenizer = prepare_tokenizer(tokenizer)
        self._statistics = statistics
        self._depth = 0
        self._closed = False
        # As in edit: what is made here is trained with, or changed, later.
        with torch.inference_mode(False):
            self._start()

    @classmethod
    def configure(cls, model: nn.Module, **options: Any) -> Any:
        """The settings for ``model`` with some fields set otherwise.

        Raises:
            TypeError: an option is not a field.
            ValueError: a field is out of range.
        """
        return cls.config_type(**options)

    @classmethod
    def create(
        cls: type[_Self],
        model: nn.Module,
        tokenizer: Any,
        *,
        statistics: Statistics | None = None,
        **options: Any,
    ) -> _Self:
        """Makes the baseline from single settings; what :func:`make_baseline` calls."""
        config = cls.configure(model, **options)
        return cls(model, tokenizer, statistics=statistics, config=config)

    def edit(self, requests: Sequence[EditRequest]) -> BaselineResult:
        """Writes one batch of facts after those before; whole, or, after an exception, not at all.

        Raises:
            RuntimeError: the baseline is closed or disabled.
            TypeError: something else than a list of requests was given.
            ValueError: the batch is empty, a request does not fit the tokenizer or the context
                window, or the model's outputs are not finite.
        """
        self._check_open("edit")
        if self._depth:
            raise RuntimeError("edit: the baseline must be on, got it within disabled()")
        batch = check_requests(requests)
        state = self._snapshot()
        begin = self._now()
        try:
            # Tensors made in inference mode could not be trained, nor changed outside of it.
            with evaluating(self._model), torch.inference_mode(False):
                converged, losses = self._edit(batch)
        except BaseException:
            self._restore(state)
            raise
        return BaselineResult(self._now() - begin, converged, losses)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model answers unedited, bit for bit; blocks may be nested.

        Raises:
            RuntimeError: the baseline is closed.
        """
        self._check_open("disabled")
        if not self._depth:
            self._disable()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._enable()

    def close(self) -> None:
        """Makes the model what it was before the baseline, bit for bit; safe to call again.

        Raises:
            RuntimeError: called within :meth:`disabled`.
        """
        if self._closed:
            return
        if self._depth:
            raise RuntimeError("close: the baseline must be on, got it within disabled()")
        self._close()
        self._closed = True

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _start(self) -> None:
        """Checks settings against the model and prepares; an exception leaves the model as is."""

    @abstractmethod
    def _edit(self, requests: list[EditRequest]) -> tuple[list[bool], list[float]]:
        """Writes a batch, the model in evaluation mode; returns ``converged`` and ``losses``."""

    @abstractmethod
    def _snapshot(self) -> Any:
        """All that :meth:`_edit` may change, for :meth:`_restore`; not changed by later edits."""

    @abstractmethod
    def _restore(self, snapshot: Any) -> None:
        """Brings a :meth:`_snapshot` back bit for bit, from wherever an edit was broken off."""

    @abstractmethod
    def _disable(self) -> None:
        """Makes the model answer unedited, bit for bit."""

    @abstractmethod
    def _enable(self) -> None:
        """Undoes :meth:`_disable`, bit for bit."""

    @abstractmethod
    def _close(self) -> None:
        """Takes everything off the model."""

    def _check_open(self, op: str) -> None:
        if self._closed:
            raise RuntimeError(f"{op}: the baseline must be open, got a closed one; make a new one")

    def _now(self) -> float:
        device = next(self._model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
