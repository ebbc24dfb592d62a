"""What the tests of the baselines share: quick settings and a whole look at a model."""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coachhook import EditRequest, Statistics, collect_statistics
from coachhook.evaluation.baselines import make_baseline
from tests.evaluation.tiny import SENTENCES

QUICK = {
    "layers": [0, 1],
    "contexts": ["{}", "Bob writes: {}"],
    "target_steps": 4,
    "covariance_weight": 5.0,
    "ridge": 1e-2,
}
# What MEND and SERAC learn from.
TRAINING = [
    EditRequest("{} lives in", "Bob", "Spain", paraphrases=["Italy, where Bob"]),
    EditRequest("{} borders", "Italy", "Dutch", neighborhood=["Spain borders"]),
    EditRequest("{} writes in", "Bob", "French"),
]
LEARNING = {"train_requests": TRAINING, "progress": False}
# Every baseline, with settings that take a moment.
SETTINGS = {
    "memit": ("memit", QUICK),
    "memit-default": ("memit", {**QUICK, "preset": "default", "target_clamp": 2.0}),
    "accumulated-exact": ("accumulated", QUICK),
    "accumulated-published": ("accumulated", {**QUICK, "variant": "published"}),
    "alphaedit": ("alphaedit", {**QUICK, "threshold": 1e-2, "ridge_weight": 0.1}),
    "fine-tuning": ("fine-tuning", {"steps": 3}),
    "lora": ("lora", {"steps": 2, "batch_size": 2, "rank": 2}),
    "retrieval": ("retrieval", {}),
    "grace": ("grace", {"steps": 3}),
    "mend": ("mend", {**LEARNING, "steps": 2, "train_batch": 2, "rank": 4}),
    "serac": ("serac", {**LEARNING, "classifier_steps": 2, "counterfactual_steps": 2}),
}
BATCHES = [
    [
        EditRequest("The capital of {} is", "France", "Madrid"),
        EditRequest("{} speaks", "Ann Art", "Dutch"),
    ],
    [
        EditRequest("The capital of {} is", "Spain", "Paris"),
        EditRequest("{} lives in", "Cid", "Lyon, Italy"),
    ],
]
PROMPTS = [request.text for batch in BATCHES for request in batch]


def statistics_of(model, tokenizer, layers=(0, 1, 2)) -> Statistics:
    return collect_statistics(model, tokenizer, SENTENCES, layers=list(layers), progress=False)


def make(model, tokenizer, key, statistics, **changes):
    name, options = SETTINGS[key]
    return make_baseline(name, model, tokenizer, statistics=statistics, **{**options, **changes})


def double(model):
    return copy.deepcopy(model).double()


def tiny_llama(tokenizer):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits_of(model, tokenizer, prompts=PROMPTS):
    """Logits of each prompt alone."""
    return [
        model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits for text in prompts
    ]


def same(found, wanted) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def whole(model):
    """All that a baseline might leave changed: modules, values, flags and attributes."""
    return (
        {path: id(module) for path, module in model.named_modules()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        {path: m.training for path, m in model.named_modules()},
        set(vars(model)),
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def unchanged(before, after) -> bool:
    *facts, values = before
    *found, now = after
    return facts == found and values.keys() == now.keys() and same(now.values(), values.values())
