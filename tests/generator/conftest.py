"""No network, and a small Llama checkpoint in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session", params=["tied", "untied"])
def tiny_llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama of width 32 with 40 text tokens, its head tied to the embeddings or not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=None,
        tie_word_embeddings=request.param == "tied",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp(f"llama-{request.param}")
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder
