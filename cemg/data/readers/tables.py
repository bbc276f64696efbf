"""CSV and Parquet with named columns, and the checked reading of tables that other readers share."""

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
AGAIN = "_duplicated_0"  # what Polars appends to a name that it reads a second time
PARQUET = ".parquet"


@dataclass(frozen=True, slots=True)
class Table:
    """Columns as read, text where the file is text, and what it takes to name the line of a row.

    ``notes`` collects what the readers of columns have to say.
    """

    path: Path
    frame: pl.DataFrame
    text: TextFile | None = None  # None: Parquet
    separator: str = ","
    quoted: bool = True
    header: bool = True
    notes: list[str] = field(default_factory=list)

    def column(self, name: str) -> pl.Series:
        """A column; UserError lists those there are. A missing value is refused with its line."""
        if name not in self.frame.columns:
            raise self.no_column(name)
        again = f"{name}{AGAIN}" in self.frame.columns
        if again and self.text is not None and AGAIN not in self.text.first_line():
            raise bad_line(self.path, 1, f"two columns are called {name!r}", fix="rename one of them")
        series = self.frame[name]
        if series.null_count():
            raise self.refuse(series.is_null(), f"column {name!r} is empty", None)
        return series

    def has(self, name: str) -> bool:
        return name in self.frame.columns

    def ids(self, name: str) -> pl.Series:
        """The column as ids, String; see `read_ids`."""
        return self._read(name, read_ids)

    def times(self, name: str) -> pl.Series:
        """The column as times; see `read_times`."""
        return self._read(name, read_times)

    def numbers(self, name: str) -> pl.Series:
        """The column as Float64."""
        return read_numbers(self.column(name), self.refuse, decimal_comma=self.separator == ";")

    def texts(self, name: str) -> list[str | None]:
        """The column as text; UserError where it is not there."""
        if name not in self.frame.columns:
            raise self.no_column(name)
        return self.frame[name].cast(pl.String).to_list()

    def refuse(self, bad: pl.Series, reason: str, fix: str | None) -> UserError:
        """The error about the first row of the mask ``bad``."""
        row = int(bad.arg_true()[0])
        if self.text is None:
            return UserError(f"{self.path}, row {row + 1}: {reason}", fix=fix)
        line = line_of_record(
            self.text, row, separator=self.separator, quoted=self.quoted, header=self.header
        )
        if row == 0 and not self.header:
            fix = "name the columns by their names if this line is a header; " + (fix or "")
        return bad_line(self.path, line, reason, fix=fix and fix.removesuffix("; "))

    def _read(self, name: str, read: Callable[[pl.Series, Refuse], tuple[pl.Series, list[str]]]) -> pl.Series:
        values, notes = read(self.column(name), self.refuse)
        self.notes.extend(f"{self.path.name}: {note}" for note in notes)
        return values

    def no_column(self, name: str, *, fix: str = COLUMNS_FIX) -> UserError:
        """The error about a column that is not there; it lists those that are."""
        reason = f"no column {name!r}; the columns are {', '.join(self.frame.columns)}"
        if self.text is None:
            return UserError(f"{self.path}: {reason}", fix=fix)
        return bad_line(self.path, 1, reason, fix=fix)


def open_table(
    path: Path, *, encoding: str = "", separator: str = "", quoted: bool = True, header: bool = True
) -> Table:
    """All columns of a CSV or Parquet file, or of a folder of Parquet files; rows without any value are
    dropped.

    ``separator`` "" is the one that the first line has most of. Without ``header`` the columns are called
    "#1", "#2", …
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
    """The Parquet files of a folder, in order of their names, without hidden ones and the items file."""
    patterns = (f"*{PARQUET}", f"*=*/**/*{PARQUET}")  # beside each other, or in partitions such as day=3
    found = (file for pattern in patterns for file in folder.glob(pattern))
    files = (file.relative_to(folder) for file in found if file.is_file())
    seen = [f for f in files if not any(part.startswith((".", "_")) for part in f.parts)]
    return [folder / file for file in sorted(seen) if str(file) != f"items{PARQUET}"]


def _checked(table: Table) -> Table:
    if table.text is not None and any("\r" in name for name in table.frame.columns):
        raise bad_line(table.path, 1, "lines end with a carriage return alone", fix="end them with a newline")
    blank = pl.all_horizontal(pl.all().is_null())
    if table.frame.is_empty() or table.frame.filter(~blank).is_empty():
        raise empty_file(table.path)
    return Table(
        table.path, table.frame.filter(~blank), table.text, table.separator, table.quoted, table.header
    )


def _separator(file: TextFile, named: str) -> str:
    if named:
        separator = SEPARATOR_NAMES.get(named, named)
        if len(separator.encode()) != 1 or separator in '"\r\n':
            raise UserError(f"{named!r} is not a valid separator", fix='one character, or "tab"')
        return separator
    outside = "".join(file.first_line().split('"')[::2])  # of an unquoted line: all of it
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
            return read(truncate=True)  # what is too much is empty
        except READ_ERRORS:
            raise UserError(f"{file.path} cannot be read: {error}") from error


def _read_parquet(path: Path) -> pl.DataFrame:
    files = shards(path) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no {PARQUET} file")
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
                cause=f"{', '.join(frame.columns)}; and {', '.join(frames[0].columns)}",
            )
    try:
        return pl.concat([frame.select(frames[0].columns) for frame in frames], how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise UserError(f"the files of {path} have columns of different types", cause=str(error)) from error


def item_key(table: Table, columns: ColumnNames | None) -> str:
    """The column of the items' ids: the one named, that of the interactions, or one of the usual names."""
    if columns is not None and columns.id is not None:
        return columns.id
    own = columns.item if columns is not None else ColumnNames().item
    usual = () if columns is not None and not columns.headerless else ITEM_IDS
    return next((name for name in (own, *usual) if table.has(name)), own)
