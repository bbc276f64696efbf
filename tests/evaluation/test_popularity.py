"""Popularity counts the training part only."""

from __future__ import annotations

import numpy as np

from cemg.data.dataset import Dataset
from cemg.evaluation import PopularityRanker


def test_popularity_ranks_by_training_counts_with_ties_by_the_lower_row() -> None:
    sequences = [[2, 2, 4, 0, 1], [4, 3, 0, 1], [2, 0, 1], [4, 0, 1]]  # the last two of each are targets
    data = Dataset(
        name="toy",
        user_ids=list("abcd"),
        item_ids=list("vwxyz"),
        sequences=[np.array(s, dtype=np.int32) for s in sequences],
        titles=[""] * 5,
        texts=[None] * 5,
        images=[None] * 5,
        tie_rule="as written",
    )
    ranker = PopularityRanker.fit(data.split())
    lists = ranker([np.array([0]), np.array([], dtype=np.int32)], 4)
    assert lists.tolist() == [[2, 4, 3, 0]] * 2  # counts: 3 for items 2 and 4, 1 for item 3, 0 for item 0
    assert ranker([np.array([0])], 99).tolist() == [[2, 4, 3, 0, 1]]
