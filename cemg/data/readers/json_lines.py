"""Files with one JSON object per line: the reviews of Amazon and Yelp."""

from __future__ import annotations

import itertools
import json
from typing import Any

import polars as pl

from cemg.data.readers.lines import READ_ERRORS, check_lines
from cemg.data.readers.textfile import TextFile, bad_line, empty_file
from cemg.data.readers.values import read_ids, read_times
from cemg.errors import UserError

Fields = dict[str, type[pl.DataType]]
KINDS: dict[type[pl.DataType], tuple[str, tuple[type, ...]]] = {
    pl.String: ("a text or a number", (str, int, float)),
    pl.Float64: ("a number", (int, float)),
}


def read_reviews(file: TextFile, fields: Fields) -> tuple[pl.DataFrame, list[str]]:
    """Read a file of reviews.

    Args:
        file: One JSON object per line.
        fields: The fields with user, item, time and rating, in this order.

    Returns:
        A frame with the columns ``user``, ``item``, ``timestamp`` and ``rating``, and notes for the user.
    """
    return reviews_of(read_json_lines(file, fields), file)


def reviews_of(records: pl.DataFrame, file: TextFile) -> tuple[pl.DataFrame, list[str]]:
    """Convert the records of ``file`` to reviews; see `read_reviews`."""

    def refuse(bad: pl.Series, reason: str, fix: str | None) -> UserError:
        line = line_of_json(file, int(bad.arg_true()[0]))
        return bad_line(file.path, line, reason.replace("column", "field", 1), fix=fix)

    user, item, time, rating = records.get_columns()
    users, user_notes = read_ids(user, refuse)
    items, item_notes = read_ids(item, refuse)
    times, time_notes = read_times(time, refuse)
    rows = {"user": users, "item": items, "timestamp": times, "rating": rating.cast(pl.Float64)}
    return pl.DataFrame(rows), [f"{file.name}: {note}" for note in (*user_notes, *item_notes, *time_notes)]


def read_json_lines(file: TextFile, fields: Fields) -> pl.DataFrame:
    """Read the ``fields`` of a file with one JSON object per line.

    A field of type String may contain a number, which is read as it is written.

    Raises:
        UserError: A line is not valid JSON, or lacks a field.
    """
    path = file.path
    try:
        frame = pl.scan_ndjson(file.source(), schema=fields).collect()
    except READ_ERRORS as error:
        check_lines(file, lambda line: _json_fault(line, fields))
        raise UserError(f"{path} cannot be read: {error}") from error
    if frame.is_empty():
        raise empty_file(path)
    if sum(frame.null_count().row(0)):
        check_lines(file, lambda line: _json_fault(line, fields))
        raise UserError(f"{path}: a line lacks one of {', '.join(fields)}")
    return frame


def line_of_json(file: TextFile, record: int) -> int:
    """Return the line of a record (from 0) of a file with one JSON object per line."""
    nonblank = (number for number, line in enumerate(file.lines(), start=1) if line.strip())
    return next(itertools.islice(nonblank, record, None), record + 1)


def _json_fault(line: str, fields: Fields) -> str | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg} at column {error.colno}"
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        return f"not valid JSON: {error}"
    if not isinstance(record, dict):
        return f"expected a JSON object, got {type(record).__name__}"
    return next((fault for name, kind in fields.items() if (fault := _field_fault(record, name, kind))), None)


def _field_fault(record: dict[str, Any], name: str, kind: type[pl.DataType]) -> str | None:
    value = record.get(name)
    if value is None:
        return f"no field {name!r}"
    words, types = KINDS[kind]
    if isinstance(value, bool) or not isinstance(value, types):
        return f"field {name!r} is {value!r}, expected {words}"
    return None
