"""Amazon reviews: the releases of 2014 and 2018 (``.json.gz``) and 2023 (``.jsonl.gz``), with metadata.

A review file ``reviews_Beauty_5.json.gz``, ``Beauty.json.gz`` or ``All_Beauty.jsonl.gz`` is joined to the
``meta_*`` file of the same name next to it. The metadata of 2014 consist of Python literals, not JSON.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import polars as pl

from cemg.data.readers.json_lines import Fields, read_reviews, reviews_of
from cemg.data.readers.lines import read_lines, scan_lines
from cemg.data.readers.raw import ITEM_SCHEMA, Raw, no_items
from cemg.data.readers.text import clean, phrases, sentences
from cemg.data.readers.textfile import TextFile, bad_line, empty_file
from cemg.errors import UserError

OLD: Fields = {"reviewerID": pl.String, "asin": pl.String, "unixReviewTime": pl.String, "overall": pl.Float64}
NEW: Fields = {"user_id": pl.String, "parent_asin": pl.String, "timestamp": pl.String, "rating": pl.Float64}
SUFFIXES = re.compile(r"(\.jsonl?)(\.gz)?$")
FOLDERS = ("", "../meta_categories")  # of the metadata; the second one is that of the 2023 release on the hub
ID = re.compile(r"""["'](parent_asin|asin)["']\s*:""")


def read_amazon(path: Path, *, edition: str, items: Path | None = None, encoding: str = "") -> Raw:
    """Read reviews and metadata.

    Args:
        path: Review file, or a folder with one.
        edition: "amazon-2014", "amazon-2018" or "amazon-2023".
        items: Metadata file; None takes the one with the name of the review file.
        encoding: Encoding of the files; "" detects it.
    """
    reviews = _reviews_file(path)
    metadata = items or metadata_of(reviews)
    interactions, notes = _interactions(TextFile(reviews, encoding), NEW if edition == "amazon-2023" else OLD)
    metadata_text = TextFile(metadata, encoding) if metadata else None
    return Raw(
        name=_subject(reviews),
        interactions=interactions,
        describe=(lambda item_ids: describe_metadata(metadata_text, item_ids)) if metadata_text else no_items,
        items_file=metadata,
        notes=[
            *notes,
            *([] if metadata else [f"there is no metadata file for {reviews.name}: items have no text"]),
        ],
    )


def _reviews_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = [file for file in sorted(path.iterdir()) if SUFFIXES.search(file.name)]
    reviews = [file for file in files if not file.name.startswith("meta_")]
    if len(reviews) != 1:
        names = ", ".join(file.name for file in reviews) or "none"
        raise UserError(f"{path}: expected one review file, found {names}", fix="name the file")
    return reviews[0]


def metadata_of(reviews: Path) -> Path | None:
    """Return the ``meta_*`` file that belongs to a file of reviews or ratings; None if there is none."""
    subject = _subject(reviews)
    folders = [reviews.parent / name for name in FOLDERS]
    files = (file for folder in folders if folder.is_dir() for file in sorted(folder.glob("meta_*")))
    return next((file for file in files if SUFFIXES.search(file.name) and _subject(file) == subject), None)


def _subject(file: Path) -> str:
    """Return ``Beauty`` for reviews_Beauty_5.json.gz, Beauty_5.json.gz, meta_Beauty.json.gz and so on."""
    stem = file.name.split(".")[0]
    return stem.removeprefix("reviews_").removeprefix("meta_").removesuffix("_5")


def _interactions(file: TextFile, fields: Fields) -> tuple[pl.DataFrame, list[str]]:
    """Read the reviews. Python literals, as in some files of 2014, are parsed line by line."""
    if not file.first_line().startswith("{'"):
        return read_reviews(file, fields)
    rows = []
    for number, line in enumerate(file.lines(), start=1):
        if line.strip():
            record = _parse(file.path, number, line)
            missing = next((name for name in fields if record.get(name) is None), None)
            if missing:
                raise bad_line(file.path, number, f"no field {missing!r}")
            rows.append([str(record[name]) for name in fields])
    if not rows:
        raise empty_file(file.path)
    texts = pl.DataFrame(rows, schema=dict.fromkeys(fields, pl.String), orient="row")
    return reviews_of(texts, file)


def describe_metadata(metadata: TextFile, item_ids: pl.Series) -> pl.DataFrame:
    """Read titles and texts of some items. Only their lines are parsed, out of millions in a file."""
    path = metadata.path
    if not path.is_file():
        raise UserError(f"{path} is missing")
    key = _key(metadata)
    item = pl.col("line").str.extract(rf"""["']{key}["']\s*:\s*["']([^"']+)["']""").str.strip_chars()
    lines = scan_lines(metadata).filter(pl.col("line").is_not_null()).with_columns(item.alias("item"))
    is_needed = pl.col("item").is_null() | pl.col("item").is_in(item_ids.implode())
    needed = read_lines(lines.filter(is_needed), metadata)
    rows = []
    for number, line, extracted in needed.select("number", "line", "item").iter_rows():
        if extracted is None:
            raise bad_line(path, number, f"no field {key!r} in {line[:60]!r}")
        record = _parse(path, number, line)
        rows.append((str(record.get(key, extracted)).strip(), *_title_and_text(record), None))
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")


def _key(metadata: TextFile) -> str:
    """Return the name of the id field: ``parent_asin`` since 2023, ``asin`` before."""
    names = set(ID.findall(metadata.first_line()))
    return "parent_asin" if "parent_asin" in names else "asin"


def _parse(file: Path, number: int, line: str) -> dict[str, Any]:
    """Parse a JSON object, or a Python literal of the 2014 release."""
    try:
        record = ast.literal_eval(line) if line.lstrip().startswith("{'") else json.loads(line)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise bad_line(file, number, f"neither JSON nor a Python literal: {error}") from error
    if not isinstance(record, dict):
        raise bad_line(file, number, f"expected an object, got {type(record).__name__}")
    return record


def _title_and_text(record: dict[str, Any]) -> tuple[str, str | None]:
    """Compose the text: title. Brand, categories. Features. Description."""
    title = clean(record.get("title"))
    groups = phrases([record.get(name) for name in ("brand", "store", "categories", "category")])
    features = phrases([record.get(name) for name in ("features", "feature")])
    return title, sentences([title, ", ".join(groups), *features, *phrases(record.get("description"))])
