"""The Yelp open dataset: ``yelp_academic_dataset_review.json`` and ``…_business.json``.

In earlier releases they are named ``review.json`` and ``business.json``.
"""

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
    """Read reviews and businesses.

    Args:
        path: Folder of the dataset, or its review file.
        items: Business file; None takes the one next to the reviews.
        encoding: Encoding of the files; "" detects it.
    """
    reviews = _reviews(path)
    business = items or reviews.with_name(reviews.name.replace("review", "business"))
    has_business = business.is_file() and business != reviews
    interactions, notes = read_reviews(TextFile(reviews, encoding), FIELDS)
    return Raw(
        name="yelp",
        interactions=interactions,
        describe=(lambda item_ids: _describe(TextFile(business, encoding), item_ids))
        if has_business
        else no_items,
        items_file=business if has_business else None,
        notes=[*notes, *([] if has_business else [f"there is no {PREFIX}business.json: items have no text"])],
    )


def _reviews(path: Path) -> Path:
    if path.is_dir():
        path = next((path / name for name in REVIEWS if (path / name).is_file()), path / REVIEWS[0])
    if not path.is_file():
        raise UserError(f"{path} is missing", fix="unpack the Yelp open dataset in that folder")
    return path


def _describe(file: TextFile, item_ids: pl.Series) -> pl.DataFrame:
    """Compose the texts: name. Categories. City, state."""
    read_json_lines(file, {"business_id": pl.String})  # rejects malformed lines; the other fields may be null
    business_id = pl.col("business_id").str.strip_chars()
    businesses = pl.scan_ndjson(file.source(), schema=ABOUT).with_columns(business_id)
    needed = businesses.filter(pl.col("business_id").is_in(item_ids.implode())).collect()
    rows = []
    for item, name, categories, city, state in needed.iter_rows():
        location = ", ".join(part for part in (clean(city), clean(state)) if part)
        rows.append((item, clean(name), sentences([clean(name), clean(categories), location]), None))
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")
