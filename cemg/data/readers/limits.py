"""Limits on source files: endless files, and files too large for memory, are rejected before reading."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from cemg.errors import UserError

MAX_COLUMNS = 2_000  # of a table
MAX_LINE = 16 << 20  # bytes of a table's first line
FREE_BYTES, MAX_EXPANSION = 1 << 30, 100  # gzip may expand to more bytes only by this factor (text: 3 to 20)
FREE_ROWS, MAX_ROWS_PER_BYTE = 10_000_000, 100  # likewise for Parquet; real tables need some bits per row
TABLES = (".csv", ".tsv", ".inter", ".item")


def check_source(path: Path) -> None:
    """Check a source before it is read. A path that does not exist is left to the reader.

    Raises:
        UserError: ``path``, or a file in it, is a device or a pipe, has too many columns, or expands beyond
            the limits.
    """
    if path.exists() and not path.is_dir() and not path.is_file():
        raise UserError(f"{path} is not a regular file", fix="copy its content to a file first")
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        if file.suffix == ".gz":
            _check_expansion(file)
        if file.suffix == ".parquet":
            _check_parquet(file)
        if file.with_suffix("").suffix in TABLES if file.suffix == ".gz" else file.suffix in TABLES:
            _check_header(file)


def _check_expansion(file: Path) -> None:
    """Unpack a gzip file once to measure it, unless it is small: deflate expands by at most 1,032."""
    size = file.stat().st_size
    if size * 1_032 <= FREE_BYTES:
        return
    unpacked = 0
    try:
        with gzip.open(file, "rb") as stream:
            while part := stream.read(1 << 24):
                unpacked += len(part)
                if unpacked > FREE_BYTES and unpacked > MAX_EXPANSION * size:
                    raise UserError(
                        f"{file} expands to more than {MAX_EXPANSION} times its size",
                        cause=f"its {size:,} bytes expand to more than {unpacked:,}",
                        fix="if this is intended, unpack the file yourself",
                    )
    except (OSError, EOFError, zlib.error):
        return  # damaged; the reader reports the line


def _check_parquet(file: Path) -> None:
    from pyarrow import ArrowException, parquet

    try:
        about = parquet.read_metadata(file)
    except (OSError, ArrowException):
        return  # damaged; the reader reports how
    if about.num_columns > MAX_COLUMNS:
        raise _too_wide(file, about.num_columns)
    if about.num_rows > max(FREE_ROWS, MAX_ROWS_PER_BYTE * file.stat().st_size):
        cause = f"its {file.stat().st_size:,} bytes claim to contain {about.num_rows:,} rows"
        raise UserError(f"{file} expands to too many rows", cause=cause)


def _check_header(file: Path) -> None:
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            line = stream.readline(MAX_LINE)
    except (OSError, EOFError, zlib.error):
        return
    if len(line) == MAX_LINE:
        raise UserError(
            f"{file}, line 1 is longer than {MAX_LINE >> 20} MiB", fix="write one record per line"
        )
    columns = 1 + max(line.count(separator) for separator in (b",", b"\t", b";", b"|"))
    if columns > MAX_COLUMNS:
        raise _too_wide(file, columns)


def _too_wide(file: Path, columns: int) -> UserError:
    return UserError(
        f"{file} has {columns:,} columns; the limit is {MAX_COLUMNS:,}",
        fix="keep the columns of users, items, times, titles and texts",
    )
