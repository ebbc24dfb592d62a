from __future__ import annotations

import numpy as np
import pytest
import torch

from coachhook.models import describe, get_submodule
from coachhook.statistics import Statistics, collect_statistics
from coachhook.statistics.batches import make_batches
from coachhook.statistics.shrinkage import shrink_


def _plain(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, float]:
    """S* and rho of the keys [N1, n] and [N2, n] of two halves, entry by entry."""
    keys = np.concatenate([first, second])
    mean, moment = keys.mean(0), keys.T @ keys / len(keys)
    n = keys.shape[1]

    def centred(half):
        return half.T @ half / len(half) - np.outer(half.mean(0), half.mean(0))

    one, two, both = centred(first), centred(second), moment - np.outer(mean, mean)
    noise = signal = 0.0
    for i in range(n):
        for j in range(n):
            if i != j and both[i, i] > 0 and both[j, j] > 0:
                unit = both[i, i] * both[j, j]
                noise += (one[i, j] - two[i, j]) ** 2 / unit
                signal += both[i, j] ** 2 / unit
    share = len(first) * len(second) / len(keys) ** 2
    rho = min(1.0, noise / signal * share) if signal else 0.0
    shrunk = moment.copy()
    for i in range(n):
        for j in range(n):
            if i != j:
                shrunk[i, j] -= rho * both[i, j]
    return shrunk, rho


def _shrunk(first: np.ndarray, second: np.ndarray) -> tuple[torch.Tensor, float]:
    a, b = torch.from_numpy(first), torch.from_numpy(second)
    keys = torch.cat([a, b])
    moment = (keys.T @ keys / len(keys)).tril()  # what is above the diagonal is not looked at
    half = (a.T @ a / len(a)).tril()
    rho = shrink_(moment, half, torch.stack([a.mean(0), b.mean(0)]), len(a), len(b))
    return moment, rho


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("sizes", [(30, 30), (5, 90)])
def test_equals_the_plain_formula(n, sizes):
    draw = np.random.default_rng(n)
    mix = draw.normal(size=(n, n)) + 3 * np.eye(n)
    first, second = (draw.normal(size=(size, n)) @ mix + 2 for size in sizes)
    if n == 7:
        first[:, 3], second[:, 3] = 0, 0  # a feature that is never on
    found, rho = _shrunk(first, second)
    expected, expected_rho = _plain(first, second)
    assert rho == pytest.approx(expected_rho, rel=1e-10, abs=1e-12)
    np.testing.assert_allclose(found.numpy(), np.tril(expected), rtol=1e-10, atol=1e-12)


def test_blocks_of_rows_do_not_matter():
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(40, 1100)) + 1, draw.normal(size=(60, 1100)) + 1
    first[:, 900] += first[:, 3]
    found, rho = _shrunk(first, second)
    keys = np.concatenate([first, second])
    centred = np.cov(keys.T, bias=True)
    off = 1 - np.eye(1100)
    expected = np.tril(keys.T @ keys / 100 - rho * off * centred)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)
    assert 0 < rho <= 1


def test_the_share_is_near_the_best_one_and_unseen_directions_are_filled():
    """On keys whose true moment is known, against the rho of least true error."""
    draw = np.random.default_rng(3)
    n = 60
    mix = np.eye(n) + 0.3 * draw.normal(size=(n, n)) / np.sqrt(n)
    scale = np.exp(draw.normal(size=n) * 2)  # features of very different size
    true = (mix.T @ mix) * np.outer(scale, scale)
    off = 1 - np.eye(n)
    for tokens in (40, 600):
        keys = draw.normal(size=(tokens, n)) @ mix * scale + 0.5 * scale
        found, rho = _shrunk(keys[: tokens // 2], keys[tokens // 2 :])
        centred = np.cov(keys.T, bias=True)
        unit = np.outer(scale, scale) / off.clip(1e-30)
        errors = [
            (((1 - r) * centred - true) * off / unit)[off > 0].__pow__(2).sum()
            for r in np.linspace(0, 1, 201)
        ]
        best = np.linspace(0, 1, 201)[int(np.argmin(errors))]
        assert abs(rho - best) < 0.12
        full = found.tril() + found.tril(-1).T
        lowest = torch.linalg.eigvalsh(full / torch.from_numpy(np.outer(scale, scale)))[0]
        assert lowest > 0.05


def test_tokens_that_repeat_within_a_text_do_not_count_as_more_evidence():
    """Ten copies of each token in its text: the halves disagree as much as before."""
    draw = np.random.default_rng(5)
    first, second = draw.normal(size=(50, 20)), draw.normal(size=(50, 20))
    _, once = _shrunk(first, second)
    _, often = _shrunk(first.repeat(10, axis=0), second.repeat(10, axis=0))
    assert often == pytest.approx(once, rel=1e-10)


def _keys(model, tokenizer, texts, layer):
    module, found = get_submodule(model, describe(model).layer(layer).path), []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    return [k.reshape(-1, k.shape[-1]).double().numpy() for k in found]


def test_the_minimal_mode_of_a_model(model, tokenizer, make_texts, tmp_path):
    model, texts = model.double(), make_texts(400)
    statistics = collect_statistics(model, tokenizer, texts, minimal=True, progress=False)
    assert statistics.tokens == 10 * 96
    # Each text is in one half, drawn by its place; cut as the statistics are.
    ids = [np.asarray(tokenizer(text)["input_ids"]) for text in texts]
    starts = np.cumsum([0, *map(len, ids)])
    used = int(np.searchsorted(starts, 960))
    batches = make_batches(ids[:used], 0, 10_000, halves=True)
    half_at = {int(p): batch.half for batch in batches for p in batch.positions}
    for layer in (0, 2):
        keys = np.concatenate(_keys(model, tokenizer, texts[:used], layer))[:960]
        halves = np.array([half_at[p] for p in range(960)])
        assert 300 < halves.sum() < 660
        expected, rho = _plain(keys[halves == 0], keys[halves == 1])
        assert statistics.shrinkage[layer] == pytest.approx(rho, rel=1e-8)
        found = statistics.covariances[layer].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    statistics.save(tmp_path / "s")
    loaded = Statistics.load(tmp_path / "s")
    assert loaded.shrinkage == statistics.shrinkage and len(loaded.shrinkage) == 3


def test_halves_keep_texts_whole_and_are_drawn_by_place():
    ids = [np.full(length, i) for i, length in enumerate([3, 5, 2] * 200)]
    batches = make_batches(ids, 0, 50, halves=True)
    owners: dict[int, set[int]] = {}
    for batch in batches:
        for row in batch.input_ids:
            owners.setdefault(int(row[0]), set()).add(batch.half)
    assert all(len(halves) == 1 for halves in owners.values())
    count = sum(min(halves) for halves in owners.values())
    assert 240 < count < 360
    later = make_batches(ids, 12_345, 50, halves=True)
    assert [b.half for b in later] != [b.half for b in batches]


def test_tokens_can_be_given_and_full_statistics_are_not_shrunk(model, tokenizer, make_texts):
    texts = make_texts(400)
    few = collect_statistics(model, tokenizer, texts, max_tokens=200, minimal=True, progress=False)
    assert few.tokens == 200 and few.meta["minimal"] is True
    full = collect_statistics(model, tokenizer, texts, max_tokens=200, progress=False)
    assert full.shrinkage == {} and full.meta["minimal"] is False
    for layer in few.layers:
        torch.testing.assert_close(few.samples[layer], full.samples[layer], rtol=1e-4, atol=1e-4)
        expected = full.covariances[layer].diagonal()
        torch.testing.assert_close(
            few.covariances[layer].diagonal(), expected, rtol=1e-4, atol=1e-6
        )


def test_a_single_text_cannot_be_halved(model, tokenizer, tmp_path):
    options = {"minimal": True, "progress": False, "checkpoint_dir": tmp_path / "state"}
    with pytest.raises(ValueError, match="must be several for the minimal mode"):
        collect_statistics(model, tokenizer, ["w1 w2 w3"], **options)
    # Nothing to go on with, which would stand in the way of a run with more texts.
    assert not (tmp_path / "state").exists()


def test_a_killed_minimal_run_goes_on(model, tokenizer, make_texts, tmp_path):
    texts, forwards = make_texts(400), []

    def die(module, arguments):
        forwards.append(1)
        if len(forwards) == 20:
            raise KeyboardInterrupt

    settings = {"minimal": True, "batch_tokens": 32, "progress": False}
    expected = collect_statistics(model, tokenizer, texts, **settings)
    handle = model.transformer.h[1].register_forward_pre_hook(die)
    settings |= {"checkpoint_dir": tmp_path / "state", "checkpoint_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        collect_statistics(model, tokenizer, texts, **settings)
    handle.remove()
    found = collect_statistics(model, tokenizer, texts, **settings, resume=True)
    assert found.shrinkage == expected.shrinkage
    for layer in expected.layers:
        assert torch.equal(found.covariances[layer], expected.covariances[layer])


def test_folders_of_before_shrinkage_load(model, tokenizer, make_texts, tmp_path):
    import json

    collect_statistics(model, tokenizer, make_texts(20), progress=False).save(tmp_path / "s")
    file = tmp_path / "s" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["shrinkage"], manifest["checksum"]
    file.write_text(json.dumps(manifest))
    assert Statistics.load(tmp_path / "s").shrinkage == {}
