"""The Cholesky kernels of ``csrc/cholesky*.cuh`` on torch tensors.

Every argument was checked by the op; what is left to this file is layout.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from coachhook.ops import _backends

# Panels of this many columns; as many keys as the kernels take at once.
WIDTH = 32
MAX_KEYS = 64
# Numbers of columns that the kernels work on.
COLUMNS = (32, 64)
# Oldest architecture the extension is built for, and the first with float64 tensor cores.
MIN_CAPABILITY = (8, 0)
# Blocks of rows are the second dimension of a grid, and rows are counted in 32 bits.
MAX_ROWS = 1 << 20
# Rows of a tile of a solve's products.
_TILE_ROWS = 64
# Blocks of threads of the kernels built for the host, which run one after another.
_HOST_WORKERS = 3


def kernels(factor: Tensor) -> ModuleType | None:
    """The extension, where its kernels can take a factor [n, n] on its device."""
    if not factor.is_cuda or len(factor) > MAX_ROWS:
        return None
    if torch.cuda.get_device_capability(factor.device) < MIN_CAPABILITY:
        return None
    return loaded()


@cache
def loaded() -> ModuleType | None:
    """The extension, where its CUDA runtime can use this machine's driver."""
    module = _backends.native()
    return module if module is not None and module.build_info()["devices"] > 0 else None


def padded_keys(k: int) -> int:
    """Columns that the kernels work on for k keys; the rest are zero."""
    return 32 if k <= 32 else 64


def padded_rows(n: int) -> int:
    """n rounded up to whole panels."""
    return -(-n // WIDTH) * WIDTH


def _place(tensor: Tensor) -> dict[str, int]:
    device = tensor.device
    if device.type != "cuda":  # the kernels built for the host
        return {"device": 0, "stream": 0}
    stream = torch.cuda.current_stream(device)
    return {"device": stream.device_index, "stream": stream.cuda_stream}


def _real(native: ModuleType, dtype: torch.dtype) -> object:
    return native.Real.float64 if dtype == torch.float64 else native.Real.float32


@cache
def _workers(device: torch.device) -> int:
    """Blocks of threads that run at once, of a kernel that fills a multiprocessor."""
    if device.type != "cuda":
        return _HOST_WORKERS
    return torch.cuda.get_device_properties(device).multi_processor_count


def invert_diagonal(native: ModuleType, factor: Tensor, inverses: Tensor) -> Tensor:
    """Inverses of the diagonal blocks of L.

    Args:
        native: the extension module.
        factor: L [n, n], any strides.
        inverses: [blocks, rows, rows] with ``rows`` elements between two blocks, ``rows`` 64 by a
            power of two. What lies below and to the right of row n in the last is not to be read.

    Returns:
        int32 [n / 64, 4], zeros: what :func:`solve` needs.
    """
    blocks, rows, _ = inverses.shape
    tiles = -(-len(factor) // _TILE_ROWS)
    arrivals = factor.new_empty(tiles, native.CHOLESKY_ARRIVALS, dtype=torch.int32)
    scratch = factor.new_empty(blocks, rows // 2, rows // 2)
    native.cholesky_invert(
        real=_real(native, factor.dtype),
        n=len(factor),
        rows=rows,
        factor=factor.data_ptr(),
        row_stride=factor.stride(0),
        column_stride=factor.stride(1),
        inverses=inverses.data_ptr(),
        scratch=scratch.data_ptr(),
        arrivals=arrivals.data_ptr(),
        **_place(factor),
    )
    return arrivals


def solve(
    native: ModuleType,
    factor: Tensor,
    inverses: Tensor,
    arrivals: Tensor,
    right: Tensor,
    residuals: Tensor,
    solved: Tensor,
    *,
    transposed: bool = False,
    keep: bool = False,
) -> None:
    """``L^-1 right``, or ``L^-T right``, by the steps of ``BlockedFactor``.

    Args:
        native: the extension module.
        factor: L [n, n], any strides.
        inverses: of its diagonal blocks in whole, see :func:`invert_diagonal`.
        arrivals: from there; zeros again when all is done, so that no two solves may overlap.
        right: [n, c], contiguous, of 32 or 64 columns.
        residuals: [n, c], contiguous, for what is left of it meanwhile. With ``keep``
            [blocks, n, c], the first of them ``right``, see ``BlockedFactor.solve_keeping``.
        solved: [>= n, c], contiguous, receives the solution.
        transposed: whether to solve with L^T.
        keep: whether to keep the residual before each step.
    """
    workers, columns = _workers(factor.device), residuals.shape[-1]
    partial = factor.new_empty(2 * workers, _TILE_ROWS, columns)
    native.cholesky_solve(
        real=_real(native, factor.dtype),
        n=len(factor),
        rows=inverses.shape[1],
        columns=columns,
        transposed=transposed,
        keep=keep,
        factor=factor.data_ptr(),
        row_stride=factor.stride(0),
        column_stride=factor.stride(1),
        inverses=inverses.data_ptr(),
        right=right.data_ptr(),
        residuals=residuals.data_ptr(),
        solved=solved.data_ptr(),
        workers=workers,
        partial=partial.data_ptr(),
        arrivals=arrivals.data_ptr(),
        **_place(factor),
    )


def rotations(
    native: ModuleType,
    factor: Tensor,
    solved: Tensor,
    keys: int,
    sign: int,
    margin: float,
    pivot_limit: float,
    status: Tensor,
    inverse: Tensor | None,
) -> Tensor:
    """``G_jj`` over ``W_j`` [panels, 32 + c, 32], from X alone; see ``_panels.py``.

    Args:
        native: the extension module.
        factor: L [n, n], of which the diagonal is checked.
        solved: X [32 panels, c], contiguous, zero below row n and right of column ``keys``.
        keys: k.
        sign: s.
        margin: ``(1 - margin) I + s X^T X`` must be positive definite, else the update fails.
        pivot_limit: largest ratio of its squared pivots called even.
        status: int32 [2] of zeros; its first becomes 1 where the update fails or something is not
            finite, its second where the pivots are not even.
        inverse: [c, c] receives ``(I + s X^T X)^-1``, or None.
    """
    rows, columns = solved.shape
    by_panel = solved.view(rows // WIDTH, WIDTH, columns)
    panels = len(by_panel)
    # With more keys than rows in the first panel the kernel takes it together with the second.
    paired = columns > WIDTH and panels > 1
    sums = solved.new_empty(panels + 1 + paired, columns, columns)
    torch.bmm(by_panel.mT, by_panel, out=sums[:panels])
    if paired:
        first = solved[: 2 * WIDTH]
        torch.mm(first, first.mT, out=sums[panels + 1])
    stacked = solved.new_empty(len(by_panel), WIDTH + columns, WIDTH)
    native.cholesky_rotations(
        real=_real(native, factor.dtype),
        n=len(factor),
        keys=keys,
        columns=columns,
        sign=sign,
        solved=solved.data_ptr(),
        sums=sums.data_ptr(),
        factor=factor.data_ptr(),
        diagonal_stride=sum(factor.stride()),
        margin=margin,
        pivot_limit=pivot_limit,
        rotations=stacked.data_ptr(),
        inverse=0 if inverse is None else inverse.data_ptr(),
        status=status.data_ptr(),
        **_place(factor),
    )
    return stacked


def apply_(
    native: ModuleType,
    factor: Tensor,
    residuals: Tensor,
    chunk: int,
    solved: Tensor,
    stacked: Tensor,
    status: Tensor,
) -> None:
    """Overwrite the lower triangle of L by that of L G where ``status[0]`` is 0.

    Args:
        native: the extension module.
        factor: L [n, n], any strides.
        residuals: [chunks, n, c], see ``BlockedFactor.solve_keeping``.
        chunk: columns of L between two of them.
        solved: X [32 panels, c].
        stacked: from :func:`rotations`.
        status: int32 [2].
    """
    native.cholesky_apply(
        real=_real(native, factor.dtype),
        n=len(factor),
        columns=solved.shape[1],
        factor=factor.data_ptr(),
        row_stride=factor.stride(0),
        column_stride=factor.stride(1),
        residuals=residuals.data_ptr(),
        chunk=chunk,
        solved=solved.data_ptr(),
        rotations=stacked.data_ptr(),
        status=status.data_ptr(),
        **_place(factor),
    )


def load_batch(
    native: ModuleType,
    keys: Tensor,
    targets: Tensor,
    key_rows: Tensor,
    right: Tensor,
    target_rows: Tensor,
    row: int,
    at: Tensor,
) -> None:
    """Copies a batch to where an append works on it, in one launch.

    Args:
        native: the extension module.
        keys: K [n, k], any strides, of the dtype of all others.
        targets: V [m, k], likewise.
        key_rows: [s, n], contiguous, receives K^T and zeros below it.
        right: [n, s], contiguous, receives K and zeros to its right.
        target_rows: [s, m], contiguous, receives V^T and zeros below it.
        row: a number,
        at: int64 [1], that goes here.
    """
    native.load_batch(
        real=_real(native, keys.dtype),
        columns=keys.shape[1],
        size=len(key_rows),
        keys=keys.data_ptr(),
        features=len(keys),
        keys_row_stride=keys.stride(0),
        keys_column_stride=keys.stride(1),
        key_rows=key_rows.data_ptr(),
        right=right.data_ptr(),
        targets=targets.data_ptr(),
        out_features=len(targets),
        targets_row_stride=targets.stride(0),
        targets_column_stride=targets.stride(1),
        target_rows=target_rows.data_ptr(),
        row=row,
        at=at.data_ptr(),
        **_place(keys),
    )
