"""A call like an earlier one skips the checks; anything else about it brings them back."""

from __future__ import annotations

import importlib

import pytest
import torch

from coachhook.ops import (
    Membership,
    Population,
    Prefix,
    Sequence,
    Ungated,
    hook_output,
    hooked_linear,
)
from coachhook.ops.hooked_linear import known

package = importlib.import_module("coachhook.ops.hooked_linear")  # the op has the same name
N, M, R = 4, 3, 2


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.delenv("COACHHOOK_BACKEND", raising=False)
    known._KNOWN.clear()
    yield
    known._KNOWN.clear()


def layer(rows=2, tokens=5):
    x = torch.randn(rows, tokens, N)
    weight, bias = torch.nn.Parameter(torch.randn(M, N)), torch.nn.Parameter(torch.randn(M))
    return x, weight, bias, torch.linalg.qr(torch.randn(M, R))[0], torch.randn(R, N)


def scope_of(name):
    return {
        "none": None,
        "sequence": Sequence(torch.zeros(2, 3)),
        "prefix": Prefix(torch.zeros(2, 3)),
        "population": Population(torch.tensor(2.0).double(), 1.5),
        "rows": Population(torch.rand(2), torch.ones(2)),
        "ungated": Ungated(),
    }[name]


NAMES = ["none", "sequence", "prefix", "population", "rows", "ungated"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_the_second_call_is_not_checked_and_says_the_same(name, masked, dense, monkeypatch):
    x, weight, bias, q, s = layer()
    delta = q @ s if dense else (q, s)
    mask = torch.rand(2, 5) > 0.3 if masked else None

    def both():
        output = torch.nn.functional.linear(x, weight, bias)
        options = {"mask": mask}
        yield from hooked_linear(x, weight, bias, delta, 0.5, scope=scope_of(name), **options)
        yield from hook_output(output, x, delta, 0.5, scope=scope_of(name), **options)

    torch.manual_seed(0)
    first = [tensor.detach() for tensor in both()]
    monkeypatch.setattr(package, "check_gate", lambda *_: pytest.fail("checked again"))
    torch.manual_seed(0)
    torch.testing.assert_close(
        [tensor.detach() for tensor in both()], first, rtol=0, atol=0, equal_nan=True
    )


CHANGES = {
    "x_dtype": lambda a: {"x": a["x"].double()},
    "x_shape": lambda a: {"x": torch.randn(2, 5, N + 1)},
    "weight_shape": lambda a: {"weight": torch.randn(M + 1, N)},
    "weight_dtype": lambda a: {"weight": a["weight"].data.half()},
    "weight_device": lambda a: {"weight": a["weight"].data.to("meta")},
    "weight_type": lambda a: {"weight": a["weight"].data.numpy()},
    "bias_shape": lambda a: {"bias": torch.randn(1)},
    "bias_type": lambda a: {"bias": 1.0},
    "lift": lambda a: {"delta": (torch.randn(M, R + 1), a["delta"][1])},
    "projection": lambda a: {"delta": (a["delta"][0], a["delta"][1].long())},
    "three": lambda a: {"delta": (*a["delta"], torch.tensor(1.0))},
    "alpha_shape": lambda a: {"alpha": torch.ones(1)},
    "alpha_dtype": lambda a: {"alpha": torch.tensor(1)},
    "alpha_device": lambda a: {"alpha": torch.tensor(1.0, device="meta")},
    "alpha_type": lambda a: {"alpha": "1"},
    "mask_dtype": lambda a: {"mask": torch.ones(2, 5)},
    "mask_shape": lambda a: {"mask": torch.ones(2, 6).bool()},
    "mean": lambda a: {"scope": Population(torch.ones(3), 1.0)},
    "std": lambda a: {"scope": Population(torch.tensor(1.0), None)},
    "state": lambda a: {"scope": Prefix(torch.ones(3, 3))},
    "scope": lambda a: {"scope": "population"},
    "backend": lambda a: {"backend": "cudnn"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_wrong_the_next_time_is_refused(change):
    x, weight, bias, q, s = layer()
    arguments = {"x": x, "weight": weight, "bias": bias, "delta": (q, s)}
    arguments |= {"alpha": torch.tensor(1.0), "scope": Population(torch.tensor(1.0), 1.0)}
    for _ in range(2):
        hooked_linear(**arguments, mask=torch.ones(2, 5).bool())
        hooked_linear(**arguments)
        hooked_linear(**arguments | {"scope": Prefix(torch.ones(2, 3))})
    arguments |= CHANGES[change](arguments)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match="^hooked_linear: .* must "):
            hooked_linear(**arguments)


def test_a_pair_may_be_a_list_and_is_looked_into():
    x, weight, bias, q, s = layer()
    for _ in range(2):
        hooked_linear(x, weight, bias, [q, s], 1.0)
    with pytest.raises(ValueError, match="delta must be"):
        hooked_linear(x, weight, bias, [q, s[:, 1:]], 1.0)


def test_tensors_that_changed_under_the_same_name_are_looked_at_again():
    x, weight, bias, q, s = layer()
    mean = torch.tensor(1.0)

    def call():
        return hooked_linear(x, weight, bias, (q, s), 1.0, scope=Population(mean, 1.0))

    for _ in range(2):
        call()
    for tensor, other in (
        (weight, torch.randn(M + 1, N)),
        (weight, torch.randn(M, N).half()),
        (s, torch.randn(R + 1, N)),
        (mean, torch.ones(7)),
    ):
        before = tensor.data
        tensor.data = other
        with pytest.raises((TypeError, ValueError), match="must"):
            call()
        tensor.data = before
        call()


def test_values_are_read_every_time():
    x, weight, bias, q, s = layer()
    offsets, groups = torch.tensor([0, 4, 10]), torch.tensor([0, 1])
    packed = x.view(-1, N)
    for _ in range(2):
        hooked_linear(packed, weight, bias, (q, s), 1.0, cu_seqlens=offsets)
        hooked_linear(x, weight, bias, (q, s), 1.0, scope=Membership(groups))
    offsets[1], groups[1] = 11, R
    with pytest.raises(ValueError, match="cu_seqlens must"):
        hooked_linear(packed, weight, bias, (q, s), 1.0, cu_seqlens=offsets)
    with pytest.raises(ValueError, match=r"scope\.groups must"):
        hooked_linear(x, weight, bias, (q, s), 1.0, scope=Membership(groups))


def test_a_change_of_the_environment_is_seen(monkeypatch):
    x, weight, bias, q, s = layer()
    ran = []
    real = package.reference.hook_output
    table = package._backends._IMPLEMENTATIONS["hooked_linear"]

    def noted(*arguments):
        ran.append("reference")
        return real(*arguments)

    monkeypatch.setitem(table, "reference", package._backends.Implementation(noted))
    package._backends._candidates.cache_clear()
    try:
        for value, runs in ((None, 0), ("reference", 2), ("cpu", 2), ("reference", 4)):
            if value is not None:
                monkeypatch.setenv("COACHHOOK_BACKEND", value)
            for _ in range(2):
                hooked_linear(x, weight, bias, (q, s), 1.0)
            assert len(ran) == runs
        monkeypatch.setenv("COACHHOOK_BACKEND", "gpu")
        with pytest.raises(ValueError, match="COACHHOOK_BACKEND must be one of"):
            hooked_linear(x, weight, bias, (q, s), 1.0)
    finally:
        monkeypatch.undo()
        package._backends._candidates.cache_clear()


def test_what_autocast_allows_is_refused_without_it():
    x, weight, bias, q, s = layer()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            hooked_linear(x.bfloat16(), weight, bias, (q, s), 1.0)
        with pytest.raises(TypeError, match="weight must have the dtype of x"):
            hooked_linear(x.bfloat16(), weight, bias, (q, s), 1.0)


def test_autocast_does_not_round_the_gate_of_a_known_call():
    x, weight, bias, q, s = layer(tokens=64)
    known_z = [hooked_linear(x, weight, bias, (q, s), 1.0)[1] for _ in range(2)][1]
    with torch.autocast("cpu", torch.bfloat16):
        y, z = hooked_linear(x, weight, bias, (q, s), 1.0)
    assert y.dtype == torch.bfloat16
    assert torch.equal(z, known_z)


def test_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(known, "_MOST", 3)
    _, weight, bias, q, s = layer()
    for tokens in range(1, 9):
        hooked_linear(torch.randn(1, tokens, N), weight, bias, (q, s), 1.0)
        assert 1 <= len(known._KNOWN) <= 3
