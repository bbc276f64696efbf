"""Imports items and feedback from CSV files into cemg-serve: those that Gorse exports, or others.

    python import_csv.py http://localhost:8000 --items items.csv --feedback feedback.csv
    python import_csv.py http://localhost:8000 --items products.csv --id sku --title name --text description

The first line of a file names its columns. Those that are no id, title or text become attributes for filters:
numbers, true and false, texts, lists with "|" between the values, and the values of a JSON object.
Items with a true ``is_hidden`` are removed. CEMG keeps nothing about users but their events, so Gorse's
users.csv is not needed. An import that stopped may be repeated: event ids are computed from the lines.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from client import Client

BATCH = 500  # lines per call


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="address of the service")
    parser.add_argument("--key", default="", help="API key with the role write")
    parser.add_argument("--items", type=Path, help="CSV file of items")
    parser.add_argument("--feedback", type=Path, help="CSV file of feedback")
    for name, column in {"id": "item_id", "title": "title", "text": "description"}.items():
        parser.add_argument(f"--{name}", default=column, help=f"column of the items (default: {column})")
    for name, column in {
        "user": "user_id",
        "item": "item_id",
        "time": "time_stamp",
        "type": "feedback_type",
    }.items():
        parser.add_argument(f"--{name}", default=column, help=f"column of the feedback (default: {column})")
    options = parser.parse_args()
    client = Client(options.url, options.key)
    if options.items:
        print("items:", import_items(client, options))
    if options.feedback:
        print("new events:", import_feedback(client, options))


def import_items(client: Client, options: argparse.Namespace) -> int:
    """Sends the items, and removes the hidden ones. Returns their number."""
    count = 0
    for rows in batches(options.items, options.id):
        items = [item_of(row, options) for row in rows]
        client.call("POST", "/v1/items", {"items": items})
        for row in rows:
            if row.get("is_hidden") == "true":
                client.call("DELETE", f"/v1/items/{quote(row[options.id], safe='')}")
        count += len(rows)
    return count


def item_of(row: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """An item as the service takes it."""
    fields = {"item_id": options.id, "title": options.title, "text": options.text}
    attributes: dict[str, Any] = {}
    for name, text in row.items():
        if name not in fields.values() and name != "is_hidden" and text not in ("", "null"):
            attributes |= attributes_of(name, text)
    item = {field: row[column] for field, column in fields.items() if row.get(column)}
    return item | {"attributes": attributes}


def attributes_of(name: str, text: str) -> dict[str, Any]:
    """The attributes in a cell."""
    try:
        value = json.loads(text, parse_constant=str)
    except ValueError:
        value = text.split("|") if "|" in text or name == "categories" else text
    if isinstance(value, dict):
        return {key: one for key, one in value.items() if one is not None and not isinstance(one, dict)}
    return {name: [str(one) for one in value] if isinstance(value, list) else value}


def import_feedback(client: Client, options: argparse.Namespace) -> int:
    """Sends the events. Returns how many were new."""
    return sum(
        client.send_events([event_of(row, options) for row in rows])
        for rows in batches(options.feedback, options.user)
    )


def event_of(row: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """An event whose id is the same in each import."""
    line = "\x1f".join(f"{name}={value}" for name, value in sorted(row.items()))
    event: dict[str, Any] = {
        "event_id": hashlib.sha256(line.encode()).hexdigest(),
        "user_id": row[options.user],
        "item_id": row[options.item],
    }
    if row.get(options.type):
        event["type"] = row[options.type]
    if row.get(options.time):
        event["timestamp"] = seconds_of(row[options.time])
    return event


def seconds_of(text: str) -> float:
    """Seconds since 1970 of a number, an ISO date, or a time as Go prints it."""
    try:
        return float(text)
    except ValueError:
        pass
    if text.endswith(" UTC"):  # 2020-01-01 01:01:01.000000001 +0000 UTC
        text = f"{text[:19]}+00:00"
    return datetime.fromisoformat(text).timestamp()


def batches(path: Path, column: str) -> Iterator[list[dict[str, str]]]:
    """The lines of a file."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if column not in (reader.fieldnames or []):
            sys.exit(f"{path} has no column {column!r}; its columns are {', '.join(reader.fieldnames or [])}")
        rows: list[dict[str, str]] = []
        for row in reader:
            rows.append(row)
            if len(rows) == BATCH:
                yield rows
                rows = []
        if rows:
            yield rows


if __name__ == "__main__":
    main()
