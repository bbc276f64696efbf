from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from cemg.baselines.registry import MODELS, Job
from cemg.data.dataset import Dataset
from cemg.features import Features

ITEMS = 30
MULTIMODAL = ("llm-esr", "mmsrec", "missrec")


@pytest.fixture(scope="session")
def ring() -> Dataset:
    """Item i + 1 follows item i, around a ring: the last item determines the next."""
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(ITEMS, size=200), rng.integers(5, 10, size=200)
    sequences = [((s + np.arange(n)) % ITEMS).astype(np.int32) for s, n in zip(starts, lengths, strict=True)]
    return Dataset(
        name="ring",
        user_ids=[str(i) for i in range(200)],
        item_ids=[str(i) for i in range(ITEMS)],
        sequences=sequences,
        titles=[""] * ITEMS,
        texts=[None] * ITEMS,
        images=[None] * ITEMS,
        tie_rule="as written",
    )


@pytest.fixture
def frozen_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random features in place of the encoders: a text for all items but one, an image for every second."""

    def draw(job: Job) -> dict[str, Features]:
        generator, items = torch.Generator().manual_seed(0), torch.arange(job.data.num_items)
        found = {}
        for name, present in (("text", items != 3), ("image", items % 2 == 0)):
            found[name] = Features(
                torch.randn(len(items), 12, generator=generator) * present[:, None], present
            )
        return found

    for name in MULTIMODAL:
        monkeypatch.setattr(importlib.import_module(MODELS[name].module), "item_features", draw)
