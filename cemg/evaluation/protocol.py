"""The evaluation protocol: one target per user, the whole catalog ranked.

T evaluated users, N items, B users per batch. Two rankings are evaluated: the list of the model, and the same
list without the items of the user's history. A target that is in the history cannot be in the second list
and counts as a miss; ``targets_in_history`` counts these targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cemg.data.dataset import Split
from cemg.errors import UserError
from cemg.evaluation.metrics import (
    CUTOFFS,
    LISTED,
    MISS,
    Metrics,
    first_items,
    intervals_at,
    metrics_at,
    ranks_of_targets,
    spread_of,
)
from cemg.evaluation.sample import Sample, digest
from cemg.progress import track

COLD = 5  # a target is cold if it has at most this many training interactions

Rank = Callable[[list[np.ndarray], int], Tensor]  # (histories, top) -> item rows [B, <= top], best first


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The ranks of all targets in the lists of one model.

    Attributes:
        part: "valid" or "test".
        cutoffs: The k of HR@k and NDCG@k.
        users: [T] positions in ``split.users_of(part)``.
        ranks: [T] int64, MISS where the rank is not below the largest cutoff.
        ranks_history_removed: The same in the lists without the history.
        cold: [T] bool, whether the target has at most COLD training interactions.
        targets_in_history: Users whose target is in their history.
        short_lists: Users whose list without the history has fewer items than the largest cutoff. A beam
            search returns one item per beam, so a target outside the beams is a miss.
        fingerprint: Identifies the split, and the part or subset of it.
        spread: What the first LISTED items of all lists are: see ``spread_of``.
        spread_history_removed: The same of the lists without the history.
    """

    part: str
    cutoffs: tuple[int, ...]
    users: np.ndarray
    ranks: Tensor
    ranks_history_removed: Tensor
    cold: Tensor
    targets_in_history: int
    short_lists: int
    fingerprint: dict[str, int | str]
    spread: Metrics = field(default_factory=dict)
    spread_history_removed: Metrics = field(default_factory=dict)

    @property
    def metrics(self) -> Metrics:
        """HR and NDCG with the history kept in the lists, as papers on generative retrieval print them."""
        return metrics_at(self.by_user(self.ranks), self.cutoffs)

    @property
    def metrics_history_removed(self) -> Metrics:
        """HR and NDCG of the lists without the history."""
        return metrics_at(self.by_user(self.ranks_history_removed), self.cutoffs)

    @property
    def cold_metrics(self) -> Metrics:
        """HR and NDCG over users with a cold target, with the history kept; empty if there are none."""
        return self._cold(self.ranks)

    @property
    def cold_metrics_history_removed(self) -> Metrics:
        """The same with the history removed."""
        return self._cold(self.ranks_history_removed)

    def _cold(self, ranks: Tensor) -> Metrics:
        of_cold = self.by_user(ranks)[self.by_user(self.cold)]
        return metrics_at(of_cold, self.cutoffs) if len(of_cold) else {}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Compute 95 % intervals of ``metrics`` over users: Wilson for HR, bootstrap for NDCG."""
        return intervals_at(self.by_user(self.ranks), self.cutoffs)

    def by_user(self, ranks: Tensor) -> Tensor:
        """Return ``ranks`` [T], which are in the order of ``users``, by ascending position in the split.

        Sums in this order are the same as those of a result file, to the last digit.
        """
        return ranks[torch.from_numpy(np.argsort(self.users))]


def evaluate(
    rank: Rank,
    split: Split,
    *,
    part: str = "test",
    cutoffs: Sequence[int] = CUTOFFS,
    users: np.ndarray | Sample | None = None,
    batch_size: int = 256,
    max_list: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a ranker on one part of a split.

    Args:
        rank: ``rank(histories, top)`` maps B histories (int32 item rows, oldest first) to lists [B, <= top]
            of item rows, best first, filled with -1. ``top`` is the largest cutoff plus the longest history
            of the batch, so that enough items remain once the history is removed.
        split: The split.
        part: "valid" or "test".
        cutoffs: The k of HR@k and NDCG@k.
        users: A `Sample`, or positions in ``split.users_of(part)``; None means all.
        batch_size: Histories per call of ``rank``.
        max_list: The largest ``top``, for a ranker that cannot return more: a beam search returns one item
            per beam. The lists without the history are then shorter.
        progress: Whether to show a progress bar.

    Returns:
        The evaluation.

    Raises:
        UserError: There is no user, or a list has an item outside the catalog or an item twice.
    """

    def lists_of(batch: np.ndarray, histories: list[np.ndarray], top: int) -> Tensor:
        return rank(histories, top)

    return _evaluate(
        lists_of, split, part=part, cutoffs=cutoffs, users=users, batch_size=batch_size, max_list=max_list,
        progress=progress,
    )  # fmt: skip


def evaluate_lists(
    lists: Tensor, split: Split, *, part: str = "test", cutoffs: Sequence[int] = CUTOFFS, others: int = 0
) -> Evaluation:
    """Evaluate existing lists.

    Args:
        lists: [T, C] item rows, best first, filled with -1; one list per user of ``split.users_of(part)``.
        split: The split.
        part: "valid" or "test".
        cutoffs: The k of HR@k and NDCG@k.
        others: Number of items in the lists that the split does not have, as rows N, N + 1, …; never a hit.

    Returns:
        The evaluation.

    Raises:
        UserError: As ``evaluate`` does.
    """
    users = len(split.users_of(part))
    if lists.ndim != 2 or len(lists) != users:
        raise UserError(f"lists must be [{users}, C], one per user, got {list(lists.shape)}")

    def lists_of(batch: np.ndarray, histories: list[np.ndarray], top: int) -> Tensor:
        return lists[torch.from_numpy(batch)]

    return _evaluate(lists_of, split, part=part, cutoffs=cutoffs, progress=False, others=others)


def _evaluate(
    lists_of: Callable[[np.ndarray, list[np.ndarray], int], Tensor],
    split: Split,
    *,
    part: str,
    cutoffs: Sequence[int],
    users: np.ndarray | Sample | None = None,
    batch_size: int = 256,
    max_list: int | None = None,
    progress: bool = True,
    others: int = 0,
) -> Evaluation:
    """Evaluate lists: ``lists_of(users, histories, top)`` returns those of a batch, as ``rank`` does."""
    rows = _rows(users, len(split.users_of(part)))
    if len(rows) == 0:
        raise UserError(
            "there is no user to evaluate", fix="use data whose users have at least three interactions"
        )
    histories, targets = split.histories(part), split.targets(part)
    rows = rows[np.argsort([len(histories[r]) for r in rows], kind="stable")]  # batches of similar length
    num_items, depth = int(split.fingerprint["items"]), max(cutoffs)
    scores: list[Tensor] = []
    tops: list[Tensor] = []
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    for batch in track(batches, "evaluate") if progress else batches:
        known, batch_targets = [histories[r] for r in batch], torch.from_numpy(targets[batch]).long()
        top = min(depth + max(map(len, known)), num_items, max_list or num_items)
        items = _checked(lists_of(batch, known, top), len(batch), num_items + others)
        found, first = _score(items, known, batch_targets, depth=min(depth, num_items))
        scores.append(found)
        tops.append(first)
    counts = split.train_counts(num_items)
    kept, removed, in_history, short = torch.cat(scores, dim=1)  # [T] each
    return Evaluation(
        part=part,
        cutoffs=tuple(cutoffs),
        users=rows,
        ranks=kept,
        ranks_history_removed=removed,
        cold=torch.from_numpy(counts[targets[rows]] <= COLD),
        targets_in_history=int(in_history.sum()),
        short_lists=int(short.sum()),
        fingerprint=split.fingerprint | _scope(part, users, len(split.users)),
        spread=spread_of(torch.cat([first[0] for first in tops]), counts),
        spread_history_removed=spread_of(torch.cat([first[1] for first in tops]), counts),
    )


def seeded_sample(split: Split, count: int = 2000, seed: int = 0, *, part: str = "test") -> np.ndarray:
    """Draw ``count`` positions in ``split.users_of(part)``, ascending; all of them if there are fewer."""
    return Sample(count, seed).rows(len(split.users_of(part)))


def _rows(users: np.ndarray | Sample | None, total: int) -> np.ndarray:
    if isinstance(users, Sample):
        return users.rows(total)
    return np.arange(total) if users is None else np.asarray(users, dtype=np.int64)


def _checked(items: Tensor, users: int, num_items: int) -> Tensor:
    if not isinstance(items, Tensor):
        raise UserError(
            f"the ranker returned {type(items).__name__}, not a tensor of item rows, [B, top]",
            fix="return torch.tensor(lists)",
        )
    if items.is_floating_point() or items.is_complex():
        raise UserError(f"the ranker returned {items.dtype}, not rows of items", fix="return their indices")
    items = items.detach().cpu().long()
    if items.ndim != 2 or len(items) != users:
        raise UserError(f"the ranker returned {list(items.shape)} for {users} histories, not [{users}, top]")
    if items.numel() and (int(items.min()) < -1 or int(items.max()) >= num_items):
        raise UserError(
            f"the ranker returned item rows {int(items.min())} … {int(items.max())}",
            cause=f"the catalog has rows 0 … {num_items - 1}",
        )
    return items


def _score(
    items: Tensor, histories: list[np.ndarray], targets: Tensor, *, depth: int
) -> tuple[Tensor, Tensor]:
    """Compute four rows [4, B] int64: rank, rank with the history removed, target in history, list too short.

    A rank of ``depth`` or more is a miss. How long a list is beyond it depends on the batch. The second
    result has the first LISTED items of both lists, [2, B, LISTED], filled with -1.
    """
    known = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(h.astype(np.int64)) for h in histories], batch_first=True, padding_value=MISS
    )  # [B, H]
    offsets = torch.arange(len(items))[:, None] * (1 << 32)  # (row, item) as one number
    in_list = torch.isin(items + offsets, known + offsets)  # [B, C]
    removed = items.masked_fill(in_list, -1)
    in_history = (known == targets[:, None]).any(1).long()
    short = ((removed >= 0).sum(1) < depth).long()
    ranks = [ranks_of_targets(listed, targets) for listed in (items, removed)]
    first = torch.stack([first_items(listed, LISTED) for listed in (items, removed)])
    return torch.stack([*(r.masked_fill(r >= depth, MISS) for r in ranks), in_history, short]), first


def _scope(part: str, users: np.ndarray | Sample | None, total: int) -> dict[str, int | str]:
    """Identify a partial evaluation, so that no table mixes it with that of the whole test."""
    scope: dict[str, int | str] = {} if part == "test" else {"part": part}
    if isinstance(users, Sample):
        return scope | ({"subset": users.name(total)} if users.name(total) else {})
    if users is not None:
        scope["subset"] = f"{len(users)} users, {digest(users)}"
    return scope
