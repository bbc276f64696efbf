"""Reading line by line with Polars, and finding the line that a fast read failed on."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import polars as pl

from cemg.errors import UserError

Fields = dict[str, type[pl.DataType]]
READ_ERRORS = (pl.exceptions.PolarsError, OSError, EOFError, zlib.error)
KINDS: dict[type[pl.DataType], tuple[str, tuple[type, ...]]] = {
    pl.String: ("a text", (str,)),
    pl.Int64: ("an integer", (int,)),
    pl.Float64: ("a number", (int, float)),
}


def bad_line(path: Path, number: int, reason: str) -> UserError:
    """The error that says where a file is malformed."""
    return UserError(f"{path}, line {number}: {reason}")


def empty_file(path: Path) -> UserError:
    return UserError(f"{path} is empty", fix="download or export it again")


def open_text(path: Path) -> IO[str]:
    """Open a text file, gzip or plain, as UTF-8."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def first_line(path: Path) -> str:
    """The first line, "" where the file is empty or no text."""
    try:
        with open_text(path) as file:
            return file.readline(1 << 20).strip()  # a device may never end it
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        return ""


def scan_lines(path: Path) -> pl.LazyFrame:
    """A frame ``number`` (from 1), ``line`` (null where blank) of a text file, gzip or plain."""
    return pl.scan_csv(
        path,
        has_header=False,
        separator="\x01",  # no text holds it: the line is the only column
        quote_char=None,
        schema={"line": pl.String},
        row_index_name="number",
        row_index_offset=1,
        truncate_ragged_lines=True,
    )


def read_lines(query: pl.LazyFrame, path: Path) -> pl.DataFrame:
    """Run a query on `scan_lines`; an unreadable or empty file is the user's error."""
    try:
        return query.collect()
    except pl.exceptions.NoDataError as error:
        raise empty_file(path) from error
    except READ_ERRORS as error:
        check_lines(path, lambda line: None)
        raise UserError(f"{path} cannot be read: {error}") from error


def read_json_lines(path: Path, fields: Fields) -> pl.DataFrame:
    """The ``fields`` of a file with a JSON object a line, gzip or plain; each must be there in each line."""
    try:
        frame = pl.scan_ndjson(path, schema=fields).collect()
    except READ_ERRORS as error:
        check_lines(path, lambda line: _json_fault(line, fields))
        raise UserError(f"{path} cannot be read: {error}") from error
    if frame.is_empty():
        raise empty_file(path)
    if sum(frame.null_count().row(0)):
        check_lines(path, lambda line: _json_fault(line, fields))
        raise UserError(f"{path}: a line lacks one of {', '.join(fields)}")
    return frame


def check_lines(path: Path, fault: Callable[[str], str | None]) -> None:
    """Slow second pass: raise for the first line that is unreadable or in which ``fault`` finds a reason."""
    number = 0
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                reason = fault(line) if line.strip() else None
                if reason:
                    raise bad_line(path, number, reason)
    except UnicodeDecodeError as error:
        raise bad_line(path, number + 1, f"no UTF-8 text: {error.reason}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise bad_line(path, number + 1, f"the file is damaged or cut short: {error}") from error


def check_width(path: Path, *, separator: str, quoted: bool) -> None:
    """Raise for the first line of a table that has more or fewer fields than its header."""
    with open_text(path) as file:
        rows = csv.reader(file, delimiter=separator, quotechar='"' if quoted else None)
        header = next(rows, [])
        for row in rows:
            if row and len(row) != len(header):
                raise bad_line(path, rows.line_num, f"{len(row)} fields where the header has {len(header)}")


def line_of_record(path: Path, record: int, *, quoted: bool) -> int:
    """The line on which a table's record (from 0, after the header, blank lines not counted) ends."""
    with open_text(path) as file:
        rows = csv.reader(file, delimiter="," if quoted else "\t", quotechar='"' if quoted else None)
        next(rows, None)
        lines = (rows.line_num for row in rows if any(row))
        return next(itertools.islice(lines, record, None), record + 2)


def _json_fault(line: str, fields: Fields) -> str | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return f"no valid JSON: {error.msg} at column {error.colno}"
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        return f"no valid JSON: {error}"
    if not isinstance(record, dict):
        return f"wanted a JSON object, got {type(record).__name__}"
    return next((fault for name, kind in fields.items() if (fault := _field_fault(record, name, kind))), None)


def _field_fault(record: dict[str, Any], name: str, kind: type[pl.DataType]) -> str | None:
    value = record.get(name)
    if value is None:
        return f"no field {name!r}"
    words, types = KINDS[kind]
    if isinstance(value, bool) or not isinstance(value, types):
        return f"field {name!r} is {value!r}, wanted {words}"
    return None
