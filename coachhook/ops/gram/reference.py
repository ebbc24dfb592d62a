"""``G += x^T x`` in one float64 product: the truth the fast paths are tested against."""

from __future__ import annotations

from torch import Tensor


def gram_update_(gram: Tensor, x: Tensor, mask: Tensor | None) -> None:
    """Reference of :func:`coachhook.ops.gram_update_`; x [N, n], mask [N]. Runs on any device."""
    wide = x.double()
    if mask is not None:
        wide = wide.masked_fill(~mask[:, None], 0.0)
    product = wide.mT @ wide
    gram.add_(((product + product.mT) / 2).to(gram.dtype))
