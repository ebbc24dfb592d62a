"""The ops: pure functions of tensors, plus the buffers they declare as mutated.

Each op has a reference in plain torch and faster implementations per device; ``backend`` chooses,
``is_supported`` and ``available_backends`` tell what runs here and why the rest does not.
"""

from __future__ import annotations

from coachhook.ops._backends import available_backends, is_supported
from coachhook.ops.cholesky import cholesky_downdate_, cholesky_update_, cholesky_update_solve_
from coachhook.ops.gram import gram_update_
from coachhook.ops.hooked_linear import (
    Membership,
    Population,
    Prefix,
    Scope,
    Sequence,
    Ungated,
    fuses_products,
    gate_scores,
    hook_output,
    hooked_linear,
)

__all__ = [
    "Membership",
    "Population",
    "Prefix",
    "Scope",
    "Sequence",
    "Ungated",
    "available_backends",
    "cholesky_downdate_",
    "cholesky_update_",
    "cholesky_update_solve_",
    "fuses_products",
    "gate_scores",
    "gram_update_",
    "hook_output",
    "hooked_linear",
    "is_supported",
]
