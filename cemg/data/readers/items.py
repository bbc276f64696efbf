"""The items file of a csv or parquet dataset: ids, titles, texts and images."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from cemg.data.readers.columns import ColumnNames
from cemg.data.readers.raw import ITEM_SCHEMA
from cemg.data.readers.tables import Table, item_key, open_table
from cemg.data.readers.text import clean, item_text


def read_items(
    path: Path, columns: ColumnNames | None, *, separator: str = "", encoding: str = ""
) -> tuple[pl.DataFrame, list[str]]:
    """Read an items file.

    Args:
        path: Table in any format of `open_table`.
        columns: Names of the columns; None takes the usual names.
        separator: Field separator; "" detects it.
        encoding: Encoding of a text file; "" detects it.

    Returns:
        A frame with the columns of ITEM_SCHEMA and one row per row of the file, and notes for the user. A
        text consists of the title and the text columns, see `item_text`.

    Raises:
        UserError: The file is malformed. The error names file and line.
    """
    headerless = columns is not None and columns.items_headerless
    table = open_table(path, separator=separator, encoding=encoding, header=not headerless)
    key = item_key(table, columns)
    if not table.has(key):
        raise table.no_column(key, fix="name the column of the item ids in this file: --columns id=NAME")
    ids = table.ids(key)
    titles = _optional(table, columns.title if columns else None, "title")
    images = _optional(table, columns.image if columns else None, "image")
    names = columns.texts if columns and columns.texts else ("text",) if table.has("text") else ()
    texts = [[clean(text) for text in table.texts(name)] for name in names]
    rows = [
        (item, clean(title), item_text(clean(title), parts), (image or "").strip() or None)
        for item, title, image, *parts in zip(ids, titles, images, *texts, strict=True)
    ]
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row"), table.notes


def _optional(table: Table, requested: str | None, usual: str) -> list[str | None]:
    """Return the requested column, or the one with the usual name if it exists, or None for each row."""
    if requested is not None or table.has(usual):
        return table.texts(requested or usual)
    return [None] * table.frame.height
