"""What a call costs beside its kernels: a layer so small that nothing else takes time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from coachhook.bench.hooked_linear import ALPHA, Layer
from coachhook.bench.runner import Case, benchmark
from coachhook.ops import hooked_linear
from coachhook.ops.hooked_linear import _HOOK_OUTPUT, _implementation, _layer_of, _pack

_CALLS = 100


def _repeat(function: Callable[..., Any], arguments: tuple[Any, ...], **options: Any) -> None:
    for _ in range(_CALLS):
        function(*arguments, **options)


@benchmark("overhead")
def cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    """A hundred calls, so that one is 10 us per ms: the op, its implementation, its registration.

    The floor is the frozen product and the implementation called directly; op minus floor is what
    checks and the choice of the implementation cost. The peer goes through ``torch.ops`` instead.
    """
    kind = dtype or torch.float32
    layer = Layer(32, 64, 16, kind, device)
    x = torch.randn(1, 1, 64, device=device).to(kind)
    alpha = torch.tensor(ALPHA, device=device)
    delta, scope = layer.delta("factored"), layer.scope("population")
    implementation = _layer_of(_implementation("hooked_linear", "auto", x))
    direct = layer.weight, layer.bias, delta, alpha, None, None, scope

    packed = _pack(x, delta, None, None, scope, "auto")

    def registered() -> None:
        base = F.linear(x, layer.weight, layer.bias)
        _HOOK_OUTPUT.registered(base, x, alpha, *packed)

    yield Case(
        op="hooked_linear.overhead",
        shape=f"{_CALLS} calls, m=32 n=64 T=1 r=16",
        dtype=kind,
        backend="auto",
        run=partial(
            _repeat, hooked_linear, (x, layer.weight, layer.bias, delta, alpha), scope=scope
        ),
        floor=partial(_repeat, implementation, (x, *direct)),
        peer_name="torch.ops.coachhook.hook_output",
        peer=partial(_repeat, registered, ()),
        cold=False,
    )
