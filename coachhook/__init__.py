"""Rewrite facts inside a frozen language model, batch after batch, without retraining.

Names are loaded on first use, so that ``import coachhook`` starts no CUDA context and needs no
compiler, no GPU and no built extension.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from coachhook._version import __version__

if TYPE_CHECKING:
    from coachhook.editing import EditConfig, Editor, EditRequest, EditResult, attach
    from coachhook.statistics import Statistics, collect_statistics

_HOME = {
    "EditConfig": "coachhook.editing",
    "EditRequest": "coachhook.editing",
    "EditResult": "coachhook.editing",
    "Editor": "coachhook.editing",
    "attach": "coachhook.editing",
    "Statistics": "coachhook.statistics",
    "collect_statistics": "coachhook.statistics",
}

__all__ = [
    "EditConfig",
    "EditRequest",
    "EditResult",
    "Editor",
    "Statistics",
    "__version__",
    "attach",
    "collect_statistics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
