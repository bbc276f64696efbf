"""The validation that selects a checkpoint: which users, and which ranking.

At most half of the validation users select the checkpoint. The others are left for the weights of a mixture,
which are fitted afterwards, so that both are not fitted on the same users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cemg.config import RunConfig
from cemg.data.dataset import Split
from cemg.data.sequences import Sequences
from cemg.evaluation.metrics import Metrics
from cemg.evaluation.protocol import Evaluation, seeded_sample

RETURNS = 0.01  # users return to items if this share of the training interactions repeats an earlier one


@dataclass(frozen=True, slots=True)
class Selection:
    """How checkpoints are compared.

    Attributes:
        users: [S] positions in ``split.valid_users`` that select the checkpoint.
        others: [T - S] positions of the other users.
        history: "kept", "removed" from the list, or "excluded" in the search.
    """

    users: np.ndarray
    others: np.ndarray
    history: str

    def metrics(self, evaluation: Evaluation, *, complete: bool = False) -> Metrics:
        """Return the metrics that are compared.

        For "excluded", the search itself excludes the history. A ranker of the whole catalog
        (``complete``) does not: there, removing the history from the list is the same.
        """
        removes = self.history == "removed" or (complete and self.history == "excluded")
        return evaluation.metrics_history_removed if removes else evaluation.metrics


def checkpoint_selection(split: Split, config: RunConfig) -> Selection:
    """Return the users and the ranking that select the checkpoint of a run."""
    decoding, total = config.decoding, len(split.valid_users)
    history: str = decoding.validation_history
    most = total if history == "earlier" else max(total // 2, 1)
    users = seeded_sample(split, min(decoding.validation_users, most), seed=config.seed, part="valid")
    if history == "earlier":
        history = "kept"
    elif history == "auto":
        history = "kept" if users_return(split) else "excluded"
    return Selection(users, np.setdiff1d(np.arange(total), users), history)


def users_return(split: Split) -> bool:
    """Whether users return to items: a share of RETURNS of the training interactions or more are repeats."""
    total = int(Sequences.of(split.train).lengths.sum())
    repeats = total - sum(len(np.unique(items)) for items in split.train)
    return repeats >= RETURNS * max(total, 1)
