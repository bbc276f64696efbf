"""The protocol against a plain loop, on histories with repeated items, as visits to restaurants have."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cemg.data.dataset import Dataset
from cemg.evaluation import evaluate

ITEMS, TOP = 200, 10


def data_with_repeats() -> Dataset:
    rng = np.random.default_rng(7)
    sequences = [(rng.zipf(1.4, size=rng.integers(3, 25)) % ITEMS).astype(np.int32) for _ in range(300)]
    blank: list[None] = [None] * ITEMS
    users, items = [str(i) for i in range(300)], [str(i) for i in range(ITEMS)]
    return Dataset("restaurants", users, items, sequences, [""] * ITEMS, list(blank), list(blank), "as drawn")


def order_of(history: np.ndarray) -> list[int]:
    """A ranking of the whole catalog that depends on the history."""
    return [int(i) for i in np.random.default_rng(int(history.sum())).permutation(ITEMS)]


def rank(histories: list[np.ndarray], top: int) -> Tensor:
    return torch.tensor([order_of(h)[:top] for h in histories])


def test_every_metric_equals_a_plain_loop_over_users() -> None:
    data = data_with_repeats()
    scored = evaluate(rank, data.split(), cutoffs=(TOP,), batch_size=17, progress=False)
    trained = [item for s in data.sequences for item in s[:-2].tolist()]
    kept, removed, cold, in_history = [], [], [], 0
    for sequence in data.sequences:
        history, target = sequence[:-1], int(sequence[-1])
        without_history = [i for i in order_of(history) if i not in set(history.tolist())]
        in_history += target in history
        kept.append(order_of(history).index(target))
        removed.append(without_history.index(target) if target in without_history else ITEMS)
        cold.append(trained.count(target) <= 5)
    assert in_history > 20 and 0 < sum(cold) < 300
    assert scored.targets_in_history == in_history and int(scored.cold.sum()) == sum(cold)
    for ranks, metrics in ((kept, scored.metrics), (removed, scored.metrics_history_removed)):
        assert metrics["HR@10"] == sum(r < TOP for r in ranks) / 300
        expected = sum(1 / math.log2(r + 2) for r in ranks if r < TOP) / 300
        assert math.isclose(metrics["NDCG@10"], expected, rel_tol=1e-12)  # float64, 300 terms
    hits = sum(r < TOP for r, c in zip(kept, cold, strict=True) if c)
    assert scored.cold_metrics["HR@10"] == hits / sum(cold)
