"""MovieLens in GroupLens's files: 100K (``u.data``), 1M and 10M (``ratings.dat``), later releases (CSV)."""

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
    """Read ratings and movies. The text of an item is its title and its genres.

    Args:
        path: Folder of MovieLens, or its file of ratings.
        items: File of movies; None takes the one next to the ratings.
        encoding: Encoding of the files; "" detects it.
    """
    files = [path / name for name in LAYOUTS if (path / name).is_file()] if path.is_dir() else [path]
    if len(files) != 1 or files[0].name not in LAYOUTS:
        raise UserError(f"{path}: expected exactly one of {', '.join(LAYOUTS)}")
    file = files[0]
    separator, items_name = LAYOUTS[file.name]
    movies = items or file.with_name(items_name)
    has_movies = movies.is_file()
    interactions, notes = (
        _ratings_csv(file, encoding) if separator == "," else _ratings(TextFile(file, encoding), separator)
    )
    return Raw(
        name=file.resolve().parent.name,
        interactions=interactions,
        describe=(lambda item_ids: _describe(movies, encoding)) if has_movies else no_items,
        items_file=movies if has_movies else None,
        notes=[*notes, *([] if has_movies else [f"there is no {movies.name}: items have no text"])],
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
    """Read lines of user, item, rating and time."""
    part = pl.col("line").str.strip_chars_end("\r").str.split(separator)
    names = ("user", "item", "rating", "timestamp")
    query = scan_lines(file).drop_nulls().select("number", part.list.len().alias("parts"), *(
        part.list.get(index, null_on_oob=True).alias(name) for index, name in enumerate(names)
    ))  # fmt: skip
    frame = read_lines(query, file)
    if frame.is_empty():
        raise empty_file(file.path)

    def refuse(bad: pl.Series, reason: str, fix: str | None) -> UserError:
        return bad_line(file.path, frame["number"].filter(bad)[0], reason, fix=fix)

    odd = frame["parts"] != len(names)
    if odd.any():
        raise refuse(odd, f"expected {separator.join(names)}", None)
    users, user_notes = read_ids(frame["user"], refuse)
    items, item_notes = read_ids(frame["item"], refuse)
    times, time_notes = read_times(frame["timestamp"], refuse)
    ratings = read_numbers(frame["rating"], refuse)
    rows = pl.DataFrame({"user": users, "item": items, "timestamp": times, "rating": ratings})
    return rows, [f"{file.name}: {note}" for note in (*user_notes, *item_notes, *time_notes)]


def _describe(file: Path, encoding: str) -> pl.DataFrame:
    rows = []
    movies = _movies_csv(file, encoding) if file.suffix == ".csv" else _movies(file, encoding)
    for item, title, genres in movies:
        genres = [genre for genre in genres if genre not in NO_GENRE]
        rows.append((item, clean(title), sentences([clean(title), ", ".join(genres)]), None))
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")


def _movies_csv(file: Path, encoding: str) -> Iterator[tuple[str, str, list[str]]]:
    table = open_table(file, encoding=encoding)
    parts = (table.column(name) for name in ("title", "genres"))
    for item, title, genres in zip(table.ids("movieId"), *parts, strict=True):
        yield item, title, genres.split("|")


def _movies(file: Path, encoding: str) -> Iterator[tuple[str, str, list[str]]]:
    """Read ``movies.dat`` (id, title, genres) or ``u.item`` (id, title, …, one flag per genre)."""
    flags = file.name == "u.item"
    names = [line.split("|")[0] for line in _lines(file.with_name("u.genre"), encoding)] if flags else []
    for number, line in enumerate(_lines(file, encoding), start=1):
        parts = line.split("|" if flags else "::")
        if len(parts) < (2 + len(names) if flags else 3):
            raise bad_line(file, number, "expected an id, a title and genres")
        flagged = [
            name for name, flag in zip(names, parts[len(parts) - len(names) :], strict=True) if flag == "1"
        ]
        yield parts[0].strip(), parts[1], flagged if flags else parts[2].split("|")


def _lines(file: Path, encoding: str) -> list[str]:
    """Read lines, without blank ones at the end; [] without a file. The older releases are in Latin-1."""
    if not file.is_file():
        return []
    text = TextFile(file, encoding)
    if not encoding and text.codec == UTF8:
        try:
            file.read_bytes().decode()
        except UnicodeDecodeError:
            text = TextFile(file, "latin-1")
    return text.text().rstrip().replace("\r\n", "\n").split("\n")
