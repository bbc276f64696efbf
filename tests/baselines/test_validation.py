"""Validation by counts against the evaluation protocol."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cemg.baselines.validation import validate
from cemg.data.dataset import Dataset
from cemg.dense import DenseConfig, DenseRanker, SequenceEncoder
from cemg.evaluation import evaluate


@pytest.fixture(scope="module")
def data() -> Dataset:
    rng = np.random.default_rng(0)
    blank: list[None] = [None] * 40
    ids = [str(i) for i in range(300)]
    sequences = [rng.integers(40, size=rng.integers(3, 12)).astype(np.int32) for _ in ids]  # with repeats
    return Dataset("random", ids, ids[:40], sequences, [""] * 40, list(blank), list(blank), "as written")


@pytest.mark.parametrize("users", [None, np.arange(0, 300, 7)])
def test_it_equals_the_protocol_with_the_history_removed(data: Dataset, users: np.ndarray | None) -> None:
    torch.manual_seed(0)
    config = DenseConfig(dim=16, inner=32, max_length=8)
    ranker = DenseRanker(SequenceEncoder(40, config).eval(), config)
    expected = evaluate(ranker, data.split(), part="valid", cutoffs=(10,), users=users, progress=False)
    assert expected.targets_in_history > 0
    assert validate(ranker, data.split(), users) == pytest.approx(expected.metrics_history_removed)
