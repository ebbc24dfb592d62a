"""Kernels that suit a model which is read again and again.

Activations in one kernel: less to run, and less to keep.

GPT-2 and GPT-J write their GELU out in eight operations, which on a CPU cost as much as the product
before them. torch has the same function whole. The two differ by rounding: in 16 bits, where every
operation rounds, by enough to show in keys, so where keys are read only wider models are changed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import NewGELUActivation

_WIDE = (torch.float32, torch.float64)

# torch has one setting for all threads: the last to leave brings back what the first one found.
_TURN = threading.Lock()
_found: list[bool] = []


def _gelu(input: Tensor) -> Tensor:
    return F.gelu(input, approximate="tanh")


@contextmanager
def fused_activations(model: nn.Module, *, narrow: bool = False) -> Iterator[None]:
    """Run the activations of a model that are known to be written out in one kernel each.

    Args:
        model: any, or some blocks of one; left as it was afterwards.
        narrow: in 16 bits too, where what is read may differ in its last bits.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    changed = [
        module
        for module in model.modules()
        # A device map, for one, may have put another forward there.
        if type(module) is NewGELUActivation and "forward" not in vars(module)
    ]
    if not narrow and not dtypes.issubset(_WIDE):
        changed = []
    try:
        for module in changed:
            vars(module)["forward"] = _gelu
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


@contextmanager
def planless_attention() -> Iterator[None]:
    """Run attention without cuDNN, which plans anew for every shape that it has not seen.

    A plan takes longer than the attention of some hundred short prompts, and prompts, steps and
    samples of one batch of edits have dozens of shapes. Of no effect on a CPU.
    """
    with _TURN:
        _found.append(torch.backends.cuda.cudnn_sdp_enabled())
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        with _TURN:
            found = _found.pop()
            if not _found:
                torch.backends.cuda.enable_cudnn_sdp(found)
