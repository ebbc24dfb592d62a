"""Trained networks of a baseline in one safetensors file, bound to the weights they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from coachhook.errors import FingerprintMismatchError, FormatError
from coachhook.store import fingerprint


def save_networks(
    path: str | os.PathLike[str],
    kind: str,
    model: nn.Module,
    shape: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Writes trained networks to the file ``path``, whole or not at all.

    Args:
        path: the file; one that is there is replaced.
        kind: name of the baseline.
        model: the unedited model they were trained for.
        shape: JSON-ready settings that the networks depend on.
        tensors: their parameters.
    """
    path = Path(path)
    header = {"kind": kind, "fingerprint": fingerprint(model), "shape": json.dumps(dict(shape))}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, header)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_networks(
    path: str | os.PathLike[str], kind: str, model: nn.Module, shape: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Reads what :func:`save_networks` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        FingerprintMismatchError: the networks were trained for other weights.
        FormatError: the file is damaged, or holds the networks of another baseline.
        ValueError: they were trained with other settings; the message names them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{kind}: networks must name a file, got {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise FormatError(f"{kind}: networks must be a safetensors file, got {error}") from error
    if header.get("kind") != kind:
        raise FormatError(
            f"{kind}: networks must be those of {kind}, got {header.get('kind')!r} in {str(path)!r}"
        )
    if header["fingerprint"] != fingerprint(model):
        raise FingerprintMismatchError(
            f"{kind}: networks must be trained for these weights, got others in {str(path)!r}; "
            "train them again"
        )
    trained = json.loads(header["shape"])
    wanted = json.loads(json.dumps(dict(shape)))
    if trained != wanted:
        raise ValueError(
            f"{kind}: networks must be trained with the settings {wanted}, got {trained}"
        )
    return tensors
