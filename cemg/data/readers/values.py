"""Ids, times and numbers of a column: what is read as what, what is refused, what is said.

Each function takes a column and ``refuse(rows, reason, fix)``, which returns the error that names the first
of the rows of a mask; it returns the values and notes for the user.
"""

from __future__ import annotations

from collections.abc import Callable

import polars as pl

from cemg.errors import UserError

Refuse = Callable[[pl.Series, str, str | None], UserError]
LARGEST = 9.2e18  # of Int64
UNITS = (("seconds", 1e11), ("milliseconds", 1e14), ("microseconds", 1e17), ("nanoseconds", LARGEST))
A_TIME = 1e8  # 1973 in seconds: a smaller number is a place in an order as well as a time, of any unit
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
    """Ids as text, blanks around them removed; leading zeros stay.

    A column in which every id is a whole float (12.0, what pandas makes of a column with gaps) is read
    without the ".0". Empty ids, control characters, fractions in a float column and nested types are refused.
    """
    if series.dtype.is_nested() or series.dtype in (pl.Boolean, pl.Binary):
        raise UserError(f"column {series.name!r} is of type {series.dtype}, which is not an id")
    if series.dtype.is_float():
        bad = (series.is_nan() | (series != series.round(0)) | (series.abs() > 2**53)).fill_null(False)
        if bad.any():
            raise refuse(bad, f"column {series.name!r} is {series.filter(bad)[0]}, which is not an id", None)
        return _checked_ids(series.cast(pl.Int64).cast(pl.String), refuse), [_float_note(series.name)]
    ids = _checked_ids(series.cast(pl.String).str.strip_chars(), refuse)
    if len(ids) and ids.str.contains(WHOLE_FLOAT).all():
        return ids.str.replace(r"\.0+$", ""), [_float_note(series.name)]
    return ids, []


def _float_note(name: str) -> str:
    return f"column {name!r} holds ids such as 12.0: they are read as 12"


def _checked_ids(ids: pl.Series, refuse: Refuse) -> pl.Series:
    empty = ids.is_null() | (ids == "")
    if empty.any():
        raise refuse(empty, f"column {ids.name!r} is empty", None)
    control = ids.str.contains(r"\p{Cc}")
    if control.any():
        shown = ids.filter(control)[0]
        raise refuse(control, f"column {ids.name!r} is {shown!r}: an id holds no control characters", None)
    return ids


def canonical(ids: pl.Expr) -> pl.Expr:
    """A numeral without leading zeros and ".0", which tools add and drop; any other id as it is."""
    plain = ids.str.replace(r"\.0+$", "").str.replace(r"^0+(\d)", "$1")
    return pl.when(ids.str.contains(NUMERAL)).then(plain).otherwise(ids)


def other_forms(wanted: pl.Series, known: pl.Series) -> pl.DataFrame:
    """Pairs (``wanted``, ``known``) of ids that differ only in form, as 0108 and 108, or 12 and 12.0.

    Only ids that the other side lacks, and only where one id of either side has that canonical form.
    """
    sides = []
    for name, own, other in (("wanted", wanted, known), ("known", known, wanted)):
        side = own.unique().alias(name).to_frame().with_columns(canonical(pl.col(name)).alias("plain"))
        side = side.filter(pl.len().over("plain") == 1)
        sides.append(side.join(other.unique().alias(name).to_frame(), on=name, how="anti"))
    return sides[0].join(sides[1], on="plain").select("wanted", "known").sort("wanted")


def read_numbers(series: pl.Series, refuse: Refuse, *, decimal_comma: bool = False) -> pl.Series:
    """Float64; text that is not a finite number is refused."""
    written = series
    if series.dtype == pl.String:
        series = series.str.strip_chars()
        if decimal_comma:
            series = series.str.replace(r"^(-?\d+),(\d+)$", "$1.$2")
    numbers = series.cast(pl.Float64, strict=False)
    bad = numbers.is_null() | ~numbers.is_finite().fill_null(False)
    if bad.any():
        raise refuse(bad, f"column {series.name!r} is {written.filter(bad)[0]!r}, wanted a number", None)
    return numbers


def read_times(series: pl.Series, refuse: Refuse) -> tuple[pl.Series, list[str]]:
    """Times that sort: numbers as they are (Int64, or Float64 with fractions), dates as microseconds, Int64.

    Dates are ISO 8601, with a time and a zone or without; what has no zone is UTC. A column that mixes
    numbers and dates, or seconds and milliseconds (told by their size), is refused.
    """
    if series.dtype in (pl.Date, pl.Datetime):
        return series.dt.epoch("us"), []
    if series.dtype.is_numeric():
        return _checked_units(series, series, refuse), []
    if series.dtype not in (pl.String, pl.Categorical, pl.Enum):
        raise UserError(
            f"column {series.name!r} is of type {series.dtype}, which is not a time", fix=TIME_FIX
        )
    written = series.cast(pl.String).str.strip_chars()
    numbers = _as_numbers(written)
    if not numbers.null_count():
        return _checked_units(numbers, written, refuse), []
    dates, zoned = _as_dates(written)
    bad = numbers.is_null() & dates.is_null()
    if bad.any():
        raise refuse(
            bad, f"column {series.name!r} is {written.filter(bad)[0]!r}, which is not a time", TIME_FIX
        )
    if dates.null_count():
        odd = dates.is_null() if dates.null_count() * 2 <= len(dates) else dates.is_not_null()
        reason = f"column {series.name!r} mixes numbers and dates: here {written.filter(odd)[0]!r}"
        raise refuse(odd, reason, "write all times alike")
    without = len(zoned) - int(zoned.sum())
    mixed = 0 < without < len(zoned)
    note = f"column {series.name!r}: {without:,} of {len(zoned):,} times have no zone and are read as UTC"
    return dates, [note] if mixed else []


def _as_numbers(written: pl.Series) -> pl.Series:
    """Int64 where every text is an integer, Float64 where it is a number, null where it is neither."""
    whole = written.cast(pl.Int64, strict=False)
    if not whole.null_count():
        return whole
    return written.cast(pl.Float64, strict=False)


def _checked_units(numbers: pl.Series, written: pl.Series, refuse: Refuse) -> pl.Series:
    size = numbers.cast(pl.Float64).abs()
    bad = ~size.is_finite() | (size > LARGEST)
    if bad.any():
        shown = written.filter(bad)[0]
        raise refuse(bad, f"column {numbers.name!r} is {shown!r}, which is not a time", TIME_FIX)
    unit = sum((size >= limit).cast(pl.Int8) for _, limit in UNITS)
    assert isinstance(unit, pl.Series)
    counts = unit.filter(size >= A_TIME).value_counts().sort("count").rows()
    if len(counts) > 1:
        (rare, few), (usual, many) = counts[0], counts[-1]
        odd = (unit == rare) & (size >= A_TIME)
        reason = (
            f"column {numbers.name!r} mixes units: {written.filter(odd)[0]} is in {UNITS[rare][0]} "
            f"({few:,} of the rows are), while {many:,} rows are in {UNITS[usual][0]}"
        )
        raise refuse(odd, reason, "convert all times to one unit")
    return numbers if numbers.dtype.is_integer() or numbers.dtype.is_float() else numbers.cast(pl.Float64)


def _as_dates(written: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Microseconds since 1970 in UTC, null where the text is not a date; and whether it names a zone."""
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
        written.alias("written").to_frame()
        .with_columns(pl.col("written").str.extract_groups(MOMENT).alias("part"))
        .with_columns(part("zone").alias("zone"))
        .select(
            text.str.to_datetime(CLOCK, strict=False, time_unit="us").dt.epoch("us").alias("moment")
            + fraction - sign * (hours * 60 + minutes) * 60 * MICROSECOND,
            pl.col("zone").is_not_null().alias("zoned"),
        )
    )  # fmt: skip
    return frame["moment"].alias(written.name), frame["zoned"]
