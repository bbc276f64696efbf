"""Imports items and feedback from CSV files into cemg-serve: those that Gorse exports, or others.

    python import_csv.py http://localhost:8000 --items items.csv --feedback feedback.csv
    python import_csv.py http://localhost:8000 --items products.csv --id sku --title name --text description

The first line of a file names its columns. Those that are no id, title or text become attributes for filters:
numbers, true and false, texts, dates, lists with "|" between the values, and the values of a JSON object. A
column whose values have several types is imported as text. Items with a true ``is_hidden`` are not sent, and
are removed if the service has them. CEMG stores nothing about users but their events, so Gorse's users.csv is
not needed. An import that stopped may be repeated: event ids are computed from the lines.
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
    try:
        if options.items:
            print("items:", import_items(client, options))
        if options.feedback:
            print("new events:", import_feedback(client, options))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def import_items(client: Client, options: argparse.Namespace) -> int:
    """Sends the items, and removes the hidden ones. Returns their number."""
    texts, count = columns_of_texts(options), 0
    for rows in batches(options.items, options.id):
        shown = [row for row in rows if row.get("is_hidden") != "true"]
        if shown:
            items = [item_of(row, options, texts) for row in shown]
            client.call("POST", "/v1/items", {"items": items})
        for row in rows:
            if row.get("is_hidden") == "true":
                remove(client, row[options.id])
        count += len(rows)
    return count


def remove(client: Client, item: str) -> None:
    try:
        client.call("DELETE", f"/v1/items/{quote(item, safe='')}")
    except RuntimeError as error:
        if ": 404 " not in str(error):  # the service never had it
            raise


def columns_of_texts(options: argparse.Namespace) -> set[str]:
    """The columns whose cells have values of several types, such as the sizes M and 38."""
    found: dict[str, set[type]] = {}
    for rows in batches(options.items, options.id):
        for row in rows:
            for name, text in row.items():
                if text not in ("", "null"):
                    found.setdefault(name, set()).add(kind_of(value_of(name, text)))
    return {name for name, kinds in found.items() if len(kinds) > 1}


def kind_of(value: Any) -> type:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float if is_number else type(value)


def item_of(row: dict[str, str], options: argparse.Namespace, texts: set[str]) -> dict[str, Any]:
    """An item as the service takes it."""
    fields = {"item_id": options.id, "title": options.title, "text": options.text}
    attributes: dict[str, Any] = {}
    for name, text in row.items():
        if name not in fields.values() and name != "is_hidden" and text not in ("", "null"):
            attributes |= {name: text} if name in texts else attributes_of(name, text)
    item = {field: row[column] for field, column in fields.items() if row.get(column)}
    return item | {"attributes": attributes}


def attributes_of(name: str, text: str) -> dict[str, Any]:
    """The attributes in a cell."""
    value = value_of(name, text)
    if isinstance(value, dict):
        return {key: one for key, one in value.items() if one is not None and not isinstance(one, dict)}
    return {name: [str(one) for one in value] if isinstance(value, list) else value}


def value_of(name: str, text: str) -> Any:
    """What a cell means."""
    try:
        return json.loads(text, parse_constant=str)
    except ValueError:
        if text.endswith("+0000 UTC"):  # a time as Go prints it
            return f"{text[:10]}T{text[11:19]}Z"
        return text.split("|") if "|" in text or name == "categories" else text


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
