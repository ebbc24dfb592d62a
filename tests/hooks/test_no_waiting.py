"""A hooked forward never asks the host to read a tensor: on a GPU it would wait for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coachhook.ops.hooked_linear import checks

from ..models.families import tiny
from .support import SCOPES, hooked, padded, prompts

# Ops that read data on the host, or whose output has a shape that depends on it.
WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "item"}


class Waits(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = function.overloadpacket.__name__
        masked = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for part in args
            if isinstance(part, (list, tuple))
            for i in part
        )
        if name in WAITS or masked:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_hooks_add_no_waiting(scope: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COACHHOOK_BACKEND", "reference")  # the CPU's own may read: it has no queue
    monkeypatch.setattr(checks, "_check_membership", lambda *_: None)  # their values: on a CPU only
    model = tiny("llama")
    hooks = hooked(model, scope)
    batch = padded(prompts(), side)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 1).long()], 1)
    step = {"input_ids": torch.full((4, 1), 9), "attention_mask": mask}

    def waits() -> Counter[str]:
        with torch.inference_mode(), Waits() as counted:
            out = model(**batch, use_cache=True)
            model(**step, past_key_values=out.past_key_values)
        return counted.seen

    with hooks.disabled():
        plain = waits()
    with hooks.record() as records:
        assert waits() == plain
    assert any(fired.any() for _, _, fired in records)


def test_the_count_sees_what_it_is_for() -> None:
    x = torch.arange(3.0)
    with Waits() as counted:
        float(x.sum())
        x[x > 1]
        x.nonzero()
    assert counted.seen.keys() >= {"_local_scalar_dense", "index", "nonzero"}
