"""CSV and Parquet with named columns, and the checked reading of tables that RecBole's reader shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from cemg.data.readers.lines import (
    READ_ERRORS,
    bad_line,
    check_lines,
    check_width,
    empty_file,
    line_of_record,
)
from cemg.data.readers.raw import ITEM_SCHEMA, Raw, no_items
from cemg.data.readers.text import clean
from cemg.errors import UserError


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """What the columns are called: ``user`` … ``rating`` of the interactions, the rest of the items file."""

    user: str = "user"
    item: str = "item"
    timestamp: str = "timestamp"
    rating: str = "rating"
    title: str = "title"
    text: str = "text"
    image: str = "image"

    def __post_init__(self) -> None:
        required = (self.user, self.item, self.timestamp)
        if len(set(required)) < len(required) or not all(required):
            raise UserError(f"user, item and timestamp must be three columns, got {', '.join(required)}")


COMMON_NAMES = (
    ColumnNames(),
    ColumnNames(user="user_id", item="item_id"),
    ColumnNames(user="user_id", item="parent_asin"),
    ColumnNames(user="userId", item="movieId"),
)


def read_table(path: Path, columns: ColumnNames | None, *, suffix: str) -> Raw:
    """Read ``interactions.csv`` (or ``.parquet``) of a folder, or a file; ``items.*`` beside it is optional.

    ``columns=None`` takes `ColumnNames` as they are, or user_id with item_id or parent_asin, or MovieLens's.
    """
    file = path / f"interactions{suffix}" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} is missing", fix="name the file of interactions in place of its folder")
    frame = read_columns(file)
    names = columns or _guess(frame)
    items = file.parent / f"items{suffix}"
    described = items.is_file() and items != file
    return Raw(
        name=path.resolve().name if path.is_dir() else file.stem,
        interactions=_interactions(frame, file, names),
        describe=(lambda wanted: _describe(items, names)) if described else no_items,
        image_folder=file.parent,
        notes=[] if described else [f"no {items.name}: items have no text"],
    )


def read_columns(file: Path, *, separator: str = ",", quoted: bool = True) -> pl.DataFrame:
    """All columns of a table; as text where the file is text."""
    try:
        if file.suffix == ".parquet":
            frame = pl.read_parquet(file)
        else:
            quote = '"' if quoted else None
            frame = pl.read_csv(file, separator=separator, quote_char=quote, infer_schema=False)
    except pl.exceptions.NoDataError as error:
        raise empty_file(file) from error
    except READ_ERRORS as error:
        if file.suffix != ".parquet":
            check_lines(file, lambda line: None)
            check_width(file, separator=separator, quoted=quoted)
        raise UserError(f"{file} cannot be read: {error}") from error
    blank = pl.all_horizontal(pl.all().is_null())
    if frame.is_empty() or (frame := frame.filter(~blank)).is_empty():
        raise empty_file(file)
    return frame


def column(frame: pl.DataFrame, file: Path, name: str) -> pl.Series:
    """A column; UserError lists those there are. A missing value is refused with its line."""
    if name not in frame.columns:
        there = ", ".join(frame.columns)
        raise bad_line(file, 1, f"no column {name!r}; the columns are {there}")
    series = frame[name]
    if series.null_count():
        raise _bad_row(file, series.is_null(), f"column {name!r} is empty")
    return series


def number_column(frame: pl.DataFrame, file: Path, name: str, *, whole: bool) -> pl.Series:
    """A column as Int64 (``whole``) or Float64; what is no such number is refused with its line."""
    series = column(frame, file, name)
    if isinstance(series.dtype, pl.Datetime | pl.Date):
        return series.cast(pl.Datetime("us")).dt.epoch("us")
    numbers = series.cast(pl.Int64 if whole else pl.Float64, strict=False)
    if series.dtype.is_float() and whole:
        numbers = numbers.set(numbers.cast(pl.Float64) != series, None)
    bad = numbers.is_null() if whole else numbers.is_null() | ~numbers.is_finite().fill_null(False)
    if bad.any():
        value = series.filter(bad)[0]
        wanted = "an integer" if whole else "a number"
        raise _bad_row(file, bad, f"column {name!r} is {value!r}, wanted {wanted}")
    return numbers


def _bad_row(file: Path, bad: pl.Series, reason: str) -> UserError:
    row = int(bad.arg_true()[0])
    if file.suffix == ".parquet":
        return UserError(f"{file}, row {row + 1}: {reason}")
    return bad_line(file, line_of_record(file, row, quoted=file.suffix == ".csv"), reason)


def _guess(frame: pl.DataFrame) -> ColumnNames:
    there = set(frame.columns)
    fitting = (names for names in COMMON_NAMES if {names.user, names.item, names.timestamp} <= there)
    return next(fitting, ColumnNames())


def _interactions(frame: pl.DataFrame, file: Path, names: ColumnNames) -> pl.DataFrame:
    rows = {
        "user": column(frame, file, names.user).cast(pl.String),
        "item": column(frame, file, names.item).cast(pl.String),
        "timestamp": number_column(frame, file, names.timestamp, whole=True),
    }
    if names.rating in frame.columns:
        rows["rating"] = number_column(frame, file, names.rating, whole=False)
    return pl.DataFrame(rows)


def _describe(file: Path, names: ColumnNames) -> pl.DataFrame:
    """Titles, texts (the title where there is no text) and image paths, relative to the items file."""
    frame = read_columns(file)
    ids = column(frame, file, names.item).cast(pl.String)
    titles, texts, images = (
        frame[name].cast(pl.String).to_list() if name in frame.columns else [None] * frame.height
        for name in (names.title, names.text, names.image)
    )
    rows = [
        (item, clean(title), clean(text) or clean(title) or None, image)
        for item, title, text, image in zip(ids, titles, texts, images, strict=True)
    ]
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")
