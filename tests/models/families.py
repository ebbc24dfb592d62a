"""Tiny randomly initialised models of the real transformers classes, one per family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

HIDDEN, WIDTH, LAYERS, VOCAB = 32, 48, 3, 64

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GROUPED = _COMMON | dict(intermediate_size=WIDTH, num_key_value_heads=2)
_GPT2 = dict(
    vocab_size=VOCAB,
    n_embd=HIDDEN,
    n_layer=LAYERS,
    n_head=4,
    n_positions=64,
    n_inner=WIDTH,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_NEOX = _COMMON | dict(intermediate_size=WIDTH)
_OPT = _COMMON | dict(ffn_dim=WIDTH, word_embed_proj_dim=HIDDEN)
_NEO = (_COMMON | dict(intermediate_size=WIDTH, num_layers=LAYERS, num_heads=4)) | dict(
    attention_types=[[["global", "local", "global"], 1]], window_size=4
)
for _key in ("num_hidden_layers", "num_attention_heads"):
    _NEO.pop(_key)

# name -> (name of the configuration class, its arguments, path of a down-projection)
SUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2Config", _GPT2, "transformer.h.1.mlp.c_proj"),
    "gptj": ("GPTJConfig", _GPT2 | dict(rotary_dim=4), "transformer.h.1.mlp.fc_out"),
    "gpt_neox": ("GPTNeoXConfig", _NEOX, "gpt_neox.layers.1.mlp.dense_4h_to_h"),
    "gpt_neox-sequential": (
        "GPTNeoXConfig",
        _NEOX | dict(use_parallel_residual=False),
        "gpt_neox.layers.1.mlp.dense_4h_to_h",
    ),
    "opt": ("OPTConfig", _OPT, "model.decoder.layers.1.fc2"),
    "llama": ("LlamaConfig", _GROUPED, "model.layers.1.mlp.down_proj"),
    "mistral": (
        "MistralConfig",
        _GROUPED | dict(sliding_window=None),
        "model.layers.1.mlp.down_proj",
    ),
    "qwen2": ("Qwen2Config", _GROUPED, "model.layers.1.mlp.down_proj"),
    "qwen3": ("Qwen3Config", _GROUPED | dict(head_dim=8), "model.layers.1.mlp.down_proj"),
    "gemma": ("GemmaConfig", _GROUPED | dict(head_dim=8), "model.layers.1.mlp.down_proj"),
    "phi": ("PhiConfig", _GROUPED, "model.layers.1.mlp.fc2"),
    "phi3": ("Phi3Config", _GROUPED, "model.layers.1.mlp.down_proj"),
    "olmo": ("OlmoConfig", _GROUPED, "model.layers.1.mlp.down_proj"),
    "gpt_neo": ("GPTNeoConfig", _NEO, "transformer.h.1.mlp.c_proj"),
    "codegen": (
        "CodeGenConfig",
        _GPT2 | dict(rotary_dim=4, n_ctx=64),
        "transformer.h.1.mlp.fc_out",
    ),
}

# Not in the table: these go through the routine by shape.
DISCOVERED: dict[str, tuple[str, dict[str, Any], str]] = {
    "stablelm": ("StableLmConfig", _GROUPED, "model.layers.1.mlp.down_proj"),
    "cohere": ("CohereConfig", _GROUPED, "model.layers.1.mlp.down_proj"),
    "starcoder2": ("Starcoder2Config", _GROUPED, "model.layers.1.mlp.c_proj"),
    "falcon": ("FalconConfig", _COMMON, "transformer.h.1.mlp.dense_4h_to_h"),
    "bloom": (
        "BloomConfig",
        dict(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=4),
        "transformer.h.1.mlp.dense_4h_to_h",
    ),
    "mpt": (
        "MptConfig",
        dict(vocab_size=VOCAB, d_model=HIDDEN, n_layers=LAYERS, n_heads=4, max_seq_len=64),
        "transformer.blocks.1.ffn.down_proj",
    ),
    "granite": (
        "GraniteConfig",
        _GROUPED | dict(residual_multiplier=1.0, logits_scaling=4.0),
        "model.layers.1.mlp.down_proj",
    ),
    "vaultgemma": (
        "VaultGemmaConfig",
        _GROUPED | dict(head_dim=8, final_logit_softcapping=3.0),
        "model.layers.1.mlp.down_proj",
    ),
}

# A norm or a scale between the MLP and the residual.
INDIRECT: dict[str, tuple[str, dict[str, Any], str]] = {
    name: (config_class, _GROUPED | arguments, "model.layers.1.mlp.down_proj")
    for name, config_class, arguments in (
        ("gemma2", "Gemma2Config", dict(head_dim=8)),
        ("gemma3", "Gemma3TextConfig", dict(head_dim=8, sliding_window=4)),
        ("olmo2", "Olmo2Config", {}),
        ("olmo3", "Olmo3Config", dict(sliding_window=4)),
        ("glm4", "Glm4Config", dict(head_dim=8)),
        ("exaone4", "Exaone4Config", dict(sliding_window=4)),
        ("granite-scaled", "GraniteConfig", dict(residual_multiplier=0.5)),
    )
}
DISCOVERED |= INDIRECT

# Blocks with experts, some after a first one without; path of the module that holds them.
_EXPERTS = _GROUPED | dict(num_experts_per_tok=2)
_ROUTED = _EXPERTS | dict(
    n_routed_experts=4, moe_intermediate_size=16, first_k_dense_replace=1, n_group=1, topk_group=1
)
_LATENT = dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
)
EXPERTS: dict[str, tuple[str, dict[str, Any], str]] = {
    name: (config_class, arguments, f"model.layers.1.{path}")
    for name, config_class, arguments, path in (
        ("mixtral", "MixtralConfig", _EXPERTS | dict(num_local_experts=4), "mlp"),
        (
            "qwen2_moe",
            "Qwen2MoeConfig",
            _EXPERTS
            | dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
            "mlp",
        ),
        (
            "qwen3_moe",
            "Qwen3MoeConfig",
            _EXPERTS | dict(num_experts=4, moe_intermediate_size=16, head_dim=8),
            "mlp",
        ),
        ("olmoe", "OlmoeConfig", _EXPERTS | dict(num_experts=4), "mlp"),
        (
            "gpt_oss",
            "GptOssConfig",
            _EXPERTS | dict(num_local_experts=4, head_dim=8, sliding_window=8),
            "mlp",
        ),
        (
            "deepseek_v3",
            "DeepseekV3Config",
            _ROUTED | _LATENT,
            "mlp",
        ),
        ("glm4_moe", "Glm4MoeConfig", _ROUTED | dict(head_dim=8), "mlp"),
        (
            "llama4",
            "Llama4TextConfig",
            _GROUPED
            | dict(
                head_dim=8,
                intermediate_size_mlp=WIDTH,
                num_local_experts=2,
                num_experts_per_tok=1,
                interleave_moe_layer_step=2,
            ),
            "feed_forward",
        ),
        (
            "granitemoe",
            "GraniteMoeConfig",
            _EXPERTS | dict(num_local_experts=4, residual_multiplier=0.5),
            "block_sparse_moe",
        ),
        ("flex_olmo", "FlexOlmoConfig", _EXPERTS | dict(num_experts=4), "mlp"),
        # A buffer beside the experts, in the module that holds them.
        ("minimax_m2", "MiniMaxM2Config", _EXPERTS | dict(num_local_experts=4, head_dim=8), "mlp"),
        # Blocks of two classes.
        (
            "jamba",
            "JambaConfig",
            _EXPERTS
            | dict(
                num_experts=4,
                attn_layer_period=2,
                attn_layer_offset=1,
                expert_layer_period=2,
                expert_layer_offset=1,
                mamba_d_state=4,
                mamba_dt_rank=4,
                use_mamba_kernels=False,
            ),
            "feed_forward",
        ),
        (
            "lfm2_moe",
            "Lfm2MoeConfig",
            _EXPERTS
            | dict(
                num_experts=4,
                moe_intermediate_size=16,
                num_dense_layers=1,
                layer_types=["conv", "full_attention", "conv"],
            ),
            "feed_forward",
        ),
        (
            "qwen3_next",
            "Qwen3NextConfig",
            _EXPERTS
            | dict(
                num_experts=4,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
                head_dim=8,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                layer_types=["linear_attention", "full_attention", "linear_attention"],
            ),
            "mlp",
        ),
        # Each router reads what the one below it has found.
        (
            "zaya",
            "ZayaConfig",
            _GROUPED
            | dict(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=16, head_dim=8),
            "mlp",
        ),
        # A block may take the choice of tokens to attend to from the one below it.
        (
            "glm_moe_dsa",
            "GlmMoeDsaConfig",
            _ROUTED
            | _LATENT
            | dict(
                index_n_heads=2,
                index_head_dim=8,
                index_topk=4,
                indexer_types=["full", "full", "shared"],
            ),
            "mlp",
        ),
    )
}

# name -> (configuration class, arguments, what the refusal must name)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "opt-350m": ("OPTConfig", _OPT | dict(do_layer_norm_before=False), "do_layer_norm_before"),
    "opt-projected": ("OPTConfig", _OPT | dict(word_embed_proj_dim=16), "a projection in between"),
    "mamba": (
        "MambaConfig",
        dict(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS),
        "one linear layer that maps to the residual width",
    ),
    "deepseek_v4": (
        "DeepseekV4Config",
        _EXPERTS
        | dict(
            n_routed_experts=4,
            moe_intermediate_size=16,
            head_dim=8,
            q_lora_rank=16,
            qk_rope_head_dim=4,
        ),
        r"one residual stream, \[1, 2, 32\] for two tokens, got \[1, 2, 4, 32\]",
    ),
    "gemma4-experts": (
        "Gemma4TextConfig",
        _GROUPED
        | dict(
            head_dim=8,
            global_head_dim=8,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=16,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        "must lie in one module, got router, experts",
    ),
}


def build(config_class: str, arguments: dict[str, Any]) -> Any:
    """A model with weights large enough that its blocks matter."""
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.generation_config.pad_token_id = 0
    return model


def tiny(name: str, change: Callable[[dict[str, Any]], None] | None = None) -> Any:
    """The tiny model of a supported or discovered family."""
    config_class, arguments, _ = (SUPPORTED | DISCOVERED | EXPERTS)[name]
    arguments = dict(arguments)
    if change is not None:
        change(arguments)
    return build(config_class, arguments)
