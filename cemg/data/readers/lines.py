"""Reading lines with Polars, and finding the line on which a fast read failed."""

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
    """Scan a text file into the columns ``number`` (from 1) and ``line`` (null if blank)."""
    return pl.scan_csv(
        file.source(),
        glob=False,
        has_header=False,
        separator="\x01",  # occurs in no text, so the line is the only column
        quote_char=None,
        schema={"line": pl.String},
        row_index_name="number",
        row_index_offset=1,
        truncate_ragged_lines=True,
    )


def read_lines(query: pl.LazyFrame, file: TextFile) -> pl.DataFrame:
    """Run a query on `scan_lines`. Raises UserError for an unreadable or empty file."""
    try:
        return query.collect()
    except pl.exceptions.NoDataError as error:
        raise empty_file(file.path) from error
    except READ_ERRORS as error:
        check_lines(file, lambda line: None)
        raise UserError(f"{file.path} cannot be read: {error}") from error


def check_lines(file: TextFile, fault: Callable[[str], str | None]) -> None:
    """Find the first faulty line in a slow second pass.

    Raises:
        UserError: A line is unreadable, or ``fault`` returns a reason for it.
    """
    for number, line in enumerate(file.lines(), start=1):
        reason = fault(line) if line.strip() else None
        if reason:
            raise bad_line(file.path, number, reason)


def check_width(file: TextFile, *, separator: str, quoted: bool) -> None:
    """Raise UserError for the first line with more fields than the header.

    Empty fields at the end of a line, after trailing separators, do not count.
    """
    rows = csv.reader(file.lines(), delimiter=separator, quotechar='"' if quoted else None)
    header = next(rows, [])
    for row in rows:
        if len(row) > len(header) and any(row[len(header) :]):
            raise bad_line(
                file.path, rows.line_num, f"it has {len(row)} fields, the first line has {len(header)}"
            )


def check_quotes(file: TextFile, *, separator: str) -> None:
    """Raise UserError for the first record with an unclosed quote, or with text after a closing quote."""
    rows = csv.reader(file.lines(), delimiter=separator, strict=True)
    first_line = 1  # of the record
    try:
        for _ in rows:
            first_line = rows.line_num + 1
    except csv.Error:
        raise bad_line(
            file.path, first_line, "a quoted field is not closed, or text follows its closing quote",
            fix='double a quote inside a quoted field: "say ""hi"""',
        ) from None  # fmt: skip


def line_of_record(file: TextFile, record: int, *, separator: str, quoted: bool, header: bool) -> int:
    """Return the line on which a record ends. Records count from 0, without blank lines and the header."""
    rows = csv.reader(file.lines(), delimiter=separator, quotechar='"' if quoted else None)
    lines = (rows.line_num for row in rows if any(row))
    index = record + header
    return next(itertools.islice(lines, index, None), index + 1)
