"""Registration of the package's ops with ``torch.library``.

An op is declared once, with its schema (mutation included), its body and its fake::

    def _update_body(factor: Tensor, keys: Tensor, backend: str) -> None:
        ...                                    # all work; may look at data; checks were done before

    def _update_fake(factor: Tensor, keys: Tensor, backend: str) -> None:
        return None                            # outputs as ``torch.empty`` of the right shape

    _UPDATE = register_op(
        "cholesky_update_",
        "(Tensor(a!) factor, Tensor keys, str backend) -> ()",
        _update_body,
        _update_fake,
    )

    def cholesky_update_(factor, keys, *, backend="auto"):
        ...                                    # checks
        _UPDATE(factor, keys, backend)

Calling the :class:`RegisteredOp` runs the body directly in plain eager mode, so that an eager call
does not pay for the dispatcher, and goes through ``torch.ops.coachhook.<name>`` wherever somebody
is watching: while compiling or exporting, under a dispatch mode (fake tensors, tracing, flop
counting), under a functorch transform, and for tensor subclasses. A body must not return one of
its arguments or a view of one, and mutates only what the schema declares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

NAMESPACE = "coachhook"

# A Library unregisters its ops when it is collected: the module keeps it for the process.
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# Asked at every call: found once.
_MODES: Callable[[], int] = torch._C._len_torch_dispatch_stack
_TRANSFORMS: Callable[[], bool] = torch._C._are_functorch_transforms_active

_PLAIN_TENSORS = frozenset(
    {Tensor, nn.Parameter} | ({nn.Buffer} if hasattr(nn, "Buffer") else set())
)


def is_watched() -> bool:
    """Whether somebody looks on: a compiler, a dispatch mode or a functorch transform."""
    return is_compiling() or _MODES() > 0 or _TRANSFORMS()


def is_plain_eager(*values: Any) -> bool:
    """Whether a body may be called directly on these values (non-tensors are ignored)."""
    if is_watched():
        return False
    for value in values:
        if type(value) not in _PLAIN_TENSORS and isinstance(value, Tensor):
            return False
    return True


class RegisteredOp:
    """An op of the ``coachhook`` namespace: called directly in eager mode, registered elsewhere.

    Args:
        name: name in ``torch.ops.coachhook``.
        body: the implementation, for every device.

    Attributes:
        registered: the ``torch.library`` overload (what compiled graphs hold).
    """

    def __init__(self, name: str, body: Callable[..., Any]) -> None:
        self.name = name
        self.body = body
        self.registered = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: Any) -> Any:
        """Run the op; arguments are positional, in the order of the schema."""
        if is_plain_eager(*args):
            return self.body(*args)
        registered = self.registered  # dynamo of torch 2.4 cannot call an attribute's result
        return registered(*args)


def register_op(
    name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]
) -> RegisteredOp:
    """Declare an op.

    Args:
        name: name in the ``coachhook`` namespace.
        schema: argument and return part of the schema, e.g. ``"(Tensor(a!) x, int k) -> ()"``.
            Mutated tensors carry an alias annotation with ``!``.
        body: implementation for every device; receives exactly the arguments of the schema.
        fake: shape function for tracing; same arguments, returns empty tensors.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return RegisteredOp(name, body)
