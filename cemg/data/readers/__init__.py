"""Readers of the public formats. All of them return a `Dataset`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from shlex import quote

from cemg.data.choices import FORMATS, TEXTS, Format
from cemg.data.dataset import Dataset
from cemg.data.readers.amazon import read_amazon
from cemg.data.readers.columns import ColumnNames
from cemg.data.readers.detect import detect_format
from cemg.data.readers.inter_json import read_inter_json
from cemg.data.readers.limits import check_source
from cemg.data.readers.movielens import read_movielens
from cemg.data.readers.raw import Filters, Raw, assemble
from cemg.data.readers.recbole import read_recbole
from cemg.data.readers.sequence import TIMES, read_sequence
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
    times: Path | None = None,
    texts: str = "all",
    columns: ColumnNames | None = None,
    separator: str = "",
    encoding: str = "",
    min_rating: float | None = None,
    ties: str = "source",
    duplicates: str = "keep",
    drop_duplicates: bool = False,
    split: str = "leave-one-out",
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
        times: File of times for the format "sequence", which has none itself.
        texts: Text of an item: "all" that the source has, or "titles", the title alone.
        columns: Names of the columns of csv and parquet; None takes the usual names.
        separator: Field separator of csv; "" takes the most frequent one in the first line.
        encoding: Encoding of text files; "" is the one of the byte order mark, or UTF-8.
        min_rating: Interactions with a lower rating are dropped.
        ties: Order of a user's interactions with equal times: "source" or "shuffle".
        duplicates: Which interactions of a repeated (user, item) pair are kept: "keep" (all), "first" or
            "last".
        drop_duplicates: Whether rows that exactly repeat another row are dropped.
        split: How `Dataset.split` makes the targets: "leave-one-out" or "time". The format "sequence" then
            takes its times from timestamps.txt next to it, unless ``times`` names another file.
        seed: Seed of ``ties="shuffle"``.

    Returns:
        The dataset, sorted by time. Its ``notes`` say what was dropped.

    Raises:
        UserError: The input is malformed. The error names file, line and reason.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", fix=f"use one of {', '.join(FORMATS)}")
    if texts not in TEXTS:
        raise UserError(f"texts must be one of {', '.join(TEXTS)}, got {texts!r}")
    for source in (path, *(file for file in (items, times) if file)):
        check_source(source)
    check_encoding(encoding)
    detected = detect_format(path) if format == "auto" else format
    if detected == "prepared":
        given = {
            "min_count": min_count, "min_rating": min_rating, "columns": columns, "images": images,
            "items": items, "times": times, "separator": separator or None, "encoding": encoding or None,
            "drop_duplicates": drop_duplicates or None,
            "ties": None if ties == "source" else ties,
            "duplicates": None if duplicates == "keep" else duplicates,
        }  # fmt: skip
        options = [option for option, value in given.items() if value is not None]
        data = _load_prepared(path, name, options)
        if split == "time" and data.cuts is None:
            command = f"cemg-data prepare SOURCE {quote(f'{path}-time')} --split time"
            raise UserError(
                f"{path} was prepared for a leave-one-out split, and a prepared folder has no times",
                fix=f"prepare its source into another folder: {command}",
            )
        return _with_texts(data, texts)
    if detected not in ("csv", "parquet"):
        for option, value in (("columns", columns), ("separator", separator)):
            if value:
                raise UserError(
                    f"{option} has no effect on {path}, which has the format {detected}",
                    fix=f"leave out {option}",
                )
    if times is not None and detected != "sequence":
        raise UserError(
            f"times has no effect on {path}, which has the format {detected}", fix="leave out times"
        )
    if split == "time" and detected == "sequence" and times is None:
        beside = (path if path.is_dir() else path.parent) / TIMES
        times = beside if beside.is_file() else None
    raw = _read(path, detected, columns, items=items, times=times, separator=separator, encoding=encoding)
    if min_count is None:
        min_count = 0 if detected in ("sequence", "inter-json") else 5
    filters = Filters(
        min_count=min_count,
        min_rating=min_rating,
        ties=ties,
        duplicates=duplicates,
        drop_duplicates=drop_duplicates,
        split=split,
        seed=seed,
    )
    data = assemble(dataclasses.replace(raw, name=name or raw.name), filters, images=images)
    return _with_texts(data, texts)


def _with_texts(data: Dataset, texts: str) -> Dataset:
    """Replace the texts by the titles if ``texts`` is "titles"."""
    if texts == "all":
        return data
    note = "texts: the titles alone"
    return dataclasses.replace(
        data, texts=[title or None for title in data.titles], notes=[*data.notes, note]
    )


def _read(
    path: Path, format: str, columns: ColumnNames | None, *, items: Path | None, times: Path | None,
    separator: str, encoding: str,
) -> Raw:  # fmt: skip
    for file in (path, *(file for file in (items, times) if file)):
        if not file.exists():
            raise UserError(f"{file} does not exist")
    match format:
        case "sequence":
            return read_sequence(path, items=items, times=times, encoding=encoding)
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
