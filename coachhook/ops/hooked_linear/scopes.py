"""What a token's correction is judged against: the scope of the gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """The published gate: z-score of the norm within the real tokens of the token's own sequence.

    Mean and unbiased standard deviation over all real tokens of the sequence, later ones included.
    A sequence of T tokens cannot reach ``z > (T - 1) / sqrt(T)``, and z is undefined at T = 1.

    Attributes:
        state: float32 or float64 ``[B, 3]``, overwritten in place with (count, mean, M2) of each
            sequence, M2 the sum of squared deviations; None keeps nothing. The statistics of a
            prompt kept here judge the decoded tokens through :class:`Population`.
    """

    state: Tensor | None = None


@dataclass(frozen=True)
class Prefix:
    """Causal gate: token t is judged against the real tokens 1..t of its own sequence.

    The running statistics do not depend on how the sequence is cut into calls, nor on its
    neighbours in the batch.

    Attributes:
        state: float32 or float64 ``[B, 3]``, (count, mean, M2) of what came before; read, and
            updated in place. None starts every sequence empty and keeps nothing.
    """

    state: Tensor | None = None


@dataclass(frozen=True)
class Population:
    """Stateless gate: the norm is standardised with a given mean and standard deviation.

    Attributes:
        mean: float, 0-dim tensor, or one value per sequence ``[B]``.
        std: the same; a sequence whose std is 0 or NaN never fires.
    """

    mean: float | Tensor
    std: float | Tensor


@dataclass(frozen=True)
class Membership:
    """Fires on *which* edit: z is the largest coefficient of ``c = A^T x``.

    The hook is given as the pair (V ``[m, N]``, A^T ``[N, n]``) with ``Delta = V A^T``. For an
    edited key, c is close to a unit vector, because ``A^T K = G^-1 (G - I)``.

    With cues an edit fires only where it is *armed*: in the ``reaches[e]`` columns after its cue,
    or from the cue on for ever. The cue is a real token of its sequence with ``cues[e] . x >=
    limits[e]``, ``gaps[e]`` columns after another such one where that is not 0. z is the largest
    coefficient of the armed edits, -inf where none is armed, and -inf never fires.

    Attributes:
        groups: int64 ``[N]`` with values in 0..N-1: keys with one value belong to one edit, and
            z is the largest sum of coefficients of a group. None: every key is its own group.
        correction: ``"sum"`` adds ``V c``; ``"own"`` adds the winning group's share alone, with
            its coefficients normalised to sum to one.
        cues: any floating dtype, ``[N, n]``, one row per edit; with ``"own"`` and without groups
            only. The products are formed as those of A^T. None: every edit is always armed.
        limits: any floating dtype, ``[N]``, with cues only; -inf: always armed, NaN: never.
        state: int64 ``[B, 1 + 2 N]``, read, and updated in place: how many tokens (padding
            included) of each sequence were read; for every edit the index of the first one at which
            its cue was seen, 2^31 - 1 where it was not; and for every edit that is not armed for
            ever a register, bit i of which says whether the token i columns before the last one
            reached the limit. A new one is (0, 2^31 - 1, ..., 0, ...). With cues only; None starts
            every sequence unarmed and keeps nothing.
        reaches: int32 ``[N]``, with cues only: for how many columns after its cue an edit is
            armed. Where reach and gap are 63 or more together, and for all edits with None: from
            the cue itself on for ever, and one token is the cue.
        gaps: int32 ``[N]``, with reaches only: how many columns before the cue another token must
            have reached the limit, at most 7 (taken for 7 beyond); 0: none need have, as with None.
    """

    groups: Tensor | None = None
    correction: Literal["sum", "own"] = "sum"
    cues: Tensor | None = None
    limits: Tensor | None = None
    state: Tensor | None = None
    reaches: Tensor | None = None
    gaps: Tensor | None = None


@dataclass(frozen=True)
class Ungated:
    """Every real token takes the hook; z is NaN."""


Scope = Sequence | Prefix | Population | Membership | Ungated
