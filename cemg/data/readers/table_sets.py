"""The csv and parquet formats: a table of interactions and, optionally, a table of items."""

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
    """Read a table of interactions, and its items.

    Args:
        path: File of interactions, or a folder with ``interactions.csv`` (.tsv, .gz, .parquet, or a folder of
            Parquet files).
        columns: Names of the columns. None takes those of `ColumnNames`, or user_id with item_id or
            parent_asin, or MovieLens's names.
        format: "csv" or "parquet".
        items: Items file. None takes ``items.*`` next to the interactions, or Amazon's ``meta_*`` file.
        separator: Field separator; "" detects it.
        encoding: Encoding of text files; "" detects it.
    """
    file = _interactions_file(path, format)
    header = columns is None or not columns.headerless
    table = open_table(file, encoding=encoding, separator=separator, header=header)
    names = columns or guess_names(table.frame.columns)
    interactions = _interactions(table, names)
    items_file = items or _items_file(file)
    describe, notes = _description(
        items_file, columns or (names if items_file else None), separator, encoding
    )
    expected = f"items{file.suffix if file.is_file() else PARQUET}"
    return Raw(
        name=path.resolve().name if path.is_dir() else file.name.split(".")[0],
        interactions=interactions,
        describe=describe,
        items_file=items_file,
        image_folder=(items_file or file).parent,
        notes=[
            *table.notes,
            *notes,
            *([] if items_file else [f"there is no {expected}: items have no text"]),
        ],
    )


def _interactions_file(path: Path, format: str) -> Path:
    """Return the file or the folder of Parquet files with the interactions."""
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path} is missing")
        return path
    candidates = (path / f"interactions{suffix}" for suffix in SUFFIXES[format])
    file = next((file for file in candidates if file.is_file()), None)
    if file is None and format == "parquet":
        folder = path / "interactions"
        file = next(
            (candidate for candidate in (folder, path) if candidate.is_dir() and shards(candidate)), None
        )
    if file is None:
        raise UserError(
            f"{path} has no interactions{SUFFIXES[format][0]}",
            fix="name the files: --interactions FILE --items FILE",
        )
    return file


def _items_file(file: Path) -> Path | None:
    """Return ``items.*`` next to the interactions, or Amazon's metadata; None if there is none."""
    folders = (file, file.parent) if file.is_dir() else (file.parent,)
    for folder in folders:
        candidates = (folder / f"items{suffix}" for suffix in (*TEXT_SUFFIXES, PARQUET))
        items = next((items for items in candidates if items.is_file() and items != file), None)
        if items:
            return items
    return metadata_of(file) if file.is_file() else None


def _description(
    items: Path | None, columns: ColumnNames | None, separator: str, encoding: str
) -> tuple[Describe, list[str]]:
    """Return the function that describes items, and notes for the user."""
    if items is None:
        return no_items, []
    if not items.is_file():
        raise UserError(f"{items} is missing")
    text = TextFile(items, encoding)
    if text.suffix in (".json", ".jsonl"):
        return (lambda item_ids: describe_metadata(text, item_ids)), []
    described, notes = read_items(items, columns, separator=separator, encoding=encoding)
    return (lambda item_ids: described), notes


def _interactions(table: Table, names: ColumnNames) -> pl.DataFrame:
    rows = {
        "user": table.ids(names.user),
        "item": table.ids(names.item),
        "timestamp": table.times(names.timestamp),
    }
    if names.rating is not None or table.has("rating"):
        rows["rating"] = table.numbers(names.rating or "rating")
    return pl.DataFrame(rows)
