"""Edits without their gate: merged weights and LoRA adapters, for models of every family."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coachhook import EditConfig, Editor, EditRequest, bundled, collect_statistics
from coachhook.editing import EditMemory, load_state
from coachhook.editing.folder import load_payloads, save_state
from coachhook.editing.records import BatchRecord
from coachhook.editing.state import EditState, LayerEdits
from coachhook.errors import FingerprintMismatchError, FormatError
from coachhook.hooks import attach_hooks
from coachhook.integrations import Export, export_edits
from coachhook.integrations.merged import MergedWeights
from coachhook.models import describe, get_submodule, load_model, weight_of
from tests.models.families import DISCOVERED, SUPPORTED, tiny

QUIET = {"measure": 0, "progress": False}
REQUEST = EditRequest("{} is", "Ann", "Bob")


class NoTokenizer:
    """Of a model without one: nothing is asked, and nothing but weights is saved."""

    def save_pretrained(self, folder):
        pass


def made_up_edits(path, model, layers=(0, 1), scope="sequence", keys=5):
    """A folder of edits with random keys and targets, and its state."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    description = describe(model)
    found = {}
    for layer in layers:
        n, m = description.layer(layer).in_features, description.layer(layer).out_features
        memory = EditMemory(torch.eye(n, dtype=torch.float64), m)
        memory.append(random(n, keys), random(m, keys))
        found[layer] = LayerEdits(memory)
    config = EditConfig(layers=list(layers), scope=scope, correction="sum")
    state = EditState(config, found)
    slots = [(0, 0)] * keys
    record = BatchRecord([REQUEST], random(4, 1), [True], [0.0], slots, {}, {})
    state.batches[1] = record
    save_state(path, state, model)
    return state


@torch.no_grad()
def ungated(model, path, ids):
    """Logits where every token takes the hook: an export by other means."""
    config, payloads = load_payloads(path)
    with attach_hooks(model, list(payloads)) as hooks:
        for layer, payload in payloads.items():
            payload.apply(hooks[layer], config)
        hooks.set_state("temporary")
        return model(input_ids=ids).logits


@torch.no_grad()
def logits_of(model, ids):
    return model.eval()(input_ids=ids).logits


def assert_close(found, wanted, tolerance=1e-5):
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("family", [*SUPPORTED, *DISCOVERED])
def test_both_formats_of_every_family_answer_as_hooks_that_always_fire(family, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny(family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model))
    made_up_edits(tmp_path / "edits", model)
    ids = torch.randint(3, 60, (2, 7))
    plain, wanted = logits_of(model, ids), ungated(model, tmp_path / "edits", ids)
    assert (wanted - plain).norm() > 0.01 * plain.norm()
    for format in ("merged", "lora"):
        out = tmp_path / format
        report = export_edits(model, NoTokenizer(), tmp_path / "edits", out, format=format, **QUIET)
        assert [layer["layer"] for layer in report["layers"]] == [0, 1]
        assert max(layer["error"] for layer in report["layers"]) < 1e-6
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_close(logits_of(merged, ids), wanted)
    assert torch.equal(logits_of(model, ids), plain)
    assert set(vars(model)) == attributes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    adapter = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    assert_close(logits_of(adapter, ids), wanted)


def test_only_the_edited_layers_are_written_to(tmp_path):
    model = tiny("llama", lambda arguments: arguments.update(tie_word_embeddings=True))
    made_up_edits(tmp_path / "edits", model, layers=[1])
    export_edits(model, NoTokenizer(), tmp_path / "edits", tmp_path / "out", **QUIET)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    changed = [
        n for n, v in found.state_dict().items() if not torch.equal(v, model.state_dict()[n])
    ]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_merged_weight_is_rounded_once(family, dtype, tmp_path):
    model = tiny(family).to(dtype)
    state = made_up_edits(tmp_path / "edits", model, layers=[1])
    report = export_edits(model, NoTokenizer(), tmp_path / "edits", tmp_path / "out", **QUIET)
    path = describe(model).layer(1).path
    delta = state.layers[1].memory.delta()
    exact = weight_of(get_submodule(model, path)).detach().double() + delta
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    weight = weight_of(get_submodule(found, path)).detach()
    assert weight.dtype == dtype
    if dtype != torch.float64:
        assert torch.equal(weight, exact.to(dtype))
        expected = float((weight.double() - exact).norm() / delta.norm())
        (layer,) = report["layers"]
        plain = weight_of(get_submodule(model, path)).detach().double()
        assert layer["error"] == pytest.approx(expected, rel=1e-6)
        assert layer["weight_norm"] == pytest.approx(float(plain.norm()))
        assert layer["delta_norm"] == pytest.approx(float(delta.norm()))
        assert expected > 1e-5
    else:
        assert_close(weight, exact, 1e-14)
    assert report["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_adapter_beside_weights_of_other_dtypes(dtype, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny("gpt2").to(dtype)
    state = made_up_edits(tmp_path / "edits", model, layers=[1])
    report = export_edits(
        model, NoTokenizer(), tmp_path / "edits", tmp_path / "out", format="lora", **QUIET
    )
    assert report["layers"][0]["rank"] == 5
    adapter = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    module = get_submodule(model, describe(model).layer(1).path)
    assert module.scaling == {"default": 1.0}
    found = module.lora_B.default.weight @ module.lora_A.default.weight
    wide = dtype == torch.float64
    weight = weight_of(module.base_layer).double()
    assert report["layers"][0]["weight_norm"] == pytest.approx(float(weight.norm()))
    assert found.dtype == (torch.float64 if wide else torch.float32)
    assert_close(found.double(), state.layers[1].memory.delta(), 1e-13 if wide else 1e-6)
    ids = torch.randint(3, 60, (2, 7))
    moved = logits_of(adapter, ids)
    with adapter.disable_adapter():
        assert not torch.equal(moved, logits_of(adapter, ids))


def test_a_rank_gives_the_best_approximation_and_its_error(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    state = made_up_edits(tmp_path / "edits", model)
    out = tmp_path / "out"
    report = export_edits(
        model, NoTokenizer(), tmp_path / "edits", out, format="lora", rank=2, **QUIET
    )
    peft.PeftModel.from_pretrained(model, out)
    for layer, entry in zip((0, 1), report["layers"], strict=True):
        delta = state.layers[layer].memory.delta()
        values = torch.linalg.svdvals(delta)
        best = float(values[2:].norm() / values.norm())
        module = get_submodule(model, describe(model).layer(layer).path)
        found = module.lora_B.default.weight @ module.lora_A.default.weight
        assert float((found - delta).norm() / delta.norm()) == pytest.approx(best, rel=1e-4)
        assert entry["rank"] == 2 and entry["error"] == pytest.approx(best, rel=1e-4)


def test_ranks_of_several_layers_are_filled_up_with_zeros(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    made_up_edits(tmp_path / "edits", model)
    state = load_state(tmp_path / "edits")
    memory = state.layers[1].memory
    memory.append(torch.ones(memory.in_features, 1), torch.ones(memory.out_features, 1))
    save_state(tmp_path / "edits", state, model)
    ids = torch.randint(3, 60, (2, 7))
    wanted = ungated(model, tmp_path / "edits", ids)
    out = tmp_path / "out"
    export_edits(model, NoTokenizer(), tmp_path / "edits", out, format="lora", **QUIET)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 6
    assert_close(logits_of(peft.PeftModel.from_pretrained(model, out), ids), wanted)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The bundled model and, by preset, folders of edits of real facts."""
    root = tmp_path_factory.mktemp("world")
    model, tokenizer = load_model(bundled.model_path(), dtype=torch.float32)
    facts = [EditRequest.from_dict(fact) for fact in bundled.demo_facts()[:4]]
    statistics = collect_statistics(
        model, tokenizer, bundled.texts(), [0, 1, 2], max_tokens=8_000, progress=False
    )
    presets = {
        "default": EditConfig.for_model(model),
        "paper": EditConfig.paper(model, covariance_weight=15.0),
    }
    for name, config in presets.items():
        editor = Editor(model, tokenizer, statistics=statistics, config=config)
        editor.edit(facts[:2])
        editor.edit(facts[2:])
        editor.save(root / name)
        editor.detach()
    return root, model, tokenizer, facts


def hook_deltas(model, tokenizer, path):
    editor = Editor.load(model, tokenizer, path)
    try:
        return {layer: editor.hooks[layer].delta().double() for layer in editor.hooks}
    finally:
        editor.detach()


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_real_edits_are_exported_as_the_hooks_hold_them(world, preset, tmp_path):
    peft = pytest.importorskip("peft")
    root, model, tokenizer, _ = world
    deltas = hook_deltas(model, tokenizer, root / preset)
    for format in ("merged", "lora"):
        out = tmp_path / format
        export_edits(model, tokenizer, root / preset, out, format=format, **QUIET)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for layer, delta in deltas.items():
        path = describe(model).layer(layer).path
        base, found = (weight_of(get_submodule(m, path)).detach() for m in (model, merged))
        assert_close(found.double() - base.double(), delta)
    ids = tokenizer("The capital of Velmora is Everfell", return_tensors="pt")["input_ids"]
    wanted = logits_of(merged, ids)
    assert (wanted - logits_of(model, ids)).norm() > 1e-3 * wanted.norm()
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert reloaded("The capital of Velmora is Everfell")["input_ids"] == ids[0].tolist()
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora")
    assert_close(logits_of(adapted, ids), wanted)


def test_the_adapter_of_rounded_state_has_the_rank_of_its_keys(world, tmp_path):
    """The paper preset keeps its weight in float32, whose rounding has full rank."""
    pytest.importorskip("peft")
    root, model, tokenizer, facts = world
    out = tmp_path / "out"
    report = export_edits(model, tokenizer, root / "paper", out, format="lora", **QUIET)
    assert [layer["rank"] for layer in report["layers"]] == [len(facts)] * len(report["layers"])
    assert max(layer["error"] for layer in report["layers"]) < 1e-5


def test_measures_the_facts_of_the_folder(world, tmp_path):
    root, model, tokenizer, facts = world
    report = export_edits(
        *(model, tokenizer, root / "default", tmp_path / "out"),
        text=bundled.texts()[:20],
        progress=False,
    )
    found = report["measured"]
    assert found["facts"] == len(facts) and found["text"] == "given"
    assert found["unedited"]["generated"]["reliability"] == 0
    assert found["gated"]["generated"]["reliability"] == 1
    assert found["unedited"]["perplexity_ratio"] == 1
    assert found["exported"]["perplexity_ratio"] != found["gated"]["perplexity_ratio"]
    merged, _ = load_model(tmp_path / "out")
    right = []
    for fact in facts:
        ids = tokenizer(fact.text, return_tensors="pt")["input_ids"]
        new = merged.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        right.append(tokenizer.decode(new).strip().startswith(fact.target_new))
    assert found["exported"]["generated"]["reliability"] == sum(right) / len(right)
    kept = json.loads((tmp_path / "out" / "coachhook_export.json").read_text())
    assert kept["measured"] == found and kept["gate"] is False and "attach" in kept["note"]


def test_the_later_of_two_facts_about_a_prompt_is_asked(tmp_path):
    model = tiny("llama")
    state = made_up_edits(tmp_path / "edits", model)
    later = copy.deepcopy(state.batches[1])
    later.requests[0] = EditRequest("{} is", "Ann", "Cid")
    state.batches[2] = later
    save_state(tmp_path / "edits", state, model)
    export = Export(model, NoTokenizer(), tmp_path / "edits", tmp_path / "out", progress=False)
    assert [request.target_new for request in export._requests] == ["Cid"]


def test_a_fit_with_the_edits_own_weight_is_their_least_squares(world, tmp_path):
    root, model, tokenizer, _ = world
    state = load_state(root / "default")
    (layer,) = state.layers
    memory = state.layers[layer].memory
    left, right = state.fitted_again(layer, state.config.covariance_weight)
    assert left.shape[1] == right.shape[0] < memory.num_keys
    # The prior is multiplied out of its factor and factored again: its condition number counts.
    assert_close(left @ right, memory.delta(), 1e-6)


def test_a_fit_with_another_weight_solves_the_normal_equations(world):
    root, *_ = world
    state = load_state(root / "default")
    (layer,) = state.layers
    memory = state.layers[layer].memory
    keys, (targets, _) = memory.keys(), memory.pair()
    left, right = state.fitted_again(layer, 30 * state.config.covariance_weight)
    delta = left @ right
    prior = memory._factor @ memory._factor.mT
    assert_close(delta @ (30 * prior + keys @ keys.mT), targets @ keys.mT, 1e-8)
    assert delta.norm() < memory.delta().norm()


def test_a_fit_leaves_folded_keys_out_of_its_prior():
    keys, targets = torch.randn(12, 6).double(), torch.randn(4, 6).double()
    memory = EditMemory(torch.diag(torch.arange(1.0, 13)), 4)
    memory.append(keys, targets)
    memory.fold(4)
    assert torch.allclose(memory.prior(), torch.diag(torch.arange(1.0, 13)).double())


def test_refuses_before_anything_is_written(world, tmp_path, monkeypatch):
    root, model, tokenizer, _ = world
    out = tmp_path / "out"

    def refused(message, kind=ValueError, edits=root / "default", model=model, out=out, **options):
        with pytest.raises(kind, match=message):
            export_edits(model, tokenizer, edits, out, **QUIET | options)
        assert not (tmp_path / "out").exists()

    refused("format must be one of merged, lora, got 'gguf'", format="gguf")
    refused("rank must be a positive integer, got 0", format="lora", rank=0)
    refused("rank must be None for format 'merged'", rank=3)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        refused("covariance_weight must be positive", covariance_weight=weight)
    refused("another scope than 'membership'", edits=root / "paper", covariance_weight=450.0)
    refused("measure must be an integer from 0, got -1", measure=-1)
    refused("text_tokens must be an integer from 2", text_tokens=0)
    refused("text must hold text that names no edited subject, got none", text=["", " "])
    refused("got none in given", text=["The capital of Velmora is Brindal."])
    refused("must be a folder of coachhook edits", FormatError, edits=tmp_path / "none")
    refused("new or empty folder", out=root)
    refused("must be a folder, got the file", out=root / "default" / "manifest.json")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.h[5].mlp.c_proj.weight += 1
    refused("fingerprint must be", FingerprintMismatchError, model=other)
    hooked = copy.deepcopy(model)
    with attach_hooks(hooked, [1]):
        refused(r"must have no hooks attached, got hooks at layers \[1\]", model=hooked)
    monkeypatch.setitem(sys.modules, "peft", None)
    refused("pip install 'coachhook\\[lora\\]'", ImportError, format="lora")


def test_refuses_a_folder_without_batches(tmp_path):
    model = tiny("llama")
    state = made_up_edits(tmp_path / "edits", model)
    state.batches.clear()
    save_state(tmp_path / "edits", state, model)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        export_edits(model, NoTokenizer(), tmp_path / "edits", tmp_path / "out", **QUIET)


def test_refuses_a_layer_without_plain_weight(tmp_path, monkeypatch):
    model = tiny("llama")
    made_up_edits(tmp_path / "edits", model)
    layer = model.model.layers[0].mlp.down_proj
    # Packed as quantised modules pack theirs, after the folder was made for it.
    packed = torch.nn.Parameter(layer.weight.detach().reshape(-1, 4), requires_grad=False)
    monkeypatch.setitem(layer._parameters, "weight", packed)
    monkeypatch.setattr("coachhook.integrations.export.fingerprint", lambda model: None)
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj must have a plain weight"):
        export_edits(model, NoTokenizer(), tmp_path / "edits", tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_after_a_failure(world, tmp_path, monkeypatch):
    root, model, tokenizer, _ = world
    before = {name: value.clone() for name, value in model.state_dict().items()}

    class Failing:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def save_pretrained(self, folder):
            assert (folder / "model.safetensors").is_file()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export_edits(model, Failing(), root / "default", tmp_path / "new" / "out", **QUIET)
    assert list((tmp_path / "new").iterdir()) == []
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_model_is_left_as_it_was_where_peft_fails(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    model = tiny("gpt2")
    modules, attributes = dict(model.named_modules()), set(vars(model))
    made_up_edits(tmp_path / "edits", model)

    def fail(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr("coachhook.integrations.lora._fill", fail)
    with pytest.raises(RuntimeError, match="no room"):
        export_edits(
            *(model, NoTokenizer(), tmp_path / "edits", tmp_path / "out"), format="lora", **QUIET
        )
    assert dict(model.named_modules()) == modules and set(vars(model)) == attributes
    assert not (tmp_path / "out").exists()


def test_merged_weights_can_be_turned_off():
    linear = torch.nn.Linear(3, 2).requires_grad_(False)
    plain, delta = linear.weight.clone(), torch.ones(2, 3).double()
    with MergedWeights({0: linear.weight}, {0: delta}) as merged:
        assert torch.allclose(linear.weight, plain + 1)
        with merged.disabled():
            assert torch.equal(linear.weight, plain)
        assert torch.allclose(linear.weight, plain + 1)
    assert torch.equal(linear.weight, plain)


@pytest.mark.parametrize("name", ["factlm-gpt2", "factlm-llama"])
def test_models_beside_the_project(shared_dir, tmp_path, name):
    """Real facts in a Conv1D and an nn.Linear model of bfloat16 weights, both formats."""
    peft = pytest.importorskip("peft")
    folder = shared_dir / "models" / name
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    model, tokenizer = load_model(folder, dtype=torch.bfloat16)
    records = json.loads((shared_dir / "data" / "counterfact_dev.json").read_text())
    known = json.loads((shared_dir / "models" / "known_ids.json").read_text())[name]
    rewrites = [
        r["requested_rewrite"] for r in records if r["case_id"] in known["counterfact_case_ids"]
    ][:2]
    facts = [EditRequest(r["prompt"], r["subject"], r["target_new"]["str"]) for r in rewrites]
    corpus = shared_dir / "data" / "corpus.txt"
    statistics = collect_statistics(model, tokenizer, corpus, [0], max_tokens=4_000, progress=False)
    config = EditConfig.for_model(model, rewordings=0)
    editor = Editor(model, tokenizer, statistics=statistics, config=config)
    editor.edit(facts)
    editor.save(tmp_path / "edits")
    editor.detach()
    edits = tmp_path / "edits"
    merged, lora = tmp_path / "merged", tmp_path / "lora"
    report = export_edits(model, tokenizer, edits, merged, text_tokens=300, progress=False)
    for state in ("gated", "exported"):
        assert report["measured"][state]["generated"]["reliability"] == 1
    export_edits(model, tokenizer, edits, lora, format="lora", **QUIET)
    merged = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert merged.dtype == torch.bfloat16
    ids = tokenizer([facts[0].text], return_tensors="pt")["input_ids"]
    wanted = logits_of(merged, ids).float()
    adapted = peft.PeftModel.from_pretrained(model, lora)
    assert_close(logits_of(adapted, ids).float(), wanted, 0.02)
