"""MovieLens as GroupLens publishes it: 100K (``u.data``), 1M and 10M (``ratings.dat``), later ones (CSV)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from cemg.data.readers.lines import bad_line, empty_file, read_lines, scan_lines
from cemg.data.readers.raw import ITEM_SCHEMA, Raw, no_items
from cemg.data.readers.tables import column, number_column, read_columns
from cemg.data.readers.text import clean, sentences
from cemg.errors import UserError

LAYOUTS = {
    "u.data": ("\t", "u.item"),
    "ratings.dat": ("::", "movies.dat"),
    "ratings.csv": (",", "movies.csv"),
}
NO_GENRE = ("(no genres listed)", "unknown")


def read_movielens(path: Path) -> Raw:
    """Read a folder of MovieLens, or its file of ratings; an item's text is its title and its genres."""
    files = [path / name for name in LAYOUTS if (path / name).is_file()] if path.is_dir() else [path]
    if len(files) != 1 or files[0].name not in LAYOUTS:
        raise UserError(f"{path}: wanted one of {', '.join(LAYOUTS)}")
    file = files[0]
    separator, items_name = LAYOUTS[file.name]
    items = file.with_name(items_name)
    return Raw(
        name=file.resolve().parent.name,
        interactions=_ratings_csv(file) if separator == "," else _ratings(file, separator),
        describe=(lambda wanted: _describe(items)) if items.is_file() else no_items,
        notes=[] if items.is_file() else [f"no {items.name}: items have no text"],
    )


def _ratings_csv(file: Path) -> pl.DataFrame:
    frame = read_columns(file)
    return pl.DataFrame({
        "user": column(frame, file, "userId"),
        "item": column(frame, file, "movieId"),
        "timestamp": number_column(frame, file, "timestamp", whole=True),
        "rating": number_column(frame, file, "rating", whole=False),
    })  # fmt: skip


def _ratings(file: Path, separator: str) -> pl.DataFrame:
    """User, item, rating and time of each line."""
    part = pl.col("line").str.split(separator)
    names = ("user", "item", "rating", "timestamp")
    query = scan_lines(file).drop_nulls().select("number", part.list.len().alias("parts"), *(
        part.list.get(place, null_on_oob=True).alias(name) for place, name in enumerate(names)
    ))  # fmt: skip
    frame = read_lines(query, file)
    if frame.is_empty():
        raise empty_file(file)
    numbers = frame.with_columns(
        pl.col("rating").cast(pl.Float64, strict=False), pl.col("timestamp").cast(pl.Int64, strict=False)
    )
    bad = (frame["parts"] != 4) | numbers["rating"].is_null() | numbers["timestamp"].is_null()
    if bad.any():
        raise bad_line(file, frame["number"].filter(bad)[0], f"wanted {separator.join(names)}, with numbers")
    return numbers.select("user", "item", "timestamp", "rating")


def _describe(file: Path) -> pl.DataFrame:
    rows = []
    for item, title, genres in _movies_csv(file) if file.suffix == ".csv" else _movies(file):
        named = [genre for genre in genres if genre not in NO_GENRE]
        rows.append((item, clean(title), sentences([clean(title), ", ".join(named)]), None))
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")


def _movies_csv(file: Path) -> Iterator[tuple[str, str, list[str]]]:
    frame = read_columns(file)
    parts = (column(frame, file, name) for name in ("movieId", "title", "genres"))
    for item, title, genres in zip(*parts, strict=True):
        yield item, title, genres.split("|")


def _movies(file: Path) -> Iterator[tuple[str, str, list[str]]]:
    """``movies.dat``: id, title, genres. ``u.item``: id, title, …, a flag for each genre of ``u.genre``."""
    flags = file.name == "u.item"
    names = [line.split("|")[0] for line in _lines(file.with_name("u.genre"))] if flags else []
    for number, line in enumerate(_lines(file), start=1):
        parts = line.split("|" if flags else "::")
        if len(parts) < (2 + len(names) if flags else 3):
            raise bad_line(file, number, "wanted an id, a title and genres")
        own = [
            name for name, flag in zip(names, parts[len(parts) - len(names) :], strict=True) if flag == "1"
        ]
        yield parts[0], parts[1], own if flags else parts[2].split("|")


def _lines(file: Path) -> list[str]:
    """Of UTF-8, or Latin-1 as the older sets are, no blank ones at the end; none where there is no file."""
    if not file.is_file():
        return []
    raw = file.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return text.rstrip().replace("\r\n", "\n").split("\n")
