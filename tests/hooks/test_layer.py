"""The wrapper around one module: storage, states, transparency."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from coachhook.hooks import HookedLinear

M, N = 12, 20


class Halved(nn.Module):
    """Stands for a quantised layer: no floating-point parameter, its own arithmetic."""

    in_features, out_features = N, M

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.randint(-8, 8, (M, N), dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.packed.to(x.dtype) / 8).T


BASES = {"linear": lambda: nn.Linear(N, M), "conv1d": lambda: Conv1D(M, N), "custom": Halved}


def hook(base: nn.Module, dtype: torch.dtype = torch.float32) -> HookedLinear:
    return HookedLinear(base, in_features=N, out_features=M, index=3, dtype=dtype)


def factors(rank: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    q, _ = torch.linalg.qr(torch.randn(M, rank, dtype=torch.float64))
    return q.to(dtype), torch.randn(rank, N, dtype=dtype)


@pytest.mark.parametrize("name", BASES)
def test_off_and_empty_are_the_base(name: str) -> None:
    base = BASES[name]()
    x = torch.randn(2, 5, N)
    expected = base(x)
    layer = hook(base)
    assert layer.state == "off"
    assert layer.storage == "empty"
    for state in ("off", "temporary", "validated"):
        layer.state = state
        assert torch.equal(layer(x), expected)
    layer.set_delta(torch.randn(M, N))
    assert not torch.allclose(hooked_everywhere(layer, x), expected)
    layer.state = "off"
    assert torch.equal(layer(x), expected)
    layer.state = "validated"
    assert layer.alpha == float("inf")
    assert torch.equal(layer(x), expected)
    layer.clear()
    assert layer.storage == "empty"
    assert not layer.delta().any()


def hooked_everywhere(layer: HookedLinear, x: torch.Tensor) -> torch.Tensor:
    layer.state = "temporary"
    return layer(x)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("storage", ["dense", "factored", "pair"])
def test_temporary_is_the_changed_weight(name: str, storage: str) -> None:
    base = BASES[name]()
    layer = hook(base)
    q, s = factors(5)
    if storage == "dense":
        layer.set_delta(q @ s)
    elif storage == "factored":
        layer.set_factored(q, s)
    else:
        layer.set_pair(q, s)
    assert layer.storage == storage
    assert layer.rank == (M if storage == "dense" else 5)
    x = torch.randn(2, 5, N)
    torch.testing.assert_close(layer.delta(), q @ s)
    torch.testing.assert_close(hooked_everywhere(layer, x), base(x) + x @ (q @ s).T)


def test_the_gate_is_the_op() -> None:
    from coachhook.ops import Population, hook_output

    base = nn.Linear(N, M)
    layer = hook(base)
    q, s = factors(4)
    layer.set_factored(q, s)
    layer.set_scope("population", population=(4.0, 1.5))
    layer.set_alpha(0.3)
    layer.state = "validated"
    x = torch.randn(3, 7, N)
    y, z = hook_output(base(x), x, (q, s), 0.3, scope=Population(4.0, 1.5))
    assert 0 < (z >= 0.3).sum() < z.numel()
    assert torch.equal(layer(x), y)
    assert torch.equal(layer(x.reshape(21, N)), y.reshape(21, M))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_bare_linear_and_an_observed_one_say_the_same_bits(
    bias: bool, dtype: torch.dtype
) -> None:
    base = nn.Linear(N, M, bias=bias).to(dtype)
    layer = hook(base)
    layer.set_factored(*factors(4))
    layer.set_scope("population", population=(4.0, 1.0))
    layer.state = "validated"
    seen: list[torch.Tensor] = []

    def note(module: nn.Module, _: object, output: torch.Tensor) -> None:
        if module is base:
            seen.append(output)

    inputs = [torch.randn(*shape, N).to(dtype) for shape in ((1, 1), (2, 5), (3, 20))]
    inputs.append(torch.randn(2, N, 6).to(dtype).mT)
    for alpha in (-9.0, 0.2, 9.0):
        layer.set_alpha(alpha)
        for x in inputs:
            bare = layer(x)
            for observe in (
                base.register_forward_hook,
                nn.modules.module.register_module_forward_hook,
            ):
                seen.clear()
                handle = observe(note)
                assert torch.equal(layer(x), bare) and len(seen) == 1
                handle.remove()


def test_alpha_and_scope() -> None:
    layer = hook(nn.Linear(N, M))
    layer.set_alpha(0.5)
    assert layer.alpha == 0.5
    with pytest.raises(ValueError, match="got NaN"):
        layer.set_alpha(float("nan"))
    with pytest.raises(ValueError, match="state must be one of off"):
        layer.state = "on"
    with pytest.raises(ValueError, match="kind must be one of sequence"):
        layer.set_scope("window")
    for bad in ((0.0, 0.0), (0.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="positive standard deviation"):
            layer.set_scope("population", population=bad)
    assert (layer.alpha, layer.scope, layer.population) == (0.5, "sequence", (0.0, 1.0))
    layer.set_scope("population", population=(2.0, 0.5))
    layer.set_scope("prefix", include_padding=True)
    assert (layer.scope, layer.include_padding, layer.population) == ("prefix", True, (2.0, 0.5))


def test_the_scope_needs_its_storage() -> None:
    layer = hook(nn.Linear(N, M))
    layer.state = "validated"
    layer.set_pair(*factors(3))
    x = torch.randn(1, 4, N)
    with pytest.raises(ValueError, match="'sequence' needs Delta stored as dense or factored"):
        layer(x)
    layer.set_scope("membership")
    layer(x)
    layer.set_factored(*factors(3))
    with pytest.raises(ValueError, match="'membership' needs Delta stored as a pair"):
        layer(x)


def test_what_is_refused_changes_nothing() -> None:
    layer = hook(nn.Linear(N, M))
    q, s = factors(4)
    layer.set_pair(q, s, torch.tensor([0, 0, 1, 1]), "own")
    before = layer.snapshot()
    nan = s.clone()
    nan[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"delta must be \[12, 20\], got \[20, 12\]"):
        layer.set_delta(torch.zeros(N, M))
    with pytest.raises(TypeError, match="delta must be a floating-point tensor, got torch.int64"):
        layer.set_delta(torch.zeros(M, N, dtype=torch.long))
    with pytest.raises(TypeError, match="got list"):
        layer.set_delta([[0.0]])
    with pytest.raises(ValueError, match=r"Q must be \[12, 4\], got \[12, 3\]"):
        layer.set_factored(q[:, :3], s)
    with pytest.raises(ValueError, match=r"S must be \[4, 20\], got \[4, 19\]"):
        layer.set_factored(q, s[:, 1:])
    with pytest.raises(ValueError, match="orthonormal columns, got columns of norm 2"):
        layer.set_factored(q * 2, s)
    with pytest.raises(ValueError, match="At must be finite"):
        layer.set_pair(q, nan)
    with pytest.raises(ValueError, match=r"groups must be int64 \[4\]"):
        layer.set_pair(q, s, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"groups must lie in 0\.\.3, got 0 to 4"):
        layer.set_pair(q, s, torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="correction must be 'sum' or 'own'"):
        layer.set_pair(q, s, None, "mean")
    after = layer.snapshot()
    assert after.stored.tensors.keys() == before.stored.tensors.keys()
    for name, tensor in before.stored.tensors.items():
        assert torch.equal(tensor, after.stored.tensors[name])
    assert after.stored.correction == "own"
    with pytest.raises(ValueError, match=r"x must be \[B, T, n\]"):
        layer.state = "temporary"
        layer(torch.zeros(1, 1, 2, N))


def test_the_buffers_are_copies_and_stay_where_they_are() -> None:
    layer = hook(nn.Linear(N, M))
    q, s = factors(3)
    layer.set_factored(q, s)
    s.zero_()
    assert layer.delta().any()
    layer.delta().zero_()
    assert layer.delta().any()
    address = layer._store.right.data_ptr()
    for rank in (1, 7, 16):
        if rank <= M:
            layer.set_factored(*factors(rank))
            assert layer.rank == rank
            assert layer._store.right.data_ptr() == address
    layer.set_delta(torch.ones(M, N))
    address = layer._store.dense.data_ptr()
    layer.set_delta(torch.zeros(M, N))
    assert layer._store.dense.data_ptr() == address
    assert layer._store.capacity == 0


def test_the_buffers_join_no_graph() -> None:
    layer = hook(nn.Linear(N, M))
    layer.set_delta(nn.Parameter(torch.randn(M, N)))
    assert not layer._store.dense.requires_grad
    q, s = factors(3)
    layer.set_factored(q.requires_grad_(), s.requires_grad_())
    assert not any(buffer.requires_grad for buffer in layer._store.buffers())
    layer.restore(layer.snapshot())


def test_the_capacity_grows_geometrically() -> None:
    layer = hook(nn.Linear(N, M))
    sizes = set()
    for count in range(1, 200):
        layer.set_pair(torch.randn(M, count), torch.randn(count, N))
        sizes.add(layer._store.capacity)
    assert sizes == {16, 32, 64, 128, 256}


@pytest.mark.parametrize("scope", ["sequence", "prefix", "population", "membership"])
def test_reserved_rows_change_nothing_but_fix_the_addresses(scope: str) -> None:
    base = nn.Linear(N, M).double()
    plain, reserved = hook(base, torch.float64), hook(base, torch.float64)
    reserved.reserve(9)
    addresses = [b.data_ptr() for b in reserved._store.buffers()]
    x = torch.randn(3, 8, N, dtype=torch.float64)
    for layer in (plain, reserved):
        layer.set_scope(scope, population=(4.0, 1.5))
        layer.set_alpha(-0.2)
        layer.state = "validated"
    assert torch.equal(reserved(x), base(x)), "empty, but live"
    scores: list = []
    plain.context.sinks[0] = scores
    reserved.context.sinks[0] = scores
    for rank in (2, 6, 3):
        q, s = factors(rank, torch.float64)
        for layer in (plain, reserved):
            if scope == "membership":
                groups = torch.tensor([1, 1, 0, 2, 2, 0][:rank]) if rank > 2 else None
                layer.set_pair(q, s, groups, "own")
            else:
                layer.set_factored(q, s)
        scores.clear()
        torch.testing.assert_close(reserved(x), plain(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(scores[0][1], scores[1][1], equal_nan=True)
        assert not torch.equal(plain(x), base(x))
        assert [b.data_ptr() for b in reserved._store.buffers()] == addresses
    before = reserved.delta()
    with pytest.raises(ValueError, match="at most the 9 rows that were reserved, got 10"):
        reserved.set_pair(torch.randn(M, 10), torch.randn(10, N))
    with pytest.raises(ValueError, match="must be given in factors"):
        reserved.set_delta(torch.zeros(M, N))
    with pytest.raises(ValueError, match="at least 3, got 2"):
        reserved.reserve(2)
    assert torch.equal(reserved.delta(), before)
    reserved.reserve(40)
    assert torch.equal(reserved.delta(), before)


def test_reserving_needs_factors() -> None:
    layer = hook(nn.Linear(N, M))
    layer.set_delta(torch.ones(M, N))
    with pytest.raises(ValueError, match="got a dense Delta"):
        layer.reserve(4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        hook(nn.Linear(N, M)).reserve(0)


@pytest.mark.parametrize("storage", ["empty", "dense", "factored", "pair"])
@pytest.mark.parametrize("after", ["empty", "dense", "factored", "pair"])
def test_a_snapshot_comes_back_bit_for_bit(storage: str, after: str) -> None:
    def put(layer: HookedLinear, kind: str, rank: int) -> None:
        q, s = factors(rank)
        if kind == "dense":
            layer.set_delta(torch.randn(M, N))
        elif kind == "factored":
            layer.set_factored(q, s)
        elif kind == "pair":
            layer.set_pair(q, s, torch.zeros(rank, dtype=torch.long), "own")

    layer = hook(nn.Linear(N, M))
    put(layer, storage, 5)
    layer.set_alpha(1.1)
    layer.set_scope("population", population=(1.0, 2.0))
    layer.state = "validated"
    snapshot, delta = layer.snapshot(), layer.delta()
    layer.clear()
    put(layer, after, 9)
    layer.set_alpha(0.1)
    layer.set_scope("prefix", include_padding=True, population=(3.0, 4.0))
    layer.state = "temporary"
    layer.restore(snapshot)
    assert torch.equal(layer.delta(), delta)
    assert (layer.storage, layer.state, layer.scope) == (storage, "validated", "population")
    assert not layer.include_padding
    assert layer.population == (1.0, 2.0)
    again = layer.snapshot()
    assert again.stored.grouped == snapshot.stored.grouped == (storage == "pair")
    assert again.stored.correction == snapshot.stored.correction
    assert again.stored.tensors.keys() == snapshot.stored.tensors.keys()
    for name, tensor in snapshot.stored.tensors.items():
        assert torch.equal(tensor, again.stored.tensors[name]), name


def test_the_wrapper_has_the_names_of_the_base() -> None:
    for make in BASES.values():
        base = make()
        layer = hook(base)
        layer.set_delta(torch.randn(M, N))
        assert list(layer.state_dict()) == list(base.state_dict())
        assert [n for n, _ in layer.named_parameters()] == [n for n, _ in base.named_parameters()]
        assert [n for n, _ in layer.named_buffers()] == [n for n, _ in base.named_buffers()]
        assert all(a is b for a, b in zip(layer.parameters(), base.parameters(), strict=True))
    layer = hook(Conv1D(M, N))
    assert (layer.nf, layer.nx) == (M, N)
    assert layer.weight is layer.base.weight
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing
    new = {name: torch.ones_like(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict(new)
    assert bool((layer.base.weight == 1).all())
    layer.weight = nn.Parameter(torch.zeros(N, M))
    assert layer.base.weight is layer.weight
    layer.train()
    assert layer.base.training
    layer.eval()
    assert not layer.base.training
    layer.requires_grad_(False)
    assert not layer.base.weight.requires_grad


def test_casting_the_model_leaves_the_hook_in_its_compute_dtype() -> None:
    layer = hook(nn.Linear(N, M))
    layer.set_delta(torch.randn(M, N))
    layer.set_alpha(1 / 3)
    delta, alpha = layer.delta(), layer.alpha
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.delta(), delta)
    assert layer.alpha == alpha
    layer.half().double()
    assert layer.delta().dtype == torch.float64
    assert torch.equal(layer.delta(), delta.double())
    layer.float()
    assert torch.equal(layer.delta(), delta)
    assert layer.delta().dtype == torch.float32
    custom = hook(Halved(), torch.float64)
    custom.set_delta(delta)
    custom.to(torch.float16)
    assert custom.delta().dtype == torch.float64
    layer.to("meta")
    assert layer.weight.is_meta
    assert layer._store.dense.is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_have_a_float32_hook(dtype: torch.dtype) -> None:
    base = nn.Linear(N, M).to(dtype)
    layer = hook(base)
    q, s = factors(4)
    layer.set_factored(q, s)
    x = torch.randn(2, 6, N, dtype=dtype)
    y = hooked_everywhere(layer, x)
    assert y.dtype == dtype
    expected = (base(x).float() + x.float() @ (q @ s).T).to(dtype)
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_stand_alone(how) -> None:
    layer = hook(nn.Linear(N, M))
    layer.set_delta(torch.randn(M, N))
    x = torch.randn(1, 4, N)
    expected = hooked_everywhere(layer, x)
    twin = how(layer)
    assert twin._parameters is twin.base._parameters
    assert twin.weight is not layer.weight
    assert torch.equal(twin(x), expected)
    twin.set_delta(torch.zeros(M, N))
    assert torch.equal(layer(x), expected)


def test_hooks_set_in_inference_mode_can_be_changed_outside() -> None:
    with torch.inference_mode():
        layer = hook(nn.Linear(N, M))
        layer.set_pair(*factors(3))
        layer.set_delta(torch.ones(M, N))
    layer.set_delta(torch.zeros(M, N))
    layer.set_alpha(1.0)
    layer.set_pair(*factors(2))


def test_gradients_pass_through_the_gate() -> None:
    base = nn.Linear(N, M).double()
    layer = hook(base, torch.float64)
    q, s = factors(4, torch.float64)
    layer.set_factored(q, s)
    layer.set_alpha(0.2)
    layer.state = "validated"
    x = torch.randn(2, 6, N, dtype=torch.float64, requires_grad=True)
    sink: list = []
    layer.context.sinks[0] = sink
    y = layer(x)
    fired = sink[0][2]
    assert 0 < int(fired.sum()) < fired.numel()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    plain = base.weight.sum(0).expand_as(x)
    torch.testing.assert_close(gradient[~fired], plain[~fired])
    torch.testing.assert_close(gradient[fired], (plain + (q @ s).sum(0))[fired])


def test_observers_of_the_gradient_of_a_bare_linear_are_called() -> None:
    base = nn.Linear(N, M)
    layer = hook(base)
    layer.set_factored(*factors(4))
    layer.state = "validated"
    seen: list[nn.Module] = []

    def note(module: nn.Module, *_: object) -> None:
        seen.append(module)

    for observe in (base.register_full_backward_pre_hook, base.register_full_backward_hook):
        seen.clear()
        handle = observe(note)
        layer(torch.randn(2, 6, N, requires_grad=True)).sum().backward()
        assert seen == [base]
        handle.remove()


def test_the_compute_dtype_is_checked() -> None:
    with pytest.raises(ValueError, match=r"dtype must be float32 or float64, got torch\.bfloat16"):
        hook(nn.Linear(N, M), torch.bfloat16)
