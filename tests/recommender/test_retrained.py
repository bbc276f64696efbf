"""A run that is retrained while a program has it open."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cemg import Recommender
from cemg.artifacts import RunArtifacts
from cemg.commands import catalog
from cemg.errors import UserError
from cemg.storage import files
from cemg.storage.manifest import MANIFEST
from cemg.storage.read import read_json, signed

READS: dict[str, Callable[[RunArtifacts], object]] = {
    "data": RunArtifacts.load_data,
    "catalog": RunArtifacts.load_catalog,
    "tokenizer": RunArtifacts.load_tokenizer,
    "generator": RunArtifacts.load_generator,
}


def _retrain(run: Path, stage: str) -> None:
    """Writes another key for the stage, as a training does when it commits."""
    record = read_json(run / stage / MANIFEST, dict)
    record.pop("sha256", None)
    files.write_json(run / stage / MANIFEST, signed(record | {"key": "0" * len(record["key"])}))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("stage", ["data", "catalog", "generator"])
def test_a_run_that_was_retrained_after_it_was_opened_is_not_read(
    tiny_run: Path, tmp_path: Path, read: str, stage: str
):
    shutil.copytree(tiny_run, tmp_path / "run")
    artifacts = RunArtifacts.open(tmp_path / "run")
    READS[read](artifacts)
    _retrain(tmp_path / "run", stage)
    with pytest.raises(UserError, match="was retrained while it was open"):
        READS[read](artifacts)


def test_titles_and_codes_of_a_long_lived_recommender_belong_to_the_training_it_opened(
    tiny_run: Path, tmp_path: Path
):
    shutil.copytree(tiny_run, tmp_path / "run")
    recommender = Recommender.from_run(tmp_path / "run")
    _retrain(tmp_path / "run", "data")
    for read in (recommender.titles, lambda: recommender.encode_items(["A thing"], [None])):
        with pytest.raises(UserError, match="was retrained while it was open"):
            read()


def test_a_recommender_stays_usable_when_items_are_added(tiny_run: Path, tmp_path: Path, command):
    shutil.copytree(tiny_run, tmp_path / "run")
    recommender = Recommender.from_run(tmp_path / "run")
    (tmp_path / "new.csv").write_text("item,title\nnew,A new thing\n")
    assert command(catalog.main, "add", "--run", tmp_path / "run", "--items", tmp_path / "new.csv") == 0
    assert recommender.titles()["new"] == "A new thing"
