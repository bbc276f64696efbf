"""The popularity baseline: the most frequent items of the training part, the same list for every user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cemg.data.dataset import Split


@dataclass(frozen=True, slots=True)
class PopularityRanker:
    """Ranks all items by their number of training interactions.

    Attributes:
        order: [N] int64, the item rows by count, largest first. The lower row wins ties.
    """

    order: Tensor

    @classmethod
    def fit(cls, split: Split) -> PopularityRanker:
        """Count the training interactions of a split. Validation and test targets are not counted."""
        counts = split.train_counts(int(split.fingerprint["items"]))
        return cls(torch.from_numpy(np.argsort(-counts, kind="stable")))

    def without(self, rows: Sequence[int]) -> PopularityRanker:
        """Return a ranker that does not list some items."""
        return PopularityRanker(self.order[~torch.isin(self.order, torch.tensor(rows, dtype=torch.int64))])

    def __call__(self, histories: list[np.ndarray], top: int) -> Tensor:
        """Return the ``top`` most popular items for each of B histories, [B, min(top, N)] int64."""
        return self.order[:top].expand(len(histories), -1)
