"""Reading line by line with Polars, and finding the line that a fast read failed on."""

from __future__ import annotations

import csv
import itertools
import zlib
from collections.abc import Callable

import polars as pl

from cemg.data.readers.textfile import TextFile, bad_line, empty_file
from cemg.errors import UserError

READ_ERRORS = (pl.exceptions.PolarsError, OSError, EOFError, zlib.error)


def scan_lines(file: TextFile) -> pl.LazyFrame:
    """A frame ``number`` (from 1), ``line`` (null where blank) of a text file."""
    return pl.scan_csv(
        file.source(),
        glob=False,
        has_header=False,
        separator="\x01",  # no text holds it: the line is the only column
        quote_char=None,
        schema={"line": pl.String},
        row_index_name="number",
        row_index_offset=1,
        truncate_ragged_lines=True,
    )


def read_lines(query: pl.LazyFrame, file: TextFile) -> pl.DataFrame:
    """Run a query on `scan_lines`; an unreadable or empty file is the user's error."""
    try:
        return query.collect()
    except pl.exceptions.NoDataError as error:
        raise empty_file(file.path) from error
    except READ_ERRORS as error:
        check_lines(file, lambda line: None)
        raise UserError(f"{file.path} cannot be read: {error}") from error


def check_lines(file: TextFile, fault: Callable[[str], str | None]) -> None:
    """Slow second pass: raise for the first line that is unreadable or in which ``fault`` finds a reason."""
    for number, line in enumerate(file.lines(), start=1):
        reason = fault(line) if line.strip() else None
        if reason:
            raise bad_line(file.path, number, reason)


def check_width(file: TextFile, *, separator: str, quoted: bool) -> None:
    """Raise for the first line of a table that has other fields than its first line.

    Empty fields at the end of a line, those of a trailing separator, do not count.
    """
    rows = csv.reader(file.lines(), delimiter=separator, quotechar='"' if quoted else None)
    header = next(rows, [])
    for row in rows:
        if len(row) > len(header) and any(row[len(header) :]):
            raise bad_line(
                file.path, rows.line_num, f"{len(row)} fields where the first line has {len(header)}"
            )


def check_quotes(file: TextFile, *, separator: str) -> None:
    """Raise for the first record of a table whose quoted field is not closed, or goes on behind it."""
    rows = csv.reader(file.lines(), delimiter=separator, strict=True)
    begin = 1
    try:
        for _ in rows:
            begin = rows.line_num + 1
    except csv.Error:
        raise bad_line(
            file.path, begin, "a quoted field is not closed, or text follows its closing quote",
            fix='write a quote within a quoted field twice: "say ""hi"""',
        ) from None  # fmt: skip


def line_of_record(file: TextFile, record: int, *, separator: str, quoted: bool, header: bool) -> int:
    """The line on which a table's record (from 0, blank lines and the header not counted) ends."""
    rows = csv.reader(file.lines(), delimiter=separator, quotechar='"' if quoted else None)
    lines = (rows.line_num for row in rows if any(row))
    place = record + header
    return next(itertools.islice(lines, place, None), place + 1)
