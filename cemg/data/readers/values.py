"""Conversion of columns to ids, times and numbers, with checks.

The functions take a column and ``refuse(mask, reason, fix)``, which returns the error for the first row of a
mask. They return the values and notes for the user.
"""

from __future__ import annotations

from collections.abc import Callable

import polars as pl

from cemg.errors import UserError

Refuse = Callable[[pl.Series, str, str | None], UserError]
LARGEST = 9.2e18  # about the largest Int64
UNITS = (("seconds", 1e11), ("milliseconds", 1e14), ("microseconds", 1e17), ("nanoseconds", LARGEST))
UNIT_KNOWN = 1e8  # 1973 in seconds; a smaller number may be a position or a time in any unit
TIME_FIX = "write times as numbers, or as dates such as 2018-07-07 or 2018-07-07T22:09:11+02:00"
MOMENT = (
    r"^(?<year>\d{4})[-/](?<month>\d{1,2})[-/](?<day>\d{1,2})"
    r"(?:[T ]+(?<hour>\d{1,2}):(?<minute>\d{2})(?::(?<second>\d{2})(?:[.,](?<fraction>\d{1,9}))?)?)?"
    r"\s*(?<zone>[Zz]|UTC|GMT|[+-](?:0\d|1[0-4])(?::?[0-5]\d)?)?$"
)
CLOCK = "%Y-%m-%d %H:%M:%S"
MICROSECOND = 1_000_000
WHOLE_FLOAT = r"^-?\d+\.0+$"
NUMERAL = r"^\d+(\.0+)?$"


def read_ids(series: pl.Series, refuse: Refuse) -> tuple[pl.Series, list[str]]:
    """Convert a column to ids.

    Spaces around an id are removed, leading zeros are kept. A column in which every id is a whole float, such
    as 12.0, which pandas writes for a column with gaps, is read without the ".0".

    Returns:
        The ids, String, and notes for the user.

    Raises:
        UserError: An id is empty, contains control characters or is a fraction; or the type is nested.
    """
    if series.dtype.is_nested() or series.dtype in (pl.Boolean, pl.Binary):
        raise UserError(f"column {series.name!r} has type {series.dtype}, which cannot be an id")
    if series.dtype.is_float():
        bad = (series.is_nan() | (series != series.round(0)) | (series.abs() > 2**53)).fill_null(False)
        if bad.any():
            raise refuse(
                bad, f"column {series.name!r} is {series.filter(bad)[0]}, which is not a valid id", None
            )
        return _checked_ids(series.cast(pl.Int64).cast(pl.String), refuse), [_float_note(series.name)]
    ids = _checked_ids(series.cast(pl.String).str.strip_chars(), refuse)
    if len(ids) and ids.str.contains(WHOLE_FLOAT).all():
        return ids.str.replace(r"\.0+$", ""), [_float_note(series.name)]
    return ids, []


def _float_note(name: str) -> str:
    return f"column {name!r} has ids such as 12.0; they are read as 12"


def _checked_ids(ids: pl.Series, refuse: Refuse) -> pl.Series:
    empty = ids.is_null() | (ids == "")
    if empty.any():
        raise refuse(empty, f"column {ids.name!r} is empty", None)
    control = ids.str.contains(r"\p{Cc}")
    if control.any():
        shown = ids.filter(control)[0]
        raise refuse(
            control, f"column {ids.name!r} is {shown!r}; ids must not contain control characters", None
        )
    return ids


def canonical(ids: pl.Expr) -> pl.Expr:
    """Remove leading zeros and ".0", which tools add and drop, from numerals; keep any other id."""
    plain = ids.str.replace(r"\.0+$", "").str.replace(r"^0+(\d)", "$1")
    return pl.when(ids.str.contains(NUMERAL)).then(plain).otherwise(ids)


def other_forms(ids: pl.Series, other_ids: pl.Series) -> pl.DataFrame:
    """Match ids that differ only in how they are written, as 0108 and 108, or 12 and 12.0.

    Only ids that the other side lacks are matched, and only if the match is unambiguous.

    Returns:
        The pairs, in the columns ``id`` and ``other``.
    """
    sides = []
    for name, side_ids, opposite in (("id", ids, other_ids), ("other", other_ids, ids)):
        side = side_ids.unique().alias(name).to_frame().with_columns(canonical(pl.col(name)).alias("plain"))
        side = side.filter(pl.len().over("plain") == 1)
        sides.append(side.join(opposite.unique().alias(name).to_frame(), on=name, how="anti"))
    return sides[0].join(sides[1], on="plain").select("id", "other").sort("id")


def read_numbers(series: pl.Series, refuse: Refuse, *, decimal_comma: bool = False) -> pl.Series:
    """Convert a column to Float64. Raises UserError for a value that is not a finite number."""
    original = series
    if series.dtype == pl.String:
        series = series.str.strip_chars()
        if decimal_comma:
            series = series.str.replace(r"^(-?\d+),(\d+)$", "$1.$2")
    numbers = series.cast(pl.Float64, strict=False)
    bad = numbers.is_null() | ~numbers.is_finite().fill_null(False)
    if bad.any():
        raise refuse(bad, f"column {series.name!r} is {original.filter(bad)[0]!r}, expected a number", None)
    return numbers


def read_times(series: pl.Series, refuse: Refuse) -> tuple[pl.Series, list[str]]:
    """Convert a column to numbers that sort by time.

    Numbers keep their values. Dates are ISO 8601, with or without a time and a zone; without a zone they are
    UTC.

    Returns:
        The times, Int64, or Float64 if some have fractions; dates in microseconds. And notes for the user.

    Raises:
        UserError: A value is not a time, or the column mixes numbers and dates, or units such as seconds and
            milliseconds, which are distinguished by their size.
    """
    if series.dtype in (pl.Date, pl.Datetime):
        return series.dt.epoch("us"), []
    if series.dtype.is_numeric():
        return _checked_units(series, series, refuse), []
    if series.dtype not in (pl.String, pl.Categorical, pl.Enum):
        raise UserError(
            f"column {series.name!r} has type {series.dtype}, which cannot be a time", fix=TIME_FIX
        )
    texts = series.cast(pl.String).str.strip_chars()
    numbers = _as_numbers(texts)
    if not numbers.null_count():
        return _checked_units(numbers, texts, refuse), []
    dates, has_zone = _as_dates(texts)
    bad = numbers.is_null() & dates.is_null()
    if bad.any():
        raise refuse(
            bad, f"column {series.name!r} is {texts.filter(bad)[0]!r}, which is not a time", TIME_FIX
        )
    if dates.null_count():
        odd = dates.is_null() if dates.null_count() * 2 <= len(dates) else dates.is_not_null()
        reason = f"column {series.name!r} mixes numbers and dates; this one is {texts.filter(odd)[0]!r}"
        raise refuse(odd, reason, "write all times in one form")
    unzoned = len(has_zone) - int(has_zone.sum())
    mixed = 0 < unzoned < len(has_zone)
    note = f"column {series.name!r}: {unzoned:,} of {len(has_zone):,} times have no zone and are read as UTC"
    return dates, [note] if mixed else []


def _as_numbers(texts: pl.Series) -> pl.Series:
    """Parse as Int64 if all texts are integers, else as Float64 with null for what is not a number."""
    integers = texts.cast(pl.Int64, strict=False)
    if not integers.null_count():
        return integers
    return texts.cast(pl.Float64, strict=False)


def _checked_units(numbers: pl.Series, originals: pl.Series, refuse: Refuse) -> pl.Series:
    """Return ``numbers``. Raises UserError if one is not finite, or if their sizes imply different units."""
    size = numbers.cast(pl.Float64).abs()
    bad = ~size.is_finite() | (size > LARGEST)
    if bad.any():
        shown = originals.filter(bad)[0]
        raise refuse(bad, f"column {numbers.name!r} is {shown!r}, which is not a time", TIME_FIX)
    unit = sum((size >= limit).cast(pl.Int8) for _, limit in UNITS)
    assert isinstance(unit, pl.Series)
    counts = unit.filter(size >= UNIT_KNOWN).value_counts().sort("count").rows()
    if len(counts) > 1:
        (rare, rare_rows), (usual, usual_rows) = counts[0], counts[-1]
        odd = (unit == rare) & (size >= UNIT_KNOWN)
        reason = (
            f"column {numbers.name!r} mixes units: {originals.filter(odd)[0]} is in {UNITS[rare][0]}, as are "
            f"{rare_rows:,} rows; {usual_rows:,} rows are in {UNITS[usual][0]}"
        )
        raise refuse(odd, reason, "convert all times to one unit")
    return numbers if numbers.dtype.is_integer() or numbers.dtype.is_float() else numbers.cast(pl.Float64)


def _as_dates(texts: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Parse dates as microseconds since 1970 in UTC, null if not a date; and whether they have a zone."""
    part = pl.col("part").struct.field
    minutes = pl.col("zone").str.extract(r"^[+-]\d{2}:?(\d{2})$").cast(pl.Int64).fill_null(0)
    hours = pl.col("zone").str.extract(r"^[+-](\d{2})").cast(pl.Int64).fill_null(0)
    sign = pl.when(pl.col("zone").str.starts_with("-")).then(-1).otherwise(1)
    text = pl.format(
        "{}-{}-{} {}:{}:{}",
        part("year"), part("month").str.zfill(2), part("day").str.zfill(2),
        part("hour").fill_null("0").str.zfill(2), part("minute").fill_null("00"),
        part("second").fill_null("00"),
    )  # fmt: skip
    fraction = part("fraction").fill_null("0").str.pad_end(6, "0").str.head(6).cast(pl.Int64)
    frame = (
        texts.alias("text").to_frame()
        .with_columns(pl.col("text").str.extract_groups(MOMENT).alias("part"))
        .with_columns(part("zone").alias("zone"))
        .select(
            text.str.to_datetime(CLOCK, strict=False, time_unit="us").dt.epoch("us").alias("moment")
            + fraction - sign * (hours * 60 + minutes) * 60 * MICROSECOND,
            pl.col("zone").is_not_null().alias("has_zone"),
        )
    )  # fmt: skip
    return frame["moment"].alias(texts.name), frame["has_zone"]
