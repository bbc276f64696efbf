"""HR@k and NDCG@k of ranked item lists with one target per user, and their confidence intervals.

T users with one target each, C candidates per list. Hits are counted on items, not on semantic IDs.

Source: CEMG, section 4.1.2, https://arxiv.org/abs/2512.21543
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cemg.errors import UserError

MISS = -1  # the rank of a target that is not in its list
CUTOFFS = (5, 10, 20)
LISTED = 10  # items of a list that ``spread_of`` looks at
MIN_SEEDS = 3  # for an interval over seeds: with 2, Student's factor is 12.7
Z95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution

Metrics = dict[str, float]  # {"HR@10": 0.06, "NDCG@10": 0.03, ...}


def ranks_of_targets(items: Tensor, targets: Tensor) -> Tensor:
    """Find the rank of each target in its list.

    Args:
        items: [T, C] item rows, best first. Entries of -1 are not items, and the items after them move up.
        targets: [T] item rows.

    Returns:
        Ranks [T] int64, counted from 0; MISS where the list does not have the target.

    Raises:
        UserError: The shapes do not match, or a list has an item twice.
    """
    if items.ndim != 2 or targets.shape != items.shape[:1]:
        got = f"{list(items.shape)} and {list(targets.shape)}"
        raise UserError(f"items must be [T, C] for targets [T], got {got}")
    _refuse_duplicates(items)
    ranks = (items >= 0).cumsum(1) - 1  # [T, C] rank of each entry among the items of its list
    hits = (items == targets[:, None]) & (items >= 0)  # [T, C]
    target_ranks = (ranks * hits).sum(1)
    return torch.where(hits.any(1), target_ranks, MISS).long()


def first_items(items: Tensor, count: int) -> Tensor:
    """Return the first ``count`` items of lists [T, C], whose entries of -1 are skipped; [T, count]."""
    at = (items >= 0).cumsum(1) - 1
    first = items.new_full((len(items), count), -1)
    row, column = ((items >= 0) & (at < count)).nonzero(as_tuple=True)
    first[row, at[row, column]] = items[row, column]
    return first


def spread_of(first: Tensor, counts: np.ndarray) -> Metrics:
    """Say which items lists recommend.

    Args:
        first: [T, K] the first K items of each list, filled with -1.
        counts: [N] training interactions of each item. Items from N on, which the split does not have, are
            not counted.

    Returns:
        "coverage@K", the share of the N items that are in at least one list, and "popularity@K", the mean
        number of training interactions of a recommended item. Empty if no list has an item.
    """
    listed = first[(first >= 0) & (first < len(counts))]
    if not len(listed):
        return {}
    coverage = len(listed.unique()) / len(counts)
    popularity = float(torch.from_numpy(counts)[listed].double().mean())
    return {f"coverage@{first.shape[1]}": coverage, f"popularity@{first.shape[1]}": popularity}


def hr(ranks: Tensor, k: int) -> float:
    """Compute HR@k, the share of users whose target is among the first ``k``, from their ranks [T]."""
    return float(_hits(ranks, k).double().mean())


def ndcg(ranks: Tensor, k: int) -> float:
    """Compute NDCG@k, the mean of 1 / log2(rank + 2) over users; 0 beyond ``k``. The ideal DCG is 1."""
    return float(gains(ranks, k).mean())


def gains(ranks: Tensor, k: int) -> Tensor:
    """Compute the NDCG@k of each user, [T] float64."""
    return _hits(ranks, k) / torch.log2(ranks.clamp_min(0).double() + 2)


def metrics_at(ranks: Tensor, cutoffs: Sequence[int] = CUTOFFS) -> Metrics:
    """Compute HR@k and NDCG@k over all users, for every ``k`` of ``cutoffs``."""
    if len(ranks) == 0:
        raise UserError("there is no user to average over", fix="evaluate at least one user")
    return {f"HR@{k}": hr(ranks, k) for k in cutoffs} | {f"NDCG@{k}": ndcg(ranks, k) for k in cutoffs}


def hr_interval(ranks: Tensor, k: int) -> tuple[float, float]:
    """Compute the 95 % Wilson interval of HR@k. Unlike the Wald interval, it holds for shares near 0."""
    count, share = len(ranks), hr(ranks, k)
    scale = 1 + Z95**2 / count
    center = (share + Z95**2 / (2 * count)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2)) / scale
    return max(center - half, 0.0), min(center + half, 1.0)


def bootstrap_interval(values: Tensor, *, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval of the mean of ``values`` [T]; users are resampled.

    The values of a metric are few different numbers, so a draw of T users is a draw of their counts.
    """
    different, counts = np.unique(values.double().numpy(), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=draws)
    low, high = np.quantile(drawn @ different / len(values), (0.025, 0.975)).tolist()
    return low, high


def intervals_at(ranks: Tensor, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, tuple[float, float]]:
    """Compute 95 % intervals of ``metrics_at`` over users: Wilson for HR, bootstrap for NDCG."""
    shares = {f"HR@{k}": hr_interval(ranks, k) for k in cutoffs}
    return shares | {f"NDCG@{k}": bootstrap_interval(gains(ranks, k)) for k in cutoffs}


def seed_interval(values: Sequence[float]) -> float | None:
    """Compute half of Student's 95 % interval of the mean of a metric over seeds.

    None for fewer than MIN_SEEDS, where the interval would be wider than any difference between models.
    """
    if len(values) < MIN_SEEDS:
        return None
    from scipy.stats import t as student  # a slow import that recommendations do not need

    quantile = float(student.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired_differences(
    first: Tensor, second: Tensor, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, dict[str, float]]:
    """Compute how much better the first of two models is, with the paired bootstrap over users.

    With several seeds, the difference of a user is the mean over them; the interval is over users alone.

    Args:
        first: Ranks of the first model, [T], or [S, T] for S seeds.
        second: Ranks of the second model for the same users in the same order, and the same seeds.
        cutoffs: The k of HR@k and NDCG@k.

    Returns:
        For each metric the mean difference per user, and ``low`` and ``high``, its 95 % interval. The first
        model is better beyond chance where ``low`` is above zero.

    Raises:
        UserError: The models have different numbers of users, or there is no user.
    """
    if first.shape != second.shape or first.numel() == 0:
        raise UserError(
            f"a paired difference needs the same users, got {first.shape[-1]} and {second.shape[-1]}"
        )
    first, second = first.view(-1, first.shape[-1]), second.view(-1, second.shape[-1])  # [S, T]
    differences = {f"HR@{k}": _hits(first, k).double() - _hits(second, k).double() for k in cutoffs}
    differences |= {f"NDCG@{k}": gains(first, k) - gains(second, k) for k in cutoffs}
    found = {}
    for name, by_seed in differences.items():
        values = by_seed.mean(0)  # [T]
        low, high = bootstrap_interval(values)
        found[name] = {"mean": float(values.mean()), "low": low, "high": high}
    return found


def _hits(ranks: Tensor, k: int) -> Tensor:
    if k < 1:
        raise UserError(f"a cutoff must be at least 1, got {k}")
    return (ranks >= 0) & (ranks < k)


def _refuse_duplicates(items: Tensor) -> None:
    ordered = items.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)  # [T, C - 1]
    if bool(repeated.any()):
        row, column = repeated.nonzero()[0].tolist()
        raise UserError(
            f"item {int(ordered[row, column])} is in the list of row {row} more than once",
            fix="remove duplicates after mapping codes to items: a repeated item would count twice",
        )
