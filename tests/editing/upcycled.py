"""A model with experts that knows real facts: a Llama whose MLPs become experts.

Each expert starts as the dense MLP ("sparse upcycling", Komatsuzaki et al. 2023), with noise of its
own so that it matters which one a token is sent to.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, MixtralConfig

EXPERTS, NOISE = 4, 0.02
_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def upcycle(dense: Path, out: Path) -> None:
    """Writes the Mixtral of a Llama's folder, as Mixtral's checkpoints are written."""
    known = LlamaConfig.from_pretrained(dense).to_dict()
    for name in ("model_type", "architectures", "hidden_act", "transformers_version"):
        known.pop(name, None)
    config = MixtralConfig(
        **known, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=None
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(out)
    AutoTokenizer.from_pretrained(dense).save_pretrained(out)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        block, mlp, rest = name.partition(".mlp.")
        if not mlp:
            tensors[name] = tensor
            continue
        for expert in range(EXPERTS):
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * NOISE
            place = f"{block}.block_sparse_moe.experts.{expert}.{_NAMES[rest.split('.')[0]]}.weight"
            tensors[place] = (tensor.float() + noise).to(tensor.dtype)
        if rest.startswith("gate_proj"):
            gate = torch.randn(EXPERTS, config.hidden_size, generator=generator)
            tensors[f"{block}.block_sparse_moe.gate.weight"] = gate.to(tensor.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
