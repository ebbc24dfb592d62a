"""The decoding kernels, run unchanged on the host, against the gate spelled out in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coachhook.ops import Membership, Population, Prefix, Scope, Sequence, Ungated
from coachhook.ops.hooked_linear.cues import NEVER, blank_state, firsts
from tests.csrc.decode_host import Decode, decode, truth
from tests.csrc.host import SANITIZE, Host, KernelFailure, build
from tests.csrc.test_gate_host import mutated
from tests.ops.gate_oracle import arming
from tests.ops.test_cues import make_edits, make_gaps, make_reaches, random_state
from tests.tolerances import tol

ORDERS = (0, 1, 7, 23)
TYPES = [torch.float32, torch.float16, torch.bfloat16]
DRIVER = "decode_driver.cpp"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(build(tmp_path_factory.mktemp("host") / "decode", driver=DRIVER))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Host:
    program = build(tmp_path_factory.mktemp("sanitized") / "decode", *SANITIZE, driver=DRIVER)
    return Host(program, {"ASAN_OPTIONS": "detect_leaks=1"})


def make(
    *tokens: int,
    n: int = 96,
    m: int = 40,
    rank: int = 12,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype = torch.float32,
    dense: bool = False,
    fused: bool = False,
    **options,
) -> Decode:
    """A layer of ordinary size in which every third token stands out."""
    x = torch.randn(*tokens, n)
    x.view(-1, n)[::3] *= 3
    q, s = torch.linalg.qr(torch.randn(m, max(m, rank)))[0][:, :rank], torch.randn(rank, n)
    if rank > m:
        q = torch.randn(m, rank) / math.sqrt(rank)
    delta = (torch.randn(m, n) / 8).to(stored) if dense else (q.to(stored), s.to(stored))
    if fused:
        weight, bias = (torch.randn(m, n) / math.sqrt(n)).to(dtype), torch.randn(m).to(dtype)
        return Decode(x.to(dtype), delta, weight=weight, bias=bias, **options)
    return Decode(x.to(dtype), delta, base=torch.randn(*tokens, m).to(dtype), **options)


def check(host: Host, case: Decode, order: int = 0) -> tuple[Tensor, Tensor]:
    want = truth(case)
    before = None if case.base is None else case.base.clone()
    y, z = decode(host, case, order)
    n = case.x.shape[-1]
    torch.testing.assert_close(
        z.double(),
        want.z,
        equal_nan=True,
        **tol("score", case.x.dtype, reduction=n, scale=want.ratio),
    )
    scale = float(want.y.abs().max())
    torch.testing.assert_close(
        y.double(), want.y, **tol("output", case.y_dtype, reduction=n, scale=scale)
    )
    if before is not None:
        assert torch.equal(y[~want.taken], before[~want.taken])
    return y, z


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1].nan_to_num(-9.0), b[1].nan_to_num(-9.0))


GROUPS = torch.tensor([0, 0, 1, 2, 2, 2, 3, 0, 9, 9, 1, 11])
SCOPES = {
    "sequence": lambda rows: Sequence(torch.full((rows, 3), math.nan, dtype=torch.float64)),
    "prefix": lambda rows: Prefix(torch.zeros(rows, 3, dtype=torch.float64)),
    "population": lambda rows: Population(40.0, 12.0),
    "population_rows": lambda rows: Population(
        torch.linspace(30, 50, rows, dtype=torch.float64), torch.linspace(8, 20, rows).double()
    ),
    "membership": lambda rows: Membership(),
    "membership_own": lambda rows: Membership(correction="own"),
    "membership_groups": lambda rows: Membership(GROUPS),
    "membership_groups_own": lambda rows: Membership(GROUPS, "own"),
    "ungated": lambda rows: Ungated(),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", SCOPES)
def test_scopes_and_layouts(host: Host, name: str, fused: bool) -> None:
    for layout in ("steps", "one", "long", "masked", "packed"):
        tokens = {"steps": (9, 1), "one": (1, 1), "long": (2, 13), "masked": (4, 5)}.get(
            layout, (20,)
        )
        case = make(*tokens, fused=fused, rank=12)
        if layout == "masked":
            case.mask = torch.rand(tokens) < 0.7
        if layout == "packed":  # an empty sequence, one token, and tokens of no sequence
            case.cu_seqlens = torch.tensor([0, 1, 1, 9, 17])
        rows = case.sequences()
        case.scope = SCOPES[name](rows)
        check(host, case)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_dtypes_and_storage(host: Host, dtype: torch.dtype, fused: bool, dense: bool) -> None:
    for stored in {dtype, torch.float32}:
        for tokens in ((3, 1), (2, 6)):
            case = make(*tokens, dtype=dtype, stored=stored, fused=fused, dense=dense)
            case.scope = Population(20.0, 7.0)
            check(host, case)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n", [1, 37, 64, 1032])
def test_sizes_strides_and_alignment(host: Host, dtype: torch.dtype, n: int) -> None:
    """n not divisible by 8, one slice and several, rows with pitches and off 16-byte boundaries."""
    case = make(2, 5, n=n, m=21, rank=5, dtype=dtype, fused=True, scope=Ungated())
    first = check(host, case)
    for case.padding, case.offset in ((3, 0), (8, 0), (0, 4), (5, 8)):
        assert same(first, check(host, case))


def test_many_rows_few_columns(host: Host) -> None:
    """Long matrices are cut one warp per rows, short ones with four; ranks beyond shared memory."""
    check(host, make(9, 1, n=40, m=1100, rank=600, fused=True, scope=Population(40.0, 12.0)))
    check(host, make(2, 1, n=40, m=1100, dense=True, scope=Population(25.0, 4.0)))


def test_more_tokens_than_their_coefficients_fit_a_block(host: Host) -> None:
    for rank in (200, 500):
        for scope in (Sequence(), Membership(), Membership(torch.arange(rank) % 90, "own")):
            check(host, make(1, 43, n=72, rank=rank, scope=scope))


def waiting(case: Decode, state: bool = True, apart: bool = True) -> Decode:
    """The same with edits that add their own after a cue, some of which was read before.

    With ``apart`` two tokens make the cues of some.
    """
    edits, dtype = case.delta[1].shape[0], case.delta[1].dtype
    case.delta, cues, limits = make_edits(case.x, case.out_features, edits, dtype)
    reaches, gaps = make_reaches(edits), make_gaps(edits) if apart else None
    told = {"reaches": reaches, "limits": limits, "gaps": gaps}
    kept = random_state(case.sequences(), edits, **told) if state else None
    case.scope = Membership(None, "own", cues, limits.float(), kept, reaches, gaps)
    return case


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("fused", [False, True])
def test_edits_wait_for_their_cues(host: Host, fused: bool, dtype: torch.dtype) -> None:
    for layout in ("steps", "one", "long", "masked", "packed", "misaligned"):
        tokens = {"steps": (9, 1), "one": (1, 1), "long": (2, 13), "masked": (4, 5)}.get(
            layout, (20,)
        )
        for state, apart in ((False, True), (True, False), (True, True)):
            for stored in {dtype, torch.float32}:
                case = make(*tokens, fused=fused, dtype=dtype, stored=stored, rank=12)
                if layout == "masked":
                    case.mask = torch.rand(tokens) < 0.7
                if layout == "packed":
                    case.cu_seqlens = torch.tensor([0, 1, 1, 9, 17])
                if layout == "misaligned":
                    case.padding, case.offset = 3, 4
                waiting(case, state, apart)
                _, after = arming(case.x, case.mask, case.cu_seqlens, case.scope)
                check(host, case)
                if state:
                    assert torch.equal(case.scope.state, after)


def test_more_edits_than_a_block_has_threads(host: Host) -> None:
    """Tiles of edits, slices of the depth; without cues the same launches."""
    for fused in (False, True):
        case = waiting(make(5, 3, n=1100, m=300, rank=700, fused=fused))
        _, after = arming(case.x, None, None, case.scope)
        y, _ = check(host, case)
        assert torch.equal(case.scope.state, after)
        case.scope = Membership(correction="own")
        assert not torch.equal(check(host, case)[0], y)


# Limits, reaches and gaps of edits that see the same tokens; the columns that show their cue, and
# whether they stay armed from the first of these on.
SHOWN = [
    (1.0, 4, 0, [3, 5, 6, 20, 27], False),
    (1.0, 4, 1, [6], False),
    (1.0, 4, 2, [5], False),
    (1.0, 4, 3, [6], False),
    (1.0, 4, 4, [], False),
    (1.0, 4, 7, [27], False),
    (1.0, 4, 2**31 - 1, [27], False),  # taken for 7
    (1.0, 4, -1, [3, 5, 6, 20, 27], False),
    (1.0, 0, 1, [6], False),
    (1.0, -(2**31), 7, [27], False),
    # Together they are more than a register knows: one token is the cue.
    (1.0, 56, 7, [3, 5, 6, 20, 27], True),
    (1.0, 62, 1, [3, 5, 6, 20, 27], True),
    (1.0, 2**31 - 1, 7, [3, 5, 6, 20, 27], True),
    (-math.inf, 4, 1, list(range(34)), True),
    (math.nan, 4, 1, [], False),
]
SHOWN_FOR_LONG = [(1.0, 55, 7, [27], False), (1.0, 61, 1, [6], False)]


@pytest.mark.parametrize(
    "edits, calls", [(SHOWN, [1, 1, *[4] * 8]), (SHOWN_FOR_LONG, [1, 20, 8, 31, 24])]
)
def test_two_tokens_make_a_cue_only_as_far_apart_as_they_are_wanted(
    host: Host, edits: list[tuple], calls: list[int]
) -> None:
    limits, reaches, gaps, shown, for_ever = zip(*edits, strict=True)
    count, length = len(edits), sum(calls)
    want = torch.zeros(count, length, dtype=torch.bool)
    for row, reach, columns, ever in zip(want, reaches, shown, for_ever, strict=True):
        for column in columns:
            row[column if ever else column + 1 : None if ever else column + max(reach, 0) + 1] = (
                True
            )
    # In sequence i edit i has the coefficient 1, the others 0; the last feature shows the cue.
    x = torch.zeros(count, length, count + 1)
    x[:, :, :count] = torch.eye(count)[:, None]
    x[:, [3, 5, 6, 20, 27], count] = 1.0
    cues = torch.eye(count + 1)[-1].repeat(count, 1)
    state = blank_state(count, count, x.device)
    asked = (torch.tensor(t, dtype=torch.int32) for t in (reaches, gaps))
    scope = Membership(None, "own", cues, torch.tensor(limits), state, *asked)
    delta = torch.ones(1, count), torch.eye(count, count + 1)
    _, after = arming(x, None, None, scope)
    z = [decode(host, Decode(part, delta, scope))[1] for part in x.split(calls, 1)]
    for edit, found, armed in zip(edits, torch.cat(z, dim=1) == 1, want, strict=True):
        assert torch.equal(found, armed), edit
    first = [min(columns, default=NEVER) for columns in shown]
    assert firsts(state).tolist() == [first] * count
    assert torch.equal(state, after)


def test_how_a_sequence_is_cut_does_not_change_what_is_armed(host: Host) -> None:
    case = waiting(make(2, 12))
    state = case.scope.state.clone()
    whole = decode(host, case)
    parts = []
    for cut in (slice(0, 5), slice(5, 6), slice(6, 12)):
        scope = replace(case.scope, state=state)
        parts.append(decode(host, Decode(case.x[:, cut], case.delta, scope, case.base[:, cut])))
    assert same(whole, tuple(torch.cat(p, dim=1) for p in zip(*parts, strict=True)))
    assert torch.equal(state, case.scope.state)


def test_an_edit_that_is_not_armed_never_fires(host: Host) -> None:
    case = waiting(make(3, 2), state=False)
    case.scope.limits[:] = math.nan
    case.alpha = -math.inf
    y, z = decode(host, case)
    assert (z == -math.inf).all() and torch.equal(y, case.base)
    case.scope.limits[3] = -math.inf  # waits for nothing
    y, z = decode(host, case)
    want = case.base + case.delta[0][:, 3]
    assert torch.allclose(y, want) and torch.isfinite(z).all()
    case.x[1, 0, 0] = math.nan
    y, z = decode(host, case)
    assert z[1, 0].isnan() and torch.equal(y[1, 0], case.base[1, 0])


def test_scores_alone(host: Host) -> None:
    case = make(3, 4)
    _, want = decode(host, case)
    case.base = None
    _, z = decode(host, case)
    assert torch.equal(z, want)


def test_in_place_and_other_output_dtype(host: Host) -> None:
    case = make(3, 4, scope=Ungated(), mask=torch.arange(4).expand(3, 4) % 2 == 0)
    case.in_place = True
    check(host, case)
    case.base = case.base.to(torch.bfloat16)
    check(host, case)


def test_running_state_does_not_depend_on_how_a_sequence_is_cut(host: Host) -> None:
    case = make(2, 12)
    case.scope = Prefix(torch.zeros(2, 3, dtype=torch.float64))
    whole = decode(host, case)
    state = torch.zeros(2, 3, dtype=torch.float64)
    parts = []
    for cut in (slice(0, 5), slice(5, 6), slice(6, 12)):
        part = Decode(case.x[:, cut], case.delta, Prefix(state), case.base[:, cut])
        parts.append(decode(host, part))
    assert same(whole, tuple(torch.cat(p, dim=1) for p in zip(*parts, strict=True)))
    assert torch.equal(state, case.scope.state)


def test_prompt_statistics_are_handed_out(host: Host) -> None:
    case = make(2, 7, scope=Sequence(torch.zeros(2, 3, dtype=torch.float64)))
    norms = (case.x.double() @ case.delta[1].double().T).norm(dim=-1)
    decode(host, case)
    mean = norms.mean(dim=1)
    want = torch.stack((torch.full((2,), 7.0), mean, (norms - mean[:, None]).square().sum(1)), 1)
    torch.testing.assert_close(case.scope.state, want, rtol=1e-5, atol=1e-5)


def test_nothing_undefined_fires(host: Host) -> None:
    for scope in (Sequence(), Population(0.0, math.nan), Population(1.0, 0.0)):
        case = make(3, 1, scope=scope)
        y, z = decode(host, case)
        assert z.isnan().all() and torch.equal(y, case.base)
    case = make(2, 6, alpha=-100.0)
    case.x[0, 2, 5] = math.nan
    for scope in (Sequence(), Membership(), Population(1.0, 1.0)):
        case.scope = scope
        y, z = decode(host, case)
        assert z[0, 2].isnan() and torch.equal(y[0, 2], case.base[0, 2])
        assert not z[1].isnan().any() and not torch.equal(y[1], case.base[1])


@pytest.mark.parametrize("dtype", TYPES)
def test_a_token_has_the_same_bits_alone_and_in_every_batch(host: Host, dtype: torch.dtype) -> None:
    case = make(64, 1, n=1096, dtype=dtype, fused=True, scope=Population(110.0, 40.0))
    whole = decode(host, case)
    assert 0 < (whole[1] >= case.alpha).sum() < 64
    for rows in (slice(0, 1), slice(5, 13), slice(30, 47)):
        part = Decode(case.x[rows], case.delta, case.scope, None, case.weight, case.bias)
        assert same(decode(host, part), (whole[0][rows], whole[1][rows]))


def test_the_frozen_product_does_not_depend_on_the_hook(host: Host) -> None:
    case = make(3, 2, n=1096, fused=True, alpha=math.inf)
    first, _ = decode(host, case)
    for rank, dense in ((40, False), (1, False), (40, True)):
        other = make(3, 2, n=1096, rank=rank, dense=dense, alpha=math.inf)
        other.x, other.base, other.weight, other.bias = case.x, None, case.weight, case.bias
        assert torch.equal(decode(host, other)[0], first)


def crowded(scope: Scope, **options) -> Decode:
    """Sequences longer than a block's round of tokens, two tiles of tokens, most of them firing."""
    return make(2, 17, n=200, scope=scope, **options)


@pytest.mark.parametrize("order", ORDERS)
def test_sanitizers_find_nothing(sanitized: Host, order: int) -> None:
    check(sanitized, crowded(Population(60.0, 20.0), dtype=torch.bfloat16, fused=True), order)
    check(
        sanitized, make(3, 1, n=37, m=19, rank=5, dtype=torch.float16, fused=True, offset=4), order
    )
    packed = make(20, n=24, dense=True, cu_seqlens=torch.tensor([0, 1, 1, 9, 17]))
    packed.scope = Prefix(torch.zeros(4, 3, dtype=torch.float64))
    check(sanitized, packed, order)
    check(sanitized, make(9, 1, n=24, scope=Membership(GROUPS, "own")), order)
    check(sanitized, waiting(make(3, 4, n=37, m=270, rank=300, fused=True, offset=4)), order)


def test_wrong_offsets_and_groups_stay_in_bounds(sanitized: Host) -> None:
    case = make(10, n=24)
    for edges in ([-5, 4, 20, 30], [9, 2, 12, 3], [0, 10, 10, 10]):
        case.cu_seqlens = torch.tensor(edges)
        for case.scope in (Sequence(), Prefix(torch.zeros(3, 3, dtype=torch.float64))):
            decode(sanitized, case)
    case.cu_seqlens = None
    case.scope = Membership(torch.tensor([-1, 5, 12, 2**40, 0, 0, 0, 1, 1, 1, 1, 1]), "own")
    decode(sanitized, case)
    for edges in ([-5, 4, 20, 30], [9, 2, 12, 3], [0, 10, 10, 10]):
        case = make(10, n=24, cu_seqlens=torch.tensor(edges))
        decode(sanitized, waiting(case))


@pytest.mark.parametrize("fused", [False, True])
def test_thread_order_does_not_change_a_bit(host: Host, fused: bool) -> None:
    for scope in (Membership(GROUPS, "own"), Sequence(), None):
        case = crowded(scope, fused=fused)
        if scope is None:
            waiting(case, state=False)
        first = decode(host, case)
        assert all(same(decode(host, case, order), first) for order in (1, 23))


@pytest.fixture(scope="module")
def summing(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The partial sums are always added up by a launch of their own."""
    folder = tmp_path_factory.mktemp("summing")
    source = mutated(folder, "decode.cu", "int64_t{16} << 20", "-1")
    return Host(build(folder / "decode", csrc=source, driver=DRIVER))


def test_sums_of_their_own_launch_are_the_same_bits(host: Host, summing: Host) -> None:
    for scope in (Population(60.0, 20.0), Membership(GROUPS, "own"), Sequence()):
        case = crowded(scope, alpha=0.5)
        assert same(decode(summing, case), decode(host, case))


def test_sanitizer_sees_an_access_outside(tmp_path: Path) -> None:
    """The net has no holes: an index one too far in the kernel is reported."""
    source = mutated(tmp_path, "decode_project.cuh", "tile * 8 + g < tokens ? end : 0", "end")
    broken = Host(build(tmp_path / "decode", *SANITIZE, csrc=source, driver=DRIVER))
    with pytest.raises(KernelFailure, match="heap-buffer-overflow"):
        decode(broken, make(3, 1))


def test_bad_arguments_are_refused(host: Host) -> None:
    too_many = make(65, 1)
    with pytest.raises(KernelFailure, match=r"decode_hooked_linear: rows must be in 1..64, got 65"):
        decode(host, too_many)
    keys = make(2, 1, rank=513, scope=Membership())
    with pytest.raises(
        KernelFailure, match=r"features must be <= 512 with reduction=max, unless .*, got 513"
    ):
        decode(host, keys)
    both = make(2, 1, fused=True)
    both.base = torch.zeros(2, 1, 40)
    with pytest.raises(KernelFailure, match="weight or base must be given, not both"):
        decode(host, both)
    alone = waiting(make(2, 1))
    alone.scope = replace(alone.scope, reaches=None)
    with pytest.raises(KernelFailure, match="gaps must be null without reaches, got 1"):
        decode(host, alone)
    alone.scope = replace(alone.scope, reaches=make_reaches(12), cues=None, limits=None, state=None)
    with pytest.raises(KernelFailure, match="reaches must be null without cues, got 1"):
        decode(host, alone)
