"""The users and the ranking that select a checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import pytest
import torch

from cemg.config import DecodingConfig, RunConfig
from cemg.data.dataset import Dataset, Split
from cemg.evaluation import evaluate
from cemg.evaluation.selection import checkpoint_selection, users_return


def split_of(sequences: list[list[int]], items: int = 30) -> Split:
    blank: list[None] = [None] * items
    return Dataset(
        name="toy",
        user_ids=[f"u{user}" for user in range(len(sequences))],
        item_ids=[f"i{item}" for item in range(items)],
        sequences=[np.array(sequence, dtype=np.int32) for sequence in sequences],
        titles=[""] * items,
        texts=list(blank),
        images=list(blank),
        tie_rule="as written",
    ).split()


def config(
    users: int, history: Literal["auto", "kept", "removed", "excluded", "earlier"] = "auto", seed: int = 0
) -> RunConfig:
    decoding = DecodingConfig(validation_users=users, validation_history=history)
    return dataclasses.replace(RunConfig(), decoding=decoding, seed=seed)


def test_half_of_the_users_at_most_select_and_the_others_are_left():
    split = split_of([[0, 1, 2]] * 21)
    for asked, selecting in ((4, 4), (10, 10), (500, 10)):
        chosen = checkpoint_selection(split, config(asked))
        assert len(chosen.users) == selecting
        assert sorted([*chosen.users, *chosen.others]) == list(range(21))
    again, other = (checkpoint_selection(split, config(10, seed=seed)) for seed in (0, 1))
    assert again.users.tolist() == chosen.users.tolist() != other.users.tolist()


def test_runs_of_earlier_versions_use_the_users_and_the_ranking_that_they_used():
    chosen = checkpoint_selection(split_of([[0, 1, 2]] * 21), config(500, "earlier"))
    assert len(chosen.users) == 21 and len(chosen.others) == 0 and chosen.history == "kept"


@pytest.mark.parametrize("history", ["kept", "removed", "excluded"])
def test_a_ranking_that_is_chosen_leaves_half_of_the_users_too(history):
    chosen = checkpoint_selection(split_of([[0, 1, 2]] * 21), config(500, history))
    assert (len(chosen.users), len(chosen.others), chosen.history) == (10, 11, history)


def test_the_history_stays_only_where_users_return_to_items():
    never, often = split_of([[0, 1, 2, 3]] * 9), split_of([[0, 1, 0, 0, 2, 3]] * 9)
    assert not users_return(never) and users_return(often)
    assert checkpoint_selection(never, config(5)).history == "excluded"
    assert checkpoint_selection(often, config(5)).history == "kept"
    assert checkpoint_selection(often, config(5, "removed")).history == "removed"


@pytest.mark.parametrize("history, expected", [("kept", 0.0), ("removed", 1.0), ("excluded", 0.0)])
def test_the_metrics_that_select_are_those_of_the_ranking(history, expected):
    split = split_of([[*range(6), 6, 29]] * 4)  # the validation target is ranked after its history
    done = evaluate(
        lambda histories, top: torch.arange(30)[:top].expand(len(histories), -1),
        split, part="valid", progress=False,
    )  # fmt: skip
    assert checkpoint_selection(split, config(2, history)).metrics(done)["HR@5"] == expected
