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
    """Return `value` as JSON, objects and what is in them on lines of their own, two deep.

    Raises:
        TypeError: something in it has no form in JSON.
    """
    return _lines(_tagged(value), 2)


def from_json(text: str | bytes) -> Any:
    """Return the value of JSON text, also of text in which Python left bare ``NaN``.

    Raises:
        ValueError: it is not JSON.
    """
    return json.loads(text, object_hook=_untagged)


def _lines(value: Any, depth: int, indent: str = "\n") -> str:
    plain = not isinstance(value, dict) or not all(isinstance(key, str) for key in value)
    if plain or not value or not depth:
        # Without indents, with which Python's encoder is several times slower.
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    deeper = indent + " "
    fields = (f"{_lines(key, 0)}: {_lines(item, depth - 1, deeper)}" for key, item in value.items())
    return "{" + deeper + f",{deeper}".join(fields) + indent + "}"


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
