from __future__ import annotations

import numpy as np
import pytest

from cemg.data.dataset import Dataset

ITEMS = 30


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
