"""A result of all users, restricted to a sample, is the evaluation of the sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cemg.baselines import __main__ as baselines
from cemg.data.dataset import Dataset
from cemg.data.synthetic import synthetic_dataset
from cemg.errors import UserError
from cemg.evaluation import Evaluation, Sample, evaluate, read_result, restrict, write_result
from cemg.evaluation.results import OF_LISTS


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return synthetic_dataset(tmp_path / "world")


def shuffled(histories: list[np.ndarray], top: int) -> Tensor:
    """A list that depends on the history alone: a model of any quality."""
    orders = [np.random.default_rng(h.tolist()).permutation(40)[:top] for h in histories]
    return torch.from_numpy(np.stack(orders))


def write(path: Path, found: Evaluation) -> dict[str, object]:
    about = {"dataset": "toy", "command": "test", "config": {}, "seed": 0, "hardware": {}, "seconds": 1.0}
    write_result(path, evaluation=found, excluded=found, **about)  # type: ignore[arg-type]
    return read_result(path)


def test_a_restricted_record_is_the_evaluation_of_its_users(data: Dataset, tmp_path: Path) -> None:
    split, sample = data.split(), Sample(15, seed=3)
    whole = write(tmp_path / "whole.json", evaluate(shuffled, split, progress=False))
    direct = write(tmp_path / "part.json", evaluate(shuffled, split, users=sample, progress=False))
    restricted = restrict(whole, sample)
    assert restricted is not None and restricted["metrics"] != whole["metrics"]
    for key in direct.keys() - {*OF_LISTS, "file"}:
        assert json.dumps(restricted[key]) == json.dumps(direct[key]), key
    assert direct["split"]["subset"].startswith("15 users, seed 3, sha256 ")  # type: ignore[index]
    assert Sample.of(direct["split"]) == sample  # type: ignore[arg-type]
    assert restrict(direct, sample) is None  # the ranks of the others are not known


def test_a_file_of_an_earlier_version_is_restricted_without_its_cold_targets(
    data: Dataset, tmp_path: Path
) -> None:
    whole = write(tmp_path / "whole.json", evaluate(shuffled, data.split(), progress=False))
    del whole["cold"]["of_user"]  # type: ignore[attr-defined]
    restricted = restrict(whole, Sample(15))
    assert restricted is not None and "cold" not in restricted and restricted["evaluated_users"] == 15
    del whole["ranks"]
    assert restrict(whole, Sample(15)) is None


def test_a_sample_of_everyone_is_the_whole_test() -> None:
    assert Sample(9).name(9) == "" and Sample(8).name(9)
    assert Sample(8).rows(100).tolist() != Sample(8, seed=1).rows(100).tolist()
    with pytest.raises(UserError, match="at least 1 user"):
        Sample(0)


def test_the_command_tests_a_sample(data: Dataset, tmp_path: Path, command, capsys) -> None:
    data.save(tmp_path / "data")
    words = ["--data", tmp_path / "data", "--model", "popularity", "--out", tmp_path / "out.json"]
    assert command(baselines.main, *words, "--users", 12) == 0
    assert read_result(tmp_path / "out.json")["split"]["subset"] == Sample(12).name(data.num_users)
    assert command(baselines.main, *words, "--users", -1) == 2
    assert "--users must be 0 or more" in capsys.readouterr().err
