"""CSV and Parquet tables with named columns; other readers use them too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from cemg.data.readers.columns import COLUMNS_FIX, ITEM_IDS, ColumnNames
from cemg.data.readers.limits import check_source
from cemg.data.readers.lines import READ_ERRORS, check_lines, check_quotes, check_width, line_of_record
from cemg.data.readers.textfile import TextFile, bad_line, empty_file
from cemg.data.readers.values import Refuse, read_ids, read_numbers, read_times
from cemg.errors import UserError

SEPARATORS = (",", ";", "\t", "|")
SEPARATOR_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}
REPEATED = "_duplicated_0"  # Polars appends this to a column name that occurs a second time
PARQUET = ".parquet"


@dataclass(frozen=True, slots=True)
class Table:
    """The columns of a file, and what is needed to find the line of a row for an error.

    Attributes:
        path: The file, or the folder of Parquet files.
        frame: The columns; those of a text file are String.
        text: The text file; None for Parquet.
        separator: Field separator of the text file.
        quoted: Whether fields may be quoted.
        header: Whether the first line has the names of the columns.
        notes: Notes for the user, collected while columns are read.
    """

    path: Path
    frame: pl.DataFrame
    text: TextFile | None = None  # None: Parquet
    separator: str = ","
    quoted: bool = True
    header: bool = True
    notes: list[str] = field(default_factory=list)

    def column(self, name: str) -> pl.Series:
        """Return a column. Raises UserError if it does not exist, or has an empty value."""
        if name not in self.frame.columns:
            raise self.no_column(name)
        is_repeated = f"{name}{REPEATED}" in self.frame.columns
        if is_repeated and self.text is not None and REPEATED not in self.text.first_line():
            raise bad_line(self.path, 1, f"two columns are named {name!r}", fix="rename one of them")
        series = self.frame[name]
        if series.null_count():
            raise self.refuse(series.is_null(), f"column {name!r} is empty", None)
        return series

    def has(self, name: str) -> bool:
        return name in self.frame.columns

    def ids(self, name: str) -> pl.Series:
        """Return a column as ids, String; see `read_ids`."""
        return self._read(name, read_ids)

    def times(self, name: str) -> pl.Series:
        """Return a column as times; see `read_times`."""
        return self._read(name, read_times)

    def numbers(self, name: str) -> pl.Series:
        """Return a column as Float64; see `read_numbers`."""
        return read_numbers(self.column(name), self.refuse, decimal_comma=self.separator == ";")

    def texts(self, name: str) -> list[str | None]:
        """Return a column as texts, None where empty. Raises UserError if it does not exist."""
        if name not in self.frame.columns:
            raise self.no_column(name)
        return self.frame[name].cast(pl.String).to_list()

    def refuse(self, bad: pl.Series, reason: str, fix: str | None) -> UserError:
        """Return the error for the first row of the mask ``bad``."""
        row = int(bad.arg_true()[0])
        if self.text is None:
            return UserError(f"{self.path}, row {row + 1}: {reason}", fix=fix)
        line = line_of_record(
            self.text, row, separator=self.separator, quoted=self.quoted, header=self.header
        )
        if row == 0 and not self.header:
            fix = "if this line is a header, name the columns by their names; " + (fix or "")
        return bad_line(self.path, line, reason, fix=fix and fix.removesuffix("; "))

    def _read(self, name: str, read: Callable[[pl.Series, Refuse], tuple[pl.Series, list[str]]]) -> pl.Series:
        values, notes = read(self.column(name), self.refuse)
        self.notes.extend(f"{self.path.name}: {note}" for note in notes)
        return values

    def no_column(self, name: str, *, fix: str = COLUMNS_FIX) -> UserError:
        """Return the error for a column that does not exist. It lists the existing ones."""
        reason = f"no column {name!r}; the columns are {', '.join(self.frame.columns)}"
        if self.text is None:
            return UserError(f"{self.path}: {reason}", fix=fix)
        return bad_line(self.path, 1, reason, fix=fix)


def open_table(
    path: Path, *, encoding: str = "", separator: str = "", quoted: bool = True, header: bool = True
) -> Table:
    """Read all columns of a file. Rows without any value are dropped.

    Args:
        path: CSV or Parquet file, or a folder of Parquet files.
        encoding: Encoding of a text file; "" is the one of its byte order mark, or UTF-8.
        separator: Field separator; "" is the most frequent one in the first line.
        quoted: Whether fields may be quoted.
        header: Whether the first line has the names of the columns; without it they are "#1", "#2", …

    Raises:
        UserError: The file is malformed. The error names the line.
    """
    if path.is_dir() or path.suffix == PARQUET:
        return _checked(Table(path, _read_parquet(path)))
    file = TextFile(path, encoding)
    separator = _separator(file, separator)
    frame = _read_csv(file, separator=separator, quoted=quoted, header=header)
    if not header:
        frame = frame.rename({name: f"#{n}" for n, name in enumerate(frame.columns, start=1)})
    stripped = [name.strip() for name in frame.columns]
    if len(set(stripped)) == len(stripped):
        frame = frame.rename(dict(zip(frame.columns, stripped, strict=True)))
    return _checked(Table(path, frame, file, separator, quoted, header))


def shards(folder: Path) -> list[Path]:
    """List the Parquet files of a folder by name, without hidden ones and the items file."""
    patterns = (f"*{PARQUET}", f"*=*/**/*{PARQUET}")  # in the folder itself, or in partitions such as day=3
    paths = (path for pattern in patterns for path in folder.glob(pattern))
    files = (path.relative_to(folder) for path in paths if path.is_file())
    visible = [file for file in files if not any(part.startswith((".", "_")) for part in file.parts)]
    return [folder / file for file in sorted(visible) if str(file) != f"items{PARQUET}"]


def _checked(table: Table) -> Table:
    """Drop rows without any value. Raises UserError for an empty table."""
    if table.text is not None and any("\r" in name for name in table.frame.columns):
        raise bad_line(
            table.path, 1, "lines end with a lone carriage return", fix="end each line with a newline"
        )
    blank = pl.all_horizontal(pl.all().is_null())
    if table.frame.is_empty() or table.frame.filter(~blank).is_empty():
        raise empty_file(table.path)
    return Table(
        table.path, table.frame.filter(~blank), table.text, table.separator, table.quoted, table.header
    )


def _separator(file: TextFile, requested: str) -> str:
    """Return the requested separator, or the most frequent one in the first line."""
    if requested:
        separator = SEPARATOR_NAMES.get(requested, requested)
        if len(separator.encode()) != 1 or separator in '"\r\n':
            raise UserError(f"{requested!r} is not a valid separator", fix='use one character, or "tab"')
        return separator
    outside = "".join(file.first_line().split('"')[::2])  # the text outside of quotes
    candidates = ("\t", *SEPARATORS) if file.suffix == ".tsv" else SEPARATORS
    return max(candidates, key=outside.count)


def _read_csv(file: TextFile, *, separator: str, quoted: bool, header: bool) -> pl.DataFrame:
    def read(*, truncate: bool = False) -> pl.DataFrame:
        return pl.read_csv(
            file.source(), separator=separator, quote_char='"' if quoted else None, infer_schema=False,
            has_header=header, truncate_ragged_lines=truncate, glob=False,
        )  # fmt: skip

    try:
        return read()
    except pl.exceptions.NoDataError as error:
        raise empty_file(file.path) from error
    except READ_ERRORS as error:
        check_lines(file, lambda line: None)
        check_width(file, separator=separator, quoted=quoted)
        if quoted:
            check_quotes(file, separator=separator)
        try:
            return read(truncate=True)  # the surplus fields are empty
        except READ_ERRORS:
            raise UserError(f"{file.path} cannot be read: {error}") from error


def _read_parquet(path: Path) -> pl.DataFrame:
    files = shards(path) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} has no {PARQUET} file")
    frames = []
    for file in files:
        check_source(file)
        try:
            frames.append(pl.read_parquet(file, glob=False))
        except READ_ERRORS as error:
            raise UserError(f"{file} cannot be read: {error}") from error
    for file, frame in zip(files, frames, strict=True):
        if set(frame.columns) != set(frames[0].columns):
            raise UserError(
                f"{file} has other columns than {files[0]}",
                cause=f"{', '.join(frame.columns)} versus {', '.join(frames[0].columns)}",
            )
    try:
        return pl.concat([frame.select(frames[0].columns) for frame in frames], how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise UserError(f"the files of {path} have columns of different types", cause=str(error)) from error


def item_key(table: Table, columns: ColumnNames | None) -> str:
    """Return the id column of an items file: the requested one, the interactions' one, or a usual name."""
    if columns is not None and columns.id is not None:
        return columns.id
    item = columns.item if columns is not None else ColumnNames().item
    usual = () if columns is not None and not columns.headerless else ITEM_IDS
    return next((name for name in (item, *usual) if table.has(name)), item)
