"""The Yelp open dataset: ``yelp_academic_dataset_review.json`` and ``…_business.json``; earlier rounds call
them ``review.json`` and ``business.json``."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from cemg.data.readers.json_lines import Fields, read_json_lines, read_reviews
from cemg.data.readers.raw import ITEM_SCHEMA, Raw, no_items
from cemg.data.readers.text import clean, sentences
from cemg.data.readers.textfile import TextFile
from cemg.errors import UserError

PREFIX = "yelp_academic_dataset_"
REVIEWS = tuple(f"{prefix}review.json{gz}" for prefix in (PREFIX, "") for gz in ("", ".gz"))
FIELDS: Fields = {"user_id": pl.String, "business_id": pl.String, "date": pl.String, "stars": pl.Float64}
ABOUT = {name: pl.String for name in ("business_id", "name", "categories", "city", "state")}


def read_yelp(path: Path, *, items: Path | None = None, encoding: str = "") -> Raw:
    """Read the folder of the dataset, or its review file; repeated visits are kept unless told otherwise.

    ``items`` None is the business file beside the reviews.
    """
    reviews = _reviews(path)
    business = items or reviews.with_name(reviews.name.replace("review", "business"))
    there = business.is_file() and business != reviews
    interactions, notes = read_reviews(TextFile(reviews, encoding), FIELDS)
    return Raw(
        name="yelp",
        interactions=interactions,
        describe=(lambda wanted: _describe(TextFile(business, encoding), wanted)) if there else no_items,
        items_file=business if there else None,
        notes=[*notes, *([] if there else [f"no {PREFIX}business.json: items have no text"])],
    )


def _reviews(path: Path) -> Path:
    if path.is_dir():
        path = next((path / name for name in REVIEWS if (path / name).is_file()), path / REVIEWS[0])
    if not path.is_file():
        raise UserError(f"{path} is missing", fix="unpack the Yelp open dataset there")
    return path


def _describe(file: TextFile, wanted: pl.Series) -> pl.DataFrame:
    """Name. Categories. City, state."""
    read_json_lines(file, {"business_id": pl.String})  # refuses a malformed line; the rest may be null
    own = pl.col("business_id").str.strip_chars()
    known = pl.scan_ndjson(file.source(), schema=ABOUT).with_columns(own)
    found = known.filter(pl.col("business_id").is_in(wanted.implode())).collect()
    rows = []
    for item, name, categories, city, state in found.iter_rows():
        place = ", ".join(part for part in (clean(city), clean(state)) if part)
        rows.append((item, clean(name), sentences([clean(name), clean(categories), place]), None))
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")
