"""Tables of result files, for the terminal and as Markdown."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cemg.errors import UserError
from cemg.evaluation.metrics import Metrics, seed_interval
from cemg.evaluation.paper import printed_rows
from cemg.evaluation.results import (
    EXCLUDED,
    KEPT,
    REMOVED,
    differences_of,
    intervals_key,
    read_result,
    same_results,
)

RANKINGS = {
    KEPT: "history kept",
    REMOVED: "history removed from the list",
    EXCLUDED: "history excluded in the search",
}
SEED = re.compile(r"-seed\d+$")


def result_table(paths: Sequence[Path], *, paper: bool = True) -> Table:
    """Build a rich table of result files and, with ``paper``, of printed results on the same data set.

    A file has a row with the history kept, one with it removed, and one with it excluded in the search if
    that was measured, each with half the width of its 95 % interval over users; rows over cold targets if
    there are any; and the paired difference to another model if the file has one. Files whose names differ
    only in ``-seedN`` are one model: the table shows the mean over the seeds with half the width of Student's
    95 % interval, or with the standard deviation (SD) for two seeds. Where all seeds have the same results,
    the model is deterministic, and the table shows one of them.

    Raises:
        UserError: There is no file, one is not a result file, or their splits differ: metrics of different
            targets are not comparable.
    """
    contents = result_rows(paths, paper=paper)
    table = Table(title=contents.title, box=box.SIMPLE, padding=0)
    for i, name in enumerate(contents.columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in contents.rows:
        table.add_row(*row)
    return table


def result_markdown(paths: Sequence[Path], *, paper: bool = True) -> str:
    """Format the table of ``result_table`` as Markdown."""
    contents = result_rows(paths, paper=paper)
    rule = ["---"] + ["---:"] * (len(contents.columns) - 1)
    rows = [contents.columns, rule, *contents.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def difference_markdown(first: Path, second: Path) -> str:
    """Format the paired differences of two result files, the first minus the second, as Markdown.

    Raises:
        UserError: The splits differ, or a file was written by an earlier version, which recorded no ranks.
    """
    records = [read_result(path) for path in (first, second)]
    _check_same_split((first, second), records)
    for path, record in zip((first, second), records, strict=True):
        if "ranks" not in record:
            raise UserError(
                f"{path} has no ranks, so it cannot be compared user by user",
                cause="an earlier version wrote it",
                fix="write it again: cemg-eval --run RUN",
            )
    lines = [f"| {first.stem} minus {second.stem} | difference | 95 % interval |", "| --- | ---: | ---: |"]
    for key, found in differences_of((records[0], records[1])).items():
        lines += [
            f"| {metric}, {RANKINGS[key]} | {d['mean']:+.4f} | {d['low']:+.4f} … {d['high']:+.4f} |"
            for metric, d in found.items()
        ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class ResultRows:
    """The cells of a table of results. The first column holds the names of the models."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def result_rows(paths: Sequence[Path], *, paper: bool = True) -> ResultRows:
    """Return the cells of ``result_table``. Raises UserError as it does."""
    records = [read_result(p) for p in paths]
    if not records:
        raise UserError("there is no result to put in a table", fix="name at least one result file")
    _check_same_split(paths, records)
    split, dataset = records[0]["split"], records[0]["dataset"]
    names = list(records[0]["metrics"])
    groups: dict[str, list[dict[str, Any]]] = {}
    for path, record in zip(paths, records, strict=True):
        groups.setdefault(SEED.sub("", path.stem) if _has_siblings(path, paths) else path.stem, []).append(
            record
        )
    rows = [row for name, group in groups.items() for row in _rows(name, group, names)]
    for printed in printed_rows(dataset) if paper else ():
        cells = _cells({"HR@10": printed.hr10, "NDCG@10": printed.ndcg10}, names)
        rows.append([f"{printed.model} ({printed.source})", *cells])
    users = split["subset"].split(",")[0] if "subset" in split else f"{split['users']:,} users"
    title = f"{dataset}: {users}, {split['items']:,} items"
    return ResultRows(title, ["model", *names], rows)


def _has_siblings(path: Path, paths: Sequence[Path]) -> bool:
    return sum(SEED.sub("", p.stem) == SEED.sub("", path.stem) for p in paths) > 1


def _rows(name: str, group: list[dict[str, Any]], names: list[str]) -> list[list[str]]:
    """The rows of one model: rankings with their intervals over users, cold targets, paired differences."""
    if same_results(group):
        group = group[:1]
    single = group[0] if len(group) == 1 else None
    rows = []
    for key, label in RANKINGS.items():
        values: list[Any] = [record.get(key) for record in group]
        if all(values):
            model = name if single else f"{name} ({len(group)} seeds)"
            title = model if key == KEPT else f"- {label}"
            rows.append([title, *_seed_cells(values, names)])
            if single:
                rows += _interval_row(single.get(intervals_key(key), {}), names)
    cold = [record.get("cold") or {} for record in group]
    for key, label in ((KEPT, "cold targets"), (REMOVED, "cold targets, history removed")):
        values = [part.get(key) for part in cold]
        if all(values):
            count = f" ({cold[0]['targets']:,})" if "targets" in cold[0] and key == KEPT else ""
            rows.append([f"- {label}{count}", *_seed_cells(values, names)])
            if single:
                rows += _interval_row(cold[0].get(intervals_key(key), {}), names)
    return rows + (_difference_rows(single, names) if single else [])


def _interval_row(intervals: Mapping[str, Sequence[float]], names: list[str]) -> list[list[str]]:
    """Half the width of each 95 % interval over users; no row if there are none."""
    if not intervals:
        return []
    halves = [(intervals[name][1] - intervals[name][0]) / 2 if name in intervals else None for name in names]
    return [["  ± (95 %)", *("" if half is None else f"{half:.4f}" for half in halves)]]


def _difference_rows(record: Mapping[str, Any], names: list[str]) -> list[list[str]]:
    """The difference to the model that the file is compared with, and the bounds of its 95 % interval."""
    compared = record.get("compared", {})
    rows = []
    for key, label in ((KEPT, compared.get("model")), (REMOVED, "memory, history removed")):
        differences = compared.get("differences", {})
        found = differences.get(key)
        if found and not (key == REMOVED and found == differences.get(KEPT)):
            rows.append([f"- minus {label}", *(_signed(found[n]["mean"]) for n in names)])
            rows.append(["  95 % lower bound", *(_signed(found[n]["low"]) for n in names)])
            rows.append(["  95 % upper bound", *(_signed(found[n]["high"]) for n in names)])
    return rows


def _signed(value: float) -> str:
    """A difference without the zero before its point, so that it is not wider than a metric."""
    return f"{value:+.4f}".replace("0.", ".", 1)


def _seed_cells(seeds: Sequence[Metrics], names: list[str]) -> list[str]:
    if len(seeds) == 1:
        return _cells(seeds[0], names)
    cells = []
    for name in names:
        values = [metrics[name] for metrics in seeds]
        half = seed_interval(values)
        spread = f"(SD {statistics.stdev(values):.4f})" if half is None else f"± {half:.4f}"
        cells.append(f"{statistics.mean(values):.4f} {spread}")
    return cells


def _cells(values: Metrics, names: list[str]) -> list[str]:
    return [f"{values[name]:.4f}" if name in values else "" for name in names]


def _check_same_split(paths: Sequence[Path], records: list[dict[str, Any]]) -> None:
    first = records[0]["split"]
    for path, record in zip(paths, records, strict=True):
        keys = [k for k in {**first, **record["split"]} if first.get(k) != record["split"].get(k)]
        if keys:
            raise UserError(
                f"{path} and {paths[0]} were measured on different splits",
                cause=f"{keys[0]}: {record['split'].get(keys[0])} and {first.get(keys[0])}",
                fix="put them in separate tables, or evaluate both on the same split",
            )
