"""Metrics against hand-computed values, and against torchmetrics on random lists with misses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics.retrieval import RetrievalHitRate, RetrievalNormalizedDCG

from cemg.errors import UserError
from cemg.evaluation import (
    MISS,
    bootstrap_interval,
    gains,
    hr,
    hr_interval,
    metrics_at,
    ndcg,
    ranks_of_targets,
)
from cemg.evaluation.metrics import first_items, spread_of


def random_lists(users: int, width: int, num_items: int, seed: int) -> tuple[Tensor, Tensor]:
    """Lists without duplicates, some with trailing -1, and targets of which many are not in the lists."""
    generator = torch.Generator().manual_seed(seed)
    items = torch.stack([torch.randperm(num_items, generator=generator)[:width] for _ in range(users)])
    lengths = torch.randint(1, width + 1, (users,), generator=generator)
    items[torch.arange(width) >= lengths[:, None]] = -1
    return items, torch.randint(num_items, (users,), generator=generator)


def test_ranks_count_from_zero_and_a_missing_target_is_a_miss() -> None:
    items = torch.tensor([[7, 3, 5], [7, 3, 5], [7, 3, 5], [4, -1, -1]])
    assert ranks_of_targets(items, torch.tensor([7, 5, 9, 3])).tolist() == [0, 2, MISS, MISS]


def test_entries_without_an_item_do_not_count_as_ranks() -> None:
    items = torch.tensor([[-1, 3, -1, 5], [-1, -1, -1, -1]])
    assert ranks_of_targets(items, torch.tensor([5, 3])).tolist() == [1, MISS]


def test_the_first_items_of_a_list_skip_entries_without_an_item() -> None:
    lists = torch.tensor([[-1, 4, -1, 2, 3], [5, -1, -1, -1, -1]])
    assert first_items(lists, 2).tolist() == [[4, 2], [5, -1]]
    assert first_items(lists, 7).tolist() == [[4, 2, 3, -1, -1, -1, -1], [5, -1, -1, -1, -1, -1, -1]]


def test_coverage_and_popularity_equal_hand_computed_values() -> None:
    first = torch.tensor([[0, 2], [2, -1], [4, -1]])  # item 4 is not in the split
    spread = spread_of(first, np.array([10, 1, 4, 0]))
    assert spread == {"coverage@2": 0.5, "popularity@2": 6.0}
    assert spread_of(torch.full((2, 3), -1), np.ones(4)) == {}


def test_a_list_with_an_item_twice_is_refused_and_names_the_item() -> None:
    with pytest.raises(UserError, match="item 3 is in the list of row 1"):
        ranks_of_targets(torch.tensor([[1, 2, 3], [3, 1, 3]]), torch.tensor([1, 1]))


def test_metrics_equal_hand_computed_values() -> None:
    ranks = torch.tensor([0, 1, 4, 5, MISS])
    found = metrics_at(ranks, (1, 5, 10))
    assert found["HR@1"] == 1 / 5 and found["HR@5"] == 3 / 5 and found["HR@10"] == 4 / 5
    at_five = 1 + 1 / math.log2(3) + 1 / math.log2(6)
    assert found["NDCG@1"] == 1 / 5
    assert found["NDCG@5"] == pytest.approx(at_five / 5, rel=1e-12)  # float64 sums of five terms
    assert found["NDCG@10"] == pytest.approx((at_five + 1 / math.log2(7)) / 5, rel=1e-12)


@pytest.mark.parametrize("k", [1, 5, 10, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_hr_and_ndcg_equal_torchmetrics(k: int, seed: int) -> None:
    items, targets = random_lists(200, 30, 60, seed)
    ranks = ranks_of_targets(items, targets)
    assert 0 < int((ranks == MISS).sum()) < 200
    scores = torch.arange(30, 0, -1).float().expand(200, 30)  # the first item has the highest score
    relevant = items == targets[:, None]
    listed = torch.arange(200)[:, None].expand(200, 30)
    for ours, theirs in (
        (hr(ranks, k), RetrievalHitRate(top_k=k, empty_target_action="neg")),
        (ndcg(ranks, k), RetrievalNormalizedDCG(top_k=k, empty_target_action="neg")),
    ):
        expected = float(theirs(scores.flatten(), relevant.flatten(), indexes=listed.flatten()))
        assert ours == pytest.approx(expected, abs=1e-6)  # torchmetrics averages 200 float32 terms <= 1


@given(st.lists(st.integers(-1, 40), min_size=1, max_size=50), st.integers(1, 40))
def test_metrics_are_between_zero_and_one_and_grow_with_the_cutoff(ranks: list[int], k: int) -> None:
    tensor = torch.tensor(ranks)
    assert 0 <= ndcg(tensor, k) <= hr(tensor, k) <= hr(tensor, k + 1) <= 1


def test_the_mean_is_over_users_not_over_batches() -> None:
    ranks = torch.tensor([0, 0, 0, MISS])
    uneven = (hr(ranks[:3], 1) + hr(ranks[3:], 1)) / 2
    assert hr(ranks, 1) == 0.75 and uneven == 0.5


def test_the_interval_of_hr_is_the_wilson_interval() -> None:
    ranks = torch.tensor([0] * 10 + [MISS] * 90)
    expected = binomtest(10, 100).proportion_ci(method="wilson")
    assert hr_interval(ranks, 10) == pytest.approx((expected.low, expected.high), rel=1e-9)  # both float64
    assert hr_interval(torch.full((50,), MISS), 10)[0] == pytest.approx(0, abs=1e-12)


def test_the_bootstrap_interval_is_deterministic_and_close_to_the_normal_interval() -> None:
    ranks = torch.randint(0, 40, (2000,), generator=torch.Generator().manual_seed(3))
    values = gains(ranks, 10)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    half = 1.96 * float(values.std()) / math.sqrt(2000)
    # a percentile of 1,000 draws varies by about 0.1 of the half width
    assert high - low == pytest.approx(2 * half, rel=0.15) and low < float(values.mean()) < high


def test_metrics_of_no_user_are_refused() -> None:
    with pytest.raises(UserError, match="no user"):
        metrics_at(torch.tensor([], dtype=torch.long))


def test_a_cutoff_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="got 0"):
        hr(torch.tensor([0]), 0)
