"""RecBole's atomic files ``X.inter`` and, optionally, ``X.item``: tab-separated, headers ``name:type``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import polars as pl

from cemg.data.readers.raw import ITEM_SCHEMA, Raw, no_items
from cemg.data.readers.tables import Table, open_table
from cemg.data.readers.text import clean, item_text
from cemg.data.readers.textfile import bad_line
from cemg.errors import UserError

TYPES = ("token", "token_seq", "float", "float_seq")


def read_recbole(path: Path, *, items: Path | None = None, encoding: str = "") -> Raw:
    """Read atomic files. The columns ``user_id``, ``item_id`` and ``timestamp`` are required.

    Args:
        path: ``.inter`` file, or a folder with one.
        items: ``.item`` file; None takes the one of the same name.
        encoding: Encoding of the files; "" detects it.
    """
    files = sorted(path.glob("*.inter")) if path.is_dir() else [path]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{path}: expected one .inter file, found {names}", fix="name the file")
    file, about = files[0], items or files[0].with_suffix(".item")
    table, _ = _open(file, encoding)
    rows = {"user": table.ids("user_id"), "item": table.ids("item_id"), "timestamp": table.times("timestamp")}
    if table.has("rating"):
        rows["rating"] = table.numbers("rating")
    has_items = about.is_file()
    return Raw(
        name=file.stem,
        interactions=pl.DataFrame(rows),
        describe=(lambda item_ids: _describe(about, encoding)) if has_items else no_items,
        items_file=about if has_items else None,
        notes=[*table.notes, *([] if has_items else [f"there is no {about.name}: items have no text"])],
    )


def _open(file: Path, encoding: str) -> tuple[Table, dict[str, str]]:
    """Read a table; return it with the bare names of its columns, and their types."""
    table = open_table(file, separator="\t", quoted=False, encoding=encoding)
    types: dict[str, str] = {}
    for header in table.frame.columns:
        name, _, kind = header.partition(":")
        if kind not in TYPES:
            expected = f"expected name:type with a type of {', '.join(TYPES)}"
            raise bad_line(file, 1, f"header {header!r}; {expected}")
        types[name] = kind
    renamed = table.frame.rename(dict(zip(table.frame.columns, types, strict=True)))
    return dataclasses.replace(table, frame=renamed), types


def _describe(file: Path, encoding: str) -> pl.DataFrame:
    """Describe the items. The title is the first column named "title" or "name"; the text adds the others."""
    table, types = _open(file, encoding)
    ids = table.ids("item_id")
    tokens = [name for name, kind in types.items() if kind.startswith("token") and name != "item_id"]
    title_column = next((name for name in tokens if "title" in name or "name" in name), None)
    rest = [name for name in tokens if name != title_column]
    rows = []
    for item, record in zip(ids, table.frame.iter_rows(named=True), strict=True):
        title = clean(record[title_column]) if title_column else ""
        rows.append((item, title, item_text(title, [clean(record[name]) for name in rest]), None))
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")
