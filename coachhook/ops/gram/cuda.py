"""``G += x^T x`` on a GPU: block columns of the lower half through cuBLAS, then mirrored.

The products of a block column are added to G inside the product's kernel. What lies above the
diagonal is a copy of what lies below, so that G is symmetric to the last bit; half of the product
is never formed. Nothing is read back to the host: padding is set to zero, not left out.

Products are those of the dtype of G. float64 sums take float64 products, exact for keys of 16 and
32 bits. float32 sums of 16-bit keys run on the TF32 units, whose 10 bits of mantissa hold float16
and bfloat16 values exactly: the products are exact, the sums round in float32. float32 keys have no
exact form there and are multiplied in full float32, whatever the caller allows elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coachhook.ops._precision import float32_products

# Columns of a block: the diagonal blocks, half of which is formed in vain, are n / 1024 of n.
_COLUMNS = 1024
# Tokens converted to the dtype of G at a time.
_TOKENS = 8192


def gram_update_(gram: Tensor, x: Tensor, mask: Tensor | None) -> None:
    """CUDA form of :func:`coachhook.ops.gram_update_`; x [N, n], mask [N]. Runs on any device."""
    if mask is not None:
        x = x.masked_fill(~mask[:, None], 0)
    n = x.shape[1]
    with float32_products(tf32=x.dtype in (torch.float16, torch.bfloat16)):
        for part in x.split(_TOKENS):
            keys = part.to(gram.dtype)
            for left in range(0, n, _COLUMNS):
                block = gram[left:, left : left + _COLUMNS]
                block.addmm_(keys[:, left:].mT, keys[:, left : left + _COLUMNS])
    for left in range(0, n, _COLUMNS):
        right = min(left + _COLUMNS, n)
        corner = gram[left:right, left:right]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        gram[left:right, right:] = gram[right:, left:right].mT


def add_lower_(total: Tensor, x: Tensor) -> None:
    """Add ``x^T x``, its products formed and summed in float32, to the lower half of a total.

    A block column at a time: its product is still in the L2 cache when it is added. 16-bit keys are
    multiplied as they are where torch does that into float32, by units of twice the rate of TF32.

    Args:
        total: [n, n] float64, updated in place; what is above the diagonal means nothing after it.
        x: keys [N, n], at most 32 bits.
    """
    short = x.dtype in (torch.float16, torch.bfloat16)
    as_they_are = short and x.is_cuda and hasattr(torch.ops.aten.mm, "dtype")
    with float32_products(tf32=short):
        for part in x.split(_TOKENS):
            keys = part if as_they_are else part.to(torch.float32)
            for left in range(0, x.shape[1], _COLUMNS):
                below, block = keys[:, left:].mT, keys[:, left : left + _COLUMNS]
                if as_they_are:
                    product = torch.mm(below, block, out_dtype=torch.float32)
                else:
                    product = below @ block
                total[left:, left : left + _COLUMNS] += product
