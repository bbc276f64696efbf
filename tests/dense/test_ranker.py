"""A trained model as a ranker and as a prior; its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cemg.data.dataset import Dataset
from cemg.dense import DenseConfig, DenseRanker, SequenceEncoder
from cemg.errors import UserError
from cemg_kernels import ItemPrior

ITEMS = 30
SMALL = DenseConfig(dim=16, inner=32, blocks=1, max_length=12)


@pytest.fixture(params=["sasrec", "bsarec"])
def ranker(request: pytest.FixtureRequest) -> DenseRanker:
    torch.manual_seed(0)
    config = DenseConfig(model=request.param, dim=16, inner=32, blocks=1, max_length=12)
    return DenseRanker(SequenceEncoder(ITEMS, config).eval(), config)


def test_a_list_has_no_duplicates_and_does_not_depend_on_the_batch(ranker: DenseRanker) -> None:
    histories = [np.arange(n, dtype=np.int32) for n in (1, 4, 25)]
    lists = ranker(histories, 99)
    assert lists.shape == (3, ITEMS)
    assert all(sorted(row) == list(range(ITEMS)) for row in lists.tolist())
    assert lists[1].tolist() == ranker(histories[1:2], 99)[0].tolist()


def test_only_the_newest_items_of_a_long_history_are_used(ranker: DenseRanker) -> None:
    newest = np.arange(SMALL.max_length)
    assert torch.equal(ranker([np.append([29, 28], newest)], 5), ranker([newest], 5))


def test_an_empty_history_is_refused(ranker: DenseRanker) -> None:
    for call in (ranker, ranker.prior):
        with pytest.raises(UserError, match="empty history"):
            call([np.array([], dtype=np.int32)], 5)


def test_a_prior_has_the_softmax_of_the_best_items(ranker: DenseRanker) -> None:
    histories = [np.arange(3), np.array([7])]
    items, mass = ranker.prior(histories, top=4)
    assert torch.equal(items, ranker(histories, 4)) and mass.dtype == torch.float64
    expected = ranker.logits(histories).double().softmax(1).gather(1, items)
    torch.testing.assert_close(mass, expected, rtol=1e-12, atol=0)
    whole = ranker.prior(histories)[1]
    assert whole.shape == (2, ITEMS)
    torch.testing.assert_close(whole.sum(1), torch.ones(2).double(), rtol=1e-12, atol=0)


def test_a_prior_is_accepted_by_the_search(ranker: DenseRanker) -> None:
    items, mass = ranker.prior([np.arange(3), np.array([7])], top=4)
    of_prior = ItemPrior(items, mass).padded()
    assert torch.equal(of_prior[0], items) and torch.equal(of_prior[1], mass)


def test_a_temperature_flattens_a_prior_and_must_be_positive(ranker: DenseRanker) -> None:
    sharp, flat = (ranker.prior([np.arange(3)], 5, temperature=t) for t in (0.5, 2.0))
    assert torch.equal(sharp[0], flat[0]) and float(sharp[1][0, 0]) > float(flat[1][0, 0])
    with pytest.raises(UserError, match="temperature must be positive"):
        ranker.prior([np.arange(3)], temperature=0.0)


def test_a_saved_ranker_gives_the_same_lists(ranker: DenseRanker, tmp_path: Path) -> None:
    ranker.save(str(tmp_path))
    loaded = DenseRanker.load(str(tmp_path))
    assert loaded.config == ranker.config
    assert torch.equal(loaded([np.arange(5)], 9), ranker([np.arange(5)], 9))


def test_a_model_of_other_data_is_refused(ranker: DenseRanker, tmp_path: Path) -> None:
    blank: list[None] = [None] * ITEMS
    sequences = [np.array([0, 1, 2, 3]), np.array([4, 5, 6])]
    ids = [str(item) for item in range(ITEMS)]
    data = Dataset("toy", ["a", "b"], ids, sequences, [""] * ITEMS, [*blank], [*blank], "as written")
    split = data.split()
    own = dataclasses.replace(ranker, targets=str(split.fingerprint["targets_sha256"]))
    own.save(tmp_path)
    loaded = DenseRanker.load(tmp_path)
    loaded.check_data(tmp_path, split)
    ranker.check_data(tmp_path, split)  # of an earlier version, which did not record it
    other = dataclasses.replace(data, sequences=[sequences[0], np.array([4, 5, 7])]).split()
    with pytest.raises(UserError, match="was not trained on the data of this run") as caught:
        loaded.check_data(tmp_path, other)
    assert "test targets" in str(caught.value) and str(tmp_path) in str(caught.value)
    fewer = Dataset("toy", ["a"], ids[:4], sequences[:1], [""] * 4, blank[:4], blank[:4], "as written")
    with pytest.raises(UserError, match="this run has 4"):
        loaded.check_data(tmp_path, fewer.split())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no trained SASRec or BSARec"):
        DenseRanker.load(tmp_path)


def test_a_model_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sasrec.json").write_text("{}")
    with pytest.raises(UserError, match="SASRec of an earlier version") as caught:
        DenseRanker.load(tmp_path)
    assert "counts positions from the oldest item" in str(caught.value)
