"""Amazon reviews: the dumps of 2014 and 2018 (``.json.gz``) and of 2023 (``.jsonl.gz``), with their metadata.

A review file ``reviews_Beauty_5.json.gz``, ``Beauty.json.gz`` or ``All_Beauty.jsonl.gz`` is joined to the
``meta_*`` file of the same name beside it. The 2014 metadata holds Python literals, not JSON.
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
FOLDERS = ("", "../meta_categories")  # where the metadata are; the second, in the set of 2023 on the hub
ID = re.compile(r"""["'](parent_asin|asin)["']\s*:""")


def read_amazon(path: Path, *, edition: str, items: Path | None = None, encoding: str = "") -> Raw:
    """Read the reviews at ``path`` (a file, or a folder with one); ``edition``: "amazon-2014" …

    ``items`` None is the metadata file of the same name.
    """
    reviews = _reviews_file(path)
    metadata = items or metadata_of(reviews)
    interactions, notes = _interactions(TextFile(reviews, encoding), NEW if edition == "amazon-2023" else OLD)
    about = TextFile(metadata, encoding) if metadata else None
    return Raw(
        name=_subject(reviews),
        interactions=interactions,
        describe=(lambda wanted: describe_metadata(about, wanted)) if about else no_items,
        items_file=metadata,
        notes=[*notes, *([] if metadata else [f"no metadata beside {reviews.name}: items have no text"])],
    )


def _reviews_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = [file for file in sorted(path.iterdir()) if SUFFIXES.search(file.name)]
    reviews = [file for file in files if not file.name.startswith("meta_")]
    if len(reviews) != 1:
        names = ", ".join(file.name for file in reviews) or "none"
        raise UserError(f"{path}: wanted one review file, found {names}", fix="name the file")
    return reviews[0]


def metadata_of(reviews: Path) -> Path | None:
    """The ``meta_*`` file that belongs to a file of reviews or ratings; None where there is none."""
    subject = _subject(reviews)
    folders = [reviews.parent / name for name in FOLDERS]
    found = (file for folder in folders if folder.is_dir() for file in sorted(folder.glob("meta_*")))
    return next((file for file in found if SUFFIXES.search(file.name) and _subject(file) == subject), None)


def _subject(file: Path) -> str:
    """``Beauty`` of reviews_Beauty_5.json.gz, Beauty_5.json.gz, meta_Beauty.json.gz, Beauty.train.csv.gz."""
    stem = file.name.split(".")[0]
    return stem.removeprefix("reviews_").removeprefix("meta_").removesuffix("_5")


def _interactions(file: TextFile, fields: Fields) -> tuple[pl.DataFrame, list[str]]:
    """The reviews; those that are written as Python literals, as some dumps of 2014 are, one by one."""
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


def describe_metadata(metadata: TextFile, wanted: pl.Series) -> pl.DataFrame:
    """Titles and texts of the wanted items; only their lines are parsed, of millions in a dump."""
    path = metadata.path
    if not path.is_file():
        raise UserError(f"{path} is missing")
    key = _key(metadata)
    item = pl.col("line").str.extract(rf"""["']{key}["']\s*:\s*["']([^"']+)["']""").str.strip_chars()
    lines = scan_lines(metadata).filter(pl.col("line").is_not_null()).with_columns(item.alias("item"))
    is_wanted = pl.col("item").is_null() | pl.col("item").is_in(wanted.implode())
    kept = read_lines(lines.filter(is_wanted), metadata)
    rows = []
    for number, line, found in kept.select("number", "line", "item").iter_rows():
        if found is None:
            raise bad_line(path, number, f"no field {key!r} in {line[:60]!r}")
        record = _parse(path, number, line)
        rows.append((str(record.get(key, found)).strip(), *_title_and_text(record), None))
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")


def _key(metadata: TextFile) -> str:
    """``parent_asin`` in the set of 2023, ``asin`` before."""
    named = set(ID.findall(metadata.first_line()))
    return "parent_asin" if "parent_asin" in named else "asin"


def _parse(file: Path, number: int, line: str) -> dict[str, Any]:
    """A JSON object, or the Python literal of the 2014 dump."""
    try:
        record = ast.literal_eval(line) if line.lstrip().startswith("{'") else json.loads(line)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise bad_line(file, number, f"neither JSON nor a Python literal: {error}") from error
    if not isinstance(record, dict):
        raise bad_line(file, number, f"wanted an object, got {type(record).__name__}")
    return record


def _title_and_text(record: dict[str, Any]) -> tuple[str, str | None]:
    """Title. Brand, categories. Features. Description."""
    title = clean(record.get("title"))
    groups = phrases([record.get(name) for name in ("brand", "store", "categories", "category")])
    features = phrases([record.get(name) for name in ("features", "feature")])
    return title, sentences([title, ", ".join(groups), *features, *phrases(record.get("description"))])
