"""The protocol on toy data with known results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cemg.data.dataset import Dataset
from cemg.errors import UserError
from cemg.evaluation import MISS, evaluate, seeded_sample

ITEMS = 40


def toy_data(sequences: list[list[int]], num_items: int = ITEMS) -> Dataset:
    blank: list[None] = [None] * num_items
    return Dataset(
        name="toy",
        user_ids=[f"u{i}" for i in range(len(sequences))],
        item_ids=[f"i{i}" for i in range(num_items)],
        sequences=[np.array(s, dtype=np.int32) for s in sequences],
        titles=[""] * num_items,
        texts=list(blank),
        images=list(blank),
        tie_rule="as written",
    )


def catalog_order(histories: list[np.ndarray], top: int) -> Tensor:
    return torch.arange(ITEMS)[:top].expand(len(histories), -1)


def test_ranks_with_the_history_kept_and_removed() -> None:
    split = toy_data([[0, 1, 5], [7, 8, 9, 6], [1, 2, 0, 39]]).split()
    scored = evaluate(catalog_order, split, cutoffs=(5, 10), progress=False)
    kept = dict(zip(scored.users.tolist(), scored.ranks.tolist(), strict=True))
    removed = dict(zip(scored.users.tolist(), scored.ranks_history_removed.tolist(), strict=True))
    assert kept == {0: 5, 1: 6, 2: MISS}
    assert removed == {0: 3, 1: 6, 2: MISS}  # items 0 and 1 of user 0 are ranked before the target
    assert scored.metrics["HR@5"] == 0 and scored.metrics_history_removed["HR@5"] == pytest.approx(1 / 3)
    assert scored.metrics["HR@10"] == pytest.approx(2 / 3)


def test_the_spread_is_over_the_first_ten_items_of_every_list() -> None:
    split = toy_data([[0, 1, 2, 5], [7, 8, 9, 6]]).split()
    scored = evaluate(catalog_order, split, cutoffs=(10,), progress=False)
    counts = split.train_counts(ITEMS)
    assert scored.spread == {"coverage@10": 10 / ITEMS, "popularity@10": counts[:10].mean()}
    lists = [range(3, 13), [*range(7), 10, 11, 12]]  # without the histories
    popularity = np.mean([counts[item] for one in lists for item in one])
    assert scored.spread_history_removed == {"coverage@10": 13 / ITEMS, "popularity@10": popularity}


def test_a_target_beyond_the_largest_cutoff_is_a_miss_in_a_list_of_any_length() -> None:
    scored = evaluate(catalog_order, toy_data([[0, 1, 5], [30, 31, 6]]).split(), cutoffs=(5,), progress=False)
    assert scored.ranks.tolist() == [MISS, MISS]


def test_a_target_in_the_history_is_counted_and_is_a_miss_once_the_history_is_removed() -> None:
    scored = evaluate(catalog_order, toy_data([[0, 1, 2, 0], [3, 4, 5]]).split(), progress=False)
    assert scored.targets_in_history == 1
    kept = dict(zip(scored.users.tolist(), scored.ranks.tolist(), strict=True))
    removed = dict(zip(scored.users.tolist(), scored.ranks_history_removed.tolist(), strict=True))
    assert kept[0] == 0 and removed[0] == MISS


def test_the_requested_list_is_long_enough_to_remove_the_longest_history_of_the_batch() -> None:
    requests: list[tuple[int, int]] = []

    def rank(histories: list[np.ndarray], top: int) -> Tensor:
        requests.append((max(map(len, histories)), top))
        return catalog_order(histories, top)

    evaluate(
        rank, toy_data([[0, 1, 2], list(range(12))]).split(), cutoffs=(5, 10), batch_size=1, progress=False
    )
    assert requests == [(2, 12), (11, 21)]


def test_max_list_limits_the_lists_and_short_lists_are_counted() -> None:
    split = toy_data([[0, 1, 5], [30, 31, 6]]).split()
    scored = evaluate(catalog_order, split, cutoffs=(5,), max_list=6, progress=False)
    assert scored.short_lists == 1  # six items without the history {0, 1} are four
    assert scored.metrics_history_removed["HR@5"] == 0.5  # item 5 moves up to rank 3


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_the_result_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    rng = np.random.default_rng(5)
    split = toy_data([rng.permutation(ITEMS)[: rng.integers(3, 15)].tolist() for _ in range(50)]).split()
    whole = evaluate(catalog_order, split, batch_size=50, progress=False)
    parts = evaluate(catalog_order, split, batch_size=batch_size, progress=False)
    assert torch.equal(whole.ranks, parts.ranks)
    assert torch.equal(whole.ranks_history_removed, parts.ranks_history_removed)


def test_the_validation_ranking_gets_only_the_training_part_as_history() -> None:
    known: list[list[int]] = []

    def rank(histories: list[np.ndarray], top: int) -> Tensor:
        known.extend(h.tolist() for h in histories)
        return catalog_order(histories, top)

    data = toy_data([[4, 3, 2, 1]])
    assert evaluate(rank, data.split(), part="valid", progress=False).ranks.tolist() == [2]
    assert evaluate(rank, data.split(), part="test", progress=False).ranks.tolist() == [1]
    assert known == [[4, 3], [4, 3, 2]]


def test_only_training_interactions_decide_whether_a_target_is_cold() -> None:
    often = [[1, 20 + i, 30] for i in range(6)]  # training interactions: six of item 1, none of item 30
    scored = evaluate(catalog_order, toy_data([*often, [5, 6, 1]]).split(), progress=False)
    assert int(scored.cold.sum()) == 6 and scored.cold_metrics["HR@20"] == 0
    assert scored.metrics["HR@20"] == pytest.approx(1 / 7)


def test_without_a_cold_target_there_are_no_cold_metrics() -> None:
    scored = evaluate(catalog_order, toy_data([[1, 2, 1]] * 6).split(), progress=False)
    assert scored.cold_metrics == {} and scored.cold_metrics_history_removed == {}


def test_only_an_evaluation_of_all_users_has_the_fingerprint_of_the_split() -> None:
    split = toy_data([[0, 1, 2], [3, 4, 5], [6, 7, 8]]).split()
    assert evaluate(catalog_order, split, progress=False).fingerprint == split.fingerprint
    valid = evaluate(catalog_order, split, part="valid", progress=False).fingerprint
    subset = evaluate(catalog_order, split, users=np.array([0, 2]), progress=False)
    assert valid["part"] == "valid" and str(subset.fingerprint["subset"]).startswith("2 users")
    assert sorted(subset.users.tolist()) == [0, 2]


def test_the_sample_depends_on_the_seed_is_ascending_and_has_no_duplicates() -> None:
    split = toy_data([[0, 1, 2]] * 30).split()
    sample = seeded_sample(split, 10, 4)
    assert sample.tolist() == seeded_sample(split, 10, 4).tolist() == sorted(set(sample.tolist()))
    assert len(sample) == 10 and sample.tolist() != seeded_sample(split, 10, 5).tolist()
    assert seeded_sample(split, 100).tolist() == list(range(30))


def test_an_item_outside_the_catalog_is_refused() -> None:
    with pytest.raises(UserError, match=r"item rows 40 … 40"):
        evaluate(lambda h, top: torch.full((len(h), 1), 40), toy_data([[0, 1, 2]]).split(), progress=False)


def test_a_list_with_a_repeated_item_is_refused() -> None:
    with pytest.raises(UserError, match="more than once"):
        evaluate(
            lambda h, top: torch.tensor([[3, 3]] * len(h)), toy_data([[0, 1, 2]]).split(), progress=False
        )


def test_a_ranker_that_returns_another_number_of_lists_is_refused() -> None:
    with pytest.raises(UserError, match=r"\[2, 3\] for 1 histories"):
        evaluate(lambda h, top: torch.zeros(2, 3).long(), toy_data([[0, 1, 2]]).split(), progress=False)


def test_scores_in_the_place_of_items_are_refused() -> None:
    with pytest.raises(UserError, match="not rows of items"):
        evaluate(lambda h, top: torch.zeros(1, 3), toy_data([[0, 1, 2]]).split(), progress=False)


def test_data_without_a_target_are_refused() -> None:
    with pytest.raises(UserError, match="no user to evaluate"):
        evaluate(catalog_order, toy_data([[0, 1]]).split(), progress=False)
