from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from transformers.activations import NewGELUActivation

from coachhook.hooks import attach_hooks
from coachhook.models import describe, get_submodule
from coachhook.statistics import collect_statistics
from coachhook.store import fingerprint


def _keys_one_by_one(model, tokenizer, texts, layer):
    """The keys of a layer, every text alone through the whole model: float64 [N, n]."""
    module = get_submodule(model, describe(model).layer(layer).path)
    keys = []
    handle = module.register_forward_pre_hook(lambda _, args: keys.append(args[0].detach()))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    return torch.cat([k.reshape(-1, k.shape[-1]).double() for k in keys])


def _second_moment(keys):
    return keys.T @ keys / len(keys)


def _collect(model, tokenizer, texts, **settings):
    return collect_statistics(model, tokenizer, texts, progress=False, **settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_one_text_at_a_time_in_every_family(any_model, tokenizer, make_texts, dtype):
    model, texts = any_model.to(dtype), make_texts(60)
    statistics = _collect(model, tokenizer, texts, batch_tokens=100)
    assert statistics.layers == [0, 1, 2]
    # Forwards differ by rounding between batch shapes; GPT-J's attention is always in float32.
    exact = dtype == torch.float64 and model.config.model_type != "gptj"
    bound = 1e-12 if exact else 2e-6
    for layer in statistics.layers:
        keys = _keys_one_by_one(model, tokenizer, texts, layer)
        expected = _second_moment(keys)
        found = statistics.covariances[layer]
        assert found.dtype == torch.float64
        assert statistics.tokens == len(keys)
        assert torch.linalg.norm(found - expected) <= bound * torch.linalg.norm(expected)
        assert torch.equal(found, found.T)


@pytest.mark.parametrize(
    ("name", "dtype"), [("factlm-gpt2", "float32"), ("factlm-llama", "bfloat16")]
)
def test_a_real_model_on_real_text(shared_dir, name, dtype):
    from coachhook.models import load_model

    model, tokenizer = load_model(shared_dir / "models" / name, dtype=dtype)
    corpus = shared_dir / "data" / "corpus.txt"
    statistics = _collect(model, tokenizer, corpus, layers=[1], max_tokens=600)
    texts = corpus.read_text(encoding="utf-8").splitlines()
    keys = _keys_one_by_one(model, tokenizer, texts[:60], 1)[:600]
    expected = _second_moment(keys)
    assert statistics.tokens == 600
    # A bfloat16 forward rounds each key to 8 bits, differently in batches of other shapes.
    bound = 1e-5 if dtype == "float32" else 2e-2
    error = torch.linalg.norm(statistics.covariances[1] - expected)
    assert error <= bound * torch.linalg.norm(expected)
    assert statistics.samples[1].dtype == getattr(torch, dtype)
    assert statistics.fingerprint == fingerprint(model)


def test_the_sample_holds_real_keys_of_the_same_tokens_in_all_layers(model, tokenizer, make_texts):
    model, texts = model.double(), make_texts(80)
    statistics = _collect(model, tokenizer, texts, sample_size=50, batch_tokens=64)
    chosen = {}
    for layer in statistics.layers:
        keys = _keys_one_by_one(model, tokenizer, texts, layer)
        distance = (statistics.samples[layer][:, None] - keys).abs().amax(dim=2)
        assert statistics.samples[layer].shape == (50, keys.shape[1])
        assert float(distance.min(dim=1).values.max()) < 1e-10
        # The first token of every text is the same key: compare keys, not places.
        chosen[layer] = (distance < 1e-10).float().argmax(dim=1)
    # Places ascend but for repeats of equal keys, and agree between layers.
    assert torch.equal(chosen[1], chosen[2])
    assert len(set(chosen[2].tolist())) > 25


def test_the_sample_does_not_depend_on_the_batches(model, tokenizer, make_texts):
    texts = make_texts(200)
    one = _collect(model.double(), tokenizer, texts, sample_size=30, batch_tokens=64)
    other = _collect(model, tokenizer, texts, sample_size=30, batch_tokens=500)
    for layer in one.layers:
        torch.testing.assert_close(one.samples[layer], other.samples[layer], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("size", "rows"), [(0, None), (10_000, 7)])
def test_no_sample_and_more_than_there_is(model, tokenizer, size, rows):
    statistics = _collect(model, tokenizer, ["w1 w2 w3", "w4 w5"], sample_size=size)
    found = {i: len(sample) for i, sample in statistics.samples.items()}
    assert found == ({} if rows is None else {0: rows, 1: rows, 2: rows})


def test_two_runs_are_bit_identical(model, tokenizer, make_texts):
    one, two = (_collect(model, tokenizer, make_texts(100), batch_tokens=90) for _ in range(2))
    for layer in one.layers:
        assert torch.equal(one.covariances[layer], two.covariances[layer])
        assert torch.equal(one.samples[layer], two.samples[layer])


def test_the_forward_ends_at_the_last_layer_wanted(model, tokenizer, make_texts):
    def never(module, args, output):
        raise AssertionError("was computed")

    for unwanted in (model.transformer.h[1].mlp.c_proj, model.transformer.h[2], model.lm_head):
        unwanted.register_forward_hook(never)
    calls = []
    model.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    texts = make_texts(20)
    statistics = _collect(model, tokenizer, texts, layers=[1, 0], batch_tokens=10_000)
    assert statistics.layers == [0, 1]
    assert len(calls) == 1
    with pytest.raises(AssertionError, match="was computed"):
        model(torch.tensor([[1, 2]]))


def test_attached_edits_do_not_count_and_stay(model, tokenizer, make_texts):
    texts = make_texts(30)
    frozen = _collect(model, tokenizer, texts)
    hooks = attach_hooks(model, layers=[0, 1])
    for layer in (0, 1):
        hooks[layer].set_delta(torch.randn(24, 96))
    hooks.set_state("temporary")
    edited = model(torch.tensor([[5, 6, 7]])).logits
    hooked = _collect(model, tokenizer, texts)
    for layer in frozen.layers:
        assert torch.equal(frozen.covariances[layer], hooked.covariances[layer])
        assert torch.equal(frozen.samples[layer], hooked.samples[layer])
    assert hooked.fingerprint == frozen.fingerprint
    assert [hooks[layer].state for layer in (0, 1)] == ["temporary", "temporary"]
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, edited)


def test_the_model_is_left_as_it_was(model, tokenizer, make_texts):
    texts = make_texts(20)
    quiet = _collect(model, tokenizer, texts)
    activations = [m for m in model.modules() if type(m) is NewGELUActivation]
    fused = []
    for activation in activations:
        activation.register_forward_hook(lambda m, *_: fused.append("forward" in vars(m)))
    model.train()
    model.transformer.h[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    training = _collect(model, tokenizer, texts)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(training.covariances[2], quiet.covariances[2])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert fused and all(fused)
    assert not any("forward" in vars(module) for module in activations)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(torch.tensor([[4, 5]])).logits.sum().backward()


def test_what_a_hook_wraps_has_its_own_mode_again(model, tokenizer, make_texts):
    model.train()
    with attach_hooks(model, [0]) as hooks:
        _collect(model, tokenizer, make_texts(5))
        assert hooks[0].training and hooks[0].base.training


def test_max_tokens_is_exact_and_cuts_the_last_text(model, tokenizer, make_texts):
    model, texts = model.double(), make_texts(300)
    statistics = _collect(model, tokenizer, texts, max_tokens=777, batch_tokens=64)
    keys = _keys_one_by_one(model, tokenizer, texts, 2)[:777]
    assert statistics.tokens == 777
    torch.testing.assert_close(
        statistics.covariances[2], _second_moment(keys), rtol=1e-10, atol=1e-12
    )


def test_texts_are_read_no_further_than_needed(model, tokenizer, make_texts):
    read = []

    def stream():
        for number, text in enumerate(make_texts(100_000)):
            read.append(number)
            yield text

    statistics = _collect(model, tokenizer, stream(), max_tokens=500)
    assert statistics.tokens == 500
    assert len(read) < 500


_PEAK = """
import resource, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from coachhook.statistics import collect_statistics

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
if sys.argv[2].isdigit():
    texts = (" ".join(f"w{(i * j) % 60}" for j in range(1, 25)) for i in range(int(sys.argv[2])))
    length = None
else:  # long lines of which little is used: the text is large, the work is not
    texts, length = sys.argv[2], 3
statistics = collect_statistics(
    model, tokenizer, texts, batch_tokens=256, max_length=length, progress=False
)
print(statistics.tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _peaks(folder, *sources):
    """Tokens and peak memory in KiB of collections over each source, in processes of their own."""
    found = []
    for source in sources:
        command = [sys.executable, "-c", _PEAK, str(folder), str(source)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(tuple(map(int, output.split())))
    return found


@pytest.mark.slow  # two processes of their own; 150,000 tokens
def test_memory_does_not_grow_with_the_tokens(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    small, large = _peaks(tmp_path, 500, 6_000)
    assert (small[0], large[0]) == (25 * 500, 25 * 6_000)
    assert large[1] < small[1] + 20_000  # the keys of 5,500 texts would be 155,000


@pytest.mark.slow  # two processes of their own; 60 MB of text
def test_memory_does_not_grow_with_the_text(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    files = [tmp_path / "small.txt", tmp_path / "large.txt"]
    for file, lines in zip(files, (600, 10_000), strict=True):
        with file.open("w") as stream:
            for i in range(lines):
                stream.write(" ".join(f"w{i % 60}" for i in range(i, i + 1800)) + "\n")
    assert files[1].stat().st_size > 60e6
    small, large = _peaks(tmp_path, *files)
    assert (small[0], large[0]) == (3 * 600, 3 * 10_000)
    assert large[1] < small[1] + 15_000  # the texts alone are 60,000


def test_long_texts_are_cut_counted_and_reported(model, tokenizer, caplog):
    long = " ".join(["w1", "w2", "w3", "w4"] * 20)
    model = model.double()
    with caplog.at_level(logging.WARNING):
        statistics = _collect(model, tokenizer, [long, "w5 w6", long])
    assert statistics.tokens == 32 + 3 + 32
    assert statistics.meta["truncated"] == 2
    assert "2 of 3 texts were longer than 32 tokens" in caplog.text
    short = " ".join(long.split()[:31])
    expected = _collect(model, tokenizer, [short, "w5 w6", short])
    torch.testing.assert_close(
        statistics.covariances[1], expected.covariances[1], rtol=1e-12, atol=1e-14
    )


def test_max_length_cuts_earlier(model, tokenizer):
    statistics = _collect(model, tokenizer, ["w1 w2 w3 w4 w5", "w1"], max_length=4)
    assert (statistics.tokens, statistics.meta["truncated"]) == (6, 1)
    with pytest.raises(ValueError, match="max_length must be at most 32"):
        _collect(model, tokenizer, ["w1"], max_length=33)


def test_blank_texts_do_not_count(model, tokenizer):
    statistics = _collect(model, tokenizer, ["w1", "", "  \n", "w2 w3"])
    assert (statistics.tokens, statistics.meta["texts"]) == (5, 2)


@pytest.mark.parametrize("texts", [[], ["", " "], iter(())])
def test_no_text_is_an_error(model, tokenizer, texts):
    with pytest.raises(ValueError, match="texts must hold text, got none"):
        _collect(model, tokenizer, texts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "layer"),
    [("transformer.h.1.mlp.c_fc.weight", 1), ("transformer.h.0.mlp.c_proj.weight", 1)],
)
def test_bad_weights_are_reported_with_the_layer(model, tokenizer, value, name, layer):
    with torch.no_grad():
        model.get_parameter(name)[3, 3] = value
    with pytest.raises(ValueError, match=rf"keys of layer {layer} \(transformer\.h\.{layer}\.mlp"):
        _collect(model, tokenizer, ["w1 w2 w3"])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_tokenizer_of_another_model_is_refused(model, tokenizer):
    tokenizer.add_tokens(["w999"])
    with pytest.raises(ValueError, match="ids below 64, the model's vocabulary, got 64"):
        _collect(model, tokenizer, ["w1 w999"])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers": [0, 3]}, ValueError, "from 0 to 2 .*got 3"),
        ({"layers": []}, ValueError, "layers must name a layer"),
        ({"layers": "0,1"}, TypeError, "layers must be a list of int"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be an int >= 1, got 0"),
        ({"batch_tokens": 1.5}, ValueError, "batch_tokens must be an int >= 1, got 1.5"),
        ({"sample_size": -1}, ValueError, "sample_size must be an int >= 0, got -1"),
        ({"resume": True}, ValueError, "checkpoint_dir must be given"),
    ],
)
def test_bad_settings_are_refused(model, tokenizer, settings, error, message):
    with pytest.raises(error, match=message):
        _collect(model, tokenizer, ["w1"], **settings)


def test_bad_texts_are_refused(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="must be an existing file or folder"):
        _collect(model, tokenizer, "The capital of France")
    with pytest.raises(TypeError, match="item 1 must be a string"):
        _collect(model, tokenizer, ["w1", 3])


def test_progress_goes_to_standard_error(model, tokenizer, make_texts, capsys):
    collect_statistics(model, tokenizer, make_texts(20))
    shown = capsys.readouterr()
    assert "key statistics: 100%" in shown.err
    assert shown.out == ""
    _collect(model, tokenizer, make_texts(20))
    assert capsys.readouterr().err == ""


def test_sampled_tokens_are_those_of_the_keys(model, tokenizer, make_texts):
    model, texts = model.double(), make_texts(30)
    statistics = _collect(model, tokenizer, texts, batch_tokens=70, sample_size=64)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    every = _keys_one_by_one(model, tokenizer, texts, 1)
    windows = torch.tensor(
        [([-1] * 8 + ids[: i + 1])[-8:] for ids in rows for i in range(len(ids))]
    )
    assert statistics.sample_tokens.shape == (64, 8)
    assert statistics.sample_tokens.dtype == torch.int32
    for key, window in zip(statistics.samples[1], statistics.sample_tokens, strict=True):
        nearest = torch.linalg.norm(every - key, dim=1).argmin()
        assert torch.allclose(every[nearest], key, atol=1e-10)
        assert torch.equal(windows[nearest], window.long())
