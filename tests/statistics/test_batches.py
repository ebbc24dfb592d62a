from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coachhook.statistics.batches import Reservoir, TokenStream, make_batches
from coachhook.statistics.collect import _WINDOW_BATCHES


def _sequences(lengths):
    ends = np.cumsum(lengths)
    return [
        np.arange(end - n, end, dtype=np.int64) + 1 for n, end in zip(lengths, ends, strict=True)
    ]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    budget=st.integers(1, 200),
    first=st.integers(0, 10**12),
)
def test_every_token_is_in_one_batch_at_its_place(lengths, budget, first):
    batches = make_batches(_sequences(lengths), first, budget)
    places = []
    for ids, mask, real, positions, _ in batches:
        assert ids.numel() <= budget or ids.shape[0] == 1
        flat = ids.reshape(-1)
        if mask is None:
            assert real is None
        else:
            assert int(mask.sum()) == len(real) == len(positions)
            assert bool(mask[:, 0].all())
            assert bool((mask[:, 1:] <= mask[:, :-1]).all())  # padding is on the right
            assert bool(mask.reshape(-1)[real].all())
            flat = flat[real]
        # Token ids were numbered like places, from 1.
        assert np.array_equal(flat.numpy() - 1 + first, positions)
        places.append(positions)
    assert np.array_equal(np.sort(np.concatenate(places)), first + np.arange(sum(lengths)))


def test_padding_is_small_on_real_text(shared_dir):
    from coachhook.models import load_model
    from coachhook.statistics import read_texts

    _, tokenizer = load_model(shared_dir / "models" / "factlm-gpt2")
    stream = TokenStream(
        read_texts(shared_dir / "data" / "corpus.txt"),
        tokenizer,
        max_length=256,
        max_tokens=131_072,
        window_tokens=_WINDOW_BATCHES * 2048,
    )
    real = padded = 0
    while window := stream.window():
        for batch in make_batches(window, 0, 2048):
            real += len(batch.positions)
            padded += batch.input_ids.numel()
    assert real == 131_072
    assert padded <= 1.06 * real


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(0, 30),
    total=st.integers(1, 200),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=20),
    seed=st.integers(0, 2**32),
)
def test_the_sample_is_the_same_in_any_order(size, total, cuts, seed):
    everything = np.random.default_rng(seed).permutation(total)
    whole, parts = Reservoir(size), Reservoir(size)
    values = np.full(size, -1)
    whole.offer(np.arange(total))
    at = 0
    while at < total:
        for cut in cuts:
            chunk = everything[at : at + cut]
            at += cut
            if len(chunk):
                slots, rows = parts.offer(chunk)
                values[slots] = chunk[rows]
                resumed = Reservoir(size)
                resumed.restore(parts.positions)
                parts = resumed
    assert np.array_equal(np.sort(whole.positions), np.sort(parts.positions))
    assert np.array_equal(values, parts.positions)
    kept = parts.positions[parts.order()]
    assert len(kept) == min(size, total)
    assert np.array_equal(kept, np.sort(kept))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sample_is_uniform(seed):
    # 100 tenths of a stream, 40 keys expected in each: the chi-square statistic of a uniform
    # sample has mean 99 and standard deviation 14.
    reservoir = Reservoir(4000, seed=seed)
    for start in range(0, 1_000_000, 50_000):
        reservoir.offer(np.arange(start, start + 50_000))
    counts = np.bincount(reservoir.positions // 10_000, minlength=100)
    assert abs(((counts - 40.0) ** 2 / 40.0).sum() - 99) < 5 * 14
