"""Single calls of csrc/decode.cu on the host, and what they must give in float64."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from coachhook.ops import Membership, Population, Prefix, Scope, Sequence, Ungated
from tests.csrc.host import DTYPES, REDUCTIONS, Host, _array
from tests.ops.gate_oracle import Answer, oracle, threshold

DECODE_SCOPES = {Sequence: 0, Population: 1, Membership: 2, Prefix: 3, Ungated: 4}
STORED = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def _bytes(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return _array(None)
    return _array(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _wide(tensor: Tensor | None, padding: int) -> Tensor | None:
    """Rows with ``padding`` NaN behind each but the last, flat: nobody is to read them."""
    if tensor is None or padding == 0:
        return tensor
    wide = torch.full((tensor.shape[0], tensor.shape[1] + padding), math.nan, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide.flatten()[: wide.numel() - padding]


@dataclass
class Decode:
    """One call of decode_hooked_linear; ``base`` or ``weight`` gives the frozen product."""

    x: Tensor
    delta: Tensor | tuple[Tensor, Tensor]
    scope: Scope = field(default_factory=Sequence)
    base: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    alpha: float = 1.0
    padding: int = 0  # unused elements between the rows of every matrix
    offset: int = 0  # bytes behind a 16-byte boundary
    in_place: bool = False

    @property
    def tokens(self) -> int:
        return self.x.numel() // self.x.shape[-1]

    @property
    def y_dtype(self) -> torch.dtype:
        return self.x.dtype if self.base is None else self.base.dtype

    @property
    def out_features(self) -> int:
        frozen = self.base if self.base is not None else self.weight
        if frozen is None:
            return 0
        return frozen.shape[-1] if self.base is not None else frozen.shape[0]

    def sequences(self) -> int:
        if self.cu_seqlens is not None:
            return len(self.cu_seqlens) - 1
        return self.x.shape[0] if self.x.dim() == 3 else 1

    def encode(self) -> bytes:
        n, tokens = self.x.shape[-1], self.tokens
        lift, projection = (None, self.delta) if isinstance(self.delta, Tensor) else self.delta
        scope, membership = self.scope, isinstance(self.scope, Membership)
        mean = std = None
        if isinstance(scope, Population):
            mean, std = (torch.as_tensor(v, dtype=torch.float64) for v in (scope.mean, scope.std))
        lift_dtype = torch.float32 if lift is None else lift.dtype
        header = (
            *(DTYPES[STORED[t]] for t in (self.x.dtype, projection.dtype, lift_dtype)),
            *(DTYPES[STORED[self.y_dtype]], tokens, n, self.out_features, projection.shape[0]),
            *(n + self.padding, n + self.padding, n + self.padding),
            projection.shape[0] + self.padding,
            *(REDUCTIONS["max" if membership else "norm"], DECODE_SCOPES[type(scope)]),
            *(self.sequences(), int(membership and scope.correction == "own"), 1),
            int(mean is not None and mean.dim() > 0),
            *(self.offset, int(self.in_place)),
        )
        flat = self.x.reshape(tokens, n)
        arrays = (
            *(_wide(t, self.padding) for t in (flat, self.weight, projection, lift)),
            *(self.bias, self.base, scope.groups if membership else None),
            *(None if self.cu_seqlens is None else self.cu_seqlens.int(), self.mask, mean, std),
            torch.tensor(self.alpha, dtype=torch.float32),
            None if membership else getattr(scope, "state", None),
            _wide(getattr(scope, "cues", None), self.padding),
            *(getattr(scope, name, None) for name in ("limits", "reaches", "gaps")),
            scope.state if membership else None,
        )
        return struct.pack(f"<{len(header)}q", *header) + b"".join(map(_bytes, arrays))


def decode(host: Host, case: Decode, order: int = 0) -> tuple[Tensor, Tensor]:
    """y and z; the state of the scope is updated."""
    out = bytearray(host._run(case.encode(), order))
    shape = (*case.x.shape[:-1], case.out_features)
    size = math.prod(shape) * torch.finfo(case.y_dtype).bits // 8
    y = torch.frombuffer(out, dtype=case.y_dtype, count=math.prod(shape)) if size else None
    z = torch.frombuffer(out, dtype=torch.float32, count=case.tokens, offset=size)
    state = getattr(case.scope, "state", None)
    if isinstance(case.scope, Membership):
        if state is not None:
            after = torch.frombuffer(out, dtype=torch.int64, offset=size + 4 * case.tokens)
            state.copy_(after.view(state.shape))
    elif state is not None:
        after = torch.frombuffer(out, dtype=torch.float64, offset=size + 4 * case.tokens)
        state.copy_(after.view(-1, 3))
    return (torch.empty(shape) if y is None else y.view(shape)), z.view(shape[:-1])


def truth(case: Decode) -> Answer:
    """The same call in float64, with alpha moved to where no score is near it."""
    x = case.x.double()
    if case.base is not None:
        base = case.base.double()
    else:
        bias = None if case.bias is None else case.bias.double()
        base = F.linear(x, case.weight.double(), bias)
    first = oracle(base, x, case.delta, 0.0, case.mask, case.cu_seqlens, case.scope)
    case.alpha = threshold(first.z)
    return oracle(base, x, case.delta, case.alpha, case.mask, case.cu_seqlens, case.scope)
