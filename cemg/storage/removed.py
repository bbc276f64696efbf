"""The removed items of a run, which are never recommended: ``removed.json`` in its folder.

They keep their semantic IDs, so histories may contain them. Retraining keeps the list.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from cemg.errors import DamagedError
from cemg.storage import files
from cemg.storage.read import check_signature, read_json, signed

REMOVED = "removed.json"


def read_removed(run: Path) -> list[str | int]:
    """Ids of the removed items; [] if there is no list. Raises DamagedError if the list is damaged."""
    path = run / REMOVED
    if not os.path.lexists(path):
        return []
    fix = f"delete it, which restores all items, and remove them again: rm {quote(str(path))}"
    record = read_json(path, dict[str, Any], fix=fix)
    check_signature(record, name=str(path), fix=fix)
    items = record.get("items")
    if not isinstance(items, list) or not all(isinstance(item, str | int) for item in items):
        raise DamagedError(f"{path} is damaged", cause="it has no list of items", fix=fix)
    return items


def write_removed(run: Path, items: Sequence[str | int]) -> None:
    """Replace the list atomically."""
    files.write_json(run / REMOVED, signed({"items": list(items)}))
