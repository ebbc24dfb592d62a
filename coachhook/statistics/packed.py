"""Symmetric or triangular matrices as their lower triangle by rows: n (n + 1) / 2 values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BLOCK = 512


def pack_lower(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the lower triangle of `matrix` [n, n] as [n (n + 1) / 2] of `dtype` on the CPU."""
    n = matrix.shape[0]
    packed = torch.empty(n * (n + 1) // 2, dtype=dtype)
    for first in range(0, n, _BLOCK):
        rows = matrix[first : first + _BLOCK].to(device="cpu", dtype=dtype)
        for i, row in enumerate(rows, start=first):
            packed[i * (i + 1) // 2 :][: i + 1] = row[: i + 1]
    return packed


def unpack_lower(packed: Tensor) -> Tensor:
    """Return the symmetric float64 matrix [n, n] of a packed triangle of any floating dtype."""
    matrix = unpack_triangle(packed, torch.float64)
    mirror_lower_(matrix)
    return matrix


def unpack_triangle(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the lower triangular matrix [n, n] of a packed triangle, zero above the diagonal."""
    n = packed_order(packed.numel())
    matrix = torch.zeros(n, n, dtype=dtype)
    for i in range(n):
        matrix[i, : i + 1] = packed[i * (i + 1) // 2 :][: i + 1]
    return matrix


def mirror_lower_(matrix: Tensor) -> None:
    """Overwrite what is above the diagonal of `matrix` [n, n] with what is below, in place."""
    n = matrix.shape[0]
    for first in range(0, n, _BLOCK):
        last = min(first + _BLOCK, n)
        square = matrix[first:last, first:last]
        square.copy_(square.tril() + square.tril(-1).T)
        matrix[first:last, last:] = matrix[last:, first:last].T


def packed_order(length: int) -> int:
    """Return the n whose packed triangle has `length` values.

    Raises:
        ValueError: there is none.
    """
    n = (math.isqrt(8 * length + 1) - 1) // 2
    if n * (n + 1) // 2 != length:
        raise ValueError(f"unpack: length must be n (n + 1) / 2 of a whole n, got {length}")
    return n
