"""Argument checks of the gated ops: everything is refused before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coachhook.ops.hooked_linear.reference import Delta
from coachhook.ops.hooked_linear.scopes import (
    Membership,
    Population,
    Prefix,
    Scope,
    Sequence,
    Ungated,
)

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_STATE_DTYPES = frozenset({torch.float32, torch.float64})


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(str(int(s)) for s in tensor.shape)}]"


def _type_name(value: Any) -> str:
    return type(value).__name__


def _check_tensor(op: str, name: str, value: Any, dims: int, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {_type_name(value)}")
    if value.dim() != dims:
        raise ValueError(f"{op}: {name} must have {dims} dimensions, got shape {_shape(value)}")
    if value.device != device:
        raise ValueError(
            f"{op}: {name} must be on the device of x ({device}), got {value.device}; move it there"
        )
    return value


def _check_float(op: str, name: str, value: Tensor) -> None:
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"{op}: {name} must be float16, bfloat16, float32 or float64, got {value.dtype}"
        )


def check_input(op: str, x: Any) -> None:
    """``x`` is a floating point tensor of 2 or 3 dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {_type_name(x)}")
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: x must be [B, T, n], [T, n] or packed [N, n], got {_shape(x)}")
    _check_float(op, "x", x)


def check_weight(op: str, x: Tensor, weight: Any, bias: Any) -> None:
    """``weight [m, n]`` and ``bias [m]`` fit ``x [..., n]``."""
    _check_tensor(op, "weight", weight, 2, x.device)
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight must be [m, {int(x.shape[-1])}] for x {_shape(x)}, got {_shape(weight)}"
        )
    if bias is not None:
        _check_tensor(op, "bias", bias, 1, x.device)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{op}: bias must be [{int(weight.shape[0])}], got {_shape(bias)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != x.dtype:
            if torch.is_autocast_enabled(x.device.type):
                return
            raise TypeError(
                f"{op}: {name} must have the dtype of x, {x.dtype}, got {value.dtype}; "
                f"convert one of them"
            )


def check_base_output(op: str, base_output: Any, x: Tensor) -> None:
    """``base_output`` is ``[..., m]`` with the leading shape of ``x``."""
    _check_tensor(op, "base_output", base_output, x.dim(), x.device)
    _check_float(op, "base_output", base_output)
    if base_output.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{op}: base_output must have the leading shape of x {_shape(x)}, "
            f"got {_shape(base_output)}"
        )


def _check_delta(op: str, x: Tensor, delta: Any, out_features: int | None, pair: bool) -> Delta:
    n = x.shape[-1]
    if isinstance(delta, Tensor):
        if pair:
            raise TypeError(
                f"{op}: delta must be the pair (V [m, N], A^T [N, n]) in the membership scope, "
                f"got a tensor {_shape(delta)}"
            )
        _check_tensor(op, "delta", delta, 2, x.device)
        _check_float(op, "delta", delta)
        if delta.shape[1] != n or out_features not in (None, delta.shape[0]):
            m = "m" if out_features is None else str(int(out_features))
            raise ValueError(f"{op}: delta must be [{m}, {int(n)}], got {_shape(delta)}")
        return delta
    if not isinstance(delta, (tuple, list)) or len(delta) != 2:
        raise TypeError(
            f"{op}: delta must be a tensor [m, n] or a pair of tensors ([m, r], [r, n]), "
            f"got {_type_name(delta)}"
        )
    lift, projection = delta
    _check_tensor(op, "delta[0]", lift, 2, x.device)
    _check_tensor(op, "delta[1]", projection, 2, x.device)
    _check_float(op, "delta[0]", lift)
    _check_float(op, "delta[1]", projection)
    if (
        lift.shape[1] != projection.shape[0]
        or projection.shape[1] != n
        or out_features not in (None, lift.shape[0])
    ):
        m = "m" if out_features is None else str(int(out_features))
        raise ValueError(
            f"{op}: delta must be ([{m}, r], [r, {int(n)}]), "
            f"got ({_shape(lift)}, {_shape(projection)})"
        )
    return lift, projection


def _check_alpha(op: str, alpha: Any, device: torch.device) -> None:
    if isinstance(alpha, Tensor):
        if alpha.device != device and alpha.device.type != "cpu":
            raise ValueError(
                f"{op}: alpha must be on {device} or on the CPU, got {alpha.device}; move it there"
            )
        if alpha.dim() != 0:
            raise ValueError(f"{op}: alpha must be a float or a 0-dim tensor, got {_shape(alpha)}")
        _check_float(op, "alpha", alpha)
    elif isinstance(alpha, bool) or not isinstance(alpha, (float, int)):
        raise TypeError(f"{op}: alpha must be a float or a 0-dim tensor, got {_type_name(alpha)}")


def _check_cu_seqlens(op: str, x: Tensor, cu_seqlens: Any) -> None:
    _check_tensor(op, "cu_seqlens", cu_seqlens, 1, x.device)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be packed [N, n] with cu_seqlens, got {_shape(x)}")
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"{op}: cu_seqlens must be [B + 1] with B >= 1, got {_shape(cu_seqlens)}")
    if torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor or cu_seqlens.is_cuda:
        return  # reading the values would break the graph, or wait for the device
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] > x.shape[0] or offsets != sorted(offsets):
        raise ValueError(
            f"{op}: cu_seqlens must start at 0, never decrease and end at or before "
            f"N = {x.shape[0]}, got {offsets[:8]}{'...' if len(offsets) > 8 else ''}"
        )


def _check_state(op: str, x: Tensor, rows: int, state: Any) -> None:
    _check_tensor(op, "scope.state", state, 2, x.device)
    if state.dtype not in _STATE_DTYPES:
        raise TypeError(f"{op}: scope.state must be float32 or float64, got {state.dtype}")
    if state.shape[0] != rows or state.shape[1] != 3:
        raise ValueError(f"{op}: scope.state must be [{int(rows)}, 3], got {_shape(state)}")


def _check_population(op: str, x: Tensor, rows: int, scope: Population) -> None:
    for name, value in (("scope.mean", scope.mean), ("scope.std", scope.std)):
        if isinstance(value, Tensor):
            if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != rows):
                raise ValueError(
                    f"{op}: {name} must be a float, a 0-dim tensor or [{int(rows)}], "
                    f"got {_shape(value)}"
                )
            _check_float(op, name, value)
            if value.dim() == 1:
                _check_tensor(op, name, value, 1, x.device)
        elif isinstance(value, bool) or not isinstance(value, (float, int)):
            raise TypeError(f"{op}: {name} must be a float or a tensor, got {_type_name(value)}")


def _check_membership(op: str, x: Tensor, keys: int, scope: Membership) -> None:
    if scope.correction not in ("sum", "own"):
        raise ValueError(f"{op}: scope.correction must be 'sum' or 'own', got {scope.correction!r}")
    groups = scope.groups
    if groups is None:
        return
    _check_tensor(op, "scope.groups", groups, 1, x.device)
    if groups.dtype != torch.int64:
        raise TypeError(f"{op}: scope.groups must be int64, got {groups.dtype}")
    if groups.shape[0] != keys:
        raise ValueError(
            f"{op}: scope.groups must be [{int(keys)}], one group per key, got {_shape(groups)}"
        )
    if torch.compiler.is_compiling() or type(groups) is not Tensor or groups.is_cuda or not keys:
        return
    low, high = (int(bound) for bound in torch.aminmax(groups))
    if low < 0 or high >= keys:
        raise ValueError(f"{op}: scope.groups must hold values in 0..{keys - 1}, got {low}..{high}")


def check_gate(
    op: str,
    x: Tensor,
    delta: Any,
    alpha: Any,
    mask: Any,
    cu_seqlens: Any,
    scope: Any,
    out_features: int | None,
) -> tuple[Delta, Scope]:
    """Check the arguments of the gate; the normalised delta and scope (None: the paper's)."""
    if scope is None:
        scope = Sequence()
    delta = _check_delta(op, x, delta, out_features, isinstance(scope, Membership))
    _check_alpha(op, alpha, x.device)
    if mask is not None:
        _check_tensor(op, "mask", mask, x.dim() - 1, x.device)
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask must be bool, got {mask.dtype}; call .bool()")
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{op}: mask must have the leading shape of x {_shape(x)}, got {_shape(mask)}"
            )
    rows = x.shape[0] if x.dim() == 3 else 1
    if cu_seqlens is not None:
        _check_cu_seqlens(op, x, cu_seqlens)
        rows = cu_seqlens.shape[0] - 1
    if isinstance(scope, (Sequence, Prefix)):
        if scope.state is not None:
            _check_state(op, x, rows, scope.state)
    elif isinstance(scope, Population):
        _check_population(op, x, rows, scope)
    elif isinstance(scope, Membership):
        _check_membership(op, x, delta[0].shape[1], scope)
    elif not isinstance(scope, Ungated):
        raise TypeError(
            f"{op}: scope must be Sequence, Prefix, Population, Membership or Ungated, "
            f"got {_type_name(scope)}"
        )
    return delta, scope
