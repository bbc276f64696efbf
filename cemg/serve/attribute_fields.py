"""The fields of an attribute table: the types of their values, and the Polars columns that hold these.

N rows of the table, C changed rows in its overlay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import pyarrow as pa

from cemg.errors import UserError

from .dates import ISO_PATTERN, microseconds
from .expressions import check_text, check_unicode

Type = Literal["string", "number", "boolean", "list of strings", "datetime"]
TYPES: tuple[Type, ...] = get_args(Type)
Storage = Literal["string", "number", "boolean", "list of strings"]
STORAGE_OF: dict[type, Storage] = {
    str: "string", int: "number", float: "number", bool: "boolean", list: "list of strings",
}  # fmt: skip
_DTYPES: dict[Storage, Any] = {
    "string": pl.String, "number": pl.Float64, "boolean": pl.Boolean, "list of strings": pl.List(pl.String),
}  # fmt: skip


@dataclass(slots=True)
class Field:
    """One attribute: its type, and counts of its values. A field in a snapshot does not change.

    Args:
        column: Name of the column of its values. It changes when no item has a value, because the base may
            hold replaced values of another type under the old name.
        null: Name of the column that tells null from a missing value.
        declared: The type that was declared for it, or None.
        storage: How its values are stored; None without values.
        values: Number of items with a value that is not null.
        nulls: Number of items whose value is null.
        not_dates: Number of strings that are not ISO dates.
    """

    column: str
    null: str
    declared: Type | None = None
    storage: Storage | None = None
    values: int = 0
    nulls: int = 0
    not_dates: int = 0

    @property
    def type(self) -> Type | None:
        """The declared type, or that of the values: ``datetime`` if all strings are ISO dates."""
        if self.declared is None and self.storage == "string" and not self.not_dates:
            return "datetime"
        return self.declared or self.storage

    @property
    def moments(self) -> str:
        """Name of the column of microseconds since 1970 that a date has beside its string."""
        return f"{self.column}.moments"

    def count(self, value: Any, change: int) -> None:
        """Counts an added (1) or removed (-1) value."""
        if value is None:
            self.nulls += change
            return
        self.values += change
        if self.storage == "string" and microseconds(value) is None:
            self.not_dates += change

    def check(self, name: str, value: Any, item: object) -> None:
        """Raises UserError if an item cannot have this value."""
        if value is None:
            return
        storage, what = STORAGE_OF.get(type(value)), f"the attribute {name!r} of item {item!r}"
        if storage is None:
            raise UserError(
                f"{what} has the type {type(value).__name__}",
                fix=f"use one of these types: {', '.join(TYPES)}",
            )
        if self.declared == "datetime" and storage == "string" and microseconds(value) is None:
            raise UserError(f"{what} is not an ISO date: {value[:80]!r}", fix="write it as 2024-01-31")
        if storage != self.storage and self.storage is not None:
            raise UserError(
                f"{what} is a {storage}, but {name!r} is a {self.type}", cause=f"its value is {value!r:.80}"
            )
        if storage == "number" and not _is_finite(value):
            raise UserError(f"{what} is not a finite 64-bit number", cause=f"its value is {value!r:.80}")
        for text in value if isinstance(value, list) else [value] if isinstance(value, str) else []:
            if not isinstance(text, str):
                raise UserError(f"{what} has a list with {type(text).__name__}", fix="use a list of strings")
            check_unicode(text, what)


def frame_of(overlay: Mapping[int, Mapping[str, Any]], fields: Mapping[str, Field]) -> pl.DataFrame:
    """Returns the rows of an overlay, [C], with all columns of the fields."""
    rows = list(overlay.values())
    columns = [row_numbers(overlay)]
    for name, field in fields.items():
        if field.nulls:
            columns.append(pl.Series(field.null, [row.get(name, 0) is None for row in rows], pl.Boolean))
        if field.storage:
            values = [row.get(name) for row in rows]
            columns.append(_series(field, values))
            if field.type == "datetime":
                moments = {date: microseconds(date) for date in set(values) if date is not None}
                columns.append(pl.Series(field.moments, [moments.get(date) for date in values], pl.Int64))
    return pl.DataFrame(columns)


def with_overlay(base: pl.DataFrame, overlay: pl.DataFrame) -> pl.DataFrame:
    """Returns the base with the rows of the overlay in place of its own, and with the overlay's columns."""
    source = np.arange(max(base.height, overlay["row"].to_numpy().max(initial=0) + 1))  # [N]
    source[overlay["row"].to_numpy()] = base.height + np.arange(overlay.height)
    columns = [
        pl.col(name) if name in base.columns else pl.lit(None, dtype).alias(name)
        for name, dtype in overlay.schema.items()
    ]
    both = pl.concat([base.select(columns), overlay])
    return both[source].with_columns(row_numbers(range(len(source))))


def moments_of(texts: pl.Series) -> pl.Series:
    """Returns the microseconds since 1970 of strings: int64 [n], null where one is not an ISO date."""
    distinct = texts.unique().drop_nulls()
    dates = distinct.filter(distinct.str.contains(ISO_PATTERN))
    if dates.is_empty():
        return pl.Series(texts.name, [None], pl.Int64).new_from_index(0, len(texts))
    moments = pl.Series([microseconds(date) for date in dates], dtype=pl.Int64)
    return texts.replace_strict(dates, moments, default=None, return_dtype=pl.Int64)


def _series(field: Field, values: list[Any]) -> pl.Series:
    assert field.storage is not None
    if field.storage == "list of strings":  # Polars would make a series of each list
        lists = pl.Series(pa.array(values, pa.large_list(pa.large_string())))
        return lists.alias(field.column)
    if field.storage == "number":  # Polars would make null of an integer beyond 64 bits
        values = [None if value is None else float(value) for value in values]
    return pl.Series(field.column, values, _DTYPES[field.storage], strict=True)


def checked_columns(name: str, field: Field, values: list[Any], item_ids: list[str]) -> list[pl.Series]:
    """Returns the columns of a field, and counts those of its strings that are not dates.

    The checks run on the whole column; only a column that fails them is checked value by value.
    """
    kinds = {STORAGE_OF.get(kind) for kind in set(map(type, values)) - {type(None)}}
    if field.storage is None and len(kinds) == 1:
        (field.storage,) = kinds
    column, problem = None, None in kinds or kinds != {field.storage}
    if not problem:
        try:
            column = _series(field, values)
            problem = _has_problem(column)
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError, pa.ArrowException):
            problem = True
    if problem or column is None:
        for item, value in zip(item_ids, values, strict=True):
            field.check(name, value, item)
            field.storage = field.storage or STORAGE_OF.get(type(value))
        raise AssertionError(f"the values of {name!r} pass each check but not that of the column")
    if field.storage != "string":
        return [column]
    moments = moments_of(column).alias(field.moments)
    field.not_dates = moments.null_count() - column.null_count()
    if field.declared == "datetime" and field.not_dates:
        wrong = (moments.is_null() & column.is_not_null()).arg_max()
        field.check(name, values[wrong or 0], item_ids[wrong or 0])
    return [column, moments] if field.type == "datetime" else [column]


def _has_problem(column: pl.Series) -> bool:
    """Whether a number is not finite, or a list has a null."""
    if column.dtype == pl.Float64:
        return not column.is_finite().all()
    if column.dtype == pl.List(pl.String):
        return bool(column.list.eval(pl.element().is_null()).list.any().any())
    return False


def row_numbers(rows: Iterable[int]) -> pl.Series:
    """Returns the column ``row`` of a frame, uint32."""
    return pl.Series("row", np.fromiter(rows, dtype=np.uint32))


def check_name(name: object) -> None:
    """Raises UserError for the name of an attribute that is empty, too long or not text."""
    if not isinstance(name, str) or not name:
        raise UserError(f"the name of an attribute must be a string, got {name!r}")
    check_text(name, "the name of an attribute")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False
