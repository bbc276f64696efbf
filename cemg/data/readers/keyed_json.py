"""JSON files with one object keyed by id: ``X.index.json``, ``X.item.json``, ``X.inter.json``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from cemg.data.readers.textfile import TextFile
from cemg.errors import UserError


def read_keyed(path: Path | str, key_name: str, *, encoding: str = "") -> dict[str, Any]:
    """Read the object of a JSON file, with its keys in the order of the file.

    Args:
        path: JSON file.
        key_name: What the keys are, in plural, for errors.
        encoding: Encoding of the file; "" detects it.

    Raises:
        UserError: The file is missing, unreadable or not valid JSON, its value is not an object, the object
            is empty, or a key occurs twice.
    """
    path = Path(path)
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated.extend(key for key, count in counts.items() if count > 1)
        return record

    try:
        value = json.loads(TextFile(path, encoding).text(), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg} at column {error.colno}"
        raise UserError(f"{path}, line {error.lineno}: {reason}") from error
    except UserError:
        raise
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        raise UserError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read", cause=str(error)) from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object keyed by {key_name}, got {short(value)}")
    if repeated:
        raise UserError(f"{path}: the key {repeated[0]!r} occurs more than once")
    if not value:
        raise UserError(f"{path} has no {key_name}")
    return value


def short(value: object, limit: int = 60) -> str:
    """Format a value for an error, with at most ``limit`` characters."""
    text = repr(value) if not isinstance(value, list | dict) else repr(value)[: limit + 1]
    return text if len(text) <= limit else f"{text[:limit]}…"
