"""The ops inside torch.compile, torch.export and fake tensors, against their eager selves."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from coachhook.ops import (
    Membership,
    Population,
    Prefix,
    Sequence,
    Ungated,
    gate_scores,
    hook_output,
    hooked_linear,
)
from coachhook.ops.hooked_linear import _pack
from coachhook.ops.hooked_linear.cues import blank_state

M, N, RANK = 19, 12, 4
CUES = torch.randn(RANK, N, generator=torch.Generator().manual_seed(1)) / 3
REACHES = torch.tensor([2, 2**31 - 1, 1, 0], dtype=torch.int32)
GAPS = torch.tensor([1, 0, 7, 2], dtype=torch.int32)


def fresh(rows):
    return blank_state(rows, RANK, torch.device("cpu"))


SCOPES = {
    "sequence": lambda rows: Sequence(torch.zeros(rows, 3)),
    "prefix": lambda rows: Prefix(torch.zeros(rows, 3)),
    "population": lambda rows: Population(2.0, 0.5),
    "population_rows": lambda rows: Population(torch.ones(rows), torch.ones(rows)),
    "membership": lambda rows: Membership(),
    "membership_own": lambda rows: Membership(torch.tensor([0, 0, 1, 1]), "own"),
    "membership_cues": lambda rows: Membership(
        None, "own", CUES, torch.tensor([-2.0, 0.5, 1.0, -torch.inf]), fresh(rows)
    ),
    "membership_reaches": lambda rows: Membership(
        None, "own", CUES, torch.tensor([-2.0, 0.5, 1.0, 0.0]), fresh(rows), REACHES
    ),
    "membership_gaps": lambda rows: Membership(
        None, "own", CUES, torch.tensor([-2.0, 0.5, 1.0, 0.0]), fresh(rows), REACHES, GAPS
    ),
    "ungated": lambda rows: Ungated(),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Parametrised cases share code objects, and dynamo counts recompilations per code object."""
    torch._dynamo.reset()


@pytest.fixture
def layer():
    return torch.randn(M, N), torch.randn(M), (torch.randn(M, RANK), torch.randn(RANK, N) / 3)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def state_of(scope):
    return getattr(scope, "state", None)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, False) for name in SCOPES), ("prefix", True), ("membership_gaps", True)],
)
def test_fullgraph(layer, name, dynamic):
    """Nothing in the op may break the graph, be alpha a number or a tensor."""
    weight, bias, delta = layer

    def run(x, alpha, mask, scope):
        y, z = hooked_linear(x, weight, bias, delta, alpha, mask=mask, scope=scope)
        return torch.relu(y), z

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    eager_scope, scope = SCOPES[name](3), SCOPES[name](3)
    alphas = [1.0, torch.tensor(0.5), torch.tensor(0.7)]
    for length, alpha in zip((5, 9, 2) if dynamic else (5,), alphas, strict=False):
        x, mask = torch.randn(3, length, N), torch.rand(3, length) > 0.3
        same(compiled(x, alpha, mask, scope), run(x, alpha, mask, eager_scope))
        if state_of(scope) is not None:
            same(state_of(scope), state_of(eager_scope))


@pytest.mark.parametrize("name", SCOPES)
def test_one_graph_for_every_batch_and_length(layer, name):
    """Sizes are not baked in: neither the number of sequences nor that of tokens recompiles."""
    weight, bias, delta = layer
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def run(x, alpha, mask, scope):
        return hooked_linear(x, weight, bias, delta, alpha, mask=mask, scope=scope)

    alpha, graphs = torch.tensor(0.5), []
    for rows, length in ((2, 6), (3, 9), (7, 4), (4, 33)):
        x, mask = torch.randn(rows, length, N), torch.rand(rows, length) > 0.3
        eager_scope, scope = SCOPES[name](rows), SCOPES[name](rows)
        want = hooked_linear(x, weight, bias, delta, alpha, mask=mask, scope=eager_scope)
        same(run(x, alpha, mask, scope), want)
        if state_of(scope) is not None:
            same(state_of(scope), state_of(eager_scope))
        graphs.append(counter.frame_count)
    # Python numbers in a scope make dynamo begin its first graph again.
    assert graphs == [graphs[0]] * 4


def test_fullgraph_packed_and_inductor(layer):
    weight, bias, delta = layer

    @torch.compile(fullgraph=True)
    def run(x, cu_seqlens, state):
        y, z = hooked_linear(
            x, weight, bias, delta, 1.0, cu_seqlens=cu_seqlens, scope=Prefix(state)
        )
        return torch.relu(y), z

    state, eager_state = torch.zeros(3, 3), torch.zeros(3, 3)
    for cuts in ([0, 3, 3, 11], [0, 1, 2, 3]):
        cu_seqlens = torch.tensor(cuts, dtype=torch.int32)
        x = torch.randn(cuts[-1], N)
        y, z = run(x, cu_seqlens, state)
        expected_y, expected_z = hooked_linear(
            x, weight, bias, delta, 1.0, cu_seqlens=cu_seqlens, scope=Prefix(eager_state)
        )
        # Inductor may pick another kernel for the frozen product.
        torch.testing.assert_close(y, torch.relu(expected_y))
        same(z, expected_z)
        same(state, eager_state)


def test_buffers_swapped_in_place_are_seen(layer):
    """What a compiled graph reads may be rewritten between calls: no recompilation."""
    weight, bias, delta = layer
    delta = tuple(part.clone() for part in delta)
    alpha = torch.tensor(0.5)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: hooked_linear(x, weight, bias, delta, alpha), fullgraph=True, backend=counter
    )
    x = torch.randn(2, 6, N)
    for step in range(3):
        same(compiled(x), hooked_linear(x, weight, bias, delta, alpha))
        delta[0].mul_(2)
        delta[1].add_(0.1)
        alpha.fill_(0.2 * step)
    assert counter.frame_count == 1


def test_hook_output_never_returns_its_input_when_compiled(layer):
    _, _, delta = layer
    base, x = torch.randn(2, 6, M), torch.randn(2, 6, N)
    assert hook_output(base, x, delta, 1e9)[0] is base
    compiled = torch.compile(
        lambda b, x: hook_output(b, x, delta, 1e9), fullgraph=True, backend="aot_eager"
    )
    y, _ = compiled(base, x)
    assert torch.equal(y, base)
    assert y.data_ptr() != base.data_ptr()


def opcheck(op, *args):
    torch.library.opcheck(op.default, args)


# opcheck compares outputs without allowing NaN, so no token may be undefined here.
@pytest.mark.parametrize("name", [name for name in SCOPES if name != "ungated"])
def test_opcheck(layer, name):
    _, _, delta = layer
    scope = SCOPES[name](3)
    if name == "prefix":
        scope = Prefix(torch.tensor([5.0, 1.0, 2.0]).repeat(3, 1))
    x, mask = torch.randn(3, 5, N), torch.ones(3, 5, dtype=torch.bool)
    packed = _pack(x, delta, mask, None, scope, "auto")
    base, alpha = torch.randn(3, 5, M), torch.tensor(0.5)
    opcheck(torch.ops.coachhook.hook_output, base, x, alpha, *packed)
    opcheck(torch.ops.coachhook.gate_scores, x, *packed)


def test_opcheck_dense_reference_and_strided(layer):
    _, _, delta = layer
    x = torch.randn(9, 2 * N)[:, ::2]
    base, alpha = torch.randn(M, 9).t(), torch.tensor(0.5)
    packed = _pack(x, delta[0] @ delta[1], None, None, Sequence(), "reference")
    opcheck(torch.ops.coachhook.hook_output, base, x, alpha, *packed)


def test_opcheck_packed_cues(layer):
    _, _, delta = layer
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    limits = torch.tensor([-2.0, 0.5, 1.0, -torch.inf])
    for state in (None, fresh(3)):
        scope = Membership(None, "own", CUES, limits, state, None if state is None else REACHES)
        x, base = torch.randn(9, N), torch.randn(9, M)
        packed = _pack(x, delta, None, cu_seqlens, scope, "auto")
        opcheck(torch.ops.coachhook.hook_output, base, x, torch.tensor(0.5), *packed)


def test_opcheck_packed(layer):
    _, _, delta = layer
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    scope = Prefix(torch.tensor([5.0, 1.0, 2.0]).repeat(3, 1))
    x, base = torch.randn(9, N), torch.randn(9, M)
    packed = _pack(x, delta, None, cu_seqlens, scope, "auto")
    opcheck(torch.ops.coachhook.hook_output, base, x, torch.tensor(0.5), *packed)


def test_schema_declares_what_is_mutated():
    for op in (torch.ops.coachhook.hook_output, torch.ops.coachhook.gate_scores):
        written = {
            a.name for a in op.default._schema.arguments if a.alias_info and a.alias_info.is_write
        }
        assert written == {"state"}


def test_export(layer):
    weight, bias, delta = layer

    class Layer(torch.nn.Module):
        def forward(self, x):
            return hooked_linear(x, weight, bias, delta, 1.0)

    x = torch.randn(2, 6, N)
    exported = torch.export.export(Layer(), (x,))
    targets = {node.target for node in exported.graph.nodes}
    assert torch.ops.coachhook.hook_output.default in targets
    same(exported.module()(x), hooked_linear(x, weight, bias, delta, 1.0))


@pytest.mark.parametrize("name", SCOPES)
def test_fake_tensors_have_the_real_shapes(layer, name):
    weight, bias, delta = layer
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (weight, bias, *delta)]
        x = torch.empty(3, 7, N)
        scope = SCOPES[name](3)
        if isinstance(scope, Membership):
            given = scope.groups, scope.cues, scope.limits, scope.state, scope.reaches, scope.gaps
            groups, *cues = (None if t is None else mode.from_tensor(t) for t in given)
            scope = Membership(groups, scope.correction, *cues)
        y, z = hooked_linear(x, fakes[0], fakes[1], tuple(fakes[2:]), 1.0, scope=scope)
        z_only = gate_scores(x, tuple(fakes[2:]), scope=scope)
    assert y.shape == (3, 7, M)
    assert z.shape == z_only.shape == (3, 7)
    assert z.dtype == z_only.dtype == torch.float32


def test_errors_are_raised_while_tracing(layer):
    weight, bias, delta = layer
    compiled = torch.compile(
        lambda x: hooked_linear(x, weight, bias, delta[0], 1.0), backend="aot_eager"
    )
    with pytest.raises(ValueError, match=r"delta must be \[19, 12\]"):
        compiled(torch.randn(2, 6, N))
