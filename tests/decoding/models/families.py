"""Tiny random models of every family that ``transformers`` can build from a configuration alone.

Sizes are set wherever a configuration has them, in its parts too. ``patch`` adds what a family needs besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from ..conftest import VOCABULARY

WIDTH, HEADS, POSITIONS, WINDOW = 32, 4, 512, 16
SIZES: dict[str, Any] = {
    name: size
    for size, names in (
        (WIDTH, "hidden_size d_model n_embd dim embedding_size embedding_dim word_embed_proj_dim embed_dim"),
        (2, "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers"),
        (2, "num_decoder_layers num_key_value_heads n_head_kv num_experts_per_tok num_experts_per_token"),
        (2, "moe_topk eos_token_id"),
        (HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads num_experts"),
        (HEADS, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
        (HEADS, "num_local_experts n_routed_experts"),
        (8, "head_dim d_kv d_head kv_channels attention_head_size index_head_dim index_topk"),
        (8, "chunk_size mamba_chunk_size"),
        (2 * WIDTH, "intermediate_size ffn_dim d_ff d_inner n_inner ffn_hidden_size encoder_ffn_dim"),
        (2 * WIDTH, "decoder_ffn_dim dim_ff feed_forward_size"),
        (WIDTH // 2, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"),
        (POSITIONS, "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions"),
        (WINDOW, "sliding_window attention_window_size attention_chunk_size attention_window"),
        (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
        (0, "pad_token_id"),
        (1, "bos_token_id decoder_start_token_id"),
        (False, "tie_word_embeddings"),
    )
    for name in names.split()
}


def mixed(*kinds: str, **more: Any) -> dict[str, Any]:
    """Four layers of two alternating types."""
    return {"num_hidden_layers": 4, "layer_types": list(kinds) * 2, **more}


LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "head_dim": 4, "num_key_value_heads": HEADS,
}  # fmt: skip
LINEAR = mixed(
    "linear_attention", "full_attention", linear_num_value_heads=4, linear_num_key_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip
DELTA = LATENT | mixed(
    "linear_attention", "full_attention", linear_head_dim=8, linear_num_heads=4, num_expert_group=1,
    topk_group=1, mlp_layer_types=["dense", "sparse"] * 2,
)  # fmt: skip
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2,
}  # fmt: skip
ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_d_state": 4,
    "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": HEADS,
}  # fmt: skip
LOCAL = mixed("sliding_attention", "full_attention")
SHARED: list[tuple[str, dict[str, Any]]] = [
    ("axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa", LATENT),
    ("longcat_flash minicpm3 sarvam_mla youtu", LATENT),
    ("qwen3_next qwen3_5_text qwen3_5_moe_text qwen4_exp_text", LINEAR),
    ("bailing_hybrid kimi_linear", DELTA),
    ("gemma2 gemma3_text gemma3n_text gemma4_text gpt_oss cohere2 exaone4 olmo3 ministral smollm3", LOCAL),
    ("granite_swa modernbert-decoder", LOCAL),
    ("bamba falcon_h1 granitemoehybrid", MAMBA),
    ("zamba zamba2", ZAMBA),
    ("lfm2 lfm2_moe", mixed("conv", "full_attention")),
    ("lfm3 llama4_text", {"num_hidden_layers": 4}),
    ("codegen gptj", {"rotary_dim": 4}),
    ("axk1 deepseek_v2", {"n_group": 1, "topk_group": 1}),
]
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granitemoehybrid": mixed("mamba", "attention"),
    "hy_v4": {"qk_rope_head_dim": 4},
    "jamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "minimax": mixed("full_attention", "linear_attention"),
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": WIDTH},
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_embds": False, "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16, "num_buckets": 2, "hash_seed": 0,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2, "num_blocks": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"n_mamba_heads": 2, "mamba_dt_rank": 4},
    "zamba2": {"n_mamba_heads": 4, "mamba_headdim": 16, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def patch(name: str) -> dict[str, Any]:
    """The settings that a family needs besides the sizes."""
    settings: dict[str, Any] = {}
    for families, shared in SHARED:
        settings |= shared if name in families.split() else {}
    return settings | OWN.get(name, {})


def names(seq2seq: bool) -> list[str]:
    """The model types of all families."""
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if seq2seq else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted(mapping)


def tiny_config(kind: type[PretrainedConfig], seq2seq: bool, **more: Any) -> PretrainedConfig:
    """The smallest configuration of a class that has all its types of layers."""
    example = kind()
    settings: dict[str, Any] = {}
    for name, size in SIZES.items():
        known = name in vars(example) or name in kind.attribute_map
        if known and not isinstance(getattr(kind, name, None), property):
            settings[name] = size
    for name in kind.sub_configs:
        part = getattr(example, name, None)
        if isinstance(part, PretrainedConfig):
            settings[name] = tiny_config(type(part), seq2seq)
    if seq2seq and example.is_encoder_decoder:
        settings["decoder_start_token_id"] = 1
    elif hasattr(example, "is_decoder"):
        settings["is_decoder"] = True
    config = kind(**(settings | patch(kind.model_type) | more))
    if kind.model_type == "encoder-decoder":
        config.decoder.is_decoder = config.decoder.add_cross_attention = True
    return config


def build(name: str, seq2seq: bool, **more: Any) -> PreTrainedModel:
    """A model of a family, in evaluation mode. Errors of ``transformers`` are not caught."""
    config = tiny_config(CONFIG_MAPPING[name], seq2seq, **more)
    torch.manual_seed(0)
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_config(config)
    return sharpened(model).eval()


@torch.no_grad()
def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough that scores differ by much more than rounding."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) and module.weight.is_floating_point():
            module.weight.normal_(0, 0.2, generator=generator)
    for name, weight in model.named_parameters():
        if "expert" in name and weight.ndim == 3:
            weight.normal_(0, 0.2, generator=generator)
    return model
