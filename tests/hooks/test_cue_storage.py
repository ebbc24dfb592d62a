"""Edits that wait for a cue: what a hook stores of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from coachhook.hooks import HookedLinear, attach_hooks
from coachhook.hooks.storage import CUE_TENSORS
from coachhook.ops import Membership, hook_output

from ..models.families import tiny
from .test_cues import M, N, edits, hook


def run(layer: HookedLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sink: list = []
    layer.context.sinks[0] = sink
    y = layer(x)
    del layer.context.sinks[0]
    return y, sink[0][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hook_is_the_op(dtype: torch.dtype) -> None:
    base = nn.Linear(N, M).to(dtype)
    layer = hook(base, dtype)
    layer.set_scope("membership")
    layer.set_alpha(0.3)
    layer.state = "validated"
    x = torch.randn(3, 7, N, dtype=dtype)
    for count in (5, 40, 3):
        given = edits(count, dtype)
        layer.set_pair(**given)
        scope = Membership(None, "own", **{name: given[name] for name in CUE_TENSORS})
        y, z = hook_output(base(x), x, (given["v"], given["at"]), 0.3, scope=scope)
        found = run(layer, x)
        assert torch.equal(found[0], y) and torch.equal(found[1], z.float())
        for tensor in given.values():
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()  # they were copied
        assert torch.equal(run(layer, x)[0], y)
        assert not torch.equal(y, base(x))


def test_reserved_rows_change_nothing_but_fix_the_addresses() -> None:
    base = nn.Linear(N, M).double()
    plain, reserved = hook(base, torch.float64), hook(base, torch.float64)
    reserved.reserve(9, cues=True)
    addresses = [b.data_ptr() for b in reserved._store.buffers()]
    x = torch.randn(3, 8, N, dtype=torch.float64)
    for layer in (plain, reserved):
        layer.set_scope("membership")
        layer.set_alpha(-9.0)
        layer.state = "validated"
    y, z = run(reserved, x)
    assert torch.equal(y, base(x)) and z.isneginf().all(), "empty, but live"
    for count in (2, 9, 3):
        given = edits(count, torch.float64)
        bare = {name: given[name] for name in ("v", "at", "correction")}
        for arguments in (given, bare):
            for layer in (plain, reserved):
                layer.set_pair(**arguments)
            torch.testing.assert_close(run(reserved, x), run(plain, x), rtol=1e-12, atol=1e-12)
            assert not torch.equal(plain(x), base(x))
            assert [b.data_ptr() for b in reserved._store.buffers()] == addresses
    reserved.clear()
    assert torch.equal(reserved(x), base(x))
    reserved.set_pair(**given)
    before = run(reserved, x)
    reserved.reserve(40, cues=True)
    torch.testing.assert_close(run(reserved, x), before)


def test_reserving_with_a_pair_in_use() -> None:
    x = torch.randn(2, 5, N)
    for given in (edits(4), {k: v for k, v in edits(4).items() if k not in CUE_TENSORS}):
        for cues in (True, False):
            layer = hook()
            layer.set_pair(**given)
            layer.set_scope("membership")
            layer.set_alpha(0.1)
            layer.state = "validated"
            before = run(layer, x)
            layer.reserve(20, cues=cues)
            torch.testing.assert_close(run(layer, x), before)
            assert layer._store.reserved_cues == (cues or "cues" in given)
            layer.reserve(21)
            assert layer._store.reserved_cues == (cues or "cues" in given)
    layer = hook()
    layer.set_pair(torch.randn(M, 2), torch.randn(2, N))
    with pytest.raises(ValueError, match="reserve: correction must be 'own'.*got 'sum'"):
        layer.reserve(4, cues=True)
    assert not layer._store.reserved


def test_what_is_refused_changes_nothing() -> None:
    layer = hook()
    whole = edits(4)
    layer.set_pair(**whole)
    given = {name: value for name, value in whole.items() if name not in ("reaches", "gaps")}
    before = layer.snapshot().stored
    version = int(layer._store.version)
    nan = given["limits"].clone()
    nan[1] = float("nan")
    for change, error, message in (
        ({"limits": None}, ValueError, "limits must be given with cues, got None; give both"),
        ({"cues": None}, ValueError, "cues must be given with limits, got None; give both"),
        ({"cues": torch.randn(3, N)}, ValueError, r"cues must be \[4, 20\], got \[3, 20\]"),
        ({"cues": given["cues"] / 0}, ValueError, "cues must be finite, got NaN or infinity"),
        ({"cues": given["cues"].long()}, TypeError, "cues must be a floating-point tensor"),
        ({"limits": torch.rand(3)}, ValueError, r"limits must be \[4\], got \[3\]"),
        (
            {"reaches": torch.zeros(3)},
            ValueError,
            r"reaches must be int32 \[\d\], got torch.float32 \[3\]",
        ),
        ({"reaches": [8] * 4}, TypeError, "reaches must be an int32 tensor, got list"),
        ({"gaps": whole["gaps"]}, ValueError, "gaps must be None without reaches, got a tensor"),
        ({**whole, "gaps": [0] * 4}, TypeError, "gaps must be an int32 tensor, got list"),
        (
            {**whole, "gaps": whole["gaps"].long()},
            ValueError,
            r"gaps must be int32 \[4\], got torch.int64 \[4\]",
        ),
        (
            {**whole, "gaps": whole["gaps"][:3]},
            ValueError,
            r"gaps must be int32 \[4\], got torch.int32 \[3\]",
        ),
        ({"limits": nan}, ValueError, r"limits must be numbers or -inf \(always armed\), got NaN"),
        ({"limits": [0.0] * 4}, TypeError, "limits must be a floating-point tensor, got list"),
        ({"correction": "sum"}, ValueError, "correction must be 'own'.*got 'sum'; give every"),
        ({"groups": torch.arange(4)}, ValueError, "correction must be 'own', without groups"),
    ):
        with pytest.raises(error, match=f"^set_pair: {message}"):
            layer.set_pair(**{**given, **change})
    after = layer.snapshot().stored
    assert after.cued and after.tensors.keys() == before.tensors.keys()
    for name, tensor in before.tensors.items():
        assert torch.equal(tensor, after.tensors[name])
    assert int(layer._store.version) == version


def test_rows_reserved_with_and_without_cues() -> None:
    given = edits(4)
    cued = hook()
    cued.set_pair(**given)
    snapshot = cued.snapshot()
    layer = hook()
    layer.reserve(6)
    with pytest.raises(ValueError, match=r"set_pair: .*reserve\(rank, cues=True\) and capture"):
        layer.set_pair(**given)
    with pytest.raises(ValueError, match="restore: cues must be None in a hook whose rows"):
        layer.restore(snapshot)
    assert layer.storage == "empty"
    layer.reserve(6, cues=True)
    layer.set_pair(**given)
    bare = given["v"], given["at"]
    with pytest.raises(ValueError, match="set_pair: correction must be 'own'.*got 'sum'"):
        layer.set_pair(*bare)
    with pytest.raises(ValueError, match="set_pair: .*got groups; give every edit one key"):
        layer.set_pair(*bare, torch.zeros(4, dtype=torch.long), "own")
    summed = hook()
    summed.set_pair(*bare)
    with pytest.raises(ValueError, match="restore: correction must be 'own'"):
        layer.restore(summed.snapshot())
    torch.testing.assert_close(layer.delta(), given["v"] @ given["at"])


def test_all_layers_reserve_or_none() -> None:
    hooks = attach_hooks(tiny("llama").double(), [0, 1])
    n, m = hooks[1].in_features, hooks[1].out_features
    hooks[1].set_pair(torch.randn(m, 2), torch.randn(2, n))
    with pytest.raises(ValueError, match="got 'sum'"):
        hooks.reserve(4, cues=True)
    assert not any(layer._store.reserved for layer in hooks.values())
    hooks.reserve(4)
    assert all(layer._store.capacity >= 4 and layer._store.reserved for layer in hooks.values())
    assert not any(layer._store.reserved_cues for layer in hooks.values())


@pytest.mark.parametrize("after", ["empty", "dense", "pair", "cued"])
def test_a_snapshot_comes_back_bit_for_bit(after: str) -> None:
    layer = hook()
    layer.set_pair(**edits(5))
    layer.set_scope("membership")
    layer.set_alpha(0.2)
    layer.state = "validated"
    x = torch.randn(2, 6, N)
    snapshot, before = layer.snapshot(), run(layer, x)
    layer.clear()
    assert not layer.snapshot().stored.cued
    if after == "dense":
        layer.set_delta(torch.ones(M, N))
    elif after == "pair":
        layer.set_pair(torch.randn(M, 9), torch.randn(9, N))
    elif after == "cued":
        layer.set_pair(**edits(40))
    layer.restore(snapshot)
    found = run(layer, x)
    assert torch.equal(found[0], before[0]) and torch.equal(found[1], before[1])
    stored = layer.snapshot().stored
    assert stored.cued and stored.tensors.keys() == snapshot.stored.tensors.keys()
    for name, tensor in snapshot.stored.tensors.items():
        assert torch.equal(tensor, stored.tensors[name])


def test_casts_moves_and_copies() -> None:
    layer = hook()
    given = edits(3)
    layer.set_pair(**given)
    layer.to(torch.bfloat16)
    assert torch.equal(layer._store.cues[:3], given["cues"])
    assert torch.equal(layer._store.gaps[:3], given["gaps"])
    layer.double()
    assert layer._store.cues.dtype == layer._store.limits.dtype == torch.float64
    assert torch.equal(layer._store.limits[:3], given["limits"].double())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin._store.cues, layer._store.cues)
        twin.set_pair(**edits(3, torch.float64))
        assert not torch.equal(twin._store.cues, layer._store.cues)
        assert int(twin._store.version) != int(layer._store.version)
    layer.to("meta")
    assert layer._store.cues.is_meta and layer._store.version.is_meta


def test_cues_set_in_inference_mode_can_be_changed_outside() -> None:
    bare = torch.randn(M, 2), torch.randn(2, N), None, "own"
    with torch.inference_mode():
        layer = hook()
        layer.set_pair(**edits(3))
        layer.set_pair(*bare)
    layer.set_pair(*bare)
    with torch.inference_mode():
        layer.set_pair(**edits(3))
    layer.set_pair(**edits(5))
    layer.clear()
    layer.set_pair(**edits(40))


def test_every_token_takes_the_hook_in_the_state_temporary() -> None:
    base = nn.Linear(N, M)
    layer = hook(base)
    given = edits(3)
    layer.set_pair(**given)
    layer.set_scope("membership")
    layer.state = "temporary"
    x = torch.randn(2, 5, N)
    torch.testing.assert_close(layer(x), base(x) + x @ (given["v"] @ given["at"]).T)
