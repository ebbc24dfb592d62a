"""Launches of the kernels of cues, see ``triton_cue_kernels.py``."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from coachhook.ops.hooked_linear.scopes import Membership

# Edits of a program, and its warps; of one that goes through a sequence, one for each edit's lane.
_EDITS, _WARPS, _READ_WARPS = 32, 4, 1
# As named in ``triton.py``.
_FUSION = True


@cache
def _kernels() -> ModuleType:
    from coachhook.ops.hooked_linear import triton_cue_kernels

    return triton_cue_kernels


def _together(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def arm_(
    part: Tensor,
    seen: Tensor,
    scope: Membership,
    sequences: int,
    length: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Sum the parts of the features into the first, -inf for edits that are not armed.

    The same as :func:`.cues.armed_edits` and a fill, in one launch or three instead of some
    hundred; updates the state of the scope. Tokens that no sequence covers are left undefined.

    Args:
        part: float32 ``[splits, N, pitch]``, contiguous.
        seen: parts of the scores of the cues, likewise, of another pitch and number of splits.
        scope: with cues and limits.
        sequences: number of sequences B.
        length: of each where ``cu_seqlens`` is None, else of all together.
        mask: uint8 ``[N]``, contiguous, or None.
        cu_seqlens: ``[B + 1]``, contiguous, or None.
    """
    kernels = _kernels()
    limits, state = scope.limits, scope.state
    if limits is None:
        raise TypeError("arm_: scope must have limits, got None")
    splits, tokens, pitch = part.shape
    edits = limits.shape[0]
    asked = limits.contiguous(), _together(scope.reaches), _together(scope.gaps)
    row, column = (0, 0) if state is None else state.stride()
    blocks = -(-edits // _EDITS)
    options = {"BE": _EDITS, "num_warps": _WARPS, "enable_fp_fusion": _FUSION}
    alone = {**options, "num_warps": _READ_WARPS}
    chunk = kernels.CHUNK.value
    if cu_seqlens is None and length <= chunk:
        kernels._short_kernel[(sequences, blocks)](
            part,
            seen,
            *asked,
            mask,
            state,
            tokens,
            length,
            edits,
            pitch,
            seen.shape[2],
            row,
            column,
            SPLITS=splits,
            SEEN_SPLITS=seen.shape[0],
            **options,
        )
        if state is not None:
            state[:, 0].add_(length)
        return
    chunks = -(-length // chunk) * sequences
    if cu_seqlens is not None:
        chunks = -(-tokens // chunk) + sequences
    words = torch.empty(2, chunks, edits, dtype=torch.int64, device=part.device)
    word, entry = words.unbind()
    kernels._words_kernel[(chunks, blocks)](
        seen,
        asked[0],
        mask,
        cu_seqlens,
        word,
        tokens,
        length,
        sequences,
        edits,
        seen.shape[2],
        SPLITS=seen.shape[0],
        **options,
    )
    kernels._read_kernel[(sequences, blocks)](
        word,
        entry,
        *asked,
        cu_seqlens,
        state,
        tokens,
        length,
        edits,
        row,
        column,
        **alone,
    )
    kernels._arm_kernel[(chunks, blocks)](
        part,
        word,
        entry,
        *asked,
        cu_seqlens,
        state,
        tokens,
        length,
        sequences,
        edits,
        pitch,
        row,
        SPLITS=splits,
        **options,
    )
