"""Compares the figures of one GPU run with what they should reach: ``python targets.py FILE.json ...``

A target whose rows are in none of the files is left out. Prints ``{name: {"goal", "measured", "met"}}``,
times in ms, the best where several files hold a row (float32 and bfloat16), and for "flat" the longest
median over that of the smallest catalog.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SELECTION = "selection, W 50, K 256, any catalog"
STEP = "trie_step", r"K 256 N (\S+)"
GOALS = {  # milliseconds, and the rows they are about
    SELECTION: (0.008, *STEP),
    "T5-small, B 1, W 50": (0.8, "latency", "t5-small B1 W50"),
    "TIGER's size, B 1, W 50": (0.4, "latency", "tiger B1 W50"),
}
FLAT = 1.2
SIZES = {"selection": STEP, "TIGER's size": ("latency", r"tiger B1 W50 N(\S+)")}


def read(paths: Sequence[Path]) -> list[Row]:
    """The rows of the files that hold any; a file that a killed run left unreadable holds none."""
    rows: list[Row] = []
    for path in paths:
        try:
            rows += json.loads(path.read_text())["rows"]
        except (ValueError, KeyError) as error:
            print(f"{path}: no rows ({error})", file=sys.stderr)
    return [row for row in rows if row["p50_ms"] is not None]


def medians(rows: Iterable[Row], op: str, case: str) -> dict[float, float]:
    """The best median by the catalog's size, the group of the pattern ``case``; without one, of size 0."""
    found: dict[float, float] = {}
    for row in rows:
        match = re.fullmatch(case, row["case"])
        if row["op"] == op and match:
            size = float(match.group(1)) if match.groups() else 0.0
            found[size] = min(row["p50_ms"], found.get(size, row["p50_ms"]))
    return found


def targets(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Each target that these rows speak of: its goal, what was measured, whether it is met."""
    found = {}
    for name, (goal, op, case) in GOALS.items():
        measured = medians(rows, op, case)
        if measured:
            found[name] = verdict(goal, max(measured.values()))
    for name, (op, case) in SIZES.items():
        measured = medians(rows, op, case)
        if len(measured) > 1:
            least, most = min(measured), max(measured)
            grown = max(measured.values()) / measured[least]
            found[f"{name}, flat from {least:.0e} to {most:.0e} items"] = verdict(FLAT, grown)
    return found


def verdict(goal: float, measured: float) -> dict[str, Any]:
    return {"goal": goal, "measured": measured, "met": measured <= goal}


if __name__ == "__main__":
    print(json.dumps(targets(read([Path(name) for name in sys.argv[1:]])), indent=1))
