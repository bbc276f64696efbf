"""Tiny random models of every architecture that has a fast path."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from ..conftest import VOCABULARY

ROTARY: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5 tied": ("T5", T5 | {"tie_word_embeddings": True}),
    "t5 gated, uneven stacks": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3}),
    "mt5": ("MT5", T5),
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
                      "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.2}),
    "llama, as many key heads": ("Llama", ROTARY | {"num_key_value_heads": 4}),
    "llama with biases": ("Llama", ROTARY | {"attention_bias": True, "mlp_bias": True}),
    "llama3 rotation": ("Llama", ROTARY | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "mistral": ("Mistral", ROTARY | {"sliding_window": None}),
    "qwen2, biases of three projections": ("Qwen2", ROTARY),
    "qwen3, normed heads": ("Qwen3", ROTARY | {"head_dim": 16}),
}  # fmt: skip
CLASSES = {
    "T5": "T5ForConditionalGeneration",
    "MT5": "MT5ForConditionalGeneration",
    "GPT2": "GPT2LMHeadModel",
}
WINDOW: dict[str, Any] = {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 0}


def build(kind: str, settings: dict[str, Any]) -> transformers.PreTrainedModel:
    """A random model with large output weights and biases, so that scores differ."""
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES.get(kind, f"{kind}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "bias" in name and weight.dim() == 1:
                weight.normal_(0, 0.3)
        model.get_output_embeddings().weight.normal_(0, 0.5)
    return model


def with_adapters(model: transformers.PreTrainedModel, **options: Any) -> Any:
    """The model with LoRA adapters whose weights are far from their initial values."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(**({"target_modules": "all-linear", "r": 2} | options))
    adapted = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
    return adapted


def by_item(found: Any) -> dict[tuple[int, int], float]:
    """Scores by prompt and item."""
    return {
        (row, item): score
        for row, (items, scores) in enumerate(zip(found.items.tolist(), found.scores.tolist(), strict=True))
        for item, score in zip(items, scores, strict=True)
        if item >= 0
    }
