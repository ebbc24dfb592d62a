"""Calls that were checked before: an eager call of a small model is mostly checks.

What the checks and the choice of the implementation look at is the same in call after call: shapes,
dtypes and devices, the kinds of the arguments, the backend. A call whose facts are those of an
earlier one that passed goes straight to the implementation chosen then. Where a check reads values
(``cu_seqlens``, groups of keys) nothing is remembered.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.ops._registry import is_watched
from coachhook.ops.hooked_linear.scopes import Population, Prefix, Sequence, Ungated

Facts = tuple[Any, ...]

# Prompts of every length pass through a server: beyond this many facts the memory starts anew.
_MOST = 1024
_KNOWN: dict[Facts, Callable[..., Any]] = {}
recall = _KNOWN.get

# A device takes longer to look up, hash and compare than all else of a tensor. Beside an x on the
# CPU one bit says the same: every other tensor is there too, or its place was not asked for.
_ON_CPU = attrgetter("shape", "dtype", "is_cpu")
_ANYWHERE = attrgetter("shape", "dtype", "device")

_AUTOCASTS: Callable[[], bool] = torch._C._is_any_autocast_enabled

# A variable that is not set costs 0.7 us through os.environ, which raises and catches twice, and
# 0.03 us through the mapping behind it.
_VARIABLES: Any = getattr(os.environ, "_data", os.environ)
_BACKEND: Any = "COACHHOOK_BACKEND"
if _VARIABLES is not os.environ:
    _BACKEND = os.environ.encodekey(_BACKEND)


def facts_of(
    op: str,
    layer: tuple[Any, ...],
    delta: Any,
    alpha: Any,
    mask: Any,
    cu_seqlens: Any,
    scope: Any,
    backend: str,
) -> Facts | None:
    """What the checks of a call look at; None where more has to be seen, or somebody looks on.

    Args:
        op: name of the op.
        layer: x and what belongs to the frozen layer.
        delta, alpha, mask, cu_seqlens, scope, backend: as given by the caller, not yet checked.
    """
    if cu_seqlens is not None or is_watched() or _AUTOCASTS():
        return None
    kind = type(scope)
    values: tuple[Any, ...]
    if kind is Population:
        values = alpha, mask, scope.mean, scope.std
    elif kind is Sequence or kind is Prefix:
        values = alpha, mask, scope.state
    elif scope is None or kind is Ungated:
        values = alpha, mask
    else:
        return None
    if type(delta) is tuple:
        pair = delta
    elif isinstance(delta, Tensor):
        pair = (delta,)
    else:
        return None
    facts: list[Any] = [op, backend, _VARIABLES.get(_BACKEND), kind, len(pair)]
    look = _ON_CPU if getattr(layer[0], "is_cpu", False) else _ANYWHERE
    for value in (*layer, *pair, *values):
        found = type(value)
        if found is Tensor or found is nn.Parameter:
            facts += look(value)
        elif value is None:
            facts.append(None)
        elif isinstance(value, Tensor):
            return None
        else:
            facts.append(found)
    return tuple(facts)


def remember(facts: Facts, implementation: Callable[..., Any]) -> None:
    """Note that a call with these facts passed every check."""
    if len(_KNOWN) >= _MOST:
        _KNOWN.clear()
    _KNOWN[facts] = implementation
