"""Models that real processes, started by torchrun, hold together answer as the whole model does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import coachhook as ch
from coachhook.errors import UnsupportedModelError
from coachhook.models import load_model
from coachhook.store import fingerprint

from .. import processes
from ..models.families import VOCAB, tiny

# The logits come to a few units, after sums that the processes take in another order.
_ROUNDING = 1e-4

_RUN = """
import json, sys
import torch, torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer
import coachhook as ch
from coachhook.evaluation.layers import suggest_layers
from coachhook.hooks import attach_hooks
from coachhook.hooks.gathered import GatheredInput
from coachhook.integrations.export import export_edits
from coachhook.store import fingerprint
sys.path.insert(0, sys.argv[1])
from answers import answers

folder, *ways = sys.argv[1:]
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(folder + "/model")

def load(way):
    plan = {"tp_plan": "auto"} if way == "plan" else {}
    model = AutoModelForCausalLM.from_pretrained(folder + "/model", **plan).float().eval()
    if way == "torch":
        from torch.distributed.tensor.parallel import (
            ColwiseParallel, RowwiseParallel, parallelize_module,
        )
        styles = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
        for block in model.model.layers:
            parallelize_module(block.mlp, mesh, styles | {"down_proj": RowwiseParallel()})
    if way == "fsdp":
        from torch.distributed.fsdp import fully_shard
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if way == "fsdp-root":  # whole between forwards
        from torch.distributed.fsdp import fully_shard
        fully_shard(model, mesh=mesh)
        model(torch.tensor([[1, 2]]))
    return model

def refusals(model):
    request = ch.EditRequest(prompt="w1 {} w2", subject="w5", target_new="w9")
    edits, texts = folder + "/edits", folder + "/texts.txt"
    statistics = ch.Statistics.from_covariances({0: torch.eye(48)}, tokens=100)
    calls = {
        "Editor": lambda: ch.Editor(model, tokenizer, statistics=statistics),
        "Editor.load": lambda: ch.Editor.load(model, tokenizer, edits),
        "collect_statistics": lambda: ch.collect_statistics(model, tokenizer, texts),
        "suggest_layers": lambda: suggest_layers(model, tokenizer, [request]),
        "export": lambda: export_edits(model, tokenizer, edits, folder + f"/out-{rank}"),
    }
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            yield name, str(error)

def gathered():
    # 7 features on 2 processes are 4 and 3.
    from torch.distributed.tensor import Shard, distribute_tensor
    whole = torch.arange(42.0).reshape(2, 3, 7)
    weight = distribute_tensor(torch.ones(5, 7), mesh, [Shard(1)])
    gather, own = GatheredInput(weight, 7), whole.chunk(2, -1)[rank]
    yield torch.equal(gather(own), whole)
    yield torch.equal(gather(own[:, :0]), whole[:, :0])
    yield gather(whole) is whole
    given = own.clone().requires_grad_()
    found = gather(given)
    (found * whole).sum().backward()
    yield torch.equal(found, whole) and torch.equal(given.grad, own)

for way in ways:
    model = load(way)
    found = {"refused": dict(refusals(model)), "gathered": list(gathered())}
    if way == "torch":
        with torch.no_grad(), ch.attach(model, folder + "/edits") as handle:
            handle.hooks.reserve(64, cues=True)
            prompt = open(folder + "/prompts.txt").readline().strip()
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            eager, compiled = model(ids), torch.compile(model, backend="aot_eager")(ids)
            torch.testing.assert_close(compiled.logits, eager.logits)
    if way != "fsdp-root":
        found["fingerprint"] = fingerprint(model)
        save_file(answers(model, tokenizer, folder), f"{folder}/{way}-{rank}.safetensors")
    with open(f"{folder}/{way}-{rank}.json", "w") as file:
        json.dump(found, file)
dist.barrier()
dist.destroy_process_group()
"""

# What the processes and the test itself ask the model.
_ANSWERS = """
import torch
import coachhook as ch

def answers(model, tokenizer, folder):
    texts = open(folder + "/prompts.txt").read().splitlines()
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    batch.pop("token_type_ids", None)
    start = batch["input_ids"].shape[1]
    def logits():
        return model(**batch).logits
    def generated(**settings):
        settings |= {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        return model.generate(**batch, **settings)[:, start:].contiguous()
    kept = []
    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)
    found = {}
    with torch.no_grad():
        found["plain"] = logits()
    with ch.attach(model, folder + "/edits") as handle:
        with torch.no_grad(), handle.hooks.record() as records:
            found["edited"] = logits()
            found["generated"] = generated()
        with torch.inference_mode():
            found["beams"] = generated(num_beams=2).clone()
        keeping = model.get_input_embeddings().register_forward_hook(keep)
        logits()[:, -1].logsumexp(-1).sum().backward()
        keeping.remove()
        found["gradient"] = kept[0].grad
        with torch.no_grad(), handle.disabled():
            found["disabled"] = logits()
    with torch.no_grad():
        found["detached"] = logits()
    found["z"] = torch.cat([z.flatten() for _, z, _ in records])
    found["fired"] = torch.cat([fired.flatten() for _, _, fired in records])
    return found
"""


def _torchrun(folder: Path, *ways: str) -> None:
    (folder / "run.py").write_text(_RUN)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.run(
        [sys.executable, "-m", *launch, str(folder / "run.py"), str(folder), *ways],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert process.returncode == 0, process.stderr


def _expected(folder: Path, model, tokenizer) -> dict[str, torch.Tensor]:
    (folder / "answers.py").write_text(_ANSWERS)
    scope: dict = {}
    exec(_ANSWERS, scope)
    found: dict[str, torch.Tensor] = scope["answers"](model, tokenizer, str(folder))
    return found


def _check(folder: Path, way: str, expected: dict[str, torch.Tensor], whole: str) -> None:
    first, second = (load_file(folder / f"{way}-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() == expected.keys()
    for name in first:  # to the bit: no process may decide otherwise than another
        assert torch.equal(first[name].nan_to_num(), second[name].nan_to_num()), name
    assert torch.equal(first["plain"], first["disabled"])
    assert torch.equal(first["plain"], first["detached"])
    for name in ("generated", "beams", "fired"):
        assert torch.equal(first[name], expected[name]), name
    for name in ("plain", "edited"):
        torch.testing.assert_close(first[name], expected[name], rtol=0, atol=_ROUNDING)
    scale = expected["gradient"].abs().max().item()
    torch.testing.assert_close(
        first["gradient"], expected["gradient"], rtol=0, atol=_ROUNDING * scale
    )
    for rank in (0, 1):
        found = json.loads((folder / f"{way}-{rank}.json").read_text())
        assert found["fingerprint"] == whole
        assert found["gathered"] == [True] * 4
        _check_refusals(found["refused"])


def _check_refusals(refused: dict[str, str]) -> None:
    ops = ["Editor", "Editor.load", "collect_statistics", "suggest_layers", "export"]
    assert list(refused) == ops
    for op, message in refused.items():
        assert message.startswith(f"{op}: model must be whole in this process, got")
        assert "device_map='auto'" in message


def _check_effect(expected: dict[str, torch.Tensor]) -> None:
    """The comparison is of something: some tokens fire, and change answers."""
    assert 0 < expected["fired"].sum() < expected["fired"].numel()
    assert (expected["edited"] - expected["plain"]).abs().max() > 100 * _ROUNDING


@pytest.mark.parametrize("key_site", ["down_proj", "mlp"])
def test_a_model_in_slices_answers_as_the_whole_one(tmp_path, key_site):
    words = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>"
    )
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ids = torch.randint(2, VOCAB, (200, 12), generator=torch.Generator().manual_seed(0))
    lines = [" ".join(f"w{i}" for i in row) for row in ids.tolist()]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    statistics = ch.collect_statistics(
        model, tokenizer, lines, layers=[0, 1], progress=False, key_site=key_site
    )
    config = ch.EditConfig.for_model(
        model, layers=[0, 1], rewordings=0, target_steps=10, key_site=key_site
    )
    editor = ch.Editor(model, tokenizer, statistics=statistics, config=config)
    editor.edit(
        [
            ch.EditRequest(prompt="w10 {} w11", subject="w20 w21", target_new="w30"),
            ch.EditRequest(prompt="w12 {} w13 w14", subject="w22", target_new="w31 w32"),
        ]
    )
    editor.save(tmp_path / "edits")
    editor.detach()
    prompts = ["w10 w20 w21 w11", "w12 w22 w13 w14", *lines[:3], "w40 w12 w22 w13 w14"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    expected = _expected(tmp_path, model, tokenizer)
    _check_effect(expected)
    processes.together(_RUN, tmp_path, "plan", "fsdp", "fsdp-root", folder=tmp_path)
    for way in ("plan", "fsdp"):
        _check(tmp_path, way, expected, fingerprint(model))
    _check_refusals(json.loads((tmp_path / "fsdp-root-0.json").read_text())["refused"])


@pytest.mark.slow  # statistics, an edit, a launch of torchrun, a compiled graph
def test_real_facts_are_answered_by_a_model_in_slices(shared_dir, tmp_path):
    source = shared_dir / "models" / "factlm-llama"
    model, tokenizer = load_model(source, dtype=torch.float32)
    (tmp_path / "model").symlink_to(source)
    texts = (shared_dir / "data" / "corpus.txt").read_text().splitlines()
    (tmp_path / "texts.txt").write_text("\n".join(texts[:100]))
    statistics = ch.collect_statistics(
        model, tokenizer, texts, layers=[0], max_tokens=20_000, progress=False
    )
    records = json.loads((shared_dir / "data" / "counterfact_dev.json").read_text())[:4]
    facts = [record["requested_rewrite"] for record in records]
    editor = ch.Editor(model, tokenizer, statistics=statistics)
    editor.edit(
        [
            ch.EditRequest(f["prompt"], subject=f["subject"], target_new=f["target_new"]["str"])
            for f in facts
        ]
    )
    editor.save(tmp_path / "edits")
    editor.detach()
    prompts = [fact["prompt"].format(fact["subject"]) for fact in facts]
    prompts += [record["paraphrase_prompts"][0].replace("\n", " ") for record in records]
    prompts += [record["neighborhood_prompts"][0] for record in records]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    expected = _expected(tmp_path, model, tokenizer)
    _check_effect(expected)
    answers = tokenizer.batch_decode(expected["generated"])
    for answer, fact in zip(answers, facts, strict=False):
        assert answer.strip().startswith(fact["target_new"]["str"])
    _torchrun(tmp_path, "torch")
    _check(tmp_path, "torch", expected, fingerprint(model))


def test_slices_in_plain_tensors_are_refused(tmp_path):
    model = tiny("llama")
    # As transformers marks what it slices; some of its versions give no DTensors.
    model.model.layers[1].mlp.down_proj._hf_tp_plan = "rowwise"
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(
        UnsupportedModelError, match=f"^fingerprint: .* got a plain tensor .*{name}"
    ):
        ch.attach(model, tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"^Editor.load: .*{name} together"):
        ch.Editor.load(model, None, tmp_path)
    model.model.layers[1].mlp.down_proj._hf_tp_plan = None
    model.model.norm._hf_tp_plan = "replicated_with_grad_allreduce"
    assert fingerprint(model) == fingerprint(tiny("llama"))


def test_what_is_no_model_is_refused_in_the_words_for_that():
    with pytest.raises(TypeError, match="model must be a torch module, got str"):
        ch.collect_statistics("gpt2", None, ["a text"])
    with pytest.raises(TypeError, match="model must be a torch module, got str"):
        ch.Editor("gpt2", None, statistics=None)
