"""The report of an experiment: one HTML page with everything inline, and one table of all metrics as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cemg.evaluation import Sample
from cemg.evaluation.results import KEPT, REMOVED
from cemg.evaluation.tables import RANKINGS
from cemg.experiments.plan import CEMG, QUESTIONS, SWEEPS, Task
from cemg.experiments.store import CODES, Store
from cemg.experiments.tables import (
    Board,
    best_baseline,
    boards,
    cold_rows,
    cost_rows,
    difference_rows,
    ranking_rows,
    spread_rows,
    value_of,
)
from cemg.report.blocks import Block, Chart, Charts, Section, Table, Text
from cemg.report.charts import interval_chart, line_chart
from cemg.report.page import render
from cemg.storage import files
from cemg.storage.read import read_json

PAGE, TABLE = "report.html", "results.csv"
COLLIDING, PERPLEXITY = "share of colliding items", "perplexity of a level"
Rows = tuple[list[str], list[list[str]]]


def write_experiment_report(store: Store, tasks: Sequence[Task], questions: Sequence[str]) -> Path:
    """Write ``report.html`` and ``results.csv``, and return the path of the page.

    Args:
        store: The folder of the experiment.
        tasks: The tasks of the questions, finished or not.
        questions: Names of `QUESTIONS`.
    """
    results: list[tuple[str, str, dict[str, Any]]] = []
    rows: list[dict[str, Any]] = []
    missing: dict[str, list[str]] = {}
    for task in sorted(tasks, key=lambda task: task.model == CEMG):  # baselines first
        found = store.results(task)
        if task.title not in found:
            missing.setdefault(task.data, []).append(task.name)
        for title, record in found.items():
            results.append((task.data, title, record))
            rows += _csv_rows(task, title, record)
    files.write_text(store.folder / TABLE, _csv(rows))
    made = boards(results, missing)
    sections = [_section(board, questions) for board in made]
    if "rq4" in questions:
        sections += [_sweeps(store, data, tasks) for data in dict.fromkeys(task.data for task in tasks)]
    title = ", ".join(f"{name.upper()}: {QUESTIONS[name].title}" for name in questions)
    files.write_text(store.folder / PAGE, render(title, sections, kind="experiment"))
    return store.folder / PAGE


def _section(board: Board, questions: Sequence[str]) -> Section:
    """The tables of one split."""
    blocks: list[Block] = []
    if board.missing:
        blocks.append(Text(f"Without a result: {', '.join(board.missing)}."))
    if not board.rows:
        return Section(board.data, blocks)
    users, items = board.split.get("users"), board.split.get("items")
    sample = Sample.of(board.split)
    of_users = f"{users:,} users" if sample is None else f"a sample of {sample.count:,} of {users:,} users"
    about = f"{of_users}, {items:,} items, leave-one-out, the whole catalog ranked."
    ties = board.split.get("tie_rule")
    blocks.insert(0, Text(about + (f" Events at the same time: {ties}." if ties else "")))
    blocks.append(Text(
        "± is half of a 95 % interval: over seeds where a row has several (Student's), else over users."
    ))  # fmt: skip
    blocks.append(Charts([_overview(board)]))
    if {"rq1", "rq2", "rq4"} & {*questions}:
        blocks += [_table(label, ranking_rows(board, key, paper=True)) for key, label in
                   ((KEPT, "History kept"), (REMOVED, "History removed from the list"))]  # fmt: skip
        blocks.append(_table("What is recommended, history kept", spread_rows(board)))
        baseline = best_baseline(board)
        if baseline is not None:
            caption = f"Difference to {baseline}, the best model other than CEMG (95 % interval over users)"
            blocks.append(_table(caption, difference_rows(board, baseline)))
    if {"rq1", "rq5"} & {*questions}:
        blocks.append(_table("Targets with at most 5 training interactions", cold_rows(board)))
    blocks.append(_table("Seconds", cost_rows(board)))
    title = board.data if sample is None else f"{board.data}, {sample.count:,} users"
    return Section(title, [block for block in blocks if not isinstance(block, Table) or block.rows])


def _table(caption: str, contents: Rows) -> Table:
    columns, rows = contents
    return Table(caption, columns, rows)


def _overview(board: Board) -> Chart:
    """NDCG@10 of every model, with the history kept and removed."""
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    for title, records in board.rows.items():
        for key in (KEPT, REMOVED):
            found = value_of(records, key, "NDCG@10")
            if found is not None:
                rows.setdefault(title, {})[RANKINGS[key]] = (found[0], found[1] or 0.0)
    return interval_chart(f"NDCG@10 on {board.data}", rows, x_label="NDCG@10")


def _sweeps(store: Store, data: str, tasks: Sequence[Task]) -> Section:
    """Charts of the metrics, collisions and perplexity over each parameter of the tokenizer."""
    charts = []
    for axis in SWEEPS:
        curves: dict[str, list[tuple[float, float]]] = {}
        for task in tasks:
            name, equals, value = task.variant.partition(" = ")
            if task.data != data or task.seed or not equals or name != axis:
                continue
            for label, figure in _figures(store, task).items():
                curves.setdefault(label, []).append((float(value), figure))
        curves = {label: sorted(curve) for label, curve in curves.items()}
        quality = {label: curve for label, curve in curves.items() if "@" in label}
        for name, shown in (
            ("metrics", quality),
            *((label, {label: curves[label]}) for label in curves if label not in quality),
        ):
            charts += [line_chart(f"{data}: {name} by {axis}", shown, x_label=axis)] if shown else []
    return Section(f"{data}, sweeps", [Charts(charts)] if charts else [Text("No sweep has a result.")])


def _figures(store: Store, task: Task) -> dict[str, float]:
    """HR@10 and NDCG@10 of the search, the share of colliding items, and the mean perplexity of a level."""
    record = store.results(task).get(f"{task.title}, search alone")
    if record is None:
        return {}
    codes = read_json(store.path(task) / CODES, dict[str, float])
    metrics = {name: record[KEPT][name] for name in ("HR@10", "NDCG@10")}
    return metrics | {COLLIDING: codes["colliding"], PERPLEXITY: codes["perplexity"]}


def _csv_rows(task: Task, title: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per ranking: what was trained, then the metrics, those of cold targets and the spread."""
    about = {
        "data": task.data, "model": title, "settings": " ".join(task.settings), "seed": task.seed,
        "users": record.get("evaluated_users", record["split"].get("users")),
        "items": record["split"].get("items"),
        "split": str(record["split"].get("targets_sha256", ""))[:16], "seconds": record.get("seconds"),
    }  # fmt: skip
    rows = []
    for key, label in RANKINGS.items():
        if key not in record:
            continue
        cold = {f"cold {name}": value for name, value in (record.get("cold") or {}).get(key, {}).items()}
        rows.append(about | {"ranking": label} | record[key] | record.get("spread", {}).get(key, {}) | cold)
    return rows


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
