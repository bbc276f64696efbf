"""MovieLens as GroupLens publishes it: 100K (``u.data``), 1M and 10M (``ratings.dat``), later ones (CSV)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from cemg.data.readers.lines import read_lines, scan_lines
from cemg.data.readers.raw import ITEM_SCHEMA, Raw, no_items
from cemg.data.readers.tables import open_table
from cemg.data.readers.text import clean, sentences
from cemg.data.readers.textfile import UTF8, TextFile, bad_line, empty_file
from cemg.data.readers.values import read_ids, read_numbers, read_times
from cemg.errors import UserError

LAYOUTS = {
    "u.data": ("\t", "u.item"),
    "ratings.dat": ("::", "movies.dat"),
    "ratings.csv": (",", "movies.csv"),
}
NO_GENRE = ("(no genres listed)", "unknown")


def read_movielens(path: Path, *, items: Path | None = None, encoding: str = "") -> Raw:
    """Read a folder of MovieLens, or its file of ratings; an item's text is its title and its genres.

    ``items`` None is the file of films beside the ratings.
    """
    files = [path / name for name in LAYOUTS if (path / name).is_file()] if path.is_dir() else [path]
    if len(files) != 1 or files[0].name not in LAYOUTS:
        raise UserError(f"{path}: wanted one of {', '.join(LAYOUTS)}")
    file = files[0]
    separator, items_name = LAYOUTS[file.name]
    films = items or file.with_name(items_name)
    there = films.is_file()
    interactions, notes = (
        _ratings_csv(file, encoding) if separator == "," else _ratings(TextFile(file, encoding), separator)
    )
    return Raw(
        name=file.resolve().parent.name,
        interactions=interactions,
        describe=(lambda wanted: _describe(films, encoding)) if there else no_items,
        items_file=films if there else None,
        notes=[*notes, *([] if there else [f"no {films.name}: items have no text"])],
    )


def _ratings_csv(file: Path, encoding: str) -> tuple[pl.DataFrame, list[str]]:
    table = open_table(file, encoding=encoding)
    rows = pl.DataFrame({
        "user": table.ids("userId"),
        "item": table.ids("movieId"),
        "timestamp": table.times("timestamp"),
        "rating": table.numbers("rating"),
    })  # fmt: skip
    return rows, table.notes


def _ratings(file: TextFile, separator: str) -> tuple[pl.DataFrame, list[str]]:
    """User, item, rating and time of each line."""
    part = pl.col("line").str.strip_chars_end("\r").str.split(separator)
    names = ("user", "item", "rating", "timestamp")
    query = scan_lines(file).drop_nulls().select("number", part.list.len().alias("parts"), *(
        part.list.get(place, null_on_oob=True).alias(name) for place, name in enumerate(names)
    ))  # fmt: skip
    frame = read_lines(query, file)
    if frame.is_empty():
        raise empty_file(file.path)

    def refuse(bad: pl.Series, reason: str, fix: str | None) -> UserError:
        return bad_line(file.path, frame["number"].filter(bad)[0], reason, fix=fix)

    odd = frame["parts"] != len(names)
    if odd.any():
        raise refuse(odd, f"wanted {separator.join(names)}", None)
    users, said = read_ids(frame["user"], refuse)
    items, more = read_ids(frame["item"], refuse)
    times, last = read_times(frame["timestamp"], refuse)
    ratings = read_numbers(frame["rating"], refuse)
    rows = pl.DataFrame({"user": users, "item": items, "timestamp": times, "rating": ratings})
    return rows, [f"{file.name}: {note}" for note in (*said, *more, *last)]


def _describe(file: Path, encoding: str) -> pl.DataFrame:
    rows = []
    films = _movies_csv(file, encoding) if file.suffix == ".csv" else _movies(file, encoding)
    for item, title, genres in films:
        named = [genre for genre in genres if genre not in NO_GENRE]
        rows.append((item, clean(title), sentences([clean(title), ", ".join(named)]), None))
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")


def _movies_csv(file: Path, encoding: str) -> Iterator[tuple[str, str, list[str]]]:
    table = open_table(file, encoding=encoding)
    parts = (table.column(name) for name in ("title", "genres"))
    for item, title, genres in zip(table.ids("movieId"), *parts, strict=True):
        yield item, title, genres.split("|")


def _movies(file: Path, encoding: str) -> Iterator[tuple[str, str, list[str]]]:
    """``movies.dat``: id, title, genres. ``u.item``: id, title, …, a flag for each genre of ``u.genre``."""
    flags = file.name == "u.item"
    names = [line.split("|")[0] for line in _lines(file.with_name("u.genre"), encoding)] if flags else []
    for number, line in enumerate(_lines(file, encoding), start=1):
        parts = line.split("|" if flags else "::")
        if len(parts) < (2 + len(names) if flags else 3):
            raise bad_line(file, number, "wanted an id, a title and genres")
        own = [
            name for name, flag in zip(names, parts[len(parts) - len(names) :], strict=True) if flag == "1"
        ]
        yield parts[0].strip(), parts[1], own if flags else parts[2].split("|")


def _lines(file: Path, encoding: str) -> list[str]:
    """Without blank lines at the end; none where there is no file. The older sets are Latin-1, not UTF-8."""
    if not file.is_file():
        return []
    text = TextFile(file, encoding)
    if not encoding and text.codec == UTF8:
        try:
            file.read_bytes().decode()
        except UnicodeDecodeError:
            text = TextFile(file, "latin-1")
    return text.text().rstrip().replace("\r\n", "\n").split("\n")
