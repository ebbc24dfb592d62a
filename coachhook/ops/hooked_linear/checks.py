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

# Shape, dtype and device of x: looked up once, a call has several tensors to hold against them.
Input = tuple[torch.Size, torch.dtype, torch.device]


def _text(shape: torch.Size) -> str:
    return f"[{', '.join(str(int(size)) for size in shape)}]"


def _type_name(value: Any) -> str:
    return type(value).__name__


def _check_tensor(op: str, name: str, value: Any, dims: int, device: torch.device) -> torch.Size:
    """Shape of a tensor of so many dimensions on the device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {_type_name(value)}")
    shape = value.shape
    if len(shape) != dims:
        raise ValueError(f"{op}: {name} must have {dims} dimensions, got shape {_text(shape)}")
    if value.device != device:
        raise ValueError(
            f"{op}: {name} must be on the device of x ({device}), got {value.device}; move it there"
        )
    return shape


def _check_float(op: str, name: str, value: Tensor) -> None:
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"{op}: {name} must be float16, bfloat16, float32 or float64, got {value.dtype}"
        )


def check_input(op: str, x: Any) -> Input:
    """``x`` is a floating point tensor of 2 or 3 dimensions; what the others must fit."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {_type_name(x)}")
    shape, dtype = x.shape, x.dtype
    if len(shape) not in (2, 3):
        raise ValueError(f"{op}: x must be [B, T, n], [T, n] or packed [N, n], got {_text(shape)}")
    if dtype not in _FLOATS:
        _check_float(op, "x", x)
    return shape, dtype, x.device


def check_weight(op: str, given: Input, weight: Any, bias: Any) -> int:
    """``weight [m, n]`` and ``bias [m]`` fit ``x [..., n]``; m."""
    x_shape, dtype, device = given
    shape = _check_tensor(op, "weight", weight, 2, device)
    if shape[1] != x_shape[-1]:
        raise ValueError(
            f"{op}: weight must be [m, {int(x_shape[-1])}] for x {_text(x_shape)}, "
            f"got {_text(shape)}"
        )
    if bias is not None:
        bias_shape = _check_tensor(op, "bias", bias, 1, device)
        if bias_shape[0] != shape[0]:
            raise ValueError(f"{op}: bias must be [{int(shape[0])}], got {_text(bias_shape)}")
    if weight.dtype != dtype:
        _refuse_dtype(op, "weight", given, weight)
    if bias is not None and bias.dtype != dtype:
        _refuse_dtype(op, "bias", given, bias)
    return shape[0]


def _refuse_dtype(op: str, name: str, given: Input, value: Tensor) -> None:
    _, dtype, device = given
    if not torch.is_autocast_enabled(device.type):
        raise TypeError(
            f"{op}: {name} must have the dtype of x, {dtype}, got {value.dtype}; "
            f"convert one of them"
        )


def check_base_output(op: str, given: Input, base_output: Any) -> int:
    """``base_output`` is ``[..., m]`` with the leading shape of ``x``; m."""
    x_shape, _, device = given
    shape = _check_tensor(op, "base_output", base_output, len(x_shape), device)
    _check_float(op, "base_output", base_output)
    if shape[:-1] != x_shape[:-1]:
        raise ValueError(
            f"{op}: base_output must have the leading shape of x {_text(x_shape)}, "
            f"got {_text(shape)}"
        )
    return shape[-1]


def _check_dense(op: str, given: Input, delta: Tensor, out_features: int | None) -> None:
    x_shape, _, device = given
    shape = _check_tensor(op, "delta", delta, 2, device)
    _check_float(op, "delta", delta)
    if shape[1] != x_shape[-1] or out_features not in (None, shape[0]):
        m = "m" if out_features is None else str(int(out_features))
        raise ValueError(f"{op}: delta must be [{m}, {int(x_shape[-1])}], got {_text(shape)}")


def _check_pair(op: str, given: Input, delta: Any, out_features: int | None) -> int:
    if not isinstance(delta, (tuple, list)) or len(delta) != 2:
        raise TypeError(
            f"{op}: delta must be a tensor [m, n] or a pair of tensors ([m, r], [r, n]), "
            f"got {_type_name(delta)}"
        )
    x_shape, _, device = given
    lift, projection = delta
    up = _check_tensor(op, "delta[0]", lift, 2, device)
    down = _check_tensor(op, "delta[1]", projection, 2, device)
    _check_float(op, "delta[0]", lift)
    _check_float(op, "delta[1]", projection)
    if up[1] != down[0] or down[1] != x_shape[-1] or out_features not in (None, up[0]):
        m = "m" if out_features is None else str(int(out_features))
        raise ValueError(
            f"{op}: delta must be ([{m}, r], [r, {int(x_shape[-1])}]), "
            f"got ({_text(up)}, {_text(down)})"
        )
    return up[1]


def _check_alpha(op: str, alpha: Any, device: torch.device) -> None:
    if isinstance(alpha, Tensor):
        if alpha.device != device and alpha.device.type != "cpu":
            raise ValueError(
                f"{op}: alpha must be on {device} or on the CPU, got {alpha.device}; move it there"
            )
        if alpha.dim() != 0:
            raise ValueError(
                f"{op}: alpha must be a float or a 0-dim tensor, got {_text(alpha.shape)}"
            )
        _check_float(op, "alpha", alpha)
    elif isinstance(alpha, bool) or not isinstance(alpha, (float, int)):
        raise TypeError(f"{op}: alpha must be a float or a 0-dim tensor, got {_type_name(alpha)}")


def _check_cu_seqlens(op: str, given: Input, cu_seqlens: Any) -> int:
    x_shape, _, device = given
    (size,) = _check_tensor(op, "cu_seqlens", cu_seqlens, 1, device)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if len(x_shape) != 2:
        raise ValueError(f"{op}: x must be packed [N, n] with cu_seqlens, got {_text(x_shape)}")
    if size < 2:
        raise ValueError(f"{op}: cu_seqlens must be [B + 1] with B >= 1, got [{int(size)}]")
    if torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor or cu_seqlens.is_cuda:
        return size - 1  # reading the values would break the graph, or wait for the device
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] > x_shape[0] or offsets != sorted(offsets):
        raise ValueError(
            f"{op}: cu_seqlens must start at 0, never decrease and end at or before "
            f"N = {x_shape[0]}, got {offsets[:8]}{'...' if len(offsets) > 8 else ''}"
        )
    return size - 1


def _check_state(op: str, device: torch.device, rows: int, state: Any) -> None:
    shape = _check_tensor(op, "scope.state", state, 2, device)
    if state.dtype not in _STATE_DTYPES:
        raise TypeError(f"{op}: scope.state must be float32 or float64, got {state.dtype}")
    if shape[0] != rows or shape[1] != 3:
        raise ValueError(f"{op}: scope.state must be [{int(rows)}, 3], got {_text(shape)}")


def _check_population(op: str, device: torch.device, rows: int, scope: Population) -> None:
    for name, value in (("scope.mean", scope.mean), ("scope.std", scope.std)):
        if isinstance(value, Tensor):
            shape = value.shape
            if shape and (len(shape) > 1 or shape[0] != rows):
                raise ValueError(
                    f"{op}: {name} must be a float, a 0-dim tensor or [{int(rows)}], "
                    f"got {_text(shape)}"
                )
            _check_float(op, name, value)
            if shape:
                _check_tensor(op, name, value, 1, device)
        elif isinstance(value, bool) or not isinstance(value, (float, int)):
            raise TypeError(f"{op}: {name} must be a float or a tensor, got {_type_name(value)}")


def _check_cues(op: str, given: Input, rows: int, keys: int, scope: Membership) -> None:
    x_shape, _, device = given
    cues, limits, state = scope.cues, scope.limits, scope.state
    if cues is None or limits is None:
        for name, value, other in (("cues", cues, "limits"), ("limits", limits, "cues")):
            if value is None and getattr(scope, other) is not None:
                raise ValueError(
                    f"{op}: scope.{name} must be a tensor with scope.{other}, got None; give both"
                )
        for name, value in (("state", state), ("reaches", scope.reaches), ("gaps", scope.gaps)):
            if value is not None:
                raise ValueError(
                    f"{op}: scope.{name} must be None without scope.cues, got "
                    f"{_type_name(value)}; leave it out, or give cues and limits"
                )
        return
    shape = _check_tensor(op, "scope.cues", cues, 2, device)
    _check_float(op, "scope.cues", cues)
    if shape[0] != keys or shape[1] != x_shape[-1]:
        raise ValueError(
            f"{op}: scope.cues must be [{int(keys)}, {int(x_shape[-1])}], one cue per key, "
            f"got {_text(shape)}"
        )
    shape = _check_tensor(op, "scope.limits", limits, 1, device)
    _check_float(op, "scope.limits", limits)
    if shape[0] != keys:
        raise ValueError(
            f"{op}: scope.limits must be [{int(keys)}], one limit per cue, got {_text(shape)}"
        )
    for name, one, value in (("reaches", "reach", scope.reaches), ("gaps", "gap", scope.gaps)):
        if value is None:
            continue
        shape = _check_tensor(op, f"scope.{name}", value, 1, device)
        if value.dtype != torch.int32:
            raise TypeError(f"{op}: scope.{name} must be int32, got {value.dtype}")
        if shape[0] != keys:
            raise ValueError(
                f"{op}: scope.{name} must be [{int(keys)}], one {one} per cue, got {_text(shape)}"
            )
    if scope.gaps is not None and scope.reaches is None:
        raise ValueError(
            f"{op}: scope.gaps must be None without scope.reaches, got "
            f"{_type_name(scope.gaps)}; leave it out, or give reaches"
        )
    if scope.correction != "own":
        raise ValueError(
            f"{op}: scope.correction must be 'own' with scope.cues, got {scope.correction!r}; "
            "a sum would add edits that are not armed"
        )
    if scope.groups is not None:
        raise ValueError(
            f"{op}: scope.groups must be None with scope.cues, got {_type_name(scope.groups)}; "
            "give every key a cue of its own"
        )
    if state is not None:
        shape = _check_tensor(op, "scope.state", state, 2, device)
        if state.dtype != torch.int64:
            raise TypeError(f"{op}: scope.state must be int64 with scope.cues, got {state.dtype}")
        if shape[0] != rows or shape[1] != 1 + 2 * keys:
            raise ValueError(
                f"{op}: scope.state must be [{int(rows)}, {1 + 2 * int(keys)}], a count and two "
                f"columns per cue, got {_text(shape)}"
            )


def _check_membership(op: str, given: Input, rows: int, keys: int, scope: Membership) -> None:
    device = given[2]
    if scope.correction not in ("sum", "own"):
        raise ValueError(f"{op}: scope.correction must be 'sum' or 'own', got {scope.correction!r}")
    _check_cues(op, given, rows, keys, scope)
    groups = scope.groups
    if groups is None:
        return
    shape = _check_tensor(op, "scope.groups", groups, 1, device)
    if groups.dtype != torch.int64:
        raise TypeError(f"{op}: scope.groups must be int64, got {groups.dtype}")
    if shape[0] != keys:
        raise ValueError(
            f"{op}: scope.groups must be [{int(keys)}], one group per key, got {_text(shape)}"
        )
    if torch.compiler.is_compiling() or type(groups) is not Tensor or groups.is_cuda or not keys:
        return
    low, high = (int(bound) for bound in torch.aminmax(groups))
    if low < 0 or high >= keys:
        raise ValueError(f"{op}: scope.groups must hold values in 0..{keys - 1}, got {low}..{high}")


def check_gate(
    op: str,
    given: Input,
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
    x_shape, _, device = given
    keys = 0
    if not isinstance(delta, Tensor):
        keys = _check_pair(op, given, delta, out_features)
        delta = tuple(delta)
    elif isinstance(scope, Membership):
        raise TypeError(
            f"{op}: delta must be the pair (V [m, N], A^T [N, n]) in the membership scope, "
            f"got a tensor {_text(delta.shape)}"
        )
    else:
        _check_dense(op, given, delta, out_features)
    _check_alpha(op, alpha, device)
    if mask is not None:
        mask_shape = _check_tensor(op, "mask", mask, len(x_shape) - 1, device)
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask must be bool, got {mask.dtype}; call .bool()")
        if mask_shape != x_shape[:-1]:
            raise ValueError(
                f"{op}: mask must have the leading shape of x {_text(x_shape)}, "
                f"got {_text(mask_shape)}"
            )
    rows = x_shape[0] if len(x_shape) == 3 else 1
    if cu_seqlens is not None:
        rows = _check_cu_seqlens(op, given, cu_seqlens)
    if isinstance(scope, Population):
        _check_population(op, device, rows, scope)
    elif isinstance(scope, (Sequence, Prefix)):
        if scope.state is not None:
            _check_state(op, device, rows, scope.state)
    elif isinstance(scope, Membership):
        _check_membership(op, given, rows, keys, scope)
    elif not isinstance(scope, Ungated):
        raise TypeError(
            f"{op}: scope must be Sequence, Prefix, Population, Membership or Ungated, "
            f"got {_type_name(scope)}"
        )
    return delta, scope
