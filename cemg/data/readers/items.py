"""The items file of a table: ids, titles, texts and pictures."""

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
    """A frame of ITEM_SCHEMA, a row for each of the file, and notes for the user.

    A text is the title and then the text columns, see `item_text`. Raises UserError naming file and line.
    """
    headerless = columns is not None and columns.items_headerless
    table = open_table(path, separator=separator, encoding=encoding, header=not headerless)
    key = item_key(table, columns)
    if not table.has(key):
        raise table.no_column(key, fix="--columns id=NAME names the column of the item ids in this file")
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


def _optional(table: Table, named: str | None, usual: str) -> list[str | None]:
    """The column that was named, or the one of the usual name where there is one."""
    if named is not None or table.has(usual):
        return table.texts(named or usual)
    return [None] * table.frame.height
