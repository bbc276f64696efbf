"""The tables of an experiment: means over seeds, pairs of seeds, and models without seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cemg.evaluation.metrics import metrics_at
from cemg.evaluation.results import KEPT, REMOVED, _packed, differences_of
from cemg.experiments.tables import Board, best_baseline, boards, cost_rows, difference_rows, ranking_rows

USERS = 40


def result(seed: int, ranks: list[int], **more: Any) -> dict[str, Any]:
    """The result of a model whose targets have these ranks, repeated to 40 users."""
    of_users = torch.tensor(ranks).repeat(USERS // len(ranks))
    metrics = metrics_at(of_users, (10,))
    packed = {key: _packed(of_users) for key in (KEPT, REMOVED)}
    split = {"users": USERS, "items": 30}
    return {"split": split, KEPT: metrics, REMOVED: metrics, "ranks": packed, "seed": seed, **more}


def example_result(**changes: Any) -> dict[str, Any]:
    metrics = {name: 0.1 for name in ("HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20")}
    split = {"users": 60, "items": 30, "targets_sha256": "a" * 64}
    return {
        "dataset": "toy",
        "split": split,
        "metrics": metrics,
        "metrics_history_removed": metrics,
    } | changes


def board(**rows: list[dict[str, Any]]) -> Board:
    return Board("toy", {"users": USERS, "items": 30}, {t.replace("_", " "): r for t, r in rows.items()})


FIRST, SECOND, THIRD = [0, -1], [0, 0], [-1, -1]  # HR@10 0.5, 1 and 0


def test_a_difference_is_the_mean_over_the_seeds_that_both_have() -> None:
    ours = [result(0, FIRST), result(1, SECOND), result(2, SECOND)]
    theirs = [result(0, SECOND), result(2, THIRD)]  # seed 1 is missing
    shown = board(CEMG=ours, SASRec=theirs)
    columns, ((title, seeds, hr, *_),) = difference_rows(shown, "SASRec")
    assert columns[:2] == ["model", "seeds"] and (title, seeds) == ("CEMG", "2")
    assert hr.startswith("+0.2500 (")  # (0.5 - 1 + 1 - 0) / 2
    by_user = differences_of((ours[0], theirs[0]), (ours[2], theirs[1]))[KEPT]["HR@10"]
    assert by_user["mean"] == 0.25 and by_user["low"] < 0.25 < by_user["high"]


def test_no_seed_in_common_is_said_and_not_compared() -> None:
    shown = board(CEMG=[result(1, FIRST)], SASRec=[result(0, SECOND)])
    _, (row,) = difference_rows(shown, "SASRec")
    assert row == ["CEMG", "none in common", "", "", "", ""]


def test_a_deterministic_model_is_compared_with_every_seed() -> None:
    ours = [result(0, FIRST), result(1, SECOND)]
    _, (row,) = difference_rows(board(CEMG=ours, Popularity=[result(0, THIRD)]), "Popularity")
    assert row[1] == "2" and row[2].startswith("+0.7500 (")
    same = [result(0, THIRD), result(1, THIRD)]  # deterministic, though it was trained twice
    _, (row,) = difference_rows(board(CEMG=ours, mine=same), "mine")
    assert row[1] == "2" and row[2].startswith("+0.7500 (")
    _, (row,) = difference_rows(board(Item_memory=[result(0, FIRST)], Popularity=same), "Popularity")
    assert row[1] == "deterministic" and row[2].startswith("+0.5000 (")


def test_the_deviation_is_shown_from_two_seeds_on_and_an_interval_from_three() -> None:
    interval = {"intervals_95": {"HR@10": (0.4, 0.6)}}
    rows = {
        "One": [result(0, FIRST, **interval)],
        "Two": [result(0, FIRST), result(1, SECOND)],
        "Three": [result(0, FIRST), result(1, SECOND), result(2, THIRD)],
        "Popularity": [result(0, FIRST, **interval)],
        "Equal": [result(0, FIRST, **interval), result(1, FIRST, **interval)],
    }
    columns, table = ranking_rows(board(**rows), KEPT, paper=False)
    place = columns.index("HR@10")
    assert {row[0]: (row[1], row[place]) for row in table} == {
        "One": ("1", "0.5000 ± 0.1000"),
        "Two": ("2", "0.7500 (SD 0.3536)"),
        "Three": ("3", "0.5000 ± 1.2421 (SD 0.5000)"),  # 4.3027 · 0.5 / √3
        "Popularity": ("deterministic", "0.5000 ± 0.1000"),
        "Equal": ("deterministic", "0.5000 ± 0.1000"),
    }


def test_seconds_are_means_over_the_seeds_and_a_stopped_seed_is_named() -> None:
    stopped = {"train_seconds": 30, "stopped": "the budget"}
    rows = [result(0, FIRST, seconds=10, config={"train_seconds": 8}),
            result(1, SECOND, seconds=40, config=stopped)]  # fmt: skip
    columns, (row,) = cost_rows(board(SASRec=rows))
    assert dict(zip(columns, row, strict=True)) == {
        "model": "SASRec", "seconds": "25", "training alone": "19", "note": "the budget",
    }  # fmt: skip
    _, (row,) = ranking_rows(board(SASRec=rows), KEPT, paper=False)
    assert row[-1] == "stopped by the budget with 1 of 2 seeds, 30 s"


def test_different_users_are_not_paired() -> None:
    other = result(0, FIRST) | {"ranks": {KEPT: _packed(torch.zeros(8))}}
    with pytest.raises(Exception, match="needs the same users, got 40 and 8"):
        differences_of((result(0, FIRST), other))


def test_results_of_different_splits_never_share_a_table() -> None:
    other = example_result(split={"users": 60, "items": 31, "targets_sha256": "b" * 64})
    made = boards([("toy", "A", example_result()), ("toy", "B", other), ("toy", "A", example_result())],
                  {"toy": ["toy-c-seed0"], "shop": ["shop-c-seed0"]})  # fmt: skip
    assert [(board.data, {title: len(r) for title, r in board.rows.items()}) for board in made] == [
        ("toy", {"A": 2}), ("toy", {"B": 1}), ("shop", {}),
    ]  # fmt: skip
    assert made[0].missing == ["toy-c-seed0"]


def test_the_best_baseline_is_not_cemg() -> None:
    better = example_result(metrics_history_removed={"NDCG@10": 0.2})
    best = example_result(metrics_history_removed={"NDCG@10": 0.3})
    rows = [
        ("toy", "SASRec", example_result()),
        ("toy", "GRU4Rec", better),
        ("toy", "CEMG, without memory", best),
    ]
    assert best_baseline(boards(rows, {})[0]) == "GRU4Rec"


def test_what_papers_print_stands_beside_the_history_kept() -> None:
    split = {"users": 22_363, "items": 12_101, "targets_sha256": "a" * 64}
    titles = ("SASRec", "TIGER", "CEMG", "CEMG, search alone")
    rows = [("beauty", title, example_result(split=split)) for title in titles]
    (board,) = boards(rows, {})
    columns, table = ranking_rows(board, "metrics", paper=True)
    assert columns[-4:] == [
        "HR@10 in the paper", "NDCG@10 in the paper", "HR@10 in its own paper", "NDCG@10 in its own paper",
    ]  # fmt: skip
    assert [row[-4:] for row in table] == [
        ["0.0434", "0.0147", "", ""], ["0.0533", "0.0251", "0.0648", "0.0384"], ["", "", "", ""],
        ["0.0665", "0.0348", "", ""],
    ]  # fmt: skip
    (other,) = boards([("beauty", "SASRec", example_result())], {})  # another set of this name
    assert not [name for name in ranking_rows(other, "metrics", paper=True)[0] if "paper" in name]


def test_a_row_says_whether_more_epochs_would_probably_be_better() -> None:
    last, earlier = ({"epochs": 8, "best_epoch": best, "epochs_run": 8} for best in (8, 5))
    rows = [("toy", title, example_result(config=one)) for title, one in (("A", last), ("B", earlier))]
    _, table = ranking_rows(boards(rows, {})[0], "metrics", paper=False)
    assert [row[-1] for row in table] == ["the best epoch is the last of 8 epochs", ""]


def test_the_best_trained_baseline_is_neither_popularity_nor_the_memory() -> None:
    high = example_result(metrics_history_removed={"NDCG@10": 0.3})
    rows = [("toy", "Item memory", high), ("toy", "SASRec", example_result())]
    (board,) = boards(rows, {})
    assert (best_baseline(board), best_baseline(board, trained=True)) == ("Item memory", "SASRec")
    assert not any("paper" in name for name in ranking_rows(board, "metrics_history_removed", paper=True)[0])
    (other,) = boards([("shop", "SASRec", example_result())], {})
    assert len(ranking_rows(other, "metrics", paper=True)[0]) == 8


def test_a_row_says_that_its_training_was_stopped() -> None:
    log = [{"epoch": 1, "share": 1, "train_seconds": 8.0}, {"epoch": 2, "share": 0.25, "train_seconds": 2.0}]
    stopped = example_result(config={"stopped": "the budget", "train_seconds": 10.0}, training=log)
    (board,) = boards([("shop", "SASRec", example_result()), ("shop", "TIGER", stopped)], {})
    columns, rows = ranking_rows(board, "metrics", paper=True)
    assert columns[-1] == "training"
    assert [row[-1] for row in rows] == ["", "stopped by the budget, 10 s, 1.2 epochs"]
