"""Every bad argument is named, with what was expected and what came, before anything changes."""

from __future__ import annotations

import pytest
import torch

from coachhook.ops import (
    Membership,
    Population,
    Prefix,
    Sequence,
    gate_scores,
    hook_output,
    hooked_linear,
)

B, T, N, M, R = 2, 5, 4, 3, 2
X = torch.randn(B, T, N)
DENSE = torch.randn(M, N)
PAIR = (torch.randn(M, R), torch.randn(R, N))
CU = torch.tensor([0, 4, 10], dtype=torch.int32)


def offsets(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


GATE_CASES = {
    "x_list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x_dims": ({"x": torch.randn(N)}, ValueError, r"x must be \[B, T, n\].*got \[4\]"),
    "x_int": ({"x": torch.ones(B, T, N).long()}, TypeError, "x must be float16.*got torch.int64"),
    "delta_none": ({"delta": None}, TypeError, "delta must be a tensor .* or a pair.*got NoneType"),
    "delta_three": ({"delta": (DENSE, DENSE, DENSE)}, TypeError, "delta must be a tensor"),
    "delta_n": ({"delta": torch.randn(M, N + 1)}, ValueError, r"delta must be .*got \[3, 5\]"),
    "delta_dims": ({"delta": torch.randn(M)}, ValueError, "delta must have 2 dimensions"),
    "delta_int": ({"delta": torch.ones(M, N).int()}, TypeError, "delta must be float16"),
    "pair_rank": (
        {"delta": (torch.randn(M, R + 1), PAIR[1])},
        ValueError,
        r"delta must be .*got \(\[3, 3\], \[2, 4\]\)",
    ),
    "pair_n": (
        {"delta": (PAIR[0], torch.randn(R, N + 1))},
        ValueError,
        r"delta must be .*\[r, 4\]",
    ),
    "pair_list": ({"delta": [PAIR[0], 3]}, TypeError, r"delta\[1\] must be a tensor, got int"),
    "pair_device": (
        {"delta": (PAIR[0].to("meta"), PAIR[1])},
        ValueError,
        r"delta\[0\] must be on the device of x \(cpu\), got meta",
    ),
    "mask_shape": (
        {"mask": torch.ones(B, T + 1).bool()},
        ValueError,
        r"mask must have the leading shape of x \[2, 5, 4\], got \[2, 6\]",
    ),
    "mask_dims": ({"mask": torch.ones(T).bool()}, ValueError, "mask must have 2 dimensions"),
    "mask_dtype": (
        {"mask": torch.ones(B, T).long()},
        TypeError,
        r"mask must be bool, got torch.int64; call .bool\(\)",
    ),
    "mask_device": (
        {"mask": torch.ones(B, T, device="meta").bool()},
        ValueError,
        "mask must be on the device",
    ),
    "cu_3d": ({"cu_seqlens": CU}, ValueError, r"x must be packed \[N, n\] with cu_seqlens"),
    "cu_float": (
        {"x": X.view(-1, N), "cu_seqlens": CU.float()},
        TypeError,
        "cu_seqlens must be int32 or int64",
    ),
    "cu_short": (
        {"x": X.view(-1, N), "cu_seqlens": offsets(0)},
        ValueError,
        r"cu_seqlens must be \[B \+ 1\] with B >= 1, got \[1\]",
    ),
    "cu_falls": (
        {"x": X.view(-1, N), "cu_seqlens": offsets(0, 5, 4, 10)},
        ValueError,
        r"cu_seqlens must .* never decrease .*got \[0, 5, 4, 10\]",
    ),
    "cu_start": (
        {"x": X.view(-1, N), "cu_seqlens": offsets(1, 10)},
        ValueError,
        "cu_seqlens must start at 0",
    ),
    "cu_end": (
        {"x": X.view(-1, N), "cu_seqlens": offsets(0, 11)},
        ValueError,
        "cu_seqlens must .* end at or before N = 10",
    ),
    "scope_type": ({"scope": "sequence"}, TypeError, "scope must be Sequence, Prefix.*got str"),
    "state_shape": (
        {"scope": Prefix(torch.zeros(B + 1, 3))},
        ValueError,
        r"scope.state must be \[2, 3\], got \[3, 3\]",
    ),
    "state_rows_packed": (
        {"x": X.view(-1, N), "cu_seqlens": CU, "scope": Sequence(torch.zeros(1, 3))},
        ValueError,
        r"scope.state must be \[2, 3\]",
    ),
    "state_dtype": (
        {"scope": Sequence(torch.zeros(B, 3).half())},
        TypeError,
        "scope.state must be float32 or float64",
    ),
    "mean_shape": (
        {"scope": Population(torch.zeros(B + 1), 1.0)},
        ValueError,
        r"scope.mean must be a float, a 0-dim tensor or \[2\], got \[3\]",
    ),
    "std_type": ({"scope": Population(0.0, None)}, TypeError, "scope.std must be a float"),
    "membership_dense": (
        {"delta": DENSE, "scope": Membership()},
        TypeError,
        r"delta must be the pair \(V \[m, N\], A\^T \[N, n\]\)",
    ),
    "correction": (
        {"scope": Membership(correction="all")},
        ValueError,
        "scope.correction must be 'sum' or 'own', got 'all'",
    ),
    "groups_length": (
        {"scope": Membership(torch.zeros(R + 1).long())},
        ValueError,
        r"scope.groups must be \[2\], one group per key, got \[3\]",
    ),
    "groups_dtype": (
        {"scope": Membership(torch.zeros(R).int())},
        TypeError,
        "scope.groups must be int64",
    ),
    "groups_range": (
        {"scope": Membership(torch.tensor([0, R]))},
        ValueError,
        r"scope.groups must hold values in 0..1, got 0..2",
    ),
    "cues_alone": (
        {"scope": Membership(None, "own", torch.zeros(R, N))},
        ValueError,
        "scope.limits must be a tensor with scope.cues, got None; give both",
    ),
    "limits_alone": (
        {"scope": Membership(None, "own", None, torch.zeros(R))},
        ValueError,
        "scope.cues must be a tensor with scope.limits, got None; give both",
    ),
    "cues_state_alone": (
        {"scope": Membership(None, "own", state=torch.zeros(B, 2 * R + 1).long())},
        ValueError,
        "scope.state must be None without scope.cues, got Tensor; leave it out",
    ),
    "reaches_alone": (
        {"scope": Membership(None, "own", reaches=torch.zeros(R).int())},
        ValueError,
        "scope.reaches must be None without scope.cues, got Tensor; leave it out",
    ),
    "reaches_shape": (
        {"scope": Membership(None, "own", PAIR[1], torch.zeros(R), None, torch.zeros(R + 1).int())},
        ValueError,
        r"scope.reaches must be \[2\], one reach per cue, got \[3\]",
    ),
    "reaches_dtype": (
        {"scope": Membership(None, "own", PAIR[1], torch.zeros(R), None, torch.zeros(R).long())},
        TypeError,
        "scope.reaches must be int32, got torch.int64",
    ),
    "reaches_device": (
        {
            "scope": Membership(
                None, "own", PAIR[1], torch.zeros(R), None, torch.zeros(R, device="meta").int()
            )
        },
        ValueError,
        "scope.reaches must be on the device of x",
    ),
    "gaps_alone": (
        {"scope": Membership(None, "own", PAIR[1], torch.zeros(R), gaps=torch.zeros(R).int())},
        ValueError,
        "scope.gaps must be None without scope.reaches, got Tensor; leave it out",
    ),
    "gaps_without_cues": (
        {"scope": Membership(None, "own", gaps=torch.zeros(R).int())},
        ValueError,
        "scope.gaps must be None without scope.cues, got Tensor; leave it out",
    ),
    "gaps_shape": (
        {
            "scope": Membership(
                None,
                "own",
                PAIR[1],
                torch.zeros(R),
                None,
                torch.zeros(R).int(),
                torch.zeros(1).int(),
            )
        },
        ValueError,
        r"scope.gaps must be \[2\], one gap per cue, got \[1\]",
    ),
    "gaps_dtype": (
        {
            "scope": Membership(
                None, "own", PAIR[1], torch.zeros(R), None, torch.zeros(R).int(), torch.zeros(R)
            )
        },
        TypeError,
        "scope.gaps must be int32, got torch.float32",
    ),
    "cues_list": (
        {"scope": Membership(None, "own", [[0.0]], torch.zeros(R))},
        TypeError,
        "scope.cues must be a tensor, got list",
    ),
    "cues_shape": (
        {"scope": Membership(None, "own", torch.zeros(R, N + 1), torch.zeros(R))},
        ValueError,
        r"scope.cues must be \[2, 4\], one cue per key, got \[2, 5\]",
    ),
    "cues_dtype": (
        {"scope": Membership(None, "own", torch.zeros(R, N).int(), torch.zeros(R))},
        TypeError,
        "scope.cues must be float16, bfloat16, float32 or float64, got torch.int32",
    ),
    "cues_device": (
        {"scope": Membership(None, "own", torch.zeros(R, N, device="meta"), torch.zeros(R))},
        ValueError,
        "scope.cues must be on the device of x",
    ),
    "limits_shape": (
        {"scope": Membership(None, "own", torch.zeros(R, N), torch.zeros(R + 1))},
        ValueError,
        r"scope.limits must be \[2\], one limit per cue, got \[3\]",
    ),
    "limits_dtype": (
        {"scope": Membership(None, "own", torch.zeros(R, N), torch.zeros(R).bool())},
        TypeError,
        "scope.limits must be float16",
    ),
    "cues_sum": (
        {"scope": Membership(None, "sum", torch.zeros(R, N), torch.zeros(R))},
        ValueError,
        "scope.correction must be 'own' with scope.cues, got 'sum'; a sum would add",
    ),
    "cues_groups": (
        {"scope": Membership(torch.zeros(R).long(), "own", torch.zeros(R, N), torch.zeros(R))},
        ValueError,
        "scope.groups must be None with scope.cues, got Tensor; give every key a cue",
    ),
    "cues_state_dtype": (
        {"scope": Membership(None, "own", PAIR[1], torch.zeros(R), torch.zeros(B, R + 1))},
        TypeError,
        "scope.state must be int64 with scope.cues, got torch.float32",
    ),
    "cues_state_shape": (
        {"scope": Membership(None, "own", PAIR[1], torch.zeros(R), torch.zeros(B, R + 1).long())},
        ValueError,
        r"scope.state must be \[2, 5\], a count and two columns per cue, got \[2, 3\]",
    ),
    "cues_state_packed": (
        {
            "x": X.view(-1, N),
            "cu_seqlens": offsets(0, 3, 5, 10),
            "scope": Membership(
                None, "own", PAIR[1], torch.zeros(R), torch.zeros(B, 2 * R + 1).long()
            ),
        },
        ValueError,
        r"scope.state must be \[3, 5\]",
    ),
    "backend": ({"backend": "cudnn"}, ValueError, "backend must be one of auto.*got 'cudnn'"),
}


def call(op, arguments):
    options = {"x": X, "delta": PAIR, **arguments}
    x, delta = options.pop("x"), options.pop("delta")
    if op is gate_scores:
        options.pop("alpha", None)
        return op(x, delta, **options)
    alpha = options.pop("alpha", 1.0)
    if op is hook_output:
        shape = x.shape[:-1] if isinstance(x, torch.Tensor) else (1,)
        return op(torch.zeros(*shape, M), x, delta, alpha, **options)
    return op(x, torch.zeros(M, N), torch.zeros(M), delta, alpha, **options)


@pytest.mark.parametrize("op", [hooked_linear, hook_output, gate_scores])
@pytest.mark.parametrize("case", GATE_CASES)
def test_gate_arguments(op, case):
    arguments, error, message = GATE_CASES[case]
    state = getattr(arguments.get("scope"), "state", None)
    before = None if state is None else state.clone()
    with pytest.raises(error, match=f"^{op.__name__}: {message}"):
        call(op, arguments)
    if before is not None:
        assert torch.equal(state, before)


@pytest.mark.parametrize("op", [hooked_linear, hook_output])
@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (torch.ones(1), ValueError, r"alpha must be a float or a 0-dim tensor, got \[1\]"),
        (torch.tensor(1), TypeError, "alpha must be float16"),
        (
            torch.tensor(1.0, device="meta"),
            ValueError,
            "alpha must be on cpu or on the CPU, got meta",
        ),
        ("2", TypeError, "alpha must be a float or a 0-dim tensor, got str"),
        (True, TypeError, "alpha must be a float or a 0-dim tensor, got bool"),
        (None, TypeError, "alpha must be a float or a 0-dim tensor, got NoneType"),
    ],
)
def test_alpha(op, alpha, error, message):
    with pytest.raises(error, match=message):
        call(op, {"alpha": alpha})


@pytest.mark.parametrize("op", [hooked_linear, hook_output])
def test_delta_must_have_the_rows_of_the_layer(op):
    with pytest.raises(ValueError, match=r"delta must be \[3, 4\], got \[4, 4\]"):
        call(op, {"delta": torch.randn(M + 1, N)})
    with pytest.raises(ValueError, match=r"delta must be \(\[3, r\], \[r, 4\]\)"):
        call(op, {"delta": (torch.randn(M + 1, R), PAIR[1])})


@pytest.mark.parametrize(
    ("weight", "bias", "error", "message"),
    [
        (None, None, TypeError, "weight must be a tensor, got NoneType"),
        (torch.zeros(M, N + 1), None, ValueError, r"weight must be \[m, 4\] for x"),
        (torch.zeros(N), None, ValueError, "weight must have 2 dimensions"),
        (torch.zeros(M, N).double(), None, TypeError, "weight must have the dtype of x"),
        (torch.zeros(M, N, device="meta"), None, ValueError, "weight must be on the device of x"),
        (torch.zeros(M, N), torch.zeros(M + 1), ValueError, r"bias must be \[3\], got \[4\]"),
        (torch.zeros(M, N), torch.zeros(M).half(), TypeError, "bias must have the dtype of x"),
        (torch.zeros(M, N), 0.0, TypeError, "bias must be a tensor, got float"),
    ],
)
def test_weight_and_bias(weight, bias, error, message):
    with pytest.raises(error, match=f"^hooked_linear: {message}"):
        hooked_linear(X, weight, bias, PAIR, 1.0)


@pytest.mark.parametrize(
    ("base_output", "error", "message"),
    [
        (3, TypeError, "base_output must be a tensor, got int"),
        (torch.zeros(B, T + 1, M), ValueError, "base_output must have the leading shape of x"),
        (torch.zeros(B * T, M), ValueError, "base_output must have 3 dimensions"),
        (torch.zeros(B, T, M).int(), TypeError, "base_output must be float16"),
        (torch.zeros(B, T, M + 1), ValueError, r"delta must be \(\[4, r\], \[r, 4\]\)"),
    ],
)
def test_base_output(base_output, error, message):
    with pytest.raises(error, match=f"^hook_output: {message}"):
        hook_output(base_output, X, PAIR, 1.0)
