"""The gated hook in Triton: tensor-core products for many tokens, on the GPU alone.

The frozen product stays the library's own, and only the rows of tokens that fire are written to:
the others are bit-identical to the unhooked layer (:mod:`.products` says what else there is to
choose). Features and norms are formed in float32,
statistics in float64. Nothing is read back to the host and no shape depends on data, so a call can
be captured in a CUDA graph; Python numbers are baked into a graph, tensors (alpha, hook,
population, state) are read at every replay. Design and floors: ``docs/kernels/hooked_linear.md``.

Every argument was checked by the op; what is left to this file is layout and launches.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from coachhook.ops.hooked_linear import products, reference
from coachhook.ops.hooked_linear.cues import is_cued
from coachhook.ops.hooked_linear.policy import MIN_CAPABILITY, LaunchPolicy, Tile, policy
from coachhook.ops.hooked_linear.reference import Delta, correction, differentiates, project
from coachhook.ops.hooked_linear.scopes import Membership, Population, Prefix, Scope, Ungated
from coachhook.ops.hooked_linear.triton_cues import arm_

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Tokens and features a program of the reductions holds, tokens one of the gate and the list; warps.
_REDUCE_TOKENS, _REDUCE_FEATURES, _REDUCE_WARPS = 8, 128, 4
# Rows of a library's product are long: more of one in flight.
_WIDE_TOKENS, _WIDE_FEATURES = 2, 1024
_GROUP_TOKENS, _GROUP_FEATURES, _GROUP_WARPS = 32, 32, 8
_GATE_TOKENS, _GATE_WARPS = 1024, 8
_LIST_TOKENS, _LIST_WARPS = 1024, 4
# Named at every launch: the default of Triton is announced to change.
_FUSION = True
# Rows of float32 features start on 64 bytes: a pitch divisible by 16 makes 16-byte accesses.
_PITCH = 16


@cache
def _kernels() -> ModuleType:
    from coachhook.ops.hooked_linear import triton_kernels

    return triton_kernels


def supports(x: Tensor) -> str | None:
    """Why the kernels cannot take these tokens, or None."""
    if x.dtype not in _DTYPES:
        return f"it computes in float32, x is {x.dtype}"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < MIN_CAPABILITY:
        wanted, got = (".".join(map(str, c)) for c in (MIN_CAPABILITY, capability))
        return f"it needs compute capability {wanted}, {x.device} has {got}"
    return None


@dataclass(frozen=True)
class _Frozen:
    """The frozen layer, where a kernel computes it with the features of a dense hook.

    Attributes:
        weight: ``[m, n]`` in the dtype of x, adjacent elements in a row.
        bias: ``[m]``, or None.
        y: ``[N, m]`` contiguous, receives ``x W0^T + b``.
    """

    weight: Tensor
    bias: Tensor | None
    y: Tensor


@dataclass(frozen=True)
class _Gate:
    """What the gate leaves for the correction.

    Attributes:
        features: float32 ``[N, f]``, rows padded to 64 bytes; -inf for edits that are not armed.
        z: float32 ``[N]``.
        fired: uint8 ``[N]``.
        magnitude: float32 ``[N]``, norm or largest coefficient.
        winner: int32 ``[N]``, the best key or group of :class:`Membership`; else None.
    """

    features: Tensor
    z: Tensor
    fired: Tensor
    magnitude: Tensor
    winner: Tensor | None


def _device(x: Tensor) -> Any:
    """Context in which kernels launch on the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _rows(tensor: Tensor) -> Tensor:
    """``[N, k]`` with adjacent elements in a row; a copy only where there is no such view."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1).contiguous().view(torch.uint8)


def _per_sequence(value: float | Tensor, device: torch.device) -> Tensor:
    """float64 ``[1]`` or ``[B]``; a Python number never waits for the host."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64).reshape(-1)
    return torch.full((1,), value, dtype=torch.float64, device=device)


def _threshold(alpha: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    if not isinstance(alpha, Tensor):
        return None, float(alpha)
    if alpha.device == device:
        return alpha, 0.0
    return None, float(alpha)  # on the CPU: reading it waits for nothing


def _kind(x: Tensor, projection: Tensor) -> str:
    if x.dtype == torch.float32:
        return "full"
    return "single" if projection.dtype == x.dtype else "pair"


def projection_sizes(
    sizes: LaunchPolicy, kind: str, features: int, depth: int
) -> tuple[Tile, int, int]:
    """Tile, length of the chunks of n, and their number; see :class:`LaunchPolicy`."""
    tile = sizes.project(kind, features)
    chunk = sizes.chunk(tile, features, depth)
    return tile, chunk, -(-depth // chunk)


def _product(
    x: Tensor, projection: Tensor, frozen: _Frozen | None, want_squares: bool
) -> tuple[Tensor, Tensor | None]:
    """Partial features ``[splits, N, pitch]``, and sums of squares ``[N, tiles]`` of their rows.

    The squares are there only where ``want_squares`` and the sum over n is not cut.
    """
    kernels = _kernels()
    tokens, depth = x.shape
    count = projection.shape[0]
    kind = _kind(x, projection)
    sizes = policy(x.device)
    if frozen is None:
        tile, chunk, splits = projection_sizes(sizes, kind, count, depth)
    else:
        tile, chunk, splits = sizes.project(f"fused_{kind}", count), depth, 1
    tiles = -(-count // tile.width)
    pitch = -(-count // _PITCH) * _PITCH
    part = x.new_empty(splits, tokens, pitch, dtype=torch.float32)
    squares = None
    if splits == 1 and want_squares:
        squares = x.new_empty(tokens, tiles, dtype=torch.float32)
    token_tiles = -(-tokens // tile.tokens)
    kernels._project_kernel[(token_tiles * tiles, splits)](
        x,
        projection,
        part,
        squares,
        None if frozen is None else frozen.weight,
        None if frozen is None else frozen.bias,
        None if frozen is None else frozen.y,
        tokens,
        count,
        depth,
        x.stride(0),
        projection.stride(0),
        0 if frozen is None else frozen.weight.stride(0),
        pitch,
        chunk,
        PAIR=kind == "pair",
        GROUP=sizes.group,
        BT=tile.tokens,
        BF=tile.width,
        BK=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=_FUSION,
    )
    return part, squares


def _parts(
    x: Tensor, projection: Tensor, frozen: _Frozen | None, want_squares: bool
) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """As of :func:`_product`, whoever forms it, and the block sizes to reduce it with."""
    if projection.dtype == torch.float64:
        projection = projection.to(torch.float32)
    projection = _rows(projection)
    blocks = _REDUCE_TOKENS, _REDUCE_FEATURES
    library = frozen is None and products.way() == "library"
    if library and products.library_takes(x, projection):
        if projection.shape[0] > _WIDE_FEATURES:
            blocks = _WIDE_TOKENS, _WIDE_FEATURES
        return products.library_features(x, projection)[None], None, blocks
    return *_product(x, projection, frozen, want_squares), blocks


def _reduce(
    part: Tensor, squares: Tensor | None, count: int, reduction: Any, blocks: tuple[int, int]
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Magnitude, winner, and z and fired as they are outside any sequence; sums into ``part[0]``.

    Args:
        part: partial features ``[splits, N, pitch]``.
        squares: ``[N, tiles]`` sums of squares, or None.
        count: number of features.
        reduction: of ``triton_kernels``.
        blocks: tokens and features of a program.
    """
    kernels = _kernels()
    splits, tokens, pitch = part.shape
    magnitude = part.new_empty(tokens)
    largest = reduction is kernels.LARGEST
    winner = part.new_empty(tokens, dtype=torch.int32) if largest else None
    z = torch.empty_like(magnitude)
    fired = part.new_empty(tokens, dtype=torch.uint8)
    kernels._reduce_kernel[(-(-tokens // blocks[0]),)](
        part,
        squares,
        magnitude,
        winner,
        z,
        fired,
        tokens,
        count,
        pitch,
        0 if squares is None else squares.shape[1],
        SPLITS=splits,
        REDUCTION=reduction.value,
        BT=blocks[0],
        BF=blocks[1],
        num_warps=_REDUCE_WARPS,
        enable_fp_fusion=_FUSION,
    )
    return magnitude, winner, z, fired


@dataclass(frozen=True)
class _Layout:
    """How the tokens ``[N]`` are cut into sequences.

    Attributes:
        sequences: their number B.
        length: of each; of all together where ``cu_seqlens`` is not None.
        mask: uint8 ``[N]``, contiguous, or None.
        cu_seqlens: ``[B + 1]``, contiguous, or None.
    """

    sequences: int
    length: int
    mask: Tensor | None
    cu_seqlens: Tensor | None

    @staticmethod
    def of(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> _Layout:
        """Layout of an input ``[B, T, n]``, ``[T, n]``, or ``[N, n]`` with ``cu_seqlens``."""
        rows = x.shape[0] if x.dim() == 3 else 1
        if cu_seqlens is not None:
            rows, cu_seqlens = cu_seqlens.shape[0] - 1, cu_seqlens.contiguous()
        return _Layout(rows, x.shape[-2], _bytes(mask), cu_seqlens)


def _judged(part: Tensor, x: Tensor, scope: Scope, layout: _Layout) -> Tensor:
    """The sums ``[1, N, pitch]`` of the parts, -inf for edits of a scope that are not armed.

    Parts of a scope without cues are handed back. Updates the state of the cues.
    """
    if not isinstance(scope, Membership) or scope.cues is None:
        return part
    seen, _, _ = _parts(x, scope.cues, None, False)
    arm_(part, seen, scope, layout.sequences, layout.length, layout.mask, layout.cu_seqlens)
    return part[:1]


def _features(
    x: Tensor,
    projection: Tensor,
    scope: Scope,
    frozen: _Frozen | None,
    layout: _Layout,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Features ``[N, f]``, magnitude, winner, and z and fired as they are outside any sequence.

    The features of edits that are not armed are -inf; the state of the cues is updated.
    """
    kernels = _kernels()
    tokens, count = x.shape[0], projection.shape[0]
    reduction = kernels.LARGEST if isinstance(scope, Membership) else kernels.NORM
    if isinstance(scope, Ungated):
        reduction = kernels.NO_REDUCTION
    part, squares, blocks = _parts(x, projection, frozen, reduction is kernels.NORM)
    part = _judged(part, x, scope, layout)
    magnitude, winner, z, fired = _reduce(part, squares, count, reduction, blocks)
    features = part[0, :, :count]
    if isinstance(scope, Membership) and scope.groups is not None:
        kernels._group_max_kernel[(-(-tokens // _GROUP_TOKENS),)](
            part,
            scope.groups.contiguous(),
            magnitude,
            winner,
            tokens,
            count,
            part.shape[2],
            BT=_GROUP_TOKENS,
            BF=_GROUP_FEATURES,
            num_warps=_GROUP_WARPS,
            enable_fp_fusion=_FUSION,
        )
    return features, magnitude, winner, z, fired


def _gate(
    x: Tensor,
    projection: Tensor,
    alpha: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scope: Scope,
    frozen: _Frozen | None = None,
) -> _Gate:
    """Features, scores and decisions of the tokens of ``x``; updates the state of the scope."""
    kernels = _kernels()
    layout = _Layout.of(x, mask, cu_seqlens)
    features, magnitude, winner, z, fired = _features(_rows(x), projection, scope, frozen, layout)
    device = x.device
    mean = std = state = None
    kind = kernels.SEQUENCE
    if isinstance(scope, Membership):
        kind = kernels.DIRECT
    elif isinstance(scope, Ungated):
        kind = kernels.UNGATED
    elif isinstance(scope, Population):
        kind = kernels.POPULATION
        mean, std = _per_sequence(scope.mean, device), _per_sequence(scope.std, device)
    else:
        kind = kernels.PREFIX if isinstance(scope, Prefix) else kernels.SEQUENCE
        state = scope.state
    alpha_tensor, alpha_number = _threshold(alpha, device)
    kernels._gate_kernel[(layout.sequences,)](
        magnitude,
        layout.mask,
        layout.cu_seqlens,
        mean,
        std,
        state,
        alpha_tensor,
        alpha_number,
        z,
        fired,
        magnitude.shape[0],
        layout.length,
        0 if mean is None or mean.shape[0] == 1 else mean.stride(0),
        0 if std is None or std.shape[0] == 1 else std.stride(0),
        0 if state is None else state.stride(0),
        0 if state is None else state.stride(1),
        SCOPE=kind.value,
        CUED=is_cued(scope),
        BT=_GATE_TOKENS,
        num_warps=_GATE_WARPS,
        enable_fp_fusion=_FUSION,
    )
    return _Gate(features, z, fired, magnitude, winner)


def _add_correction_(y: Tensor, lift: Tensor | None, gate: _Gate, scope: Scope) -> None:
    """In place ``y[t] += lift @ features[t]`` for the tokens that fired; y ``[N, m]``."""
    kernels = _kernels()
    tokens, outputs = y.shape
    if lift is not None:
        lift = _rows(lift)
    own = isinstance(scope, Membership) and scope.correction == "own"
    groups = scope.groups if isinstance(scope, Membership) and own else None
    sizes = policy(y.device)
    full = y.dtype not in (torch.float16, torch.bfloat16)
    tile = sizes.correct_full if full else sizes.correct
    index = y.new_empty(tokens, dtype=torch.int32)
    count = y.new_empty(1, dtype=torch.int32)
    kernels._list_kernel[(1,)](
        gate.fired,
        index,
        count,
        tokens,
        BT=_LIST_TOKENS,
        num_warps=_LIST_WARPS,
        enable_fp_fusion=_FUSION,
    )
    kernels._correct_kernel[(-(-tokens // tile.tokens), -(-outputs // tile.width))](
        y,
        gate.features,
        lift,
        index,
        count,
        gate.winner if own else None,
        None if groups is None else groups.contiguous(),
        gate.magnitude if own else None,
        outputs,
        gate.features.shape[1],
        gate.features.stride(0),
        y.stride(0),
        0 if lift is None else lift.stride(0),
        PRECISION="ieee" if full else "tf32x3",
        BT=tile.tokens,
        BM=tile.width,
        BK=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=_FUSION,
    )


def _is_empty(x: Tensor, delta: Delta) -> bool:
    """Nothing to launch: no token, no input feature, or a hook without a feature."""
    projection = delta if isinstance(delta, Tensor) else delta[1]
    return x.numel() == 0 or projection.shape[0] == 0


def gate_scores(
    x: Tensor, delta: Delta, mask: Tensor | None, cu_seqlens: Tensor | None, scope: Scope
) -> Tensor:
    """As :func:`reference.gate_scores`."""
    if _is_empty(x, delta):
        return reference.gate_scores(x, delta, mask, cu_seqlens, scope)
    projection = delta if isinstance(delta, Tensor) else delta[1]
    with torch.no_grad(), _device(x):
        gate = _gate(x, projection, 0.0, mask, cu_seqlens, scope)
    return gate.z.view(x.shape[:-1])


def hook_output(
    base_output: Tensor,
    x: Tensor,
    delta: Delta,
    alpha: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scope: Scope,
    owned: bool = False,
) -> tuple[Tensor, Tensor]:
    """As :func:`reference.hook_output`.

    Args:
        owned: whether ``base_output`` may be overwritten.
    """
    if _is_empty(x, delta) or base_output.numel() == 0:
        return reference.hook_output(base_output, x, delta, alpha, mask, cu_seqlens, scope)
    lift, projection = (None, delta) if isinstance(delta, Tensor) else delta
    parts = (delta,) if isinstance(delta, Tensor) else delta
    with torch.no_grad(), _device(x):
        gate = _gate(x, projection, alpha, mask, cu_seqlens, scope)
    z = gate.z.view(x.shape[:-1])
    if differentiates(base_output, x, *parts):
        features = project(x.flatten(0, -2), delta)
        added = correction(features, delta, scope, gate.features).view(base_output.shape)
        hooked = (base_output.to(features.dtype) + added).to(base_output.dtype)
        return torch.where(gate.fired.bool().view(z.shape)[..., None], hooked, base_output), z
    if owned and base_output.is_contiguous():
        y = base_output
    else:
        y = base_output.clone(memory_format=torch.contiguous_format)
    with torch.no_grad(), _device(x):
        _add_correction_(y.view(-1, y.shape[-1]), lift, gate, scope)
    return y, z


def fuses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Delta,
    cu_seqlens: Tensor | None,
    scope: Scope,
) -> bool:
    """Whether :func:`hooked_linear` may compute the frozen product of this call itself.

    A factored hook has too few rows to share the tiles of x with W0, and in float32 the products
    are bound by their operations wherever x comes from.
    """
    dense = isinstance(delta, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
    return dense and products.can_fuse(x, weight, bias, delta)


def hooked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Delta,
    alpha: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scope: Scope,
) -> tuple[Tensor, Tensor]:
    """The whole layer with a dense hook, x read once, where :func:`fuses` allows it.

    The frozen product is summed in float32 and rounded once: not the bits of ``F.linear``.
    """
    if not isinstance(delta, Tensor):
        raise TypeError("hooked_linear: delta must be dense, got factors")
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = y.view(-1, y.shape[-1])
    with torch.no_grad(), _device(x):
        frozen = _Frozen(weight, None if bias is None else bias.contiguous(), rows)
        gate = _gate(x, delta, alpha, mask, cu_seqlens, scope, frozen)
        _add_correction_(rows, None, gate, scope)
    return y, gate.z.view(x.shape[:-1])
