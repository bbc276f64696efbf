"""The ``log.jsonl`` of a stage as curves over epochs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import FiniteFloat

from cemg.errors import DamagedError
from cemg.storage.read import parse_json, read_bytes

Log = list[dict[str, float]]  # rows with a "step" and the values logged at it, in the order of the steps
Curve = list[tuple[float, float]]
MAX_POINTS = 300  # of a curve; more are averaged in groups of consecutive steps


def read_log(path: Path) -> Log:
    """The rows of a ``log.jsonl``.

    A line that a killed run left incomplete is skipped. Of a step that was logged twice, the last row counts.
    """
    rows: dict[tuple[float, tuple[str, ...]], dict[str, float]] = {}
    for line in read_bytes(path).splitlines():
        try:
            row = parse_json(line, dict[str, FiniteFloat], name=str(path))
        except DamagedError:
            continue
        if "step" in row:
            rows[(row["step"], tuple(sorted(row)))] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def curves_of(log: Log, prefixes: tuple[str, ...], *, steps_per_epoch: float = 1.0) -> dict[str, Curve]:
    """(epoch, value) points of every logged name that starts with one of ``prefixes``, in their order.

    The labels are short: "recon" for "rqvae/recon", "level 0" for the prefix "rqvae/perplexity_" and a 0.
    """
    names = sorted({name for row in log for name in row})
    chosen = [(prefix, name) for prefix in prefixes for name in names if name.startswith(prefix)]
    return {
        _label(name, prefix): averaged(
            [(row["step"] / steps_per_epoch, row[name]) for row in log if name in row]
        )
        for prefix, name in chosen
    }


def _label(name: str, prefix: str) -> str:
    end = name.removeprefix(prefix) if prefix.endswith("_") else name.rpartition("/")[2]
    return f"level {end}" if end.isdigit() else end


def averaged(curve: Curve, *, points: int = MAX_POINTS) -> Curve:
    """At most ``points`` points: means of groups of consecutive ones."""
    if len(curve) <= points:
        return curve
    groups = np.array_split(np.asarray(curve), points)
    return [(float(x), float(y)) for x, y in (group.mean(axis=0) for group in groups)]


def steps_per_epoch(log: Log, epochs: int) -> float:
    """Training steps in an epoch, from the log of a training of ``epochs`` epochs.

    Losses are logged before their step is counted, validations after it.
    """
    last_loss = max((row["step"] for row in log if "generator/loss" in row), default=-1.0)
    last_validation = max((row["step"] for row in log if "generator/ndcg@10" in row), default=0.0)
    return max(last_loss + 1, last_validation, 1.0) / max(epochs, 1)
