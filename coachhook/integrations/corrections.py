"""Delta of a layer without its gate: as a matrix, in factors, and of a lower rank."""

from __future__ import annotations

import torch
from torch import Tensor

from coachhook.editing.payload import HookPayload

# Delta [m, n], or factors (left [m, r], right [r, n]) whose product it is; float64 on the CPU.
Correction = Tensor | tuple[Tensor, Tensor]


def correction_of(payload: HookPayload) -> Correction:
    """What a hook adds to every token once its gate is gone.

    Of a membership pair that is the sum over all edits, ``V A^T``, whatever its ``correction``:
    which edit a token belongs to is for the gate to say.
    """
    if payload.kind == "dense":
        return payload.tensors["delta"].double()
    return payload.tensors["left"].double(), payload.tensors["right"].double()


def matrix(correction: Correction) -> Tensor:
    """Delta ``[m, n]``, float64."""
    return correction if isinstance(correction, Tensor) else correction[0] @ correction[1]


class Spectrum:
    """A correction as ``U diag(s) W^T``, to be cut at any rank.

    Args:
        correction: of a layer.
    """

    def __init__(self, correction: Correction) -> None:
        if isinstance(correction, Tensor):
            self._u, self.values, self._wt = torch.linalg.svd(correction, full_matrices=False)
        else:
            # Q is orthonormal: the singular values of Q S are those of S, which has few rows.
            q, r = torch.linalg.qr(correction[0])
            u, self.values, self._wt = torch.linalg.svd(r @ correction[1], full_matrices=False)
            self._u = q @ u

    def rank(self, weight: Tensor, dtype: torch.dtype) -> int:
        """How many singular values could be seen in ``weight + Delta`` of a dtype, at least 1.

        Those below its rounding are left out: of a Delta whose layer was kept in float32 they are
        rounding themselves, of as high a rank as the matrix has.

        Args:
            weight: W0 ``[m, n]``.
            dtype: float32 or float64.
        """
        norm = torch.linalg.vector_norm(weight.detach().cpu().double())
        total = float(norm + torch.linalg.vector_norm(self.values))
        return max(1, int((self.values > torch.finfo(dtype).eps * total).sum()))

    def cut(self, rank: int, rows: int) -> tuple[Tensor, Tensor]:
        """The best approximation of a rank, ``B A`` with B ``[m, rows]`` and A ``[rows, n]``.

        Rows beyond the rank are zero, and so are those beyond what Delta has.
        """
        kept = min(rank, rows, len(self.values))
        # Half of each singular value on either side keeps both factors in the range of any dtype.
        root = self.values[:kept].sqrt()
        b = self._u.new_zeros(len(self._u), rows)
        a = self._wt.new_zeros(rows, self._wt.shape[1])
        b[:, :kept] = self._u[:, :kept] * root
        a[:kept] = root[:, None] * self._wt[:kept]
        return b, a


def relative_error(found: Tensor, wanted: Tensor, size: Tensor) -> float:
    """``||found - wanted|| / ||size||`` in the Frobenius norm; 0 where all are zero."""
    norm = float(size.norm())
    return float((found.double() - wanted).norm()) / norm if norm else 0.0
