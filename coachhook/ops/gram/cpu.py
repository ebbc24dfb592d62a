"""``G += x^T x`` on CPU, one half of the product computed and added to both halves of G.

Each block of the product below the diagonal is added to G as it is and, transposed, above the
diagonal: a symmetric G stays symmetric to the last bit. Blocks of 512 columns: 1.5 to 1.7 times
faster than the full product from about 500 tokens on, 0.8 times at 128 tokens, where reading and
writing G is all the time (n = 4096, Zen 4, MKL).
"""

from __future__ import annotations

from torch import Tensor

_COLUMNS = 512
# Tokens converted to the dtype of G at a time.
_TOKENS = 4096


def gram_update_(gram: Tensor, x: Tensor, mask: Tensor | None) -> None:
    """Fast CPU form of :func:`coachhook.ops.gram_update_`; x [N, n], mask [N]."""
    if mask is not None:
        x = x[mask]
    step = len(x) if x.dtype == gram.dtype else _TOKENS
    for first in range(0, len(x), max(step, 1)):
        _add_(gram, x[first : first + step].to(gram.dtype))


def _add_(gram: Tensor, x: Tensor) -> None:
    n = x.shape[1]
    for left in range(0, n, _COLUMNS):
        right = min(left + _COLUMNS, n)
        product = x[:, left:].mT @ x[:, left:right]
        corner, below = product[: right - left], product[right - left :]
        gram[left:right, left:right] += corner.tril() + corner.tril(-1).mT
        gram[right:, left:right] += below
        gram[left:right, right:] += below.mT
