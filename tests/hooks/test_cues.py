"""Edits that wait for a cue: what a hook stores of them, and what it keeps beside a cache."""

from __future__ import annotations

import copy
import inspect
import pickle
from itertools import pairwise

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounter

from coachhook.hooks import HookedLinear, HookSet, attach_hooks
from coachhook.hooks.cache_state import state_of
from coachhook.hooks.storage import CUE_TENSORS

from ..models.families import tiny
from .support import inputs

M, N = 12, 20
INF = float("inf")
IDS = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(4))
LONG = torch.randint(3, 60, (1, 100), generator=torch.Generator().manual_seed(4))
NEVER = 2**31 - 1


def hook(base: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> HookedLinear:
    base = nn.Linear(N, M) if base is None else base
    return HookedLinear(base, in_features=N, out_features=M, index=3, dtype=dtype)


def edits(count: int, dtype: torch.dtype = torch.float32) -> dict:
    """Arguments of ``set_pair``: half of the edits wait for a cue, most of these for a pair."""
    limits = torch.rand(count, dtype=dtype)
    limits[::2] = -INF
    v, at, cues = (torch.randn(*s, dtype=dtype) for s in ((M, count), (count, N), (count, N)))
    reaches = torch.randint(1, 6, (count,), dtype=torch.int32)
    gaps = torch.arange(count, dtype=torch.int32) % 3
    return {
        "v": v, "at": at, "correction": "own",
        "cues": cues, "limits": limits, "reaches": reaches, "gaps": gaps,
    }  # fmt: skip


def waiting(
    model,
    *pairs: tuple[int | tuple[int, ...], int],
    ids: torch.Tensor = IDS,
    reaches: torch.Tensor | None = None,
    gaps: torch.Tensor | None = None,
) -> HookSet:
    """Layer 0 with one edit per (cue, place), columns of IDS: it fires there if its cue was read.

    Cue and key are filters that are 1 at their token of IDS, or tokens, and 0 at the others of
    ``ids``.
    """
    hooks = attach_hooks(model, [0])
    layer = hooks[0]
    with hooks.disabled():
        filters = torch.linalg.pinv(inputs(model, layer, input_ids=ids)).T
    tokens = [[cue] if isinstance(cue, int) else list(cue) for cue, _ in pairs]
    cues = torch.stack([filters[columns].sum(0) for columns in tokens])
    places = filters[[place for _, place in pairs]]
    v = torch.randn(layer.out_features, len(pairs), dtype=torch.float64) * 9
    layer.set_pair(v, places, None, "own", cues, torch.full((len(pairs),), 0.5), reaches, gaps)
    layer.set_scope("membership")
    layer.set_alpha(0.5)
    layer.state = "validated"
    return hooks


def again(hooks: HookSet) -> None:
    """Set the same edits once more."""
    kept = hooks[0].snapshot().stored.tensors
    hooks[0].set_pair(kept["left"], kept["right"], None, "own", kept["cues"], kept["limits"])


def fired_at(records: list, start: int = 0) -> list[int]:
    """Columns of the first row that fired, of one forward after the other."""
    flags = torch.cat([flags[0] for _, _, flags in records])
    return (flags.nonzero().flatten() + start).tolist()


def read(model, hooks: HookSet, *cuts: int, cache=None, start: int = 0) -> list[int]:
    """Columns that fire in the rest of IDS, given in parts that end at the cuts."""
    cache = transformers.DynamicCache() if cache is None else cache
    bounds = (start, *cuts, IDS.shape[1])
    with torch.no_grad(), hooks.record() as records:
        for a, b in pairwise(bounds):
            model(IDS[:, a:b], past_key_values=cache, use_cache=True)
    return fired_at(records, start)


def test_an_edit_fires_only_after_its_cue() -> None:
    for pairs, wanted in (
        ([(3, 7)], [7]),
        ([(9, 7)], []),
        ([(7, 7)], [7]),
        ([(3, 7), (9, 10), (10, 9), (0, 0)], [0, 7, 10]),
    ):
        model = tiny("llama").double()
        with torch.no_grad():
            plain = model(IDS).logits
        hooks = waiting(model, *pairs)
        with torch.no_grad(), hooks.record() as records:
            edited = model(IDS, use_cache=False).logits
        assert fired_at(records) == wanted
        first = wanted[0] if wanted else IDS.shape[1]
        assert torch.equal(edited[:, :first], plain[:, :first])
        assert torch.equal(edited, plain) == (not wanted)
        for cuts in ((), (5,), range(1, 12), (4, 8), (8, 9)):
            assert read(model, hooks, *cuts) == wanted
        hooks.detach()


@pytest.mark.parametrize("cuts", [(), (4, 7, 8), tuple(range(1, 12))])
def test_an_edit_waits_for_a_cue_that_was_read_soon_before(cuts: tuple[int, ...]) -> None:
    model = tiny("llama").double()
    pairs = (3, 9), (4, 9), (4, 7), (6, 10)
    # What is 6 columns before is out of reach of the first.
    reaches = torch.tensor([5, 5, 3, 2**31 - 1], dtype=torch.int32)
    hooks = waiting(model, *pairs[:1], reaches=reaches[:1])
    assert read(model, hooks, *cuts) == []
    hooks.detach()
    hooks = waiting(model, *pairs, reaches=reaches)
    assert read(model, hooks, *cuts) == [7, 9, 10]
    with torch.no_grad(), hooks.record() as records:
        model(IDS, use_cache=False)
    assert fired_at(records) == [7, 9, 10]


@pytest.mark.parametrize("cuts", [(), (4, 7, 8), tuple(range(1, 12))])
def test_two_tokens_make_a_cue_at_their_distance_alone(cuts: tuple[int, ...]) -> None:
    model = tiny("llama").double()
    pairs = {((3, 5), 7): (8, 2), ((3, 5), 8): (8, 1), ((2, 6), 9): (3, 4), ((4,), 10): (8, 1)}
    # One token is enough without a gap, and where an edit stays armed for ever.
    pairs |= {((3, 5), 4): (8, 0), ((5,), 11): (NEVER, 3)}
    reaches, gaps = torch.tensor(list(pairs.values()), dtype=torch.int32).T
    hooks = waiting(model, *pairs, reaches=reaches, gaps=gaps)
    assert read(model, hooks, *cuts) == [4, 7, 9, 11]
    with torch.no_grad(), hooks.record() as records:
        model(IDS, use_cache=False)
    assert fired_at(records) == [4, 7, 9, 11]


@pytest.mark.parametrize("change", ["none", "copied", "pickled", "reordered", "moved"])
def test_a_deep_crop_takes_no_edit_away_that_waits_for_two_tokens(change: str) -> None:
    """What it leaves of a register are both of them; the cache knows how far apart they are."""
    changes = {"intermediate_size": 160, "max_position_embeddings": 128}
    model = tiny("llama", lambda arguments: arguments.update(changes)).double()
    reaches, gaps = torch.tensor([[50], [3]], dtype=torch.int32)
    hooks = waiting(model, ((20, 23), 72), ids=LONG, reaches=reaches, gaps=gaps)
    layer, cache = hooks[0], transformers.DynamicCache()
    kept = layer.snapshot()
    if change == "moved":
        # As many edits as the cache knows, in another buffer.
        waiting_alone = kept.stored.tensors | {"gaps": torch.zeros_like(gaps)}
        left, right, *cue = (waiting_alone[n] for n in ("left", "right", *CUE_TENSORS))
        layer.set_pair(left, right, None, "own", *cue)
    with torch.no_grad():
        model(LONG[:, :5], past_key_values=cache)
        if change == "moved":
            layer.set_pair(torch.ones(32, 40), torch.ones(40, 160))
            layer.restore(kept)
        model(LONG[:, 5:], past_key_values=cache)
        if change == "copied":
            cache = copy.deepcopy(cache)
        elif change == "pickled":
            cache = pickle.loads(pickle.dumps(cache))
        elif change == "reordered":
            cache.reorder_cache(torch.tensor([0]))
        cache.crop(-30)
        with hooks.record() as records:
            model(LONG[:, 70:80], past_key_values=cache)
    assert fired_at(records, 70) == [72]


def test_nothing_armed_is_minus_infinity_and_below_every_threshold() -> None:
    model = tiny("llama").double()
    with torch.no_grad():
        plain = model(IDS).logits
    hooks = waiting(model, (8, 3))
    hooks[0].set_alpha(-INF)
    with torch.no_grad(), hooks.record() as records:
        edited = model(IDS).logits
    _, z, flags = records[0]
    assert z[0, :8].isneginf().all() and z[0, 8:].isfinite().all()
    assert fired_at(records) == [8, 9, 10, 11]
    assert torch.equal(edited[:, :8], plain[:, :8])


def test_a_cache_cut_back_forgets_the_cues_behind_the_cut_alone() -> None:
    model = tiny("llama").double()
    hooks = waiting(model, (6, 10), (3, 9), reaches=torch.tensor([2**31 - 1, 6]).int())

    def after(*crops: int) -> list[int]:
        cache = transformers.DynamicCache()
        with torch.no_grad():
            model(IDS[:, :5], past_key_values=cache)
            for column in (5, 6, 7):
                model(IDS[:, column : column + 1], past_key_values=cache)
            for crop in crops:
                cache.crop(crop)
            length = cache.get_seq_length()
            with hooks.record() as records:
                positions = torch.arange(length, 12)[None]
                model(IDS[:, length:], past_key_values=cache, position_ids=positions)
        return fired_at(records, length)

    assert after() == [9, 10]
    assert after(-1) == [9, 10]
    assert after(-2) == [9, 10]  # the cue is read again
    seen = []
    for crop in (-1, -2, -5):
        cache = transformers.DynamicCache()
        with torch.no_grad():
            model(IDS[:, :8], past_key_values=cache)
            cache.crop(crop)
        seen.append(state_of(cache).moments[0, "membership"].tolist())
    assert seen == [[[7, 6, 3, 0, 8]], [[6, NEVER, 3, 0, 4]], [[3, NEVER, NEVER, 0, 0]]]


@pytest.mark.parametrize("change", ["same", "other", "more", "restore", "clear", "reserve"])
def test_other_edits_begin_unarmed(change: str) -> None:
    """Also where their number is that of before: the columns would be read as theirs."""
    model = tiny("llama").double()
    hooks = waiting(model, (3, 7), (4, 8), (6, 10))
    cache, whole = transformers.DynamicCache(), transformers.DynamicCache()
    with torch.no_grad():
        for kept in (cache, whole):
            model(IDS[:, :5], past_key_values=kept)
    untouched = copy.deepcopy(cache)
    assert read(model, hooks, cache=whole, start=5) == [7, 8, 10]
    layer = hooks[0]
    kept = layer.snapshot()
    tensors = kept.stored.tensors
    if change == "same":
        again(hooks)
    elif change == "other":
        cues = tensors["cues"].flip(0)
        layer.set_pair(tensors["left"], tensors["right"], None, "own", cues, tensors["limits"])
    elif change == "more":
        more = {name: tensors[name].repeat(2, 1) for name in ("right", "cues")}
        v, limits = tensors["left"].repeat(1, 2), tensors["limits"].repeat(2)
        layer.set_pair(v, more["right"], None, "own", more["cues"], limits)
    elif change == "restore":
        layer.restore(kept)
    elif change == "clear":
        layer.clear()
        layer.restore(kept)
    else:
        layer.reserve(9)
    # From then on cues are kept again; those of "other" are in the opposite order.
    wanted = [7] if change == "other" else [10]
    for cuts, kept_until_now in (((), cache), ((6, 7, 8, 9), untouched)):
        assert read(model, hooks, *cuts, cache=kept_until_now, start=5) == wanted


def test_a_batch_of_prompts_and_the_rows_of_its_cache() -> None:
    model = tiny("llama").double()
    other = IDS.flip(1)
    hooks = waiting(model, (3, 7), ids=torch.cat([IDS, other]))
    rows = torch.cat([IDS, other, IDS])
    with torch.no_grad():
        cache = model(rows[:, :5]).past_key_values
    seen = state_of(cache).moments[0, "membership"].tolist()
    assert seen == [[5, 3, 0], [5, NEVER, 0], [5, 3, 0]]
    pickled = pickle.loads(pickle.dumps(cache))
    pickled.reorder_cache(torch.tensor([1, 1, 0]))
    with torch.no_grad(), hooks.record() as records:
        model(rows[[1, 1, 0], 5:], past_key_values=pickled)
        model(rows[:, 5:], past_key_values=cache)
    assert records[0][2].nonzero().tolist() == [[2, 2]]
    assert records[1][2].nonzero().tolist() == [[0, 2], [2, 2]]


def test_padding_counts_where_it_is_included() -> None:
    """As text it arms, and nothing is kept."""
    model = tiny("llama").double()
    hooks = waiting(model, (3, 7))
    mask = torch.ones_like(IDS)
    mask[0, 3] = 0
    for include, wanted in ((False, []), (True, [7])):
        hooks[0].set_scope("membership", include_padding=include)
        # Only the hook is to see the mask: the model's attention would change the key.
        hooks[0].context.enter(model.model, (), {"input_ids": IDS, "attention_mask": mask})
        with torch.no_grad(), hooks.record() as records:
            model.model.layers[0].mlp.down_proj(_x(model, hooks))
        assert fired_at(records) == wanted
    with torch.no_grad():
        cache = model(IDS[:, :5]).past_key_values
    assert state_of(cache) is None
    assert read(model, hooks, cache=cache, start=5) == []


def _x(model, hooks: HookSet) -> torch.Tensor:
    forward = hooks[0].context.forward
    kept = dict(vars(forward))
    with hooks.disabled():
        x = inputs(model, hooks[0], input_ids=IDS)[None]
    vars(forward).update(kept)
    return x


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5),
    reason="torch 2.4 cannot trace the attention of transformers",
)
def test_a_compiled_graph_forgets_the_cues_of_other_edits_too() -> None:
    torch._dynamo.reset()
    model = tiny("llama").double()
    hooks = waiting(model, (3, 7), (4, 8))
    hooks.reserve(5, cues=True)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)

    def static() -> transformers.StaticCache:
        sizes = {"max_cache_len": 16, "max_batch_size": 1, "dtype": model.dtype}
        known = inspect.signature(transformers.StaticCache).parameters
        sizes = {name: size for name, size in sizes.items() if name in known}
        return transformers.StaticCache(config=model.config, **sizes)

    def decode(step, change: bool) -> list[torch.Tensor]:
        cache = static()
        out = [model(IDS[:, :5], past_key_values=cache).logits]
        for column in range(5, 12):
            if change and column == 7:
                again(hooks)
            positions = torch.tensor([[column]])
            mask = (torch.arange(16) <= column)[None, None, None]
            given = {"position_ids": positions, "past_key_values": cache, "attention_mask": mask}
            if "cache_position" in inspect.signature(model.forward).parameters:
                given["cache_position"] = positions[0]
            out.append(step(input_ids=IDS[:, column : column + 1], **given).logits)
        return out

    answers = []
    with torch.no_grad():
        for change in (False, True, False):
            wanted = decode(model, change)
            answers.append(torch.cat(wanted, 1))
            for got, want in zip(decode(compiled, change), wanted, strict=True):
                torch.testing.assert_close(got, want)
    assert counter.frame_count <= 2
    torch.testing.assert_close(answers[0], answers[2])
    assert not torch.allclose(answers[0], answers[1])
    torch._dynamo.reset()


def test_what_a_pair_without_cues_costs() -> None:
    layer = hook()
    plain = {"v": torch.randn(M, 3), "at": torch.randn(3, N), "correction": "own"}
    layer.set_pair(**plain)
    assert not any(getattr(layer._store, name).numel() for name in CUE_TENSORS)
    layer.set_pair(**edits(3))
    assert layer._store.cues.shape == (16, N) and layer._store.gaps.shape == (16,)
    layer.set_pair(**plain)
    assert not any(getattr(layer._store, name).numel() for name in CUE_TENSORS)
    layer.set_pair(**edits(3))
    layer.set_delta(torch.ones(M, N))
    assert not any(getattr(layer._store, name).numel() for name in CUE_TENSORS)
    other = hook()
    other.reserve(4)
    assert other._store.cues.numel() == 0
