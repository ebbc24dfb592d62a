from __future__ import annotations

import json

import pytest
import torch

from coachhook.errors import FingerprintMismatchError, FormatError
from coachhook.statistics import Statistics, collect_statistics
from coachhook.statistics.packed import mirror_lower_, pack_lower, unpack_lower


@pytest.fixture
def statistics(model, tokenizer, make_texts):
    return collect_statistics(model, tokenizer, make_texts(50), sample_size=20, progress=False)


def _covariance(n=6, dtype=torch.float64):
    keys = torch.randn(50, n, dtype=dtype)
    return keys.T @ keys / 50


@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 1100])
def test_packing_is_exact(n):
    matrix = torch.randn(n, n, dtype=torch.float64)
    matrix = matrix + matrix.T
    packed = pack_lower(matrix, torch.float64)
    assert packed.shape == (n * (n + 1) // 2,)
    assert torch.equal(unpack_lower(packed), matrix)
    assert torch.equal(unpack_lower(pack_lower(matrix, torch.float32)), matrix.float().double())
    halved = matrix.tril() + 7 * torch.ones(n, n, dtype=torch.float64).triu(1)
    mirror_lower_(halved)
    assert torch.equal(halved, matrix)


def test_save_and_load(statistics, tmp_path):
    statistics.save(tmp_path / "s")
    loaded = Statistics.load(tmp_path / "s")
    assert loaded.layers == statistics.layers
    assert (loaded.tokens, loaded.fingerprint) == (statistics.tokens, statistics.fingerprint)
    assert loaded.meta == statistics.meta
    for layer in statistics.layers:
        assert torch.equal(loaded.covariances[layer], statistics.covariances[layer])
        assert torch.equal(loaded.samples[layer], statistics.samples[layer])
    loaded.save(tmp_path / "s")  # onto the files it reads from
    again = Statistics.load(tmp_path / "s")
    assert torch.equal(again.covariances[2], statistics.covariances[2])
    assert torch.equal(loaded.covariances[2], statistics.covariances[2])


def test_float32_takes_half_the_room(statistics, tmp_path):
    statistics.save(tmp_path / "wide")
    statistics.save(tmp_path / "narrow", dtype=torch.float32)
    wide, narrow = (
        (tmp_path / name / "tensors-00001.safetensors").stat().st_size
        for name in ("wide", "narrow")
    )
    sample = sum(s.nbytes for s in statistics.samples.values())
    assert 1.9 < (wide - sample) / (narrow - sample) < 2.1
    loaded = Statistics.load(tmp_path / "narrow")
    expected = statistics.covariances[0].float().double()
    assert loaded.covariances[0].dtype == torch.float64
    assert torch.equal(loaded.covariances[0], expected)
    with pytest.raises(ValueError, match=r"dtype must be torch\.float64 or torch\.float32"):
        statistics.save(tmp_path / "half", dtype=torch.float16)


def test_from_covariances():
    narrow = _covariance(dtype=torch.float32)
    statistics = Statistics.from_covariances({4: _covariance(), 2: narrow}, tokens=50)
    assert (statistics.layers, statistics.tokens) == ([2, 4], 50)
    assert torch.equal(statistics.covariances[2], narrow.double())
    assert (statistics.fingerprint, statistics.samples) == (None, {})


def test_from_covariances_save_and_load(tmp_path):
    statistics = Statistics.from_covariances({4: _covariance()}, tokens=50)
    statistics.save(tmp_path / "s")
    loaded = Statistics.load(tmp_path / "s")
    assert torch.equal(loaded.covariances[4], statistics.covariances[4])
    assert (loaded.fingerprint, loaded.samples) == (None, {})


def _with_nan():
    bad = _covariance()
    bad[1, 2] = float("nan")
    return bad


@pytest.mark.parametrize(
    ("covariances", "tokens", "error", "message"),
    [
        ({}, 5, ValueError, "must hold a layer"),
        ({0: _covariance()}, 0, ValueError, "tokens must be a positive int, got 0"),
        ({0: _covariance()}, True, ValueError, "tokens must be a positive int"),
        ({"0": _covariance()}, 5, TypeError, "keyed by int layer indices, got '0'"),
        ({0: [[1.0]]}, 5, TypeError, r"\[0\] must be a floating-point tensor, got list"),
        ({0: torch.eye(3).long()}, 5, TypeError, "got torch.int64"),
        ({0: torch.randn(3, 4)}, 5, ValueError, r"must be square \[n, n\], got \[3, 4\]"),
        ({0: _with_nan()}, 5, ValueError, "must be finite"),
        ({0: torch.randn(4, 4)}, 5, ValueError, "must be symmetric"),
    ],
)
def test_from_covariances_refuses(covariances, tokens, error, message):
    with pytest.raises(error, match=message):
        Statistics.from_covariances(covariances, tokens=tokens)


def test_an_unknown_layer_lists_those_there(statistics, tmp_path):
    statistics.save(tmp_path / "s")
    for found in (statistics, Statistics.load(tmp_path / "s")):
        with pytest.raises(ValueError, match=r"layer must be one of \[0, 1, 2\], got 7"):
            found.covariances[7]
        assert 7 not in found.covariances and 1 in found.covariances


def test_check_accepts_the_model_and_its_casts(statistics, model):
    statistics.check(model)
    statistics.check(model.double())
    statistics.check(model.bfloat16())


def test_check_names_both_fingerprints(statistics, model):
    ours = statistics.fingerprint
    with torch.no_grad():
        model.transformer.wte.weight += 0.5
    with pytest.raises(FingerprintMismatchError, match=ours) as caught:
        statistics.check(model)
    from coachhook.store import fingerprint

    assert fingerprint(model) in str(caught.value) and fingerprint(model) != ours


def test_check_without_fingerprint_compares_shapes(model):
    Statistics.from_covariances({1: _covariance(96)}, tokens=50).check(model)
    with pytest.raises(ValueError, match=r"layer 1 must be \[96, 96\].*got \[6, 6\]"):
        Statistics.from_covariances({1: _covariance(6)}, tokens=50).check(model)
    with pytest.raises(ValueError, match="from 0 to 2"):
        Statistics.from_covariances({5: _covariance(96)}, tokens=50).check(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": "many"}, "tokens must be int"),
        ({"fingerprint": 3}, "fingerprint must be str or null"),
        ({"layers": [0, 1, 9]}, r"layer\.9\.covariance"),
        ({"sampled_layers": [9]}, r"layer\.9\.sample"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(statistics, tmp_path, change, message):
    statistics.save(tmp_path / "s")
    file = tmp_path / "s" / "manifest.json"
    manifest = json.loads(file.read_text()) | change
    del manifest["checksum"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=message):
        Statistics.load(tmp_path / "s")


def test_a_truncated_file_is_refused(statistics, tmp_path):
    statistics.save(tmp_path / "s")
    file = tmp_path / "s" / "tensors-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError, match="truncated"):
        Statistics.load(tmp_path / "s")


def test_a_folder_of_other_files_is_not_overwritten(statistics, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files in it"):
        statistics.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
