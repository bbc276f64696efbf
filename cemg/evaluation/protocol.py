"""The protocol of every number we print: leave-one-out, the whole catalog ranked, every user once.

T evaluated users, N items, B users of a batch. Two rankings are scored side by side: the list as the
model gives it, and the list without the items of the user's own history. Where a target is in that history,
the second ranking cannot contain it: a miss, and ``targets_in_history`` says how often.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cemg.data.dataset import Split
from cemg.errors import UserError
from cemg.evaluation.metrics import (
    CUTOFFS,
    MISS,
    Metrics,
    bootstrap_interval,
    gains,
    hr_interval,
    metrics_at,
    ranks_of_targets,
)
from cemg.progress import track

COLD = 5  # a target is cold with this many training interactions or fewer

Rank = Callable[[list[np.ndarray], int], Tensor]  # (histories, top) -> item rows [B, <= top], best first


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one model scored. ``ranks`` and ``ranks_history_removed`` are [T] int64, MISS beyond all cutoffs.

    ``users`` [T] are positions in ``split.users``; ``cold`` [T] marks targets with at most COLD training
    interactions. ``short_lists`` counts users whose list without the history had fewer items than the
    largest cutoff: with beam search the list is what the beam held, and a target behind it is a miss.
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

    @property
    def metrics(self) -> Metrics:
        """History kept in the ranking: what generative papers print."""
        return metrics_at(self.ranks, self.cutoffs)

    @property
    def metrics_history_removed(self) -> Metrics:
        return metrics_at(self.ranks_history_removed, self.cutoffs)

    @property
    def cold_metrics(self) -> Metrics:
        """Over users with a cold target, history kept; empty where there is none."""
        return metrics_at(self.ranks[self.cold], self.cutoffs) if bool(self.cold.any()) else {}

    @property
    def cold_metrics_history_removed(self) -> Metrics:
        ranks = self.ranks_history_removed[self.cold]
        return metrics_at(ranks, self.cutoffs) if len(ranks) else {}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % intervals of ``metrics`` over users: Wilson for HR, bootstrap for NDCG."""
        shares = {f"HR@{k}": hr_interval(self.ranks, k) for k in self.cutoffs}
        return shares | {f"NDCG@{k}": bootstrap_interval(gains(self.ranks, k)) for k in self.cutoffs}


def evaluate(
    rank: Rank,
    split: Split,
    *,
    part: str = "test",
    cutoffs: Sequence[int] = CUTOFFS,
    users: np.ndarray | None = None,
    batch_size: int = 256,
    max_list: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Score ``rank`` on the ``part`` ("valid" or "test") of a split.

    ``rank(histories, top)`` gets B histories (int32 item rows, oldest first) and returns [B, <= top] item
    rows, best first, -1 for none. ``top`` is the largest cutoff plus the longest history of the batch, so
    that enough is left once the history is removed; ``max_list`` caps it where a ranker cannot give more
    (a beam search returns its beams), and the removed ranking is then made of what is there.
    ``users`` are positions 0 … T-1 in ``split.users`` (see ``seeded_sample``); None means all.
    Raises UserError on an item outside the catalog and on an item listed twice.
    """

    def ranked(batch: np.ndarray, histories: list[np.ndarray], top: int) -> Tensor:
        return rank(histories, top)

    return _evaluate(
        ranked, split, part=part, cutoffs=cutoffs, users=users, batch_size=batch_size, max_list=max_list,
        progress=progress,
    )  # fmt: skip


def evaluate_lists(
    lists: Tensor, split: Split, *, part: str = "test", cutoffs: Sequence[int] = CUTOFFS, others: int = 0
) -> Evaluation:
    """Score given lists [T, C] of item rows, best first, -1 for none: one per user of ``split.users``.

    ``others``: how many items the lists have beyond the split's N, as rows N, N + 1, …; they are misses.
    Raises UserError as ``evaluate`` does.
    """
    if lists.ndim != 2 or len(lists) != len(split.users):
        raise UserError(f"lists must be [{len(split.users)}, C], one per user, got {list(lists.shape)}")

    def given(batch: np.ndarray, histories: list[np.ndarray], top: int) -> Tensor:
        return lists[torch.from_numpy(batch)]

    return _evaluate(given, split, part=part, cutoffs=cutoffs, progress=False, others=others)


def _evaluate(
    lists_of: Callable[[np.ndarray, list[np.ndarray], int], Tensor],
    split: Split,
    *,
    part: str,
    cutoffs: Sequence[int],
    users: np.ndarray | None = None,
    batch_size: int = 256,
    max_list: int | None = None,
    progress: bool = True,
    others: int = 0,
) -> Evaluation:
    """``lists_of(rows of users, their histories, top)`` returns the lists of a batch, as ``rank`` does."""
    rows = np.arange(len(split.users)) if users is None else np.asarray(users, dtype=np.int64)
    if len(rows) == 0:
        raise UserError("there is no user to evaluate", fix="give users three interactions or more")
    histories, targets = split.histories(part), split.targets(part)
    rows = rows[np.argsort([len(histories[r]) for r in rows], kind="stable")]  # batches of like length
    num_items, most = int(split.fingerprint["items"]), max(cutoffs)
    scored: list[Tensor] = []
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    for batch in track(batches, "evaluate") if progress else batches:
        known, wanted = [histories[r] for r in batch], torch.from_numpy(targets[batch]).long()
        top = min(most + max(map(len, known)), num_items, max_list or num_items)
        items = _checked(lists_of(batch, known, top), len(batch), num_items + others)
        scored.append(_score(items, known, wanted, most=min(most, num_items)))
    cold = split.train_counts(num_items)[targets[rows]] <= COLD
    fingerprint = split.fingerprint | _scope(part, users)
    return _gather(
        torch.cat(scored, dim=1), rows, part=part, cutoffs=cutoffs, cold=cold, fingerprint=fingerprint
    )


def seeded_sample(split: Split, count: int = 2000, seed: int = 0) -> np.ndarray:
    """``count`` different positions in ``split.users`` (all, if fewer), ascending, for early stopping."""
    total = len(split.users)
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def _gather(
    scores: Tensor,
    rows: np.ndarray,
    *,
    part: str,
    cutoffs: Sequence[int],
    cold: np.ndarray,
    fingerprint: dict[str, int | str],
) -> Evaluation:
    kept, removed, own, short = scores  # [T] each, as _score orders them
    return Evaluation(
        part=part,
        cutoffs=tuple(cutoffs),
        users=rows,
        ranks=kept,
        ranks_history_removed=removed,
        cold=torch.from_numpy(cold),
        targets_in_history=int(own.sum()),
        short_lists=int(short.sum()),
        fingerprint=fingerprint,
    )


def _checked(items: Tensor, users: int, num_items: int) -> Tensor:
    items = items.detach().cpu().long()
    if items.ndim != 2 or len(items) != users:
        raise UserError(f"the ranker returned {list(items.shape)} for {users} histories, not [{users}, top]")
    if items.numel() and (int(items.min()) < -1 or int(items.max()) >= num_items):
        raise UserError(
            f"the ranker returned item rows {int(items.min())} … {int(items.max())}",
            cause=f"the catalog holds rows 0 … {num_items - 1}",
        )
    return items


def _score(items: Tensor, histories: list[np.ndarray], targets: Tensor, *, most: int) -> Tensor:
    """Rank kept, rank with history removed, target in own history, list too short; [4, B] int64.

    A rank of ``most`` or more is a miss: how far a list goes on behind it depends on the batch's histories.
    """
    known = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(h.astype(np.int64)) for h in histories], batch_first=True, padding_value=MISS
    )  # [B, H]
    offsets = torch.arange(len(items))[:, None] * (1 << 32)  # (row, item) as one number
    seen = torch.isin(items + offsets, known + offsets)  # [B, C]
    removed = items.masked_fill(seen, -1)
    own = (known == targets[:, None]).any(1).long()
    short = ((removed >= 0).sum(1) < most).long()
    ranks = [ranks_of_targets(listed, targets) for listed in (items, removed)]
    return torch.stack([*(r.masked_fill(r >= most, MISS) for r in ranks), own, short])


def _scope(part: str, users: np.ndarray | None) -> dict[str, int | str]:
    """What sets a partial evaluation apart from the whole test, so that no table mixes the two."""
    scope: dict[str, int | str] = {} if part == "test" else {"part": part}
    if users is not None:
        chosen = np.sort(np.asarray(users, dtype="<i8"))
        scope["subset"] = f"{len(chosen)} users, {hashlib.sha256(chosen.tobytes()).hexdigest()[:16]}"
    return scope
