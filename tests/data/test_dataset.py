"""The prepared folder and the leave-one-out split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cemg.data import Dataset, Split
from cemg.errors import UserError


def dataset(*sequences: list[int], items: int = 5) -> Dataset:
    return Dataset(
        name="tiny",
        user_ids=[f"u{n}" for n in range(len(sequences))],
        item_ids=[f"i{n}" for n in range(items)],
        sequences=[np.array(s, dtype=np.int32) for s in sequences],
        titles=[""] * items,
        texts=[None] * items,
        images=[None] * items,
        tie_rule="none",
    )


def test_the_last_item_is_for_test_the_second_last_for_validation_and_the_rest_for_training():
    split = dataset([0, 1, 2, 3], [4, 0], [1, 2, 3]).split()
    assert [s.tolist() for s in split.train] == [[0, 1], [4, 0], [1]]
    assert split.users.tolist() == [0, 2]
    assert split.targets("valid").tolist() == [2, 2] and split.targets("test").tolist() == [3, 3]
    assert [s.tolist() for s in split.histories("valid")] == [[0, 1], [1]]
    assert [s.tolist() for s in split.histories("test")] == [[0, 1, 2], [1, 2]]


def test_training_counts_exclude_targets():
    assert dataset([0, 1, 2, 3], [4, 0]).split().train_counts(5).tolist() == [2, 1, 0, 0, 1]


def test_saving_and_loading_keeps_everything_even_users_without_items(tmp_path: Path):
    data = dataset([0, 1], [], [3, 3, 3], [])
    data.save(tmp_path)
    loaded = Dataset.load(tmp_path)
    assert [s.tolist() for s in loaded.sequences] == [[0, 1], [], [3, 3, 3], []]
    assert (loaded.user_ids, loaded.item_ids, loaded.texts) == (data.user_ids, data.item_ids, data.texts)
    assert isinstance(loaded.split(), Split)


def test_fingerprints_differ_if_a_target_differs():
    one, other = dataset([0, 1, 2]).split(), dataset([0, 1, 3]).split()
    assert one.fingerprint["targets_sha256"] != other.fingerprint["targets_sha256"]


def test_columns_of_different_lengths_and_missing_files_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="1 user ids for 0 sequences"):
        Dataset("x", ["u"], [], [], [], [], [], "none")
    with pytest.raises(UserError, match="2 titles for 1 items"):
        Dataset("x", [], ["i"], [], ["", ""], [None], [None], "none")
    with pytest.raises(UserError, match=r"dataset\.json is missing"):
        Dataset.load(tmp_path)
