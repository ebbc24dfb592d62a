"""The factor G of ``L' = L G`` by panels of columns, in torch: for CPUs and for many keys on GPUs.

``G = chol(I + s X X^T)`` is semiseparable: for panels of ``b`` columns, ``P_j`` the sum of
``X_i^T X_i`` over the panels before ``j``, and ``R_j R_j^T = I + s P_j``,

    Y_j  = R_j^-1 X_j^T                                    [k, b]
    G_jj = chol(I + s Y_j^T Y_j)                           [b, b]
    W_j  = s R_j^-T Y_j G_jj^-T                            [k, b]
    L'_ij = L_ij G_jj + (K_i - sum_{p <= j} L_ip X_p) W_j  for i > j
    L'_jj = L_jj G_jj

(Gill, Golub, Murray, Saunders 1974 for k = 1; the panel form follows by block elimination.) All
``G_jj`` and ``W_j`` come from ``X`` alone, so every way of failing is met before ``L`` is touched;
after that the row blocks of ``L`` are independent of each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the batched k x k temporaries, 32 MiB in float64.
_BATCH_ELEMENTS = 1 << 22


def panel_width(k: int) -> int:
    """Panel width b, a power of two from 32 on and at least k.

    With fewer rows than keys ``P_1`` is singular: beside keys that outweigh L L^T the I of
    ``I + P_1`` drowns in its rounding, which costs L' up to as many digits as they outweigh by.
    """
    return max(32, 1 << (k - 1).bit_length())


def rotations(solved: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """``G_jj`` over ``W_j`` for all panels; nothing is read back to the host.

    Args:
        solved: X [n, k].
        sign: s, 1 or -1.

    Returns:
        [panels, b + k, b], and whether some matrix was not positive definite (bool, 0-dim); then
        the first may hold anything.
    """
    n, k = solved.shape
    width = min(panel_width(k), n)
    panels = -(-n // width)
    padded = solved.new_zeros(panels * width, k)
    padded[:n] = solved
    by_panel = padded.view(panels, width, k)
    stacked = solved.new_empty(panels, width + k, width)
    prefix = torch.eye(k, dtype=solved.dtype, device=solved.device)
    unit = torch.eye(width, dtype=solved.dtype, device=solved.device)
    failed = torch.zeros((), dtype=torch.bool, device=solved.device)
    step = max(1, _BATCH_ELEMENTS // (k * k))
    for first in range(0, panels, step):
        part = by_panel[first : first + step]
        sums = torch.cumsum(torch.cat([prefix[None], sign * torch.bmm(part.mT, part)]), 0)
        root, root_info = torch.linalg.cholesky_ex(sums[:-1])
        prefix = sums[-1]
        y = torch.linalg.solve_triangular(root, part.mT, upper=False)
        corner, corner_info = torch.linalg.cholesky_ex(unit + sign * torch.bmm(y.mT, y))
        z = torch.linalg.solve_triangular(corner, y.mT, upper=False)
        out = stacked[first : first + step]
        out[:, :width] = corner
        out[:, width:] = sign * torch.linalg.solve_triangular(root.mT, z.mT, upper=True)
        failed |= root_info.any() | corner_info.any()
    return stacked, failed


def apply_(factor: Tensor, keys: Tensor, solved: Tensor, stacked: Tensor, rows: int) -> None:
    """Overwrite the lower triangle of L by that of L G, ``rows`` rows at a time, or a panel's.

    Each tile is copied into contiguous scratch ``[L_ij | K_i]`` and multiplied once by
    ``[G_jj; W_j]``.
    """
    n, k = keys.shape
    width = stacked.shape[2]
    rows = max(rows, width)  # else a corner would lie in two blocks
    scratch = factor.new_empty(min(rows, n), width + k)
    for top in range(0, n, rows):
        bottom = min(top + rows, n)
        scratch[: bottom - top, width:] = keys[top:bottom]
        for panel, left in enumerate(range(0, bottom, width)):
            right = min(left + width, n)
            if right > top:
                corner = factor[left:right, left:right]
                size = right - left
                rotated = corner.tril() @ stacked[panel, :size, :size]
                corner.copy_(rotated + corner.triu(1))
            first = max(right, top)
            if first < bottom:
                block = factor[first:bottom, left:right]
                tile = scratch[first - top : bottom - top]
                tile[:, :width] = block
                tile[:, width:].addmm_(tile[:, :width], solved[left:right], alpha=-1)
                torch.mm(tile, stacked[panel], out=block)
