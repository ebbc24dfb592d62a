"""Calls every CUDA kernel on small odd shapes, for compute-sanitizer."""

from __future__ import annotations

import torch

from coachhook.ops import Membership, Population, Sequence, hook_output


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    q, s = torch.randn(37, 11, device=device), torch.randn(11, 29, device=device)
    edges = torch.tensor([0, 1, 1, 40, 60], dtype=torch.int32, device=device)
    state = torch.zeros(4, 3, dtype=torch.float64, device=device)
    scopes = (Sequence(), Sequence(state), Population(2.0, 1.0), Membership())
    calls = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(4, 16, 29, device=device, dtype=dtype)
        base = torch.randn(4, 16, 37, device=device, dtype=dtype)
        mask = torch.rand(4, 16, device=device) < 0.8
        for scope in scopes:
            hook_output(base, x, (q, s), 0.5, mask=mask, scope=scope, backend="cuda")
            flat, rows = x.view(64, 29), base.view(64, 37)
            hook_output(rows, flat, (q, s), 0.5, cu_seqlens=edges, scope=scope, backend="cuda")
            calls += 2
    torch.cuda.synchronize()
    print(f"{calls} calls done")


if __name__ == "__main__":
    main()
