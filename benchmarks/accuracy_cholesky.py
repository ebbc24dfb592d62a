"""Prints the accuracy tables of docs/kernels/cholesky.md, in Markdown. Takes a few minutes.

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy_cholesky

All errors are relative, in the Frobenius norm, against a solve with an 80-bit matrix and 80-bit
residuals.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch
from torch import Tensor

from coachhook.editing.memory import EditMemory
from coachhook.ops import cholesky_update_solve_
from tests.ops.linalg_oracle import F64, batches, exact, joint, relative, spd

N, M, K, BATCHES = 320, 16, 8, 1000
CONDITIONS = [1e4, 1e6, 1e8, 1e10]
Batches = list[tuple[Tensor, Tensor]]


def factor_path(prior: Tensor, made: Batches, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Delta and the final factor of one update with solve for each batch."""
    factor = torch.linalg.cholesky(prior).to(dtype)
    delta = torch.zeros(M, N, dtype=dtype)
    for keys, targets in made:
        keys, targets = keys.to(dtype), targets.to(dtype)
        delta += (targets - delta @ keys) @ cholesky_update_solve_(factor, keys).mT
    return delta, factor


def memory_path(prior: Tensor, made: Batches, **options: Any) -> EditMemory:
    memory = EditMemory(prior, M, **options)
    for keys, targets in made:
        memory.append(keys, targets)
    return memory


def consecutive() -> None:
    print("| prior | keys | joint LU | op | EditMemory | op float32 | EditMemory float32 | L L^T |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for isotropic in (False, True):
        for condition in CONDITIONS:
            prior, root = spd(N, condition)
            made = batches(root, BATCHES, K, M, isotropic=isotropic)
            truth = exact(prior, made)
            total = prior + sum(keys @ keys.mT for keys, _ in made)
            delta, factor = factor_path(prior, made, F64)
            single = factor_path(prior, made, torch.float32)[0]
            errors = [
                relative(joint(prior, made), truth),
                relative(delta, truth),
                relative(memory_path(prior, made).delta(), truth),
                relative(single, truth),
                relative(memory_path(prior, made, dtype=torch.float32).delta(), truth),
                relative(factor @ factor.mT, total),
            ]
            kind = "isotropic" if isotropic else "from the prior"
            print(f"| {condition:.0e} | {kind} | " + " | ".join(f"{e:.0e}" for e in errors), "|")


def removal() -> None:
    print("| prior | keys | beside the prior | default | folded (max_keys=0) |")
    print("| --- | --- | --- | --- | --- |")
    gone = random.Random(0).sample(range(40), 25)
    for isotropic in (False, True):
        for condition in CONDITIONS:
            prior, root = spd(N, condition)
            made = batches(root, 40, K, M, isotropic=isotropic)
            kept = [made[i] for i in range(40) if i not in gone]
            errors = []
            for max_keys in (10**6, None, 0):
                memory = memory_path(prior, made, max_keys=max_keys)
                for index in gone:
                    memory.remove(index + 1)
                never = memory_path(prior, kept, max_keys=max_keys)
                errors.append(relative(memory.delta(), never.delta()))
            kind = "isotropic" if isotropic else "from the prior"
            print(f"| {condition:.0e} | {kind} | " + " | ".join(f"{e:.0e}" for e in errors), "|")


if __name__ == "__main__":
    warnings.simplefilter("ignore", UserWarning)
    consecutive()
    print()
    removal()
