"""Which format a path holds, told by file names and, where these do not tell, by a file's first line."""

from __future__ import annotations

from pathlib import Path

from cemg.data.readers.lines import first_line
from cemg.errors import UserError

BY_NAME = {  # a glob in a folder -> its format; the first that matches wins
    "dataset.json": "prepared",
    "interactions.txt": "sequence",
    "*.inter": "recbole",
    "*.inter.json": "inter-json",
    "yelp_academic_dataset_review.json": "yelp",
    "*_item2attributes.json": "sequence",
    "interactions.csv": "csv",
    "interactions.parquet": "parquet",
    "u.data": "movielens",
    "ratings.dat": "movielens",
    "movies.csv": "movielens",
}
BY_SUFFIX = {
    ".txt": "sequence", ".data": "movielens", ".dat": "movielens", ".inter": "recbole", ".csv": "csv",
    ".parquet": "parquet",
}  # fmt: skip
BY_FIELD = {  # in this order: the reviews of 2018 have a reviewerID too
    "business_id": "yelp",
    "parent_asin": "amazon-2023",
    "verified": "amazon-2018",
    "reviewerID": "amazon-2014",
}
JSON_LINES = ("*.json", "*.json.gz", "*.jsonl", "*.jsonl.gz")


def detect_format(path: Path) -> str:
    """The format of a file or folder; UserError where it cannot be told."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.name.endswith(".inter.json"):
        return "inter-json"
    found = _of_folder(path) if path.is_dir() else BY_SUFFIX.get(path.suffix) or _of_records(path)
    if found is None:
        raise UserError(f"cannot tell the format of {path}", fix="name it: --format csv, or another")
    return found


def _of_folder(folder: Path) -> str | None:
    named = next((name for pattern, name in BY_NAME.items() if any(folder.glob(pattern))), None)
    if named:
        return named
    files = sorted(file for pattern in JSON_LINES for file in folder.glob(pattern))
    reviews = [file for file in files if not file.name.startswith("meta_")]
    return next((name for file in reviews if (name := _of_records(file))), None)


def _of_records(file: Path) -> str | None:
    line = first_line(file)
    return next((name for field, name in BY_FIELD.items() if f'"{field}"' in line), None)
