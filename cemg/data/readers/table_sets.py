"""The csv and parquet formats: a table of interactions and, beside it or named, one of items."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from cemg.data.readers.amazon import describe_metadata, metadata_of
from cemg.data.readers.columns import ColumnNames, guess_names
from cemg.data.readers.items import read_items
from cemg.data.readers.raw import Describe, Raw, no_items
from cemg.data.readers.tables import PARQUET, Table, open_table, shards
from cemg.data.readers.textfile import TextFile
from cemg.errors import UserError

TEXT_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SUFFIXES = {"csv": TEXT_SUFFIXES, "parquet": (PARQUET,)}


def read_table_set(
    path: Path, columns: ColumnNames | None, *, format: str, items: Path | None = None, separator: str = "",
    encoding: str = "",
) -> Raw:  # fmt: skip
    """Read a file of interactions, or a folder with ``interactions.csv`` (.tsv, .gz, .parquet, a folder of
    shards).

    ``items`` is the items file; None takes ``items.*`` beside it, or the ``meta_*`` file of Amazon's 2023
    set. ``columns`` None takes `ColumnNames` as they are, or user_id with item_id or parent_asin, or
    MovieLens's.
    """
    file = _interactions_file(path, format)
    header = columns is None or not columns.headerless
    table = open_table(file, encoding=encoding, separator=separator, header=header)
    names = columns or guess_names(table.frame.columns)
    interactions = _interactions(table, names)
    about = items or _items_file(file)
    describe, notes = _description(about, columns or (names if about else None), separator, encoding)
    expected = f"items{file.suffix if file.is_file() else PARQUET}"
    return Raw(
        name=path.resolve().name if path.is_dir() else file.name.split(".")[0],
        interactions=interactions,
        describe=describe,
        items_file=about,
        image_folder=(about or file).parent,
        notes=[*table.notes, *notes, *([] if about else [f"no {expected}: items have no text"])],
    )


def _interactions_file(path: Path, format: str) -> Path:
    """The file, or the folder of Parquet shards, that holds the interactions."""
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path} is missing")
        return path
    found = (path / f"interactions{suffix}" for suffix in SUFFIXES[format])
    file = next((file for file in found if file.is_file()), None)
    if file is None and format == "parquet":
        folder = path / "interactions"
        file = next((place for place in (folder, path) if place.is_dir() and shards(place)), None)
    if file is None:
        raise UserError(
            f"{path} has no interactions{SUFFIXES[format][0]}",
            fix="name the files: --interactions FILE --items FILE",
        )
    return file


def _items_file(file: Path) -> Path | None:
    """``items.*`` beside the interactions, or Amazon's metadata of the same name."""
    folders = (file, file.parent) if file.is_dir() else (file.parent,)
    for folder in folders:
        beside = (folder / f"items{suffix}" for suffix in (*TEXT_SUFFIXES, PARQUET))
        found = next((items for items in beside if items.is_file() and items != file), None)
        if found:
            return found
    return metadata_of(file) if file.is_file() else None


def _description(
    items: Path | None, columns: ColumnNames | None, separator: str, encoding: str
) -> tuple[Describe, list[str]]:
    if items is None:
        return no_items, []
    if not items.is_file():
        raise UserError(f"{items} is missing")
    text = TextFile(items, encoding)
    if text.suffix in (".json", ".jsonl"):
        return (lambda wanted: describe_metadata(text, wanted)), []
    about, notes = read_items(items, columns, separator=separator, encoding=encoding)
    return (lambda wanted: about), notes


def _interactions(table: Table, names: ColumnNames) -> pl.DataFrame:
    rows = {
        "user": table.ids(names.user),
        "item": table.ids(names.item),
        "timestamp": table.times(names.timestamp),
    }
    if names.rating is not None or table.has("rating"):
        rows["rating"] = table.numbers(names.rating or "rating")
    return pl.DataFrame(rows)
