"""Calls every CUDA and Triton kernel on small odd shapes, for compute-sanitizer.

With ``--few`` one dtype and one size of each CUDA kernel: racecheck follows every access to shared
memory, and takes minutes for all of them.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from coachhook.editing.memory import EditMemory
from coachhook.ops import (
    Membership,
    Population,
    Prefix,
    Scope,
    Sequence,
    Ungated,
    available_backends,
    cholesky_downdate_,
    cholesky_update_solve_,
    gate_scores,
    hook_output,
    hooked_linear,
)
from coachhook.ops.hooked_linear.cues import blank_state

FEW = "--few" in sys.argv
DTYPES = (torch.bfloat16,) if FEW else (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((19, 72),) if FEW else ((3, 72), (19, 72), (19, 37))


def scopes(rows: int, keys: int) -> tuple[Scope, ...]:
    state = torch.zeros(rows, 3, dtype=torch.float64, device="cuda")
    groups = torch.arange(keys, device="cuda") % 3
    own = Membership(groups, "own")
    return Sequence(state), Prefix(state), Population(2.0, 1.0), Membership(), own, Ungated()


def gate() -> int:
    """More tokens than the decoding kernels take."""
    q, s = torch.randn(37, 11, device="cuda"), torch.randn(11, 29, device="cuda")
    edges = torch.tensor([0, 1, 1, 40, 76], dtype=torch.int32, device="cuda")
    calls = 0
    for dtype in DTYPES:
        x = torch.randn(4, 20, 29, device="cuda", dtype=dtype)
        base = torch.randn(4, 20, 37, device="cuda", dtype=dtype)
        mask = torch.rand(4, 20, device="cuda") < 0.8
        for scope in (Sequence(), *scopes(4, 11)):
            hook_output(base, x, (q, s), 0.5, mask=mask, scope=scope, backend="cuda")
            flat, rows = x.view(80, 29), base.view(80, 37)
            hook_output(rows, flat, (q, s), 0.5, cu_seqlens=edges, scope=scope, backend="cuda")
            calls += 2
    return calls


def decoding() -> int:
    """Both ways to the frozen product, aligned rows and others, one tile of tokens and several."""
    calls = 0
    for way in ("exact", "fused"):
        os.environ["COACHHOOK_PRODUCTS"] = way
        for dtype in DTYPES:
            for tokens, n in SHAPES:
                calls += decode(dtype, tokens, n)
    return calls


def decode(dtype: torch.dtype, tokens: int, n: int) -> int:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    x, weight, bias = (t.to(dtype) for t in (random(tokens, 1, n), random(43, n), random(43)))
    q, s = random(43, 11), random(11, n)
    edges = torch.tensor([0, 1, 1, tokens - 1], dtype=torch.int32, device="cuda")
    calls = 0
    for edits, length in ((11, 1), (300, 1), (300, tokens)):
        cues, limits = random(edits, n), torch.zeros(edits, device="cuda")
        batch = tokens // length
        state = blank_state(batch, edits, x.device)
        number = torch.arange(edits, dtype=torch.int32, device="cuda")
        asked = (number % 70, number % 9) if length > 1 else ()
        cued = Membership(None, "own", cues, limits, state, *asked)
        pair = random(43, edits), random(edits, n)
        rows = x.view(batch, length, n)
        hooked_linear(rows, weight, bias, pair, 0.5, scope=cued, backend="cuda")
        calls += 1
    for scope in scopes(tokens, 11):
        hooked_linear(x, weight, bias, (q, s), 0.5, scope=scope, backend="cuda")
        gate_scores(x, (q, s), scope=scope, backend="cuda")
        calls += 2
    for scope in scopes(3, 11):
        hooked_linear(
            x[:, 0], weight, bias, (q, s), 0.5, cu_seqlens=edges, scope=scope, backend="cuda"
        )
        calls += 1
    for delta in ((q.to(dtype), s.to(dtype)), q @ s, (q @ s).to(dtype)):
        hooked_linear(x, weight, bias, delta, 0.5, scope=Population(2.0, 1.0), backend="cuda")
        calls += 1
    return calls


def triton() -> int:
    """Each Triton kernel; one dtype, since each call compiles its kernels first."""
    available, reason = available_backends("hooked_linear")["triton"]
    if not available:
        print(f"triton left out: {reason}")
        return 0
    q, s = torch.randn(37, 11, device="cuda"), torch.randn(11, 29, device="cuda")
    weight, bias = (q @ s).bfloat16(), q[:, 0].bfloat16()
    x = torch.randn(3, 25, 29, device="cuda", dtype=torch.bfloat16)
    groups = torch.arange(11, device="cuda") % 3
    calls = 0
    for scope in (Sequence(), Membership(groups, "own")):
        hooked_linear(x, weight, bias, (q, s), 0.5, scope=scope, backend="triton")
        calls += 1
    number, edges = (
        torch.arange(11, dtype=torch.int32, device="cuda"),
        torch.tensor([0, 40, 40, 75]),
    )
    for rows, packed in ((x, None), (x.view(1, 75, 29), None), (x.view(75, 29), edges.cuda())):
        state = blank_state(3 if packed is not None else len(rows), 11, x.device)
        limits = torch.zeros(11, device="cuda")
        cued = Membership(None, "own", s.clone(), limits, state, number * 7, number % 9)
        hooked_linear(
            rows, weight, bias, (q, s), 0.5, cu_seqlens=packed, scope=cued, backend="triton"
        )
        calls += 1
    for way in ("fused", "library"):
        os.environ["COACHHOOK_PRODUCTS"] = way
        for delta in (weight, q @ s):
            hooked_linear(x, weight, bias, delta, 0.5, backend="triton")
            calls += 1
    return calls


def cholesky() -> int:
    """Both widths of the kernels, aligned rows and others, more than one chunk of columns."""
    calls = 0
    for dtype in (torch.float64,) if FEW else (torch.float32, torch.float64):
        for n, k in ((70, 3), (130, 40)):
            factor = torch.eye(n, dtype=dtype, device="cuda")
            keys = torch.randn(n, k, dtype=dtype, device="cuda") / n
            for lower in (factor, factor.mT, torch.eye(n + 1, dtype=dtype, device="cuda")[1:, 1:]):
                cholesky_update_solve_(lower, keys, backend="cuda")
                cholesky_downdate_(lower, keys, backend="cuda")
                calls += 2
    return calls


def memory() -> int:
    """Appends as they are, captured and replayed; inverses of larger blocks; both widths."""
    calls = 0
    for dtype in (torch.float64,) if FEW else (torch.float32, torch.float64):
        edits = EditMemory(torch.eye(200, dtype=torch.float64, device="cuda"), 9, dtype=dtype)
        for k in (20, 40):
            keys = torch.randn(200, k, dtype=dtype, device="cuda") / 200
            for _ in range(4):
                edits.append(keys, keys[:9])
                calls += 1
    return calls


def main() -> None:
    torch.manual_seed(0)
    calls = gate() + decoding() + cholesky() + memory() + (0 if FEW else triton())
    torch.cuda.synchronize()
    print(f"{calls} calls done")


if __name__ == "__main__":
    main()
