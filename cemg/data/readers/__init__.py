"""Readers of the public formats. All of them return a `Dataset`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cemg.data.choices import FORMATS, Format
from cemg.data.dataset import Dataset
from cemg.data.readers.amazon import read_amazon
from cemg.data.readers.columns import ColumnNames
from cemg.data.readers.detect import detect_format
from cemg.data.readers.inter_json import read_inter_json
from cemg.data.readers.limits import check_source
from cemg.data.readers.movielens import read_movielens
from cemg.data.readers.raw import Filters, Raw, assemble
from cemg.data.readers.recbole import read_recbole
from cemg.data.readers.sequence import read_sequence
from cemg.data.readers.table_sets import read_table_set
from cemg.data.readers.textfile import check_encoding
from cemg.data.readers.yelp import read_yelp
from cemg.errors import UserError

__all__ = ["FORMATS", "ColumnNames", "Format", "check_encoding", "detect_format", "read_dataset"]


def read_dataset(
    path: Path,
    *,
    format: str = "auto",
    name: str | None = None,
    items: Path | None = None,
    images: Path | None = None,
    min_count: int | None = None,
    columns: ColumnNames | None = None,
    separator: str = "",
    encoding: str = "",
    min_rating: float | None = None,
    ties: str = "source",
    duplicates: str = "keep",
    drop_duplicates: bool = False,
    seed: int = 0,
) -> Dataset:
    """Read, filter and sort a dataset.

    The filters apply in this order: ``drop_duplicates``, ``min_rating``, ``duplicates``, ``min_count``.

    Args:
        path: File or folder.
        format: One of FORMATS; "auto" detects it.
        name: Name of the dataset; None takes that of the source.
        items: Items file; None takes the one next to the interactions.
        images: Folder of images, named by item id or as in the ``image`` column of the items.
        min_count: Fewest interactions of a user or item that is kept (k-core). None is 5, or 0 (off) for
            "sequence" and "inter-json", which are already filtered.
        columns: Names of the columns of csv and parquet; None takes the usual names.
        separator: Field separator of csv; "" takes the most frequent one in the first line.
        encoding: Encoding of text files; "" is the one of the byte order mark, or UTF-8.
        min_rating: Interactions with a lower rating are dropped.
        ties: Order of a user's interactions with equal times: "source" or "shuffle".
        duplicates: Which interactions of a repeated (user, item) pair are kept: "keep" (all), "first" or
            "last".
        drop_duplicates: Whether rows that exactly repeat another row are dropped.
        seed: Seed of ``ties="shuffle"``.

    Returns:
        The dataset, sorted by time. Its ``notes`` say what was dropped.

    Raises:
        UserError: The input is malformed. The error names file, line and reason.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", fix=f"use one of {', '.join(FORMATS)}")
    for source in (path, *([items] if items else [])):
        check_source(source)
    check_encoding(encoding)
    detected = detect_format(path) if format == "auto" else format
    if detected == "prepared":
        given = {
            "min_count": min_count, "min_rating": min_rating, "columns": columns, "images": images,
            "items": items, "separator": separator or None, "encoding": encoding or None,
            "drop_duplicates": drop_duplicates or None,
            "ties": None if ties == "source" else ties,
            "duplicates": None if duplicates == "keep" else duplicates,
        }  # fmt: skip
        return _load_prepared(path, name, [option for option, value in given.items() if value is not None])
    if detected not in ("csv", "parquet"):
        for option, value in (("columns", columns), ("separator", separator)):
            if value:
                raise UserError(
                    f"{option} has no effect on {path}, which has the format {detected}",
                    fix=f"leave out {option}",
                )
    raw = _read(path, detected, columns, items=items, separator=separator, encoding=encoding)
    if min_count is None:
        min_count = 0 if detected in ("sequence", "inter-json") else 5
    filters = Filters(
        min_count=min_count,
        min_rating=min_rating,
        ties=ties,
        duplicates=duplicates,
        drop_duplicates=drop_duplicates,
        seed=seed,
    )
    return assemble(dataclasses.replace(raw, name=name or raw.name), filters, images=images)


def _read(
    path: Path, format: str, columns: ColumnNames | None, *, items: Path | None, separator: str, encoding: str
) -> Raw:
    for file in (path, *([items] if items else [])):
        if not file.exists():
            raise UserError(f"{file} does not exist")
    match format:
        case "sequence":
            return read_sequence(path, items=items, encoding=encoding)
        case "amazon-2014" | "amazon-2018" | "amazon-2023":
            return read_amazon(path, edition=format, items=items, encoding=encoding)
        case "yelp":
            return read_yelp(path, items=items, encoding=encoding)
        case "movielens":
            return read_movielens(path, items=items, encoding=encoding)
        case "recbole":
            return read_recbole(path, items=items, encoding=encoding)
        case "inter-json":
            return read_inter_json(path, items=items, encoding=encoding)
        case _:
            return read_table_set(
                path, columns, format=format, items=items, separator=separator, encoding=encoding
            )


def _load_prepared(path: Path, name: str | None, options: list[str]) -> Dataset:
    """Load a prepared folder. Raises UserError for options, which would have no effect."""
    if options:
        raise UserError(
            f"{path} is already prepared: {', '.join(options)} would have no effect",
            fix="prepare its source again with these options",
        )
    data = Dataset.load(path)
    return dataclasses.replace(data, name=name) if name else data
