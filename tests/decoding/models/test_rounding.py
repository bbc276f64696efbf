"""The error of the C++ decoder in float32 against float64: at most a small multiple of the model's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from cemg.decoding.models.causal import CausalPlan
from cemg.decoding.models.native import NativePlan
from cemg.decoding.models.t5 import T5Plan
from cemg.decoding.protocol import LogitsRequest

VOCABULARY, FIRST, CODES, LONG = 220, 3, 200, 8192  # LONG: terms of the feed-forward block's sums
USERS, PROMPT, FED = 6, 12, 3
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", {
        "d_model": 256, "d_kv": 64, "d_ff": LONG, "num_layers": 1, "num_heads": 4,
        "decoder_start_token_id": 0, "tie_word_embeddings": False}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 256, "n_layer": 1, "n_head": 4, "n_inner": LONG,
                                 "n_positions": 32}),
    "llama": ("LlamaForCausalLM", {
        "hidden_size": 256, "intermediate_size": LONG, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2}),
}  # fmt: skip
KINDS = {"t5": "T5Config", "gpt2": "GPT2Config", "llama": "LlamaConfig"}


def scaled_model(family: str, scale: float) -> Any:
    """A random model with its matrices multiplied by ``scale``."""
    name, settings = CONFIGURATIONS[family]
    torch.manual_seed(0)
    config = getattr(transformers, KINDS[family])(
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=1, **settings
    )
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(scale)
    return model


def own_forward(model: Any, prompts: Tensor, fed: Tensor) -> Tensor:
    """Log-probabilities [B, 1 + T, V] of the model, after each prompt and each further token."""
    if model.config.is_encoder_decoder:
        begun = torch.cat((torch.zeros(len(fed), 1, dtype=torch.int64), fed), 1)
        logits = model(input_ids=prompts, decoder_input_ids=begun).logits
    else:
        logits = model(input_ids=torch.cat((prompts, fed), 1)).logits[:, -fed.shape[1] - 1 :]
    return logits.log_softmax(-1)[..., FIRST : FIRST + CODES]


def in_cpp(model: Any, prompts: Tensor, fed: Tensor) -> Tensor:
    """The same, computed by the C++ decoder step by step."""
    kind = T5Plan if model.config.is_encoder_decoder else CausalPlan
    state = NativePlan(kind(model, range(FIRST, FIRST + CODES))).new_state()
    request = LogitsRequest(FIRST, CODES, True)
    steps = [state.prefill(prompts, torch.ones_like(prompts), request, prompts.numel())]
    sole = torch.zeros(len(prompts), 1, dtype=torch.int64)
    steps += [state.decode_step(token[:, None], sole, request) for token in fed.unbind(1)]
    return torch.cat([step.values - step.logsumexp[..., None] for step in steps], 1)


@pytest.mark.parametrize("scale", [1.0, 20.0, 60.0])
@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_large_weights_lose_no_more_accuracy_in_cpp_than_in_the_models_own_float32(family, scale):
    """Errors of rows differ by orders of magnitude, so their geometric mean is compared."""
    model = scaled_model(family, scale)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(FIRST, VOCABULARY, (USERS, PROMPT), generator=generator)
    fed = torch.randint(FIRST, FIRST + CODES, (USERS, FED), generator=generator)
    with torch.inference_mode():
        exact = own_forward(copy.deepcopy(model).double(), prompts, fed)

        def error(found: Tensor) -> Tensor:
            return (found.double() - exact).square().mean(-1).sqrt().log().mean().exp()

        own, ours = error(own_forward(model, prompts, fed)), error(in_cpp(model, prompts, fed))
    assert 0 < ours < 2 * own, f"off by {ours:.2e}, the model's own float32 by {own:.2e}"
