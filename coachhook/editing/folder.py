"""An EDITS folder: everything needed to go on editing, to take a batch back, or only to answer.

The hooks' own tensors are kept beside the memory they were made from, so that inference reads them
and the records of the batches, and nothing else. What is only added to, and what does not change
from save to save, lies in files that a later write of the same folder takes over as they are
(:mod:`coachhook.editing.segments`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coachhook._version import __version__
from coachhook.editing.config import EditConfig
from coachhook.editing.folded import most_keys
from coachhook.editing.logs import logs_of, read_folded, read_rows
from coachhook.editing.memory import EditMemory
from coachhook.editing.payload import HookPayload
from coachhook.editing.published import PublishedMemory
from coachhook.editing.records import BatchRecord
from coachhook.editing.segments import Written, arranged, read_segments
from coachhook.editing.state import EditState, LayerEdits
from coachhook.editing.unrelated import SampleTokens
from coachhook.errors import FingerprintMismatchError, FormatError
from coachhook.models import describe, get_submodule
from coachhook.statistics.packed import packed_order, unpack_triangle
from coachhook.store import (
    TensorSource,
    check_fields,
    fingerprint,
    load_folder,
    save_folder,
    version_of,
)

KIND = "edits"
# Of a hook's tensors those that follow from the records.
_OF_RECORDS = ("cues", "limits", "reaches", "gaps")
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
    logs = logs_of(state)
    tensors: dict[str, TensorSource] = {}
    layers: dict[str, Any] = {}
    for index, edits in state.layers.items():
        payload, memory = state.payload(index), edits.memory
        memory_tensors, memory_values = memory.state_dict()
        prefix = f"layer.{index}"
        for name, tensor in payload.tensors.items():
            if name not in _OF_RECORDS:
                tensors[f"{prefix}.hook.{name}"] = tensor
        if isinstance(memory, PublishedMemory):
            for name, tensor in memory_tensors.items():
                if f"{prefix}.memory.{name}" not in logs:
                    tensors[f"{prefix}.memory.{name}"] = tensor
        else:
            pieces = range(len(memory_values["folded"]))
            memory_values["kept"] = [i for i in pieces if f"folded.{i}.keys" in memory_tensors]
        layers[str(index)] = {
            "kind": payload.kind,
            "alpha": payload.alpha,
            "population": payload.population,
            "rank": payload.rank,
            "next_group": edits.next_group,
            "out_features": memory.out_features,
            "memory": memory_values,
        }
    if state.sample_tokens is not None:
        tensors["sample_tokens"] = state.sample_tokens.tokens
    place = str(Path(path).resolve())
    last = state.writes.get(place)
    segments, sets = {}, []
    unchanged: set[str] = set()
    for name, log in logs.items():
        earlier = list(last.segments.get(name, [])) if last is not None else []
        segments[name] = arranged(log, earlier)
        first = 0
        for segment in segments[name]:
            found = log.tensors(segment.number, first, first + segment.units)
            sets.append(found)
            if any(segment is other for other in earlier):
                unchanged.update(found)
            first += segment.units
    manifest = {
        **owner,
        "coachhook": __version__,
        "config": state.config.to_dict(),
        "layers": layers,
        "segments": {k: [[s.number, s.units] for s in v] for k, v in segments.items()},
        "batches": {str(n): b.to_dict() for n, b in state.batches.items()},
    }
    version = save_folder(
        place,
        kind=KIND,
        manifest=manifest,
        tensors=tensors,
        sets=sets,
        unchanged=unchanged,
        replaces=last.version if last is not None else None if replace else "",
    )
    state.writes[place] = Written(version, segments)


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
    with _complete(path):
        state = EditState(EditConfig.from_dict(manifest["config"]), {})
        if "sample_tokens" in tensors:
            state.sample_tokens = SampleTokens(tensors["sample_tokens"])
        kind = PublishedMemory if state.config.state_dtype == "float32" else EditMemory
        for key, entry in manifest["layers"].items():
            kept, values = _memory(manifest, key, tensors)
            if state.config.scope == "membership" and not values["folded"]:
                # Folders of before kept all keys beside the prior.
                most = min(values["max_keys"], most_keys(kept["keys"].shape[1]))
                values |= {"max_keys": most, "keep_prior": True}
            if model is not None:
                device = memory_device(model, int(key))
                # Keys in the prior stay on the CPU, wherever the memory is.
                kept |= {k: v.to(device) for k, v in kept.items() if not k.startswith("folded.")}
            state.layers[int(key)] = LayerEdits(
                kind.from_state_dict(kept, values),
                tensors[f"layer.{key}.sample"] if f"layer.{key}.sample" in tensors else None,
                entry["next_group"],
            )
        state.batches.update(_records(manifest, tensors))
        logs, found = logs_of(state), manifest.get("segments", {})
        segments = {name: read_segments(logs[name], found[name]) for name in found}
        state.writes[str(Path(path).resolve())] = Written(version_of(manifest), segments)
    return state


def _memory(
    manifest: Mapping[str, Any], layer: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of a layer's memory."""
    prefix, entry = f"layer.{layer}.memory.", manifest["layers"][layer]
    segments, values = manifest.get("segments", {}), dict(entry["memory"])
    if (rows := segments.get(f"{prefix}rows")) is None:  # before version 3, or published
        kept = {k.removeprefix(prefix): tensors[k] for k in tensors if k.startswith(prefix)}
    else:
        names = [name for name in ("factor", "initial", "base") if f"{prefix}{name}" in tensors]
        kept = {name: tensors[f"{prefix}{name}"] for name in names}
        n, m = packed_order(kept["factor"].numel()), entry["out_features"]
        kept |= read_rows(f"{prefix}rows", rows, tensors, n, m, kept["factor"].dtype)
        pieces = [(i, values["folded"][i][1]) for i in values["kept"]]
        kept |= read_folded(f"{prefix}folded", segments[f"{prefix}folded"], pieces, tensors)
        values["rows"] = [count for _, count in rows]
    for name in ("factor", "initial"):
        if name in kept and kept[name].dim() == 1:  # in version 1 it was square
            kept[name] = unpack_triangle(kept[name], kept[name].dtype)
    return kept, values


def _records(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[int, BatchRecord]:
    found = {}
    for number, record in manifest["batches"].items():
        named = {int(i): f"cues.{number}.{i}" for i in manifest["layers"]}
        cues = {i: tensors[name] for i, name in named.items() if name in tensors}
        found[int(number)] = BatchRecord.from_dict(record, tensors[f"targets.{number}"], cues)
    return found


def load_records(path: str | os.PathLike[str]) -> tuple[EditConfig, dict[int, BatchRecord]]:
    """Reads from an EDITS folder what was asked and found, without the memories.

    Returns:
        The settings, and the batches by number.

    Raises:
        FormatError: not an EDITS folder, damaged, or of a newer version.
    """
    manifest, tensors = _open(path, None)
    with _complete(path):
        return EditConfig.from_dict(manifest["config"]), _records(manifest, tensors)


@contextmanager
def _complete(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"load: {os.fspath(path)} must hold complete edits, got {type(error).__name__}: {error}"
        ) from error


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
    with _complete(path):
        config = EditConfig.from_dict(manifest["config"])
        records = EditState(config, {}, _records(manifest, tensors))
        for key, entry in manifest["layers"].items():
            prefix = f"layer.{key}.hook."
            kept = {k.removeprefix(prefix): tensors[k] for k in tensors if k.startswith(prefix)}
            if entry["kind"] == "pair":
                kept |= records.cues(int(key)) or {}
            population = entry["population"]
            payloads[int(key)] = HookPayload(
                entry["kind"],
                kept,
                entry["alpha"],
                None if population is None else (population[0], population[1]),
            )
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
