"""Compares the results of a GPU run with their targets: ``python targets.py FILE.json ...``

Prints ``{name: {"goal", "measured", "met"}}``, times in milliseconds. If several files have a row (float32
and bfloat16), the fastest counts. "flat" is the largest median over that of the smallest catalog. A target
without rows in the files is left out.
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
GOALS = {  # milliseconds, and the op and case of the rows
    SELECTION: (0.008, *STEP),
    "T5-small, B 1, W 50": (0.8, "latency", "t5-small B1 W50"),
    "TIGER's size, B 1, W 50": (0.4, "latency", "tiger B1 W50"),
}
FLAT = 1.2
SIZES = {"selection": STEP, "TIGER's size": ("latency", r"tiger B1 W50 N(\S+)")}


def read(paths: Sequence[Path]) -> list[Row]:
    """The rows of all files; an unreadable file, left by a killed run, has none."""
    rows: list[Row] = []
    for path in paths:
        try:
            rows += json.loads(path.read_text())["rows"]
        except (ValueError, KeyError) as error:
            print(f"{path}: no rows ({error})", file=sys.stderr)
    return [row for row in rows if row["p50_ms"] is not None]


def medians(rows: Iterable[Row], op: str, case: str) -> dict[float, float]:
    """The best median per catalog size, the group of the pattern ``case``; size 0 without a group."""
    best: dict[float, float] = {}
    for row in rows:
        match = re.fullmatch(case, row["case"])
        if row["op"] == op and match:
            size = float(match.group(1)) if match.groups() else 0.0
            best[size] = min(row["p50_ms"], best.get(size, row["p50_ms"]))
    return best


def targets(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """For each target with rows: its goal, the measured value, and whether the target is met."""
    results = {}
    for name, (goal, op, case) in GOALS.items():
        measured = medians(rows, op, case)
        if measured:
            results[name] = verdict(goal, max(measured.values()))
    for name, (op, case) in SIZES.items():
        measured = medians(rows, op, case)
        if len(measured) > 1:
            least, most = min(measured), max(measured)
            grown = max(measured.values()) / measured[least]
            results[f"{name}, flat from {least:.0e} to {most:.0e} items"] = verdict(FLAT, grown)
    return results


def verdict(goal: float, measured: float) -> dict[str, Any]:
    return {"goal": goal, "measured": measured, "met": measured <= goal}


if __name__ == "__main__":
    print(json.dumps(targets(read([Path(name) for name in sys.argv[1:]])), indent=1))
