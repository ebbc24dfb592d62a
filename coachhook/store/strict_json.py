"""JSON that every reader takes: numbers that are not finite are written as objects.

Python's own ``json`` writes ``NaN`` and ``Infinity``, which are not JSON. Here such a number
becomes ``{"$float": "NaN"}`` and comes back as it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

_TAG = "$float"
_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: Any) -> str:
    """Return `value` as indented JSON.

    Raises:
        TypeError: something in it has no form in JSON.
    """
    return json.dumps(_tagged(value), indent=1, ensure_ascii=False, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """Return the value of JSON text, also of text in which Python left bare ``NaN``.

    Raises:
        ValueError: it is not JSON.
    """
    return json.loads(text, object_hook=_untagged)


def _tagged(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: next(n for n, x in _NAMES.items() if x == value or value != value)}
    if isinstance(value, Mapping):
        return {key: _tagged(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tagged(item) for item in value]
    return value


def _untagged(value: dict[str, Any]) -> Any:
    name = value.get(_TAG)
    return _NAMES[name] if len(value) == 1 and isinstance(name, str) and name in _NAMES else value
