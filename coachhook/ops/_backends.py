"""Which implementations of an op exist here, why the others do not, and which one runs.

Every op registers its implementations once, at import of its package::

    register("gram_update_", "reference", reference.gram_update_)
    register("gram_update_", "cpu", cpu.gram_update_)
    register("gram_update_", "triton", _triton_gram_update, supports=_triton_supports)

and asks at each call ``resolve("gram_update_", backend, gram, x)`` for the function to run. Where
``auto`` passes over an implementation because it does not take these tensors (their dtype, the
device's architecture), the reason is logged, once per process.
Functions registered for ``triton`` and ``cuda`` must import what they need on first call: importing
the package touches neither triton nor CUDA.

Environment switch, read at call time: ``COACHHOOK_BACKEND`` (see ``docs/environment.md``).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from coachhook._version import __version__
from coachhook.errors import BackendUnavailableError

_LOG = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu", "triton", "cuda")

# First choice first. The reference runs wherever torch does.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


@dataclass(frozen=True)
class Implementation:
    """One implementation of one op.

    Attributes:
        function: what ``resolve`` hands out.
        supports: given the tensors of a call, the reason why it cannot take them, or None.
        extension: whether, as a ``cuda`` implementation, it needs the CUDA extension.
    """

    function: Callable[..., Any]
    supports: Callable[..., str | None] | None = None
    extension: bool = True

    def refusal(self, tensors: tuple[Any, ...]) -> str | None:
        """The reason why it does not take these tensors, or None."""
        return None if self.supports is None else self.supports(*tensors)


_IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}


def register(
    op: str,
    backend: str,
    function: Callable[..., Any],
    *,
    supports: Callable[..., str | None] | None = None,
    extension: bool = True,
) -> None:
    """Add an implementation of an op; ``backend`` is one of :data:`BACKENDS`."""
    _IMPLEMENTATIONS.setdefault(op, {})[backend] = Implementation(function, supports, extension)
    _candidates.cache_clear()


@cache
def _load(name: str, what: str, remedy: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(name), None
    except ImportError as error:
        if importlib.util.find_spec(name) is None:
            return None, f"the {what} extension {name} is not built; {remedy}"
        return None, f"the {what} extension {name} does not load: {error}"


@cache
def _load_native() -> tuple[ModuleType | None, str | None]:
    remedy = "install from source with nvcc on PATH and COACHHOOK_BUILD_CUDA=1"
    module, error = _load("coachhook._C", "CUDA", remedy)
    if module is None:
        return None, error
    return _of_this_version(module, module.build_info()["version"])


def _of_this_version(module: ModuleType, built: str) -> tuple[ModuleType | None, str | None]:
    if built == __version__:
        return module, None
    return None, f"it was built for version {built}; install coachhook again"


@cache
def _load_native_cpu() -> tuple[ModuleType | None, str | None]:
    remedy = "install from source with a C++ compiler and COACHHOOK_BUILD_CPU=1"
    module, error = _load("coachhook._cpu", "CPU", remedy)
    if module is None:
        return None, error
    module, error = _of_this_version(module, module.VERSION)
    if module is None:
        return None, error
    if not module.has_pair_product():
        return None, "this processor has no AVX-512 for bfloat16"
    return module, None


def native() -> ModuleType | None:
    """The CUDA extension module, or None; imported on first use."""
    return _load_native()[0]


def native_error() -> str | None:
    """Why :func:`native` is None, or None where the extension loads."""
    return _load_native()[1]


def native_cpu() -> ModuleType | None:
    """The CPU extension module where it has something for this processor, or None."""
    return _load_native_cpu()[0]


def native_cpu_error() -> str | None:
    """Why :func:`native_cpu` is None, or None."""
    return _load_native_cpu()[1]


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_missing(op: str, backend: str, device: torch.device) -> str | None:
    """The reason why a backend runs no tensors on a device, or None where it runs some."""
    if backend == "cpu" and device.type != "cpu":
        return f"it runs on CPU tensors, these are on {device}"
    if backend in ("triton", "cuda"):
        if device.type != "cuda":
            return f"it runs on CUDA tensors, these are on {device}"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
    implementation = _IMPLEMENTATIONS[op].get(backend)
    if implementation is None:
        return f"{op} has no {backend} implementation yet"
    if backend == "triton" and not _has_triton():
        return "the package triton is not installed"
    if backend == "cuda" and implementation.extension and native() is None:
        return native_error()
    return None


def _able(op: str, device: torch.device, tensors: tuple[Any, ...]) -> list[str]:
    """The backends that can run these tensors."""
    return [
        backend
        for backend in BACKENDS
        if _why_missing(op, backend, device) is None
        and _IMPLEMENTATIONS[op][backend].refusal(tensors) is None
    ]


@cache
def _candidates(
    op: str, asked: str, device: torch.device, first: str | None
) -> tuple[tuple[str, Implementation], ...]:
    """What ``asked`` may mean on a device, first choice first.

    Kept for the process: what is installed and what a machine has does not change.
    """
    if asked != "auto":
        order: tuple[str, ...] = (asked,)
    else:
        order = _PREFERENCE.get(device.type, ("reference",))
        if first in order:
            order = (first, *order)
    table = _IMPLEMENTATIONS[op]
    return tuple((b, table[b]) for b in order if _why_missing(op, b, device) is None)


@cache
def _say_once(op: str, backend: str, reason: str) -> None:
    _LOG.warning("%s: %s is passed over: %s; another backend runs", op, backend, reason)


def _check_op(op: str) -> None:
    if op not in _IMPLEMENTATIONS:
        raise ValueError(f"op must be one of {', '.join(sorted(_IMPLEMENTATIONS))}, got {op!r}")


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def available_backends(
    op: str, device: torch.device | str | None = None
) -> dict[str, tuple[bool, str | None]]:
    """What can run an op on a device, and why the rest cannot.

    Args:
        op: public name of the op, e.g. ``"hooked_linear"``.
        device: device of the tensors; None asks for each backend on the device it is made for.

    Returns:
        ``{backend: (available, reason)}``; the reason is None where available.
    """
    _check_op(op)
    report: dict[str, tuple[bool, str | None]] = {}
    for backend in BACKENDS:
        home = "cuda" if backend in ("triton", "cuda") else "cpu"
        reason = _why_missing(op, backend, torch.device(home if device is None else device))
        report[backend] = (reason is None, reason)
    return report


def is_supported(op: str, device: torch.device | str | None = None) -> bool:
    """Whether some implementation of ``op`` runs on tensors of ``device`` (None: this machine's).

    Raises:
        ValueError: unknown op.
    """
    _check_op(op)
    where = _default_device() if device is None else torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        return False
    return any(_why_missing(op, backend, where) is None for backend in BACKENDS)


def ops() -> list[str]:
    """Names of the registered ops."""
    return sorted(_IMPLEMENTATIONS)


def check_backend(op: str, backend: str) -> None:
    """Raise ValueError where ``backend`` is not a known name."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"{op}: backend must be one of {', '.join(('auto', *BACKENDS))}, got {backend!r}"
        )


def environment_backend() -> str:
    """The value of ``COACHHOOK_BACKEND``, "auto" where it is unset.

    Raises:
        ValueError: it is not a known name.
    """
    value = os.environ.get("COACHHOOK_BACKEND") or "auto"
    if value != "auto" and value not in BACKENDS:
        raise ValueError(
            f"COACHHOOK_BACKEND must be one of {', '.join(('auto', *BACKENDS))}, got {value!r}"
        )
    return value


def resolve(
    op: str, backend: str, *tensors: Tensor, first: str | None = None
) -> Callable[..., Any]:
    """The function that runs ``op`` on ``tensors``.

    Args:
        op: public name of the op.
        backend: a name of :data:`BACKENDS`, or ``"auto"``: the one that
            ``COACHHOOK_BACKEND`` names, else the fastest that can take these tensors.
        tensors: the tensors of the call; the first one gives the device.
        first: the implementation that "auto" tries before the others.

    Raises:
        ValueError: unknown backend name, in the argument or in ``COACHHOOK_BACKEND``.
        BackendUnavailableError: the backend asked for cannot run here; the message says why.
    """
    device = tensors[0].device
    check_backend(op, backend)
    asked = environment_backend() if backend == "auto" else backend
    reason = None
    for candidate, implementation in _candidates(op, asked, device, first):
        reason = implementation.refusal(tensors)
        if reason is None:
            return implementation.function
        if asked == "auto":
            _say_once(op, candidate, reason)
    if asked == "auto":
        raise BackendUnavailableError(f"{op}: no implementation for tensors on {device}")
    raise BackendUnavailableError(
        f"{op}: backend {asked!r} is not available: {reason or _why_missing(op, asked, device)}; "
        f"available for tensors on {device}: {', '.join(_able(op, device, tensors))}"
    )
