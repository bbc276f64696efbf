"""JSON files that hold one object keyed by id: ``X.index.json``, ``X.item.json``, ``X.inter.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cemg.data.readers.textfile import TextFile
from cemg.errors import UserError


def read_keyed(path: Path | str, what: str, *, encoding: str = "") -> dict[str, Any]:
    """The object of a JSON file, its keys in file order; ``what`` its keys are is named in errors.

    Raises UserError, with line or key, for a missing or unreadable file, for anything but valid JSON text,
    for another value than an object, for an object without keys, and for a key that occurs twice.
    """
    path = Path(path)
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            repeated.extend(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return found

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
        raise UserError(f"{path}: the file must hold a JSON object keyed by {what}, got {short(value)}")
    if repeated:
        raise UserError(f"{path}: the key {repeated[0]!r} occurs more than once")
    if not value:
        raise UserError(f"{path} holds no {what}")
    return value


def short(value: object, most: int = 60) -> str:
    """A value as an error shows it."""
    shown = repr(value) if not isinstance(value, list | dict) else repr(value)[: most + 1]
    return shown if len(shown) <= most else f"{shown[:most]}…"
