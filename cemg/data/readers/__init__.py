"""Readers of the public formats; each ends in the same `Dataset`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from cemg.data.dataset import Dataset
from cemg.data.readers.amazon import read_amazon
from cemg.data.readers.detect import detect_format
from cemg.data.readers.inter_json import read_inter_json
from cemg.data.readers.limits import check_source
from cemg.data.readers.movielens import read_movielens
from cemg.data.readers.raw import Filters, Raw, assemble
from cemg.data.readers.recbole import read_recbole
from cemg.data.readers.sequence import read_sequence
from cemg.data.readers.tables import ColumnNames, read_table
from cemg.data.readers.yelp import read_yelp
from cemg.errors import UserError

Format = Literal[
    "auto",
    "prepared",
    "sequence",
    "amazon-2014",
    "amazon-2018",
    "amazon-2023",
    "yelp",
    "movielens",
    "recbole",
    "inter-json",
    "csv",
    "parquet",
]
FORMATS: tuple[str, ...] = get_args(Format)

__all__ = ["FORMATS", "ColumnNames", "Format", "detect_format", "read_dataset"]


def read_dataset(
    path: Path,
    *,
    format: str = "auto",
    name: str | None = None,
    images: Path | None = None,
    min_count: int | None = None,
    columns: ColumnNames | None = None,
    min_rating: float | None = None,
    ties: str = "source",
    duplicates: str = "keep",
    seed: int = 0,
) -> Dataset:
    """Read ``path`` (a file or a folder) in one of FORMATS.

    Interactions below ``min_rating`` go first, then the users and items of fewer than ``min_count``
    interactions, to a fixed point (default 5; 0, off, for ``sequence`` and ``inter-json``, which come
    filtered). What is left is sorted by time; ``ties`` and ``seed`` order equal times, ``duplicates``
    ("keep", "first", "last") says what of a repeated (user, item) stays. ``images`` is a folder of pictures
    named by the item's id, or as the items' ``image`` column says. ``columns`` names the columns of csv and
    parquet.

    Raises UserError naming file, line and reason where the input is malformed.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", fix=f"use one of {', '.join(FORMATS)}")
    check_source(path)
    found = detect_format(path) if format == "auto" else format
    if found == "prepared":
        given = {
            "min_count": min_count, "min_rating": min_rating, "columns": columns, "images": images,
            "ties": None if ties == "source" else ties,
            "duplicates": None if duplicates == "keep" else duplicates,
        }  # fmt: skip
        return _load_prepared(path, name, [option for option, value in given.items() if value is not None])
    if columns is not None and found not in ("csv", "parquet"):
        raise UserError(f"{path} is {found}, whose columns have names of their own", fix="leave out columns")
    raw = _read(path, found, columns)
    if min_count is None:
        min_count = 0 if found in ("sequence", "inter-json") else 5
    filters = Filters(
        min_count=min_count,
        min_rating=min_rating,
        ties=ties,
        duplicates=duplicates,
        seed=seed,
    )
    return assemble(dataclasses.replace(raw, name=name or raw.name), filters, images=images)


def _read(path: Path, format: str, columns: ColumnNames | None) -> Raw:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    match format:
        case "sequence":
            return read_sequence(path)
        case "amazon-2014" | "amazon-2018" | "amazon-2023":
            return read_amazon(path, edition=format)
        case "yelp":
            return read_yelp(path)
        case "movielens":
            return read_movielens(path)
        case "recbole":
            return read_recbole(path)
        case "inter-json":
            return read_inter_json(path)
        case _:
            return read_table(path, columns, suffix=f".{format}")


def _load_prepared(path: Path, name: str | None, refused: list[str]) -> Dataset:
    if refused:
        raise UserError(
            f"{path} is prepared already: {', '.join(refused)} would have no effect",
            fix="prepare its source again with them",
        )
    data = Dataset.load(path)
    return dataclasses.replace(data, name=name) if name else data
