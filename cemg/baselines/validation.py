"""HR@10 and NDCG@10 of all validation users, from counts instead of lists.

The rank of a target is the number of items with a higher score, so no list is sorted. Sorting is most of the
time of ``cemg.evaluation.evaluate`` for a model that scores every item.

B users per batch, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from cemg.data.dataset import Split
from cemg.evaluation.metrics import Metrics, metrics_at

BATCH = 256


class Scorer(Protocol):
    """A model that scores every item."""

    def logits(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        """Return a score per item, [B, N]. The histories are item rows, oldest first, none empty."""
        ...


@torch.inference_mode()
def validate(ranker: Scorer, split: Split, users: np.ndarray | None = None) -> Metrics:
    """Compute HR@10 and NDCG@10 on the validation targets, with the history removed from the lists.

    A target that is in the history is a miss. Of items with equal scores, the target comes first.

    Args:
        ranker: The model.
        split: The split.
        users: Positions in ``split.valid_users``; None means all.
    """
    histories, targets = split.histories("valid"), split.targets("valid")
    rows = np.arange(len(targets)) if users is None else users
    rows = rows[np.argsort(histories.lengths[rows], kind="stable")]
    ranks = [
        _ranks(ranker, histories.of_users(rows[i : i + BATCH]), targets[rows[i : i + BATCH]])
        for i in range(0, len(rows), BATCH)
    ]
    return metrics_at(torch.cat(ranks), (10,))


def _ranks(ranker: Scorer, histories: Sequence[np.ndarray], targets: np.ndarray) -> torch.Tensor:
    """Compute the rank [B] int64 of each target among the items that are not in its history."""
    logits = ranker.logits(histories)  # [B, N]
    rows = torch.from_numpy(np.repeat(np.arange(len(histories)), [len(h) for h in histories]))
    known = torch.from_numpy(np.concatenate(histories).astype(np.int64))
    logits[rows.to(logits.device), known.to(logits.device)] = float("-inf")
    score = logits.gather(1, torch.from_numpy(targets.astype(np.int64))[:, None].to(logits.device))  # [B, 1]
    return (logits > score).sum(1, dtype=torch.int32).long().cpu()
