"""Times in many notations, in every format: they sort, or are refused with their line."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import polars as pl
import pytest

from cemg.data import read_dataset
from cemg.errors import UserError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def moments(*texts: object) -> str:
    return "user,item,timestamp\n" + "".join(
        f"u,{item},{text}\n" for item, text in zip("abcdefg", texts, strict=False)
    )


TIMES: dict[str, tuple[list[str], list[str]]] = {  # as written, and the items in time order
    "days": (["2020-02-01", "2019-12-31", "2020-01-31"], ["b", "c", "a"]),
    "days with slashes": (["2020/2/1", "2019/12/31", "2020/1/31"], ["b", "c", "a"]),
    "date-times": (["2020-01-01 10:00:00", "2020-01-01 09:59:59", "2020-01-01T09:59:59.5"], ["b", "c", "a"]),
    "minutes": (["2020-01-01 10:00", "2020-01-01 09:59"], ["b", "a"]),
    "zones": (
        ["2020-01-01T10:00:00Z", "2020-01-01T10:30:00+02:00", "2020-01-01T04:00:00-0500"],
        ["b", "c", "a"],
    ),
    "pandas": (["2020-01-01 10:00:00+00:00", "2020-01-01 09:00:00.123456+00:00"], ["b", "a"]),
    "nanoseconds": (["2020-01-01 10:00:00.123456789", "2020-01-01 10:00:00.123455789"], ["b", "a"]),
    "UTC": (["2020-01-01 10:00:00 UTC", "2020-01-01 09:00:00 UTC"], ["b", "a"]),
    "days and date-times": (["2020-01-02", "2020-01-01 23:59:59"], ["b", "a"]),
    "seconds": (["1700000001", "1700000000"], ["b", "a"]),
    "fractions": (["1700000000.25", "1700000000.125", "1700000000"], ["c", "b", "a"]),
    "scientific": (["1.7e9", "1.6e9"], ["b", "a"]),
    "milliseconds": (["1700000001000", "1700000000000"], ["b", "a"]),
    "microseconds": (["1700000001000000", "1700000000000000"], ["b", "a"]),
    "counters": (["10", "9", "0"], ["c", "b", "a"]),
    "before 1970": (["-1", "-2", "5"], ["b", "a", "c"]),
    "blanks": ([" 2 ", " 1"], ["b", "a"]),
}


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("kind", ["csv", "parquet", "recbole", "amazon", "movielens", "yelp"])
def test_times_sort_the_same_way_in_every_format(name, kind, tmp_path):
    texts, order = TIMES[name]
    data = read_dataset(TIME_FILES[kind](tmp_path, texts), min_count=0)
    assert data.item_ids == order


def _csv(folder: Path, times: list[str]) -> Path:
    return write(folder / "t.csv", moments(*times))


def _parquet(folder: Path, times: list[str]) -> Path:
    items = list("abcdefg"[: len(times)])
    frame = pl.DataFrame({"user": ["u"] * len(times), "item": items, "timestamp": times})
    frame.write_parquet(folder / "t.parquet")
    return folder / "t.parquet"


def _recbole(folder: Path, times: list[str]) -> Path:
    rows = "".join(f"u\t{item}\t{time}\n" for item, time in zip("abcdefg", times, strict=False))
    return write(folder / "t.inter", "user_id:token\titem_id:token\ttimestamp:float\n" + rows)


def _records(path: Path, times: list[str], names: tuple[str, str, str, str]) -> Path:
    records = [
        dict(zip(names, ("u", item, time, 5), strict=True))
        for item, time in zip("abcdefg", times, strict=False)
    ]
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def _amazon(folder: Path, times: list[str]) -> Path:
    return _records(folder / "t.jsonl", times, ("user_id", "parent_asin", "timestamp", "rating"))


def _yelp(folder: Path, times: list[str]) -> Path:
    return _records(folder / "t.json", times, ("user_id", "business_id", "date", "stars"))


def _movielens(folder: Path, times: list[str]) -> Path:
    rows = "".join(f"u\t{item}\t5\t{time}\n" for item, time in zip("abcdefg", times, strict=False))
    return write(folder / "u.data", rows)


TIME_FILES: dict[str, Callable[[Path, list[str]], Path]] = {
    "csv": _csv, "parquet": _parquet, "recbole": _recbole, "amazon": _amazon, "yelp": _yelp,
    "movielens": _movielens,
}  # fmt: skip

BAD_TIMES = {
    "mixed units": (
        ["1700000000", "1700000001000", "1700000002000"],
        "mixes units: 1700000000 is in seconds",
    ),
    "numbers and dates": (["5", "2020-01-01", "2020-01-02"], "mixes numbers and dates; this one is '5'"),
    "a day that is none": (["2020-01-01", "2020-02-30"], "is '2020-02-30', which is not a time"),
    "day first": (["31.12.2020", "30.12.2020"], "is '31.12.2020', which is not a time"),
    "a zone that is none": (["2020-01-01T10:00:00+99:00", "2020-01-01"], "is '2020-01-01T10:00:00+99:00'"),
    "words": (["soon", "later"], "is 'soon', which is not a time"),
    "infinite": (["inf", "1"], "is 'inf', which is not a time"),
    "beyond": (["99999999999999999999", "1"], "is '99999999999999999999', which is not a time"),
}


@pytest.mark.parametrize("name", BAD_TIMES)
@pytest.mark.parametrize("kind", TIME_FILES)
def test_times_that_cannot_be_compared_are_refused_with_the_line(name, kind, tmp_path):
    texts, reason = BAD_TIMES[name]
    path = TIME_FILES[kind](tmp_path, texts)
    with pytest.raises(UserError) as refused:
        read_dataset(path, min_count=0)
    row = next(n for n, text in enumerate(texts, start=1) if text in reason)
    location = f"row {row}" if kind == "parquet" else f"line {row + (kind in ('csv', 'recbole'))}"
    assert reason in str(refused.value) and location in str(refused.value) and "fix" in str(refused.value)


def test_a_mix_of_times_with_and_without_a_zone_is_read_as_utc_with_a_note(tmp_path):
    data = read_dataset(_csv(tmp_path, ["2020-01-01T10:00:00+02:00", "2020-01-01T08:30:00"]), min_count=0)
    assert "t.csv: column 'timestamp': 1 of 2 times have no zone and are read as UTC" in data.notes


EARLY, LATE = datetime(2020, 1, 1, 8), datetime(2020, 1, 1, 9)
PARQUET_TIMES = {
    "dates": [date(2020, 1, 2), date(2020, 1, 1)],
    "date-times": [LATE, EARLY],
    "zones": [LATE.replace(tzinfo=UTC), EARLY.replace(tzinfo=timezone(timedelta(hours=2)))],
    "integers": [2, 1],
    "floats": [1.5, 1.25],
}


@pytest.mark.parametrize("name", PARQUET_TIMES)
def test_typed_times_in_parquet_sort(name, tmp_path):
    frame = pl.DataFrame({"user": ["u", "u"], "item": ["b", "a"], "timestamp": PARQUET_TIMES[name]})
    for dtype in {frame["timestamp"].dtype, *([pl.Datetime("ms")] if name == "date-times" else [])}:
        frame.with_columns(pl.col("timestamp").cast(dtype)).write_parquet(tmp_path / "t.parquet")
        assert read_dataset(tmp_path / "t.parquet", min_count=0).item_ids == ["a", "b"]
