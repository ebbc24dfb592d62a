"""An EDITS folder: everything needed to go on editing, to take a batch back, or only to answer.

The hooks' own tensors are kept beside the memory they were made from, so that inference reads them
and nothing else. The largest part of a memory is its factor, n (n + 1) / 2 numbers for each layer,
and it changes only when keys are folded into it: it has a file of its own, which a later write of
the same folder takes over as it is.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coachhook._version import __version__
from coachhook.editing.config import EditConfig
from coachhook.editing.memory import EditMemory
from coachhook.editing.published import PublishedMemory
from coachhook.editing.records import BatchRecord
from coachhook.editing.state import EditState, HookPayload, LayerEdits
from coachhook.editing.unrelated import SampleTokens
from coachhook.errors import FingerprintMismatchError, FormatError
from coachhook.models import describe, get_submodule
from coachhook.statistics.packed import pack_lower, unpack_triangle
from coachhook.store import check_fields, fingerprint, load_folder, save_folder, version_of

KIND = "edits"
# Large, and the same from batch to batch.
_STABLE = (".memory.factor", ".memory.base", ".memory.prior", ".memory.frozen", ".sample")
_FIELDS = {
    "fingerprint": str,
    "model": str,
    "config": dict,
    "layers": dict,
    "batches": dict,
}


def save_state(
    path: str | os.PathLike[str],
    state: EditState,
    model: nn.Module | None = None,
    *,
    replace: bool = True,
) -> None:
    """Writes an EDITS folder, whole or not at all.

    Edits there that this state was read from, or last written as, are replaced; not those that
    something else has written there since.

    Args:
        path: the folder.
        state: the edits.
        model: the model they belong to. None keeps the fingerprint of the folder that is there.
        replace: whether edits are replaced, too, where this state was never read or written.

    Raises:
        ValueError: the folder cannot be written, or holds other files or edits to be kept.
    """
    if model is None:
        old, _ = load_folder(path, KIND)
        owner = {"fingerprint": old["fingerprint"], "model": old["model"]}
    else:
        config: Any = model.config
        owner = {"fingerprint": fingerprint(model), "model": str(config._name_or_path or "")}
    tensors: dict[str, Tensor | Callable[[], Tensor]] = {}
    layers: dict[str, Any] = {}
    for index, edits in state.layers.items():
        payload = state.payload(index)
        memory_tensors, memory_values = edits.memory.state_dict()
        prefix = f"layer.{index}"
        tensors |= {f"{prefix}.hook.{k}": v.contiguous() for k, v in payload.tensors.items()}
        for name, tensor in memory_tensors.items():
            is_factor = name == "factor"
            packing = partial(pack_lower, tensor, tensor.dtype)
            tensors[f"{prefix}.memory.{name}"] = packing if is_factor else tensor.contiguous()
        if edits.sample is not None:
            tensors[f"{prefix}.sample"] = edits.sample.contiguous()
        layers[str(index)] = {
            "kind": payload.kind,
            "alpha": payload.alpha,
            "population": payload.population,
            "rank": payload.rank,
            "next_group": edits.next_group,
            "memory": memory_values,
        }
    if state.sample_tokens is not None:
        tensors["sample_tokens"] = state.sample_tokens.tokens.contiguous()
    for number, batch in state.batches.items():
        tensors[f"targets.{number}"] = batch.targets.contiguous()
        tensors |= {f"cues.{number}.{i}": v.contiguous() for i, v in batch.cues.items()}
    manifest = {
        **owner,
        "coachhook": __version__,
        "config": state.config.to_dict(),
        "layers": layers,
        "batches": {str(n): b.to_dict() for n, b in state.batches.items()},
    }
    stable = [name for name in tensors if name.endswith(_STABLE)]
    place = str(Path(path).resolve())
    state.writes[place] = save_folder(
        place,
        kind=KIND,
        manifest=manifest,
        tensors=tensors,
        stable=stable,
        replaces=state.writes.get(place, None if replace else ""),
    )


def _open(
    path: str | os.PathLike[str], expected: str | None
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    manifest, tensors = load_folder(path, KIND)
    check_fields(manifest, _FIELDS, path)
    if expected is not None and manifest["fingerprint"] != expected:
        raise FingerprintMismatchError(
            f"load: fingerprint must be {expected}, that of the model given, got "
            f"{manifest['fingerprint']} in {os.fspath(path)}, edits of "
            f"{manifest['model'] or 'another model'}; load the model they were made for"
        )
    return manifest, tensors


def load_state(
    path: str | os.PathLike[str], expected: str | None = None, model: nn.Module | None = None
) -> EditState:
    """Reads an EDITS folder to go on editing.

    Args:
        path: the folder.
        expected: fingerprint the edits must carry; None does not check.
        model: each memory is put where its layer is; None leaves them on the CPU.

    Raises:
        FormatError: not an EDITS folder, damaged, or of a newer version.
        FingerprintMismatchError: the edits belong to other weights.
    """
    manifest, tensors = _open(path, expected)
    try:
        state = EditState(EditConfig.from_dict(manifest["config"]), {})
        state.writes[str(Path(path).resolve())] = version_of(manifest)
        if "sample_tokens" in tensors:
            state.sample_tokens = SampleTokens(tensors["sample_tokens"])
        rounded = state.config.state_dtype == "float32"
        kind = PublishedMemory if rounded else EditMemory
        for key, entry in manifest["layers"].items():
            prefix = f"layer.{key}.memory."
            kept = {k.removeprefix(prefix): tensors[k] for k in tensors if k.startswith(prefix)}
            if "factor" in kept and kept["factor"].dim() == 1:  # in version 1 it was square
                kept["factor"] = unpack_triangle(kept["factor"], kept["factor"].dtype)
            if model is not None:
                device = memory_device(model, int(key))
                # Keys in the prior stay on the CPU, wherever the memory is.
                kept |= {k: v.to(device) for k, v in kept.items() if not k.startswith("folded.")}
            state.layers[int(key)] = LayerEdits(
                kind.from_state_dict(kept, entry["memory"]),
                tensors[f"layer.{key}.sample"] if f"layer.{key}.sample" in tensors else None,
                entry["next_group"],
            )
        for number, record in manifest["batches"].items():
            named = {i: f"cues.{number}.{i}" for i in state.layers}
            cues = {i: tensors[name] for i, name in named.items() if name in tensors}
            state.batches[int(number)] = BatchRecord.from_dict(
                record, tensors[f"targets.{number}"], cues
            )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"load: {os.fspath(path)} must hold complete edits, got {type(error).__name__}: {error}"
        ) from error
    return state


def memory_device(model: nn.Module, layer: int) -> torch.device:
    """Where the memory of a layer belongs: beside the layer, or where there is float64."""
    module = get_submodule(model, describe(model).layer(layer).path)
    # A quantised layer may have buffers alone.
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    return torch.device("cpu") if device.type == "mps" else device


def load_payloads(
    path: str | os.PathLike[str], expected: str | None = None
) -> tuple[EditConfig, dict[int, HookPayload]]:
    """Reads only what inference needs from an EDITS folder.

    Raises:
        FormatError: not an EDITS folder, damaged, or of a newer version.
        FingerprintMismatchError: the edits belong to other weights.
    """
    manifest, tensors = _open(path, expected)
    payloads = {}
    try:
        for key, entry in manifest["layers"].items():
            prefix = f"layer.{key}.hook."
            kept = {k.removeprefix(prefix): tensors[k] for k in tensors if k.startswith(prefix)}
            population = entry["population"]
            payloads[int(key)] = HookPayload(
                entry["kind"],
                kept,
                entry["alpha"],
                None if population is None else (population[0], population[1]),
            )
        config = EditConfig.from_dict(manifest["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"load: {os.fspath(path)} must hold complete edits, got {type(error).__name__}: {error}"
        ) from error
    return config, payloads


def revert_folder(path: str | os.PathLike[str], batch: int) -> None:
    """Takes one batch back in an EDITS folder, without the model.

    Raises:
        FormatError: not an EDITS folder, damaged, or of a newer version.
        ValueError: there is no such batch, it cannot be taken back any more, or something else
            has written the folder meanwhile.
    """
    state = load_state(path)
    state.remove(batch)
    save_state(path, state)
