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

from cemg.data.readers.lines import Fields, bad_line, read_json_lines, read_lines, scan_lines
from cemg.data.readers.raw import ITEM_SCHEMA, Raw
from cemg.data.readers.text import clean, phrases, sentences
from cemg.errors import UserError

OLD: Fields = {"reviewerID": pl.String, "asin": pl.String, "unixReviewTime": pl.Int64, "overall": pl.Float64}
NEW: Fields = {"user_id": pl.String, "parent_asin": pl.String, "timestamp": pl.Int64, "rating": pl.Float64}
SUFFIXES = re.compile(r"(\.jsonl?)(\.gz)?$")


def read_amazon(path: Path, *, edition: str) -> Raw:
    """Read the reviews at ``path`` (a file, or a folder with one); ``edition``: "amazon-2014" …"""
    reviews, metadata = _files(path)
    fields = NEW if edition == "amazon-2023" else OLD
    names = dict(zip(fields, ("user", "item", "timestamp", "rating"), strict=True))
    key = "parent_asin" if edition == "amazon-2023" else "asin"
    return Raw(
        name=_subject(reviews),
        interactions=read_json_lines(reviews, fields).rename(names),
        describe=lambda wanted: _describe(metadata, key, wanted),
        notes=[] if metadata else [f"no metadata beside {reviews.name}: items have no text"],
    )


def _files(path: Path) -> tuple[Path, Path | None]:
    folder = path if path.is_dir() else path.parent
    files = [file for file in sorted(folder.iterdir()) if SUFFIXES.search(file.name)]
    metadata = {_subject(file): file for file in files if file.name.startswith("meta_")}
    reviews = [file for file in files if not file.name.startswith("meta_")] if path.is_dir() else [path]
    if len(reviews) != 1:
        names = ", ".join(file.name for file in reviews) or "none"
        raise UserError(f"{path}: wanted one review file, found {names}", fix="name the file")
    return reviews[0], metadata.get(_subject(reviews[0]))


def _subject(file: Path) -> str:
    """``Beauty`` of reviews_Beauty_5.json.gz, Beauty_5.json.gz, meta_Beauty.json.gz."""
    stem = SUFFIXES.sub("", file.name)
    return stem.removeprefix("reviews_").removeprefix("meta_").removesuffix("_5")


def _describe(metadata: Path | None, key: str, wanted: pl.Series) -> pl.DataFrame:
    """Titles and texts of the wanted items; only their lines are parsed, of millions in a dump."""
    if metadata is None:
        return pl.DataFrame(schema=ITEM_SCHEMA)
    item = pl.col("line").str.extract(rf"""["']{key}["']\s*:\s*["']([^"']+)["']""")
    lines = scan_lines(metadata).filter(pl.col("line").is_not_null()).with_columns(item.alias("item"))
    is_wanted = pl.col("item").is_null() | pl.col("item").is_in(wanted.implode())
    kept = read_lines(lines.filter(is_wanted), metadata)
    rows = []
    for number, line, found in kept.select("number", "line", "item").iter_rows():
        if found is None:
            raise bad_line(metadata, number, f"no field {key!r} in {line[:60]!r}")
        record = _parse(metadata, number, line)
        rows.append((str(record.get(key, found)), *_title_and_text(record), None))
    return pl.DataFrame(rows, schema=ITEM_SCHEMA, orient="row")


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
