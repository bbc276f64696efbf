"""The Yelp open dataset: ``yelp_academic_dataset_review.json`` and ``…_business.json``."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from cemg.data.readers.lines import Fields, check_lines, read_json_lines
from cemg.data.readers.raw import ITEM_SCHEMA, Raw
from cemg.data.readers.text import clean, sentences
from cemg.errors import UserError

REVIEW, BUSINESS = "yelp_academic_dataset_review.json", "yelp_academic_dataset_business.json"
FIELDS: Fields = {"user_id": pl.String, "business_id": pl.String, "date": pl.String, "stars": pl.Float64}
ABOUT = {name: pl.String for name in ("business_id", "name", "categories", "city", "state")}


def read_yelp(path: Path) -> Raw:
    """Read the folder of the dataset, or its review file; repeated visits are kept unless told otherwise."""
    reviews = path / REVIEW if path.is_dir() else path
    if not reviews.is_file():
        raise UserError(f"{reviews} is missing", fix="unpack the Yelp open dataset there")
    business = reviews.parent / BUSINESS
    return Raw(
        name="yelp",
        interactions=_with_time(read_json_lines(reviews, FIELDS), reviews),
        describe=lambda wanted: _describe(business, wanted),
        notes=[] if business.is_file() else [f"no {BUSINESS}: items have no text"],
    )


def _with_time(reviews: pl.DataFrame, file: Path) -> pl.DataFrame:
    """``date`` ("2018-07-07 22:09:11" or a day) as seconds since 1970."""
    moment = pl.col("date").str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False)
    day = pl.col("date").str.to_datetime("%Y-%m-%d", strict=False)
    timed = reviews.with_columns(pl.coalesce(moment, day).dt.epoch("s").alias("timestamp"))
    bad = set(timed.filter(pl.col("timestamp").is_null())["date"])
    if bad:
        check_lines(file, lambda line: _date_fault(json.loads(line)["date"], bad))
    names = {"user_id": "user", "business_id": "item", "stars": "rating"}
    return timed.rename(names).select("user", "item", "timestamp", "rating")


def _date_fault(date: str, bad: set[str]) -> str | None:
    return f"field 'date' is {date!r}, wanted YYYY-MM-DD HH:MM:SS" if date in bad else None


def _describe(file: Path, wanted: pl.Series) -> pl.DataFrame:
    """Name. Categories. City, state."""
    if not file.is_file():
        return pl.DataFrame(schema=ITEM_SCHEMA)
    read_json_lines(file, {"business_id": pl.String})  # refuses a malformed line; the rest may be null
    found = pl.scan_ndjson(file, schema=ABOUT).filter(pl.col("business_id").is_in(wanted.implode())).collect()
    rows = []
    for item, name, categories, city, state in found.iter_rows():
        place = ", ".join(part for part in (clean(city), clean(state)) if part)
        rows.append((item, clean(name), sentences([clean(name), clean(categories), place]), None))
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")
