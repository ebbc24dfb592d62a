"""What a command asks for, checked before a folder is made or a run started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.experiments.systems import (
    TRAINED,
    configure,
    has_gate,
    key_site,
    known_systems,
    setting_types,
)
from coachhook.models import describe
from coachhook.models.families import FAMILIES
from coachhook.statistics import Statistics

_COUNTS = ("count", "tokens", "first", "sample", "text_tokens", "evaluation_batch")
_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    NoneType: "null",
}


def check_arguments(args: Any) -> None:
    """Checks all that needs neither the facts nor the model's weights.

    Raises:
        ValueError: an argument is not what it must be.
    """
    unknown = sorted(set(args.systems) - set(known_systems()))
    if unknown:
        raise ValueError(f"--systems must be of {', '.join(known_systems())}, got {unknown}")
    gateless = [name for name in args.systems if not has_gate(name)]
    if args.experiment == "zscores" and gateless:
        known = ", ".join(filter(has_gate, known_systems()))
        raise ValueError(f"--systems of zscores must have a gate ({known}), got {gateless}")
    if not args.batch_sizes:
        raise ValueError("--batch-sizes must be positive integers such as 1,10,30, got none")
    for name in _COUNTS:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 1, got {value}; leave it out for "
                "its default"
            )
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {args.out}; name another one")
    for system, options in args.settings.items():
        _check_types(system, options)
    # What was not set is the preset's own.
    model = _skeleton(str(args.model)) if args.settings else None
    if model is not None:
        for system in args.settings:
            check_settings(model, system, args.settings[system])


def check_settings(model: Any, system: str, options: dict[str, Any]) -> Any:
    """The settings of a system, checked against a model, whose weights are not looked at.

    Raises:
        ValueError: a setting does not fit the model, or the others.
    """
    description = describe(model)
    try:
        config = configure(system, model, options)
        for index in _layers(config):
            description.layer(index)
    except ValueError as error:
        raise ValueError(f"--set {system}: {error}") from error
    return config


def open_statistics(args: Any) -> Statistics | None:
    """The statistics that were given, if any.

    Raises:
        ValueError: there are none in that folder.
    """
    if args.stats is None:
        return None
    try:
        return Statistics.load(args.stats)
    except ValueError as error:
        raise ValueError(
            f"--stats must be a folder of `coachhook stats`, got {args.stats}: {error}"
        ) from error


def check_model(args: Any, model: Any, statistics: Statistics | None) -> None:
    """Checks what takes the loaded model: settings and given statistics.

    Raises:
        ValueError: a setting does not fit the model; the statistics are another model's, or have
            not all layers of a system.
    """
    if statistics is not None:
        statistics.check(model)
    for system in args.systems:
        layers = statistics_layers(args, model, system)
        if statistics is None or not layers:
            continue
        site = key_site(system, args.settings.get(system, {}))
        if site != statistics.key_site:
            raise ValueError(
                f"--stats must be of key_site {site!r}, as {system} is, got "
                f"{statistics.key_site!r}; leave --stats out, which makes both"
            )
        missing = sorted(set(layers) - set(statistics.layers))
        if missing:
            raise ValueError(
                f"--stats must have the layers {layers} that {system} edits, got "
                f"{statistics.layers}; collect them with `coachhook stats --layers`, or leave "
                "--stats out"
            )


def statistics_layers(args: Any, model: Any, system: str) -> list[int]:
    """The layers whose statistics a system uses with the settings of a command.

    Raises:
        ValueError: a setting does not fit the model.
    """
    config = check_settings(model, system, args.settings.get(system, {}))
    edit = getattr(config, "edit", config)  # of the systems that use statistics
    return list(edit.layers) if hasattr(edit, "covariance_weight") else []


def _check_types(system: str, options: dict[str, Any]) -> None:
    """Checks that settings exist, and that each has a value of its type."""
    known = setting_types(system)
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"--set {system}.NAME must be one of {', '.join(sorted(known))}, got {name!r}"
            )
        if not _fits(value, known[name]):
            raise ValueError(f"--set {system}.{name} must be {_say(known[name])}, got {value!r}")
    networks = options.get("networks")
    if system in TRAINED and networks is not None and not Path(networks).is_file():
        raise ValueError(f"--set {system}.networks must name a file, got {networks!r}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value that was read as JSON is of an annotated type."""
    if get_origin(kind) is Sequence:
        (item,) = get_args(kind)
        return isinstance(value, list) and all(_fits(v, item) for v in value)
    if get_args(kind):  # a union
        return any(_fits(value, one) for one in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and not math.isnan(value)
    return type(value) is kind  # True is no integer


def _say(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Sequence:
        return f"a JSON list, each item {_say(get_args(kind)[0])}"
    if get_args(kind):
        return " or ".join(dict.fromkeys(_say(one) for one in get_args(kind)))
    return _WORDS[kind]


def _layers(config: Any) -> list[int]:
    """The blocks that settings name, if they do."""
    one, several = getattr(config, "layer", None), getattr(config, "layers", None)
    return [*([] if one is None else [one]), *(several or ())]


def _skeleton(name: str) -> Any:
    """The model without its weights; None where only the loaded one can tell."""
    try:
        config = AutoConfig.from_pretrained(name)
        # One that is not in the table is run to be described, which takes weights.
        if config.get_text_config().model_type not in FAMILIES:
            return None
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError):
        return None  # what is wrong with it is said when it is loaded
