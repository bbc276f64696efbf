"""Which format a path holds, told by file names and, where these do not tell, by a file's first line."""

from __future__ import annotations

from pathlib import Path

from cemg.data.readers.tables import shards
from cemg.data.readers.textfile import TextFile
from cemg.errors import UserError

BY_NAME = {  # a glob in a folder -> its format; the first that matches wins
    "dataset.json": "prepared",
    "interactions.txt": "sequence",
    "*.inter": "recbole",
    "*.inter.json": "inter-json",
    "yelp_academic_dataset_review.json*": "yelp",
    "*_item2attributes.json": "sequence",
    "interactions.csv": "csv",
    "interactions.csv.gz": "csv",
    "interactions.tsv": "csv",
    "interactions.tsv.gz": "csv",
    "interactions.parquet": "parquet",
    "interactions/**/*.parquet": "parquet",
    "u.data": "movielens",
    "ratings.dat": "movielens",
    "movies.csv": "movielens",
}
BY_SUFFIX = {
    ".txt": "sequence", ".data": "movielens", ".dat": "movielens", ".inter": "recbole", ".csv": "csv",
    ".tsv": "csv", ".parquet": "parquet",
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
    found = _of_folder(path) if path.is_dir() else _of_file(path)
    if found is None:
        holds = ", ".join(sorted(file.name for file in path.iterdir())[:8]) if path.is_dir() else ""
        raise UserError(
            f"cannot tell the format of {path}",
            cause=f"it holds {holds or 'nothing'}" if path.is_dir() else None,
            fix="name the files: --interactions FILE --items FILE; or the format: --format csv, or another",
        )
    return found


def _of_folder(folder: Path) -> str | None:
    named = next((name for pattern, name in BY_NAME.items() if any(folder.glob(pattern))), None)
    if named:
        return named
    files = sorted(file for pattern in JSON_LINES for file in folder.glob(pattern))
    reviews = [file for file in files if not file.name.startswith("meta_")]
    found = next((name for file in reviews if (name := _of_records(file))), None)
    return found or ("parquet" if shards(folder) else None)


def _of_file(path: Path) -> str | None:
    return BY_SUFFIX.get(TextFile(path).suffix) or _of_records(path)


def _of_records(file: Path) -> str | None:
    line = TextFile(file).first_line()
    return next(
        (name for field, name in BY_FIELD.items() if f'"{field}"' in line or f"'{field}'" in line), None
    )
