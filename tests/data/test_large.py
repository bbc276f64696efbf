"""The synthetic data set of any size: its planted structure, its files, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cemg.commands import data as command_of_data
from cemg.data import Dataset, large
from cemg.data.large import following_clusters, write_large

SIZES = {"users": 3000, "items": 1234}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(large, "BLOCK", 500)


def test_the_planted_clusters_follow_each_other(tmp_path: Path):
    count = write_large(tmp_path, **SIZES)
    data, following = Dataset.load(tmp_path), following_clusters(1234)
    assert (data.num_users, data.num_items, data.num_interactions) == (3000, 1234, count)
    assert len(following) == 123 and sorted(following) == list(range(123))
    lengths = [len(items) for items in data.sequences]
    assert min(lengths) == large.SHORTEST and abs(np.mean(lengths) - large.MEAN) < 0.5
    clusters = [items % len(following) for items in data.sequences]
    habits = np.concatenate([following[one[:-1]] == one[1:] for one in clusters])
    # a random cluster follows too; the standard error of the share is below 0.5 / sqrt(30,000) = 0.003
    assert abs(habits.mean() - (large.HABIT + (1 - large.HABIT) / 123)) < 0.012
    counts = np.bincount(np.concatenate(data.sequences), minlength=1234)
    assert counts[:123].sum() > 3 * counts[123:246].sum() > 0  # ranks 0 and 1 of the clusters
    texts: dict[str, set[int]] = {}
    for row, text in enumerate(data.texts):
        texts.setdefault(str(text).split(",")[0], set()).add(row % 123)
    assert len(texts) == 123 and all(len(own) == 1 for own in texts.values())


def test_the_seed_alone_determines_the_files(tmp_path: Path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        write_large(tmp_path / name, **SIZES, seed=seed)
    one, same, other = (
        json.loads((tmp_path / n / "dataset.json").read_text()) for n in ("one", "same", "other")
    )
    assert one == same and one["files"]["interactions.parquet"] != other["files"]["interactions.parquet"]
    assert pq.ParquetFile(tmp_path / "one" / "interactions.parquet").num_row_groups == 6  # written by blocks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--users", "1e2", "--items", "many"), "--items must be a whole number, got 'many'"),
        (("--users", "1.5", "--items", "50"), "--users must be a whole number, got '1.5'"),
        (("--users", "nan", "--items", "50"), "--users must be a whole number, got 'nan'"),
        (("--users", "50", "--items", "9"), "--items must be from 10 to 2,147,483,647, got 9"),
        (
            ("--users", "1e10", "--items", "50"),
            "--users must be from 10 to 2,147,483,647, got 10,000,000,000",
        ),
    ],
)
def test_invalid_sizes_are_refused(tmp_path, command, capsys, options, said):
    assert command(command_of_data.main, "synth", tmp_path / "out", *options) == 2
    assert f"error: {said}" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_command_writes_a_prepared_folder(tmp_path, command, capsys):
    assert command(command_of_data.main, "synth", tmp_path / "out", "--users", "1e3", "--items", "2e2") == 0
    data = Dataset.load(tmp_path / "out")
    said = f"1,000 users, 200 items, {data.num_interactions:,} interactions"
    captured = capsys.readouterr()
    assert captured.err == f"wrote {tmp_path / 'out'}: {said}\n"
    assert captured.out == f"{tmp_path / 'out'}\n" and data.synthetic
