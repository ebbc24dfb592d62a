"""What is available on this machine, what is not and why: for people and for bug reports.

Nothing here creates a CUDA context; GPUs are read from the driver's own tool.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from coachhook import bundled
from coachhook._version import __version__
from coachhook.ops import _backends
from coachhook.ops.hooked_linear import cuda, decode, policy, products

PACKAGES = ("transformers", "tokenizers", "safetensors", "numpy", "triton", "peft", "matplotlib")


def report() -> dict[str, Any]:
    """Everything a bug report should hold, as JSON-ready values.

    Returns:
        ``coachhook``, ``python``, ``platform``: versions. ``packages``: ``{name: version | None}``.
        ``cpu``: cores and torch threads. ``gpu``: ``available``, ``reason``, ``torch_cuda`` and the
        ``devices``. ``native``, ``native_cpu``: the extensions. ``triton``. ``backends``:
        ``{op: {backend: {"available", "reason"}}}``. ``environment``: the COACHHOOK_ variables set
        here, ``environment_problems``: what is wrong with them. ``bundled_model``: whether
        ``coachhook demo`` has its model.
    """
    return {
        "coachhook": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"torch": torch.__version__, **{name: _version(name) for name in PACKAGES}},
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpu": _gpu(),
        "native": _native(),
        "native_cpu": _native_cpu(),
        "triton": _triton(),
        "backends": _op_backends(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("COACHHOOK_")},
        "environment_problems": _environment_problems(),
        "bundled_model": _bundled_model(),
    }


def render(facts: dict[str, Any]) -> str:
    """The report as text, one fact a line, what is missing with its reason."""
    versions = (
        f"{name} {version or 'not installed'}" for name, version in facts["packages"].items()
    )
    cpu = facts["cpu"]
    lines = [
        f"coachhook {facts['coachhook']} on Python {facts['python']}, {facts['platform']}",
        f"packages          {', '.join(versions)}",
        f"CPU               {cpu['cores']} cores, torch uses {cpu['threads']} threads",
        f"GPU               {_gpu_line(facts['gpu'])}",
        f"CUDA extension    {_native_line(facts['native'])}",
        f"CPU extension     {_yes_or_why(facts['native_cpu'])}",
        f"triton            {_yes_or_why(facts['triton'])}",
        f"bundled model     {_yes_or_why(facts['bundled_model'])}",
    ]
    switches = [f"{name}={value}" for name, value in facts["environment"].items()]
    lines.append(f"switches          {', '.join(switches) or 'none set'}")
    lines += [f"  {problem}" for problem in facts["environment_problems"]]
    lines.append("ops:")
    for op, backends in facts["backends"].items():
        able = [name for name, state in backends.items() if state["available"]]
        lines.append(f"  {op:<24}{', '.join(able)}")
    reasons: dict[str, list[str]] = {}
    for op, backends in facts["backends"].items():
        for name, state in backends.items():
            if not state["available"]:
                reasons.setdefault(f"{name}: {state['reason']}", []).append(op)
    if reasons:
        lines.append("not available:")
    for reason, ops in reasons.items():
        some = "" if len(ops) == len(facts["backends"]) else f" ({', '.join(ops)})"
        lines.append(f"  {reason}{some}")
    return "\n".join(lines)


def _environment_problems() -> list[str]:
    """What the first op that reads a switch would say of it, on this machine or another."""
    problems = []
    for check in (
        _backends.environment_backend,
        products.way,
        decode.overlap_asked,
        lambda: policy.policy("cpu"),
    ):
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    return problems


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    available = torch.cuda.is_available()
    devices = _nvidia_smi()
    reason = None
    if not available:
        if torch.version.cuda is None:
            reason = "this torch is built without CUDA"
        elif not devices:
            reason = "no NVIDIA GPU or driver found"
        else:
            reason = "torch cannot use the driver; compare torch_cuda with the driver's version"
    return {
        "available": available,
        "reason": reason,
        "torch_cuda": torch.version.cuda,
        "devices": devices,
    }


def _nvidia_smi() -> list[dict[str, str]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    fields = ("name", "compute_cap", "memory.total", "driver_version")
    query = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if result.returncode != 0:
        return []
    rows = (line.split(", ") for line in result.stdout.splitlines())
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def _native() -> dict[str, Any]:
    native = _backends.native()
    if native is None:
        return {
            "available": False,
            "reason": _backends.native_error(),
            "nvcc": shutil.which("nvcc"),
        }
    reason = cuda.runtime_problem() if torch.cuda.is_available() else None
    return {"available": True, "reason": reason, **native.build_info()}


def _native_cpu() -> dict[str, Any]:
    reason = _backends.native_cpu_error()
    return {"available": reason is None, "reason": reason}


def _triton() -> dict[str, Any]:
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "not installed; torch's CUDA wheels for Linux bring it"
    elif not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    return {"available": reason is None, "reason": reason}


def _op_backends() -> dict[str, dict[str, dict[str, Any]]]:
    return {
        op: {
            name: {"available": available, "reason": reason}
            for name, (available, reason) in _backends.available_backends(op).items()
        }
        for op in _backends.ops()
    }


def _bundled_model() -> dict[str, Any]:
    folder = Path(bundled.model_path())
    present = (folder / "config.json").is_file()
    reason = None if present else f"no model in {folder}; install coachhook again"
    return {"available": present, "reason": reason, "path": str(folder)}


def _yes_or_why(state: dict[str, Any]) -> str:
    return "yes" if state["available"] else f"no: {state['reason']}"


def _gpu_line(gpu: dict[str, Any]) -> str:
    if not gpu["available"]:
        return f"no: {gpu['reason']}"
    names = [f"{d['name']} (compute {d['compute_cap']})" for d in gpu["devices"]]
    driver = gpu["devices"][0]["driver_version"] if gpu["devices"] else "unknown"
    return f"{', '.join(names) or 'yes'}; driver {driver}, torch for CUDA {gpu['torch_cuda']}"


def _native_line(native: dict[str, Any]) -> str:
    if not native["available"]:
        nvcc = f"nvcc found at {native['nvcc']}" if native["nvcc"] else "no nvcc on PATH"
        return f"no: {native['reason']} ({nvcc})"
    note = f" ({native['reason']})" if native["reason"] else ""
    return f"built for {native['architectures']}{note}"
