"""The gate against vectors of the published implementation (``golden/gate.*``)."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coachhook.bench.peers import published_hook
from coachhook.ops import available_backends, gate_scores, hooked_linear
from tests.tolerances import compute_eps, tol

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
# One token has no standard deviation, which torch warns of: the case T1 is about that.
pytestmark = pytest.mark.filterwarnings(r"ignore:std\(\)")
BACKENDS = [name for name, (able, _) in available_backends("hooked_linear", "cpu").items() if able]


@cache
def vectors():
    return json.loads((GOLDEN / "gate.json").read_text()), load_file(GOLDEN / "gate.safetensors")


def case_names():
    if not GOLDEN.is_dir():
        return []
    return [name for name in vectors()[0] if not name.startswith("_")]


def load(name):
    facts, tensors = vectors()
    return facts[name], {
        key.removeprefix(f"{name}."): value
        for key, value in tensors.items()
        if key.startswith(f"{name}.")
    }


def arguments(case):
    """x, weight, bias and Delta; a bias of the hook is one more input that is always one."""
    x, weight = case["x"], case["W0"]
    delta = case["Wh"].double() - weight.double()
    bias, hook_bias = case.get("b0"), case.get("bh")
    if bias is not None and not torch.equal(bias, hook_bias):
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        weight = torch.cat([weight, bias[:, None]], dim=1)
        delta = torch.cat([delta, (hook_bias.double() - bias.double())[:, None]], dim=1)
        bias = None
    return x, weight, bias, delta


def rounding_of_z(case):
    """Bound on what the published arithmetic may lose in z: it subtracts rounded outputs.

    Each row of p and o is rounded in the dtype of x, so a norm is off by at most
    eps / 2 (|p| + |o|) plus the rounding of the products; mean and std by as much.
    """
    dtype = case["x"].dtype
    eps = torch.finfo(dtype).eps
    p, o = case["base"].double().norm(dim=-1), case["hooked"].double().norm(dim=-1)
    products = compute_eps(dtype) * math.sqrt(case["x"].shape[-1])
    norm_error = ((eps / 2 + products) * (p + o) + eps * case["norm"].double()).amax(-1)
    z, std = case["z"].double(), case["norm"].double().std(dim=-1)
    handed_out = max(eps, torch.finfo(torch.float32).eps)
    return (norm_error / std)[:, None] * (2 + z.abs()) + 4 * handed_out * (1 + z.abs())


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no reference data at {GOLDEN}")
def test_vectors_are_there():
    assert len(case_names()) == 34


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", case_names())
def test_gate(name, backend):
    facts, case = load(name)
    x, weight, bias, delta = arguments(case)
    alpha = float(facts["alpha"])
    y, z = hooked_linear(x, weight, bias, delta, alpha, backend=backend)

    golden_z = case["z"].double()
    assert torch.equal(z.isnan(), golden_z.isnan())
    bound = rounding_of_z(case).nan_to_num(0.0)
    assert (((z.double() - golden_z).abs().nan_to_num(0.0)) <= bound).all()

    # No z of these cases lies within rounding of alpha, but for ties that are met exactly.
    assert torch.equal(z >= alpha, case["mask"].bool())

    bounds = tol("output", x.dtype, reduction=x.shape[-1], scale=float(case["y"].abs().max()))
    torch.testing.assert_close(y, case["y"], **bounds)


@pytest.mark.parametrize("name", case_names())
def test_factored_storage_decides_alike(name):
    """Delta = Q S by a QR decomposition: the norm of S x is the norm of Delta x."""
    facts, case = load(name)
    x, weight, bias, delta = arguments(case)
    q, s = torch.linalg.qr(delta)
    z = gate_scores(x, delta)
    z_factored = gate_scores(x, (q, s))
    if name == "same_weights":
        assert z_factored.isnan().all()
        return
    norms = case["norm"].double()
    ratio = float((norms.amax(-1) / norms.std(-1)).nan_to_num().max())
    bounds = tol("score", x.dtype, reduction=x.shape[-1] + s.shape[0], scale=max(ratio, 1.0))
    torch.testing.assert_close(z_factored, z, equal_nan=True, **bounds)


@pytest.mark.parametrize("name", case_names())
def test_the_published_peer_is_the_published_code(name):
    """What the benchmarks call published gives the published numbers, to the last product."""
    facts, case = load(name)
    y, z = published_hook(
        case["x"], case["W0"], case.get("b0"), case["Wh"], case.get("bh"), facts["alpha"]
    )
    assert z.dtype == case["z"].dtype
    assert torch.equal(z.isnan(), case["z"].isnan())
    assert torch.equal(z >= facts["alpha"], case["mask"].bool())
    bounds = tol("output", y.dtype, reduction=y.shape[-1], scale=float(case["y"].abs().max()))
    torch.testing.assert_close(y, case["y"], **bounds)
