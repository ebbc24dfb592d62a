"""The table: where each known family of models keeps what editing needs, and which layers to edit.

A family is looked up by ``config.model_type``. Every path was checked on the class in transformers:
the output of ``down`` is added to the residual stream of its block as it is, with nothing but
dropout in between. A model that is not in the table goes through the generic routine of
``describe`` instead, which finds the same paths by shape and verifies that property by running the
first block.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Paths of one family, dotted, from the causal language model's root.

    Attributes:
        blocks: the list of transformer blocks; its parent is the module that runs them.
        down: the down-projection, relative to a block.
        norm: the final norm.
        parallel: whether attention and MLP read the same residual: a config key where it varies,
            None where the first block has to show it.
    """

    blocks: str
    down: str
    norm: str
    parallel: bool | str | None = False


_LLAMA = Family("model.layers", "mlp.down_proj", "model.norm")
_GPT2 = Family("transformer.h", "mlp.c_proj", "transformer.ln_f")
_GPTJ = Family("transformer.h", "mlp.fc_out", "transformer.ln_f", parallel=True)

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_neo": _GPT2,
    "gptj": _GPTJ,
    "codegen": _GPTJ,
    "gpt_neox": Family(
        "gpt_neox.layers",
        "mlp.dense_4h_to_h",
        "gpt_neox.final_layer_norm",
        parallel="use_parallel_residual",
    ),
    "opt": Family("model.decoder.layers", "fc2", "model.decoder.final_layer_norm"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "phi3": _LLAMA,
    "olmo": _LLAMA,
    "phi": Family("model.layers", "mlp.fc2", "model.final_layernorm", parallel=True),
}

# (model_type, number of blocks, hidden size) -> the layers of the published hyper-parameter files:
# GPT2-XL and GPT-J are the paper's models; the others are the ones used for MEMIT-style editing.
_PUBLISHED_LAYERS: dict[tuple[str, int, int], range] = {
    ("gpt2", 48, 1600): range(13, 18),
    ("gptj", 28, 4096): range(3, 9),
    ("llama", 32, 4096): range(4, 9),
    ("llama", 28, 3072): range(4, 9),
    ("mistral", 32, 4096): range(4, 9),
    ("qwen2", 28, 3584): range(4, 9),
}

_MAX_DEFAULT_LAYERS = 5


def default_layers(model_type: str, num_layers: int, hidden_size: int) -> list[int]:
    """The layers to edit when the user names none.

    The models of the published experiments have theirs in a table. For the rest: causal tracing
    finds the recall of a fact in MLPs of the early middle, and the published ranges start at about
    an eighth of the depth (GPT-J 3 of 28, Llama 4 of 32) and span about another eighth, five layers
    at most: ``[L // 8, L // 8 + min(5, L // 8 + 1))``. Models of up to eight blocks have no early
    middle; they hold facts in their first MLPs, so the first half is taken, three at most.
    """
    published = _PUBLISHED_LAYERS.get((model_type, num_layers, hidden_size))
    if published is not None:
        return list(published)
    if num_layers <= 8:
        return list(range(max(1, min(3, num_layers // 2))))
    start = num_layers // 8
    return list(range(start, start + min(_MAX_DEFAULT_LAYERS, start + 1)))
