"""RecBole's atomic files: ``X.inter``, maybe ``X.item``; tab separated, ``name:type`` headers."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from cemg.data.readers.lines import bad_line
from cemg.data.readers.raw import ITEM_SCHEMA, Raw, no_items
from cemg.data.readers.tables import column, number_column, read_columns
from cemg.data.readers.text import clean, sentences
from cemg.errors import UserError

TYPES = ("token", "token_seq", "float", "float_seq")


def read_recbole(path: Path) -> Raw:
    """Read a ``.inter`` file or a folder with one; needs ``user_id``, ``item_id`` and ``timestamp``."""
    files = sorted(path.glob("*.inter")) if path.is_dir() else [path]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{path}: wanted one .inter file, found {names}", fix="name the file")
    file, items = files[0], files[0].with_suffix(".item")
    frame, _ = _read(file)
    rows = {
        "user": column(frame, file, "user_id"),
        "item": column(frame, file, "item_id"),
        "timestamp": number_column(frame, file, "timestamp", whole=False),
    }
    if "rating" in frame.columns:
        rows["rating"] = number_column(frame, file, "rating", whole=False)
    return Raw(
        name=file.stem,
        interactions=pl.DataFrame(rows),
        describe=(lambda wanted: _describe(items)) if items.is_file() else no_items,
        notes=[] if items.is_file() else [f"no {items.name}: items have no text"],
    )


def _read(file: Path) -> tuple[pl.DataFrame, dict[str, str]]:
    """The columns under their bare names, and the type of each."""
    frame = read_columns(file, separator="\t", quoted=False)
    types: dict[str, str] = {}
    for header in frame.columns:
        name, _, kind = header.partition(":")
        if kind not in TYPES:
            raise bad_line(file, 1, f"header {header!r}; wanted name:type with a type of {', '.join(TYPES)}")
        types[name] = kind
    return frame.rename(dict(zip(frame.columns, types, strict=True))), types


def _describe(file: Path) -> pl.DataFrame:
    """Title: the first column with "title" or "name" in its name. Text: it, then the other tokens."""
    frame, types = _read(file)
    ids = column(frame, file, "item_id")
    tokens = [name for name, kind in types.items() if kind.startswith("token") and name != "item_id"]
    headline = next((name for name in tokens if "title" in name or "name" in name), None)
    rest = [name for name in tokens if name != headline]
    rows = []
    for item, record in zip(ids, frame.iter_rows(named=True), strict=True):
        title = clean(record[headline]) if headline else ""
        rows.append((item, title, sentences([title, *(clean(record[name]) for name in rest)]), None))
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")
