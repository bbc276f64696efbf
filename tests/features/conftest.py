"""Small local checkpoints and drawn images for the feature tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ..helpers import save_wordpiece_tokenizer

WORDS = ["red", "lip", "stick", "##stick", "nail", "polish", "shampoo", "for", "dry", "hair", "a", "soap"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub lookups fail at once instead of being tried again for a minute."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of 16 hidden units, random seeded weights and a WordPiece vocabulary."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    save_wordpiece_tokenizer(folder, WORDS, lowercase=True)
    return folder


@pytest.fixture
def draw(tmp_path: Path) -> Callable[[str, int], Path]:
    """``draw(name, seed)`` writes a seeded noise image of 80 by 64 pixels and returns its path."""

    def write(name: str, seed: int) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return tmp_path / name

    return write
