"""Popularity: the most bought items of the training part, the same list for everybody."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cemg.data.dataset import Split


@dataclass(frozen=True, slots=True)
class PopularityRanker:
    """``order`` [N] int64: all item rows by training count, largest first, ties by the lower row."""

    order: Tensor

    @classmethod
    def fit(cls, split: Split) -> PopularityRanker:
        """Count the training interactions of a split; validation and test targets are not looked at."""
        counts = split.train_counts(int(split.fingerprint["items"]))
        return cls(torch.from_numpy(np.argsort(-counts, kind="stable")))

    def __call__(self, histories: list[np.ndarray], top: int) -> Tensor:
        """The ``top`` most popular items for each of B histories, [B, min(top, N)]."""
        return self.order[:top].expand(len(histories), -1)
