"""The commands that errors suggest can be pasted into a shell, whatever the paths contain."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from cemg.commands import console, sources
from cemg.commands.recommend import _check_all
from cemg.commands.train import _agree, _check_spelling
from cemg.config import RunConfig, config_text
from cemg.data.readers.pictures import image_paths
from cemg.data.synthetic import planted_clusters
from cemg.errors import UserError
from cemg.pipeline import Pipeline
from cemg.storage.files import storage_error
from cemg.storage.manifest import remedy
from cemg.storage.removed import REMOVED, read_removed
from cemg.storage.run import PENDING, no_such_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my runs").mkdir()
    return tmp_path / "my runs"


def mistyped(folder: Path) -> tuple[UserError, Path]:
    (folder / "beauty").mkdir()
    (folder / "beauty" / "config.yaml").touch()
    return no_such_run(folder / "baeuty"), folder / "beauty"


def nearly_an_existing_name(folder: Path) -> tuple[UserError, Path]:
    (folder / "beauty").mkdir()
    (folder / "beauty" / "config.yaml").touch()
    return raised(_check_spelling, folder / "beautys"), folder / "beauty"


def unfinished(folder: Path) -> tuple[UserError, Path]:
    (folder / PENDING).write_text(config_text(RunConfig()))
    return raised(Pipeline.open, folder), folder


def outside_picture(folder: Path) -> tuple[UserError, Path]:
    (folder / "here").mkdir()
    (folder / "a.jpg").touch()
    table = pl.DataFrame({"item": ["1"], "image": ["../a.jpg"]})
    return raised(image_paths, table, folder / "here", folder / "here"), folder


CHECK_ALL = partial(_check_all, shard="", join=False, ray="", device="cpu")


def raised(function: Callable[..., object], *arguments: object) -> UserError:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return caught.value


ERRORS: dict[str, Callable[[Path], tuple[UserError | None, Path]]] = {
    "a run that does not exist": lambda folder: (no_such_run(folder / "x"), folder / "x"),
    "a mistyped run": mistyped,
    "a new run with almost an existing name": nearly_an_existing_name,
    "an unfinished run": unfinished,
    "a trained run": lambda folder: (raised(_agree, folder, ["seed: 0 → 1"], False), folder),
    "a damaged run": lambda folder: (raised(_agree, folder, ["the catalog"], True), folder),
    "a damaged stage": lambda folder: (UserError("damaged", fix=remedy(folder / "graph")), folder),
    "a damaged list of removed items": lambda folder: (
        raised(lambda: ((folder / REMOVED).write_text("{"), read_removed(folder))),
        folder / REMOVED,
    ),
    "a full disk": lambda folder: (storage_error(OSError(errno.ENOSPC, ""), folder / "file"), folder),
    "no planted labels": lambda folder: (raised(planted_clusters, folder), folder),
    "a picture outside of its folder": outside_picture,
    "a result over a folder": lambda folder: (
        raised(console.check_result, folder), folder / "beauty.json",
    ),
    "a table of another type": lambda folder: (
        raised(CHECK_ALL, folder / "all.csv", "all"), folder / "all.parquet",
    ),
    "data that are named twice": lambda folder: (
        raised(lambda: sources.one_source(folder, folder / "b.csv", option="--data")), folder / "b.csv",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_a_path_with_a_space_is_one_word_of_the_suggested_command(name, folder):
    error, path = ERRORS[name](folder)
    assert error is not None and error.fix is not None
    words = [word.rstrip(";,)") for word in shlex.split(error.fix)]
    assert str(path) in words
