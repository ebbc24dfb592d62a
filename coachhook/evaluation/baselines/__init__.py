"""The systems that readers compare with, behind one interface.

    with make_baseline("memit", model, tokenizer, statistics=statistics) as baseline:
        baseline.edit(requests)
        evaluate(model, tokenizer, requests, hooks=baseline)

What each implements, and where it departs from its paper, is in docs/baselines.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from coachhook.evaluation.baselines.base import Baseline, BaselineResult

if TYPE_CHECKING:
    from torch import nn

    from coachhook.statistics import Statistics

__all__ = ["BASELINES", "Baseline", "BaselineResult", "make_baseline"]

# name -> (module of this package, class in it)
_HOME = {
    "memit": ("memit", "Memit"),
    "accumulated": ("accumulated", "Accumulated"),
    "alphaedit": ("alphaedit", "AlphaEdit"),
    "fine-tuning": ("fine_tuning", "FineTuning"),
    "lora": ("lora", "Lora"),
    "retrieval": ("retrieval", "Retrieval"),
    "grace": ("grace", "Grace"),
    "mend": ("mend", "Mend"),
    "serac": ("serac", "Serac"),
}


class _Baselines(Mapping[str, type[Baseline]]):
    """Name -> class; a module is imported when its class is asked for."""

    def __getitem__(self, name: str) -> type[Baseline]:
        if name not in _HOME:
            raise KeyError(f"baseline must be one of {', '.join(_HOME)}, got {name!r}")
        module, attribute = _HOME[name]
        found: type[Baseline] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
        return found

    def __contains__(self, name: object) -> bool:
        return name in _HOME

    def __iter__(self) -> Iterator[str]:
        return iter(_HOME)

    def __len__(self) -> int:
        return len(_HOME)


BASELINES: Mapping[str, type[Baseline]] = _Baselines()


def make_baseline(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    *,
    statistics: Statistics | None = None,
    **options: Any,
) -> Baseline:
    """Puts a baseline on a model.

    Args:
        name: one of :data:`BASELINES`.
        model: a transformers causal language model without hooks.
        tokenizer: its (fast) tokenizer.
        statistics: key covariances, for the systems that need them.
        options: fields of the baseline's own settings, see :meth:`Baseline.create` of its class.

    Raises:
        ImportError: the baseline needs a package that is not installed; the message names it.
        TypeError: an option is not a field of the settings.
        ValueError: there is no such baseline, or as the baseline's class raises.
    """
    if name not in BASELINES:
        raise ValueError(f"make_baseline: name must be one of {', '.join(_HOME)}, got {name!r}")
    return BASELINES[name].create(model, tokenizer, statistics=statistics, **options)
