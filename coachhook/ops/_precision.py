"""How float32 matrices are multiplied, for the length of a block of code.

torch keeps what cuBLAS does in one setting of the process, and autocast, which rounds operands to
16 bits, in one for each thread and kind of device. An op that needs a certain precision sets them
for its own products and puts back what the caller chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def without_autocast(kind: str) -> AbstractContextManager[object]:
    """Autocast off on a kind of device, such as "cuda", where the caller has it on."""
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Products of float32 matrices in full precision, or on a GPU with operands rounded to TF32.

    TF32 keeps 10 bits of the mantissa and all of the exponent: float16 and bfloat16 values survive
    it unchanged, so that their products are exact and only the float32 sums round.
    """
    settings = torch.backends.cuda.matmul
    # Since torch 2.9; there the older switch must not be touched once the newer one was.
    name: str
    value: str | bool
    if hasattr(settings, "fp32_precision"):
        name, value = "fp32_precision", "tf32" if tf32 else "ieee"
    else:
        name, value = "allow_tf32", tf32
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        with without_autocast("cpu"), without_autocast("cuda"):
            yield
    finally:
        setattr(settings, name, before)
