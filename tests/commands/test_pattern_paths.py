"""Paths with the characters ``[ ? *`` name one file, never the files that match a pattern."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from cemg import Recommender
from cemg.commands import catalog, train
from cemg.data import Dataset, read_dataset
from cemg.evaluation.lists import _read
from cemg.storage.read import read_parquet
from cemg.tokenizer import Catalog

NAMES = [("n[1]", "n1"), ("n?", "nx"), ("n*", "nyy")]  # a name, and another one that it matches


def _table(user: str) -> pl.DataFrame:
    rows = [(user, f"i{n}", n) for n in range(4)]
    return pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")


def _write(path: Path, user: str) -> Path:
    table = _table(user)
    if path.suffix == ".parquet":
        table.write_parquet(path)
    elif path.suffix == ".json":
        names = ("reviewerID", "asin", "unixReviewTime")
        rows = [dict(zip(names, row, strict=True)) | {"overall": 5.0} for row in table.iter_rows()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(table.write_csv().encode()))
    elif path.suffix == ".dat":
        path.write_text("".join(f"{user}::{item}::5::{time}\n" for _, item, time in table.iter_rows()))
    else:
        path.write_text(table.write_csv())
    return path


@pytest.mark.parametrize(("name", "other"), NAMES)
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_a_table_whose_name_looks_like_a_pattern_is_read(tmp_path: Path, name: str, other: str, suffix: str):
    given = _write(tmp_path / f"{name}{suffix}", "mine")
    _write(tmp_path / f"{other}{suffix}", "foreign")
    assert read_dataset(given, min_count=0).user_ids == ["mine"]


@pytest.mark.parametrize(("name", "other"), NAMES)
@pytest.mark.parametrize("file", ["reviews_Toys_5.json", "ratings.dat"])
def test_a_folder_whose_name_looks_like_a_pattern_is_read(tmp_path: Path, name: str, other: str, file: str):
    for folder, user in ((name, "7"), (other, "8")):
        (tmp_path / folder).mkdir()
        _write(tmp_path / folder / file, user)
    assert read_dataset(tmp_path / name, min_count=0).user_ids == ["7"]


@pytest.mark.parametrize(("name", "other"), NAMES)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_lists_catalogs_and_artifacts_whose_names_look_like_patterns_are_read(
    tmp_path: Path, name: str, other: str, suffix: str
):
    given = _write(tmp_path / f"{name}{suffix}", "mine")
    _write(tmp_path / f"{other}{suffix}", "foreign")
    assert _read(given)["user"][0] == "mine"
    if suffix == ".parquet":
        assert read_parquet(given, dict(_table("").schema))["user"][0] == "mine"
    codes, foreign = (tmp_path / f"{stem}-codes{suffix}" for stem in (name, other))
    for path, item in ((codes, "mine"), (foreign, "foreign")):
        table = pl.DataFrame({"item": [item, "b"], "code_0": ["0", "1"], "code_1": ["1", "0"]})
        table = table.with_columns(pl.col("code_0", "code_1").cast(pl.Int64))
        table.write_csv(path) if suffix == ".csv" else table.write_parquet(path)
    assert Catalog.read(codes).item_ids[0] == "mine"


@pytest.mark.parametrize(("name", "other"), NAMES)
def test_a_run_whose_name_looks_like_a_pattern_can_be_opened(
    tiny_run: Path, tmp_path: Path, name: str, other: str
):
    shutil.copytree(tiny_run, tmp_path / name)
    (tmp_path / other / "data").mkdir(parents=True)  # Polars would read these, or fail on them
    for file in Dataset.FILES:
        (tmp_path / other / "data" / file).write_bytes(b"foreign")
    recommender = Recommender.from_run(tmp_path / name)
    expected = Recommender.from_run(tiny_run)
    history = expected.catalog.item_ids[:3]
    assert recommender.recommend(history, top=3).ids == expected.recommend(history, top=3).ids
    assert recommender.titles() == expected.titles()


def test_a_run_whose_name_looks_like_a_pattern_can_be_trained(
    tmp_path: Path, tiny_settings: list[str], feature_cache: Path, command
):
    settings = [part for one in (*tiny_settings, "generator.epochs=1") for part in ("--set", one)]
    (tmp_path / "bq" / "data").mkdir(parents=True)
    for file in Dataset.FILES:
        (tmp_path / "bq" / "data" / file).write_bytes(b"foreign")
    assert command(train.main, "--run", tmp_path / "[b]q", "--cache", feature_cache, *settings) == 0
    recommender = Recommender.from_run(tmp_path / "[b]q")
    assert recommender.recommend(recommender.catalog.item_ids[:2], top=3).ids[0][2] is not None


def test_items_are_added_from_the_named_file_to_the_named_run(tiny_run: Path, tmp_path: Path, command):
    run = tmp_path / "[b]q"
    shutil.copytree(tiny_run, run)
    for name, item in (("n[1].csv", "mine"), ("n1.csv", "foreign")):
        (tmp_path / name).write_text(f"item,title\n{item},A new thing\n")
    assert command(catalog.main, "add", "--run", run, "--items", tmp_path / "n[1].csv") == 0
    assert Catalog.load(run / "catalog").item_ids[-1] == "mine"


def test_no_reader_lets_polars_expand_a_path():
    """Every reader is called with ``glob=False``, except that of JSON lines, which has no such option."""
    sources = [*Path("cemg").rglob("*.py"), *Path("bench").rglob("*.py")]
    kinds = ("csv", "parquet", "ipc", "lines")
    calls = [f"pl.{verb}_{kind}(" for verb in ("read", "scan") for kind in kinds]
    root = Path(__file__).parents[2]
    found = 0
    for path in (root / source for source in sources):
        text = path.read_text()
        for call in calls:
            for after in text.split(call)[1:]:
                found += 1
                assert "glob=False" in after[:250], path
    assert found >= 7
