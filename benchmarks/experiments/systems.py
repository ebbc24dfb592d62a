"""Every system behind one interface: ours in its presets, and the baselines.

Ours is saved to disk as an EDITS folder. A baseline is saved where everything that its edits change
is made of tensors and plain values; where it is not, a run that was cut off edits its facts again
from the first one, which gives the same result because every batch starts from its own seed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import load_file, save_file

from coachhook.editing import EditConfig, Editor, EditRequest
from coachhook.evaluation.baselines import BASELINES, make_baseline
from coachhook.evaluation.baselines.closed_form import ClosedForm
from coachhook.hooks import HookSet
from coachhook.statistics import Statistics

# Label, and the settings on top of those of the preset.
_PRESETS: dict[str, tuple[Callable[..., EditConfig], dict[str, Any]]] = {
    "ours": (EditConfig.for_model, {}),
    "ours-mlp": (EditConfig.for_model, {"key_site": "mlp"}),
    # The same edit with the hook always on: what the gate is worth.
    "no-gate": (EditConfig.for_model, {"alpha": -1e30, "correction": "sum"}),
    "paper": (EditConfig.paper, {}),
}
TITLES = {
    "ours": "coachhook (default)",
    "ours-mlp": "coachhook, whole MLPs",
    "no-gate": "coachhook, gate always open",
    "paper": "CoachHooK as published",
    "memit": "MEMIT",
    "accumulated": "MEMIT, accumulated keys (no hook)",
    "alphaedit": "AlphaEdit",
    "fine-tuning": "fine-tuning",
    "lora": "LoRA",
    "retrieval": "retrieval in the prompt",
    "grace": "GRACE",
    "mend": "MEND",
    "serac": "SERAC",
}


# Systems whose own networks are trained on other facts first.
TRAINED = ("mend", "serac")


def known_systems() -> list[str]:
    """Names that :func:`make_system` takes."""
    return [*_PRESETS, *BASELINES]


def has_gate(name: str) -> bool:
    """Whether a system has a gate that can stay shut, and so scores to compare with its alpha."""
    return name in _PRESETS and name != "no-gate"


def uses_statistics(name: str) -> bool:
    """Whether a system needs the key statistics."""
    return name in _PRESETS or BASELINES[name].needs_statistics


def key_site(name: str, options: dict[str, Any]) -> str:
    """What the keys of a system with some settings are inputs of."""
    fixed = _PRESETS[name][1] if name in _PRESETS else {}
    return str({"key_site": "down_proj", **fixed, **options}["key_site"])


def statistics_names(site: str) -> tuple[str, str]:
    """Entries of a plan for the folder of a site's statistics and the seconds they took."""
    name = "statistics" if site == "down_proj" else f"statistics_{site}"
    return name, f"{name}_seconds"


def setting_types(name: str) -> dict[str, Any]:
    """Setting -> annotated type, for all that can be set by a system's ``options`` as JSON."""
    if name in _PRESETS:
        return get_type_hints(EditConfig)
    found = get_type_hints(BASELINES[name].config_type)
    if issubclass(BASELINES[name], ClosedForm):
        del found["edit"]
        return {**get_type_hints(EditConfig), **found, "preset": str}
    # Facts and functions are no JSON.
    return {k: v for k, v in found.items() if k not in ("train_requests", "retriever")}


def configure(name: str, model: Any, options: dict[str, Any]) -> Any:
    """The settings of a system for a model; nothing is put on it, and no weight is read.

    Raises:
        ValueError: a setting is out of range, or does not fit the model.
    """
    if name in _PRESETS:
        preset, fixed = _PRESETS[name]
        return preset(model, **{**fixed, **options})
    # Settings ask for networks, or for facts to train them on; the worker has those.
    there = {"networks": ""} if name in TRAINED else {}
    return BASELINES[name].configure(model, **{**there, **options})


@dataclass(frozen=True)
class Outcome:
    """What one batch did.

    Args:
        seconds: wall-clock time.
        cpu_seconds: time of all threads of the process; what a busy machine does not disturb.
        converged: per fact whether the system's own objective was met.
        alphas: layer -> threshold after the batch, where there is a gate.
    """

    seconds: float
    cpu_seconds: float
    converged: list[bool]
    alphas: dict[int, float]


class _Clock:
    """Wall-clock and CPU time of an edit, the GPU's work included."""

    def __init__(self) -> None:
        self.start = self._now()

    def read(self) -> tuple[float, float]:
        wall, cpu = self._now()
        return wall - self.start[0], cpu - self.start[1]

    @staticmethod
    def _now() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


class Ours:
    """An :class:`~coachhook.editing.Editor` in one of its presets."""

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        statistics: Statistics,
        options: dict[str, Any],
        state: Path | None,
    ) -> None:
        config = configure(name, model, options)
        if state is None:
            self.editor = Editor(model, tokenizer, statistics=statistics, config=config)
        else:
            self.editor = Editor.load(model, tokenizer, state)
        self.settings = self.editor.config.to_dict()
        self.targets: list[torch.Tensor] = []

    @property
    def gates(self) -> HookSet | None:
        return self.editor.hooks

    @property
    def done(self) -> int:
        return sum(len(batch.requests) for batch in self.editor.batches.values())

    def edit(self, requests: Sequence[EditRequest]) -> Outcome:
        clock = _Clock()
        result = self.editor.edit(requests)
        return Outcome(*clock.read(), result.converged, result.alphas)

    def disabled(self) -> AbstractContextManager[None]:
        return self.editor.hooks.disabled()

    def save(self, path: Path) -> bool:
        self.editor.save(path)
        return True

    def close(self) -> None:
        self.editor.detach()


class Other:
    """A baseline of :mod:`coachhook.evaluation.baselines`."""

    gates: HookSet | None = None

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        statistics: Statistics,
        options: dict[str, Any],
        state: Path | None,
    ) -> None:
        self.baseline = make_baseline(name, model, tokenizer, statistics=statistics, **options)
        config = self.baseline.config
        self.settings = {
            k: _plain(v) for k, v in vars(config).items() if k not in ("train_requests", "networks")
        }
        self.done = 0
        if state is not None:
            record, tensors = _read(state)
            # The same that an edit uses to undo itself.
            snapshot = _unpack(record["snapshot"], tensors)
            kind = type(self.baseline._snapshot())
            self.baseline._restore(kind(**snapshot) if is_dataclass(kind) else snapshot)
            self.done = record["done"]

    def edit(self, requests: Sequence[EditRequest]) -> Outcome:
        clock = _Clock()
        result = self.baseline.edit(requests)
        times = clock.read()
        self.done += len(requests)
        return Outcome(*times, result.converged, {})

    def disabled(self) -> AbstractContextManager[None]:
        return self.baseline.disabled()

    def save(self, path: Path) -> bool:
        tensors: dict[str, torch.Tensor] = {}
        try:
            found = self.baseline._snapshot()
            if is_dataclass(found):  # not vars(), which may hold what was derived from the fields
                found = {field.name: getattr(found, field.name) for field in fields(found)}
            snapshot = _pack(found, tensors)
        except TypeError:
            return False
        _write(path, {"done": self.done, "snapshot": snapshot}, tensors)
        return True

    def close(self) -> None:
        self.baseline.close()


System = Ours | Other


def make_system(
    name: str,
    model: Any,
    tokenizer: Any,
    statistics: Statistics,
    options: dict[str, Any],
    state: Path | None = None,
) -> System:
    """Puts a system on a model.

    Args:
        name: one of :func:`known_systems`.
        model: a causal language model without hooks.
        tokenizer: its tokenizer.
        statistics: key covariances.
        options: settings to change, fields of its config.
        state: what :meth:`save` wrote, to go on from there.
    """
    kind = Ours if name in _PRESETS else Other
    return kind(name, model, tokenizer, statistics, options, state)


def _plain(value: Any) -> Any:
    if isinstance(value, EditConfig):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    plain = value is None or isinstance(value, (bool, int, float, str, list, dict))
    return value if plain else str(value)


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A JSON-ready picture of nested containers, their tensors put aside.

    Raises:
        TypeError: something in it is neither a container, a tensor nor a plain value.
    """
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name, "device": str(value.device)}
    if isinstance(value, EditRequest):
        return {"request": value.to_dict()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"pack: value must be tensors and plain values, got {type(value).__name__}")


def _unpack(packed: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    ((kind, value), *_) = packed.items()
    if kind == "tensor":
        return tensors[value].to(packed["device"])
    if kind == "request":
        return EditRequest.from_dict(value)
    if kind == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in value}
    if kind in ("list", "tuple"):
        items = [_unpack(item, tensors) for item in value]
        return items if kind == "list" else tuple(items)
    return value


def _write(path: Path, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """A folder that is there whole or not at all; the one before stays until then."""
    fresh, old = path.with_name(f"{path.name}.new"), path.with_name(f"{path.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(tensors, fresh / "tensors.safetensors")
    (fresh / "state.json").write_text(json.dumps(record), encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not path.exists():  # killed between the two renames
        path = path.with_name(f"{path.name}.old")
    record = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return record, load_file(path / "tensors.safetensors")


def state_there(path: Path) -> bool:
    """Whether something was saved at ``path``."""
    return path.is_dir() or path.with_name(f"{path.name}.old").is_dir()
