"""HR@k and NDCG@k of ranked item lists with one target a user (paper §4.1.2), and intervals for them.

T users (one target each), C candidates in a list. Hits are counted on items, never on code tuples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cemg.errors import UserError

MISS = -1  # the rank of a target that is not in the list
CUTOFFS = (5, 10, 20)
Z95 = 1.959963984540054  # the standard normal's 97.5 % point

Metrics = dict[str, float]  # {"HR@10": 0.06, "NDCG@10": 0.03, ...}


def ranks_of_targets(items: Tensor, targets: Tensor) -> Tensor:
    """0-based rank of each target in its list, MISS where it is not there; [T] int64.

    ``items`` [T, C] are item rows, best first; an entry of -1 is no item and holds no place, so what
    stands behind it moves up. ``targets`` [T]. Raises UserError where a list names an item twice.
    """
    if items.ndim != 2 or targets.shape != items.shape[:1]:
        got = f"{list(items.shape)} and {list(targets.shape)}"
        raise UserError(f"items must be [T, C] for targets [T], got {got}")
    _refuse_duplicates(items)
    places = (items >= 0).cumsum(1) - 1  # [T, C] rank of each entry among the list's items
    hits = (items == targets[:, None]) & (items >= 0)  # [T, C]
    ranks = (places * hits).sum(1)
    return torch.where(hits.any(1), ranks, MISS).long()


def hr(ranks: Tensor, k: int) -> float:
    """Share of users whose target is among the first ``k``. ``ranks`` [T] as of ``ranks_of_targets``."""
    return float(_hits(ranks, k).double().mean())


def ndcg(ranks: Tensor, k: int) -> float:
    """Mean of 1 / log2(rank + 2) over all users, 0 beyond ``k``: with one target the ideal DCG is 1."""
    return float(gains(ranks, k).mean())


def gains(ranks: Tensor, k: int) -> Tensor:
    """Each user's NDCG@k, [T] float64."""
    return _hits(ranks, k) / torch.log2(ranks.clamp_min(0).double() + 2)


def metrics_at(ranks: Tensor, cutoffs: Sequence[int] = CUTOFFS) -> Metrics:
    """HR@k and NDCG@k over all users at once, for every ``k`` of ``cutoffs``."""
    if len(ranks) == 0:
        raise UserError("there is no user to average over", fix="evaluate one user or more")
    return {f"HR@{k}": hr(ranks, k) for k in cutoffs} | {f"NDCG@{k}": ndcg(ranks, k) for k in cutoffs}


def hr_interval(ranks: Tensor, k: int) -> tuple[float, float]:
    """Wilson's 95 % interval of HR@k: binomial, and sound for shares near 0 where Wald's is not."""
    count, share = len(ranks), hr(ranks, k)
    scale = 1 + Z95**2 / count
    centre = (share + Z95**2 / (2 * count)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2)) / scale
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrap_interval(values: Tensor, *, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values`` [T] under resampling of users."""
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    means = torch.empty(draws, dtype=torch.float64)
    for i in range(draws):
        means[i] = values[torch.randint(count, (count,), generator=generator)].double().mean()
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _hits(ranks: Tensor, k: int) -> Tensor:
    if k < 1:
        raise UserError(f"a cutoff must be 1 or more, got {k}")
    return (ranks >= 0) & (ranks < k)


def _refuse_duplicates(items: Tensor) -> None:
    ordered = items.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)  # [T, C - 1]
    if bool(twice.any()):
        row, column = twice.nonzero()[0].tolist()
        raise UserError(
            f"item {int(ordered[row, column])} is in the list of row {row} more than once",
            fix="drop duplicates after expanding codes to items: a repeated item would count its hit twice",
        )
