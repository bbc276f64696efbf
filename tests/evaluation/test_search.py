"""The studies of the search, on lists with known errors."""

from __future__ import annotations

import pytest
import torch

from cemg.decoding import Recommendations
from cemg.evaluation.search import TIE, beam_error, list_differences

SCORES = torch.arange(30.0).neg()[None]  # item i has score −i, so the exact ranking is 0, 1, 2 …


def lists(items: list[int], certified: int = 0) -> Recommendations:
    """One list of these items, with their scores from SCORES."""
    rows = torch.tensor([items])
    scores = SCORES.gather(1, rows.clamp_min(0)).masked_fill(rows < 0, float("-inf"))
    return Recommendations(rows, scores, torch.zeros(1, len(items), 2).long(), torch.tensor([certified]))


def errors_of(found: Recommendations, scores: torch.Tensor = SCORES) -> dict[str, float]:
    return {name: float(value) for name, value in beam_error(found, scores).items()}


def test_the_exact_list_has_no_error() -> None:
    assert errors_of(lists(list(range(20)), certified=20)) == {
        "equal@10": 1, "overlap@10": 1, "equal@20": 1, "overlap@20": 1, "certified": 20, "wrong": 0,
        "score": 0,
    }  # fmt: skip


def test_a_missing_item_counts_from_its_rank_on() -> None:
    found = errors_of(lists([*range(12), *range(13, 21)]))  # 12 is missing
    assert (found["equal@10"], found["overlap@10"]) == (1, 1)
    assert found["equal@20"] == 0 and found["overlap@20"] == pytest.approx(19 / 20)


def test_a_list_shorter_than_k_lacks_the_other_items() -> None:
    found = errors_of(lists(list(range(10))))
    assert (found["equal@10"], found["overlap@10"]) == (1, 1)
    assert (found["equal@20"], found["overlap@20"]) == (0, 0.5)
    four = torch.arange(4.0).neg()[None]  # the scores of a catalog of four items, which the list has all
    assert errors_of(lists([0, 1, 2, 3]), four)["equal@20"] == 1


def test_a_certified_result_at_the_wrong_rank_is_counted() -> None:
    assert errors_of(lists([0, 2, 1, 3], certified=3))["wrong"] == 2
    assert errors_of(lists([0, 2, 1, 3], certified=1))["wrong"] == 0


def test_results_with_equal_scores_may_swap() -> None:
    scores = SCORES.clone()
    scores[0, 2] = scores[0, 1] - TIE / 2
    found = errors_of(lists([0, 2, 1, *range(3, 20)], certified=20), scores)
    assert (found["equal@10"], found["overlap@20"], found["wrong"]) == (1, 1, 0)


def scored(**scores: float) -> Recommendations:
    """One list of the items a, b, c … with these scores, best first."""
    items = torch.tensor([[ord(name) for name in scores]])
    return Recommendations(
        items, torch.tensor([list(scores.values())]), items[..., None], torch.zeros(1).long()
    )


@pytest.mark.parametrize(
    ("mine", "other", "differ"),
    [
        ({"a": -1.0, "b": -2.0}, {"a": -1.0, "b": -2.00001}, False),
        ({"a": -1.0, "b": -2.0}, {"a": -1.0, "b": -2.001}, True),  # another score
        ({"a": -1.0, "b": -1.00001}, {"b": -1.0, "a": -1.00001}, False),  # equal scores, swapped
        ({"a": -1.0, "b": -2.0}, {"a": -1.0, "c": -2.00001}, False),  # equal scores at the end
        ({"a": -1.0, "b": -2.0}, {"a": -1.0, "c": -2.1}, True),  # b has a higher score than the last
        ({"a": -1.0, "c": -2.1}, {"a": -1.0, "b": -2.0}, True),
    ],
)  # fmt: skip
def test_lists_differ_unless_a_tie_explains_the_difference(
    mine: dict[str, float], other: dict[str, float], differ: bool
) -> None:
    difference, found = list_differences(scored(**mine), scored(**other))
    assert found.tolist() == [differ]
    shared = [abs(mine[name] - other[name]) for name in mine if name in other]
    assert float(difference) == pytest.approx(max(shared), abs=1e-6)


def test_a_list_with_fewer_items_differs_from_a_full_one() -> None:
    full, short = lists([0, 1, 2]), lists([0, 1, -1])
    assert list_differences(full, full)[1].tolist() == [False]
    assert list_differences(short, short)[1].tolist() == [False]
    assert list_differences(full, short)[1].tolist() == [True]
