"""Detection of the format of a dataset, by file names or by the first line of a file."""

from __future__ import annotations

from pathlib import Path

from cemg.data.readers.tables import shards
from cemg.data.readers.textfile import TextFile
from cemg.errors import UserError

BY_NAME = {  # glob pattern in a folder -> format; the first match counts
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
BY_FIELD = {  # in this order, because the reviews of 2018 also have a reviewerID
    "business_id": "yelp",
    "parent_asin": "amazon-2023",
    "verified": "amazon-2018",
    "reviewerID": "amazon-2014",
}
JSON_LINES = ("*.json", "*.json.gz", "*.jsonl", "*.jsonl.gz")


def detect_format(path: Path) -> str:
    """Return the format of a file or folder. Raises UserError if it cannot be detected."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.name.endswith(".inter.json"):
        return "inter-json"
    format = _of_folder(path) if path.is_dir() else _of_file(path)
    if format is None:
        names = ", ".join(sorted(file.name for file in path.iterdir())[:8]) if path.is_dir() else ""
        raise UserError(
            f"cannot detect the format of {path}",
            cause=f"it contains {names or 'no files'}" if path.is_dir() else None,
            fix="name the files: --interactions FILE --items FILE; or name the format: --format csv",
        )
    return format


def _of_folder(folder: Path) -> str | None:
    by_name = next((format for pattern, format in BY_NAME.items() if any(folder.glob(pattern))), None)
    if by_name:
        return by_name
    files = sorted(file for pattern in JSON_LINES for file in folder.glob(pattern))
    reviews = [file for file in files if not file.name.startswith("meta_")]
    by_field = next((format for file in reviews if (format := _of_records(file))), None)
    return by_field or ("parquet" if shards(folder) else None)


def _of_file(path: Path) -> str | None:
    return BY_SUFFIX.get(TextFile(path).suffix) or _of_records(path)


def _of_records(file: Path) -> str | None:
    line = TextFile(file).first_line()
    return next(
        (name for field, name in BY_FIELD.items() if f'"{field}"' in line or f"'{field}'" in line), None
    )
