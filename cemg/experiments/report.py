"""The report of an experiment: one HTML page with everything inline, and one table of all metrics as CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cemg.baselines.registry import MODELS
from cemg.evaluation import Sample
from cemg.evaluation.results import KEPT, REMOVED
from cemg.evaluation.tables import RANKINGS
from cemg.experiments.plan import ABLATIONS, NEW_ITEMS, QUESTIONS, SWEEPS, Task
from cemg.experiments.settings import CEMG
from cemg.experiments.store import Store
from cemg.experiments.tables import (
    Board,
    best_baseline,
    boards,
    cold_rows,
    cost_rows,
    difference_rows,
    figure_of,
    ranking_rows,
    spread_rows,
)
from cemg.report.blocks import Block, Chart, Charts, Section, Table, Text
from cemg.report.charts import interval_chart, line_chart
from cemg.report.page import render
from cemg.storage import files

PAGE, TABLE = "report.html", "results.csv"
COLLIDING, PERPLEXITY = "share of colliding items", "perplexity of a level"
NO_NEW_ITEMS = "New items are tested with the split leave-one-out only."
OF_USERS = "± is half of the 95 % interval over users."
OF_SEEDS = (
    "Of several seeds, a cell has the mean and the standard deviation (SD), from 3 seeds on with half of "
    "Student's 95 % interval (±). Of one seed, and of a deterministic model, ± is half of the 95 % interval "
    "over users."
)
OF_PAIRS = (
    " (by NDCG@10, history removed): mean over users and over the seeds that both have, 95 % interval over "
    "users"
)
FEWEST = 30  # targets of a table of rare items
Rows = tuple[list[str], list[list[str]]]


def write_experiment_report(store: Store, planned: Sequence[Task], questions: Sequence[str]) -> Path:
    """Write ``report.html`` and ``results.csv``, and return the path of the page.

    Both have all tasks of the folder, and the page all questions that were asked so far.

    Args:
        store: The folder of the experiment.
        planned: Tasks of the questions, finished or not, that may not be in the folder yet.
        questions: Names of `QUESTIONS`.
    """
    known = {task.name: task for task in (*store.tasks(), *planned)}
    tasks, questions = list(known.values()), [q for q in QUESTIONS if q in {*questions, *store.questions()}]
    rows = [
        row for task in _ordered(tasks) for title, record in store.results(task).items()
        for row in _csv_rows(task, title, record)
    ]  # fmt: skip
    files.write_text(store.folder / TABLE, _csv(rows))
    title = ", ".join(f"{name.upper()}: {QUESTIONS[name].title}" for name in questions)
    page = render(title, experiment_sections(store, tasks, questions), kind="experiment")
    files.write_text(store.folder / PAGE, page)
    return store.folder / PAGE


def experiment_sections(store: Store, tasks: Sequence[Task], questions: Sequence[str]) -> list[Section]:
    """Return the sections of a report: per question, one for each data set and split.

    Args:
        store: The folder of the experiment.
        tasks: The tasks of the questions, finished or not.
        questions: Names of `QUESTIONS`.
    """
    ordered = _ordered(tasks)
    found = {task.name: store.results(task) for task in ordered}
    sections = []
    for question in questions:
        chosen = [task for task in ordered if task.belongs_to(question)]
        results = [
            (task.table, title, record) for task in chosen for title, record in found[task.name].items()
        ]
        missing: dict[str, list[str]] = {}
        for task in chosen:
            if task.title not in found[task.name]:
                damaged = store.damaged(task)
                name = f"{task.name} (damaged: {damaged})" if damaged else task.name
                missing.setdefault(task.table, []).append(name)
        for board in boards(results, missing):
            title = f"{_label(board)}: {question.upper()}, {_topic(question, board)}"
            blocks = _about(board, store, chosen) + _answer(question, board, store, chosen)
            sections.append(Section(title, blocks))
    return sections


def _topic(question: str, board: Board) -> str:
    """What a section is about; the two parts of RQ5 have a section each."""
    if question == "rq5" and board.rows:
        return NEW_ITEMS if "added" in str(board.split.get("split")) else "cold items"
    return QUESTIONS[question].title.lower()


def _ordered(tasks: Sequence[Task]) -> list[Task]:
    """The baselines in the order of MODELS, those of files after them, then CEMG."""
    place = {name: place for place, name in enumerate(MODELS)}
    return sorted(
        tasks, key=lambda t: (t.model == CEMG, place.get(t.model, len(place)), _variant_place(t), t.seed)
    )


def _variant_place(task: Task) -> int:
    """The place of a variant among those of its question; CEMG without a variant is the first."""
    variants = [
        "",
        *ABLATIONS,
        *(f"{axis} = {value}" for axis, (_, values) in SWEEPS.items() for value in values),
    ]
    return variants.index(task.variant) if task.variant in variants else len(variants)


def _label(board: Board) -> str:
    """The data set and split, and the number of users of a sample."""
    sample = Sample.of(board.split)
    return board.data if sample is None else f"{board.data}, {sample.count:,} users"


def _about(board: Board, store: Store, tasks: Sequence[Task]) -> list[Block]:
    """The beginning of each section: missing tasks, the data, the split, settings, and the meaning of ±."""
    blocks: list[Block] = []
    if board.missing:
        blocks.append(Text(f"Without a result: {', '.join(board.missing)}."))
    if not board.rows:
        return blocks
    users, items = board.split.get("users"), board.split.get("items")
    sample = Sample.of(board.split)
    of_users = f"{users:,} users" if sample is None else f"a sample of {sample.count:,} of {users:,} users"
    split = board.split.get("split", "leave-one-out")
    about = f"{of_users}, {items:,} items, split {split}, the whole catalog ranked."
    ties = board.split.get("tie_rule")
    blocks.append(Text(about + (f" Events at the same time: {ties}." if ties else "")))
    read = store.data().get(board.data)
    if read:
        kept = f"{read['users']:,} users, {read['items']:,} items and {read['interactions']:,} interactions"
        blocks.append(Text("; ".join([f"Read from the source: {kept}", *read["notes"]]) + "."))
    changed = {t.title: t.changed for t in tasks if t.table == board.data and t.changed}
    if changed:
        parts = [f"{title}: {' '.join(settings)}" for title, settings in changed.items()]
        blocks.append(Text(f"Changed settings: {'; '.join(parts)}."))
    blocks.append(Text(OF_SEEDS if any(len(r) > 1 for r in board.rows.values()) else OF_USERS))
    return blocks


def _answer(question: str, board: Board, store: Store, tasks: Sequence[Task]) -> list[Block]:
    """The charts and tables of one question, those without rows left out."""
    if not board.rows:
        return []
    blocks: list[Block] = []
    if question in ("rq1", "rq2"):
        blocks.append(Charts([_overview(board)]))
        blocks += [_table(label, ranking_rows(board, key, paper=True)) for key, label in
                   ((KEPT, "History kept"), (REMOVED, "History removed from the list"))]  # fmt: skip
        blocks.append(
            _table("Coverage and popularity of the recommendations, history kept", spread_rows(board))
        )
        best = {best_baseline(board): "the best model other than CEMG"}
        best.setdefault(best_baseline(board, trained=True), "the best trained model other than CEMG")
        for baseline, label in best.items():
            if baseline is not None:
                caption = f"Difference to {baseline}, {label}{OF_PAIRS}"
                blocks.append(_table(caption, difference_rows(board, baseline)))
    if question == "rq3":
        blocks.append(_table("Seconds", cost_rows(board)))
        blocks += _latencies(store, board)
    if question == "rq4":
        blocks += _sweeps(store, board, tasks)
    if question == "rq5":
        caption = "Targets with at most 5 training interactions"
        if "split" in board.split and "added" in str(board.split["split"]):
            caption = "Targets that were added to the catalog after training"
        columns, rows = cold_rows(board)
        targets = max((int(row[1].replace(",", "")) for row in rows), default=0)
        if rows and targets < FEWEST:
            blocks.append(Text(f"{caption}: only {targets}, too few for a table."))
        else:
            blocks.append(Table(caption, columns, rows))
        if board.split.get("split") and "added" not in str(board.split["split"]):
            blocks.append(Text(NO_NEW_ITEMS))
    return [block for block in blocks if not isinstance(block, Table) or block.rows]


def _table(caption: str, contents: Rows) -> Table:
    columns, rows = contents
    return Table(caption, columns, rows)


def _overview(board: Board) -> Chart:
    """NDCG@10 of every model, with the history kept and removed."""
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    for title, records in board.rows.items():
        for key in (KEPT, REMOVED):
            found = figure_of(records, key, "NDCG@10")
            if found is not None:
                rows.setdefault(title, {})[RANKINGS[key]] = (found.mean, found.half or 0.0)
    return interval_chart(f"NDCG@10 on {board.data}", rows, x_label="NDCG@10")


def _latencies(store: Store, board: Board) -> list[Block]:
    """A table of the time of a recommendation by each model."""
    found = store.latencies(board.data)
    if not found or "added" in str(board.split.get("split")):
        return []
    batches = sorted({row["histories"] for row in found["rows"]})
    rows: dict[tuple[str, str], list[str]] = {}
    for row in found["rows"]:
        cell = f"{row['p50_ms']:,.1f} ({row['p25_ms']:,.1f} … {row['p75_ms']:,.1f})"
        rows.setdefault((row["model"], row["engine"]), []).append(cell)
    columns = ["model", "engine", *(f"ms, {batch} at once" for batch in batches)]
    about = found["hardware"]
    caption = (
        f"Time of {found['top']} recommendations, median and quartiles, measured in turns on "
        f"{about.get('gpu', about['cpu'])}, {about['threads']} CPU threads"
    )
    return [Table(caption, columns, [[*name, *cells] for name, cells in rows.items()])]


def _sweeps(store: Store, board: Board, tasks: Sequence[Task]) -> list[Block]:
    """A table and charts of the metrics, collisions and perplexity over each parameter of the tokenizer."""
    charts: list[Chart] = []
    rows: list[list[str]] = []
    for axis in SWEEPS:
        curves: dict[str, list[tuple[float, float]]] = {}
        is_default = {task.variant: bool(task.base) for task in tasks}
        found: dict[str, list[dict[str, float]]] = {}  # a variant: the figures of its seeds
        for task in tasks:
            if task.table == board.data and task.variant.startswith(f"{axis} = "):
                figures = _figures(store, task)
                if figures:
                    found.setdefault(task.variant, []).append(figures)
        for variant, seeds in found.items():
            figures = {label: statistics.mean(one[label] for one in seeds) for label in seeds[0]}
            name = f"{variant} (the default)" if is_default.get(variant) else variant
            rows.append([name, str(len(seeds)),
                         *(f"{figures[metric]:.4f}" for metric in figures if "@" in metric),
                         f"{figures[COLLIDING]:.1%}", f"{figures[PERPLEXITY]:.0f}"])  # fmt: skip
            for label, figure in figures.items():
                curves.setdefault(label, []).append((float(variant.partition(" = ")[2]), figure))
        curves = {label: sorted(curve) for label, curve in curves.items()}
        quality = {label: curve for label, curve in curves.items() if "@" in label}
        shown = {"metrics": quality} | {label: {label: curves[label]} for label in curves.keys() - quality}
        for label in sorted(shown):
            if shown[label]:
                charts.append(line_chart(f"{board.data}: {label} by {axis}", shown[label], x_label=axis))
    if not rows:
        return [Text("No sweep has a result.")]
    columns = ["search alone", "seeds", "HR@10", "NDCG@10", COLLIDING, PERPLEXITY]
    return [Table("Sweeps, history kept, means over the seeds", columns, rows), Charts(charts)]


def _figures(store: Store, task: Task) -> dict[str, float]:
    """HR@10 and NDCG@10 of the search, the share of colliding items, and the mean perplexity of a level."""
    record = store.results(task).get(f"{task.title}, search alone")
    if record is None:
        return {}
    codes = store.codes(task)
    metrics = {name: record[KEPT][name] for name in ("HR@10", "NDCG@10")}
    return metrics | {COLLIDING: codes["colliding"], PERPLEXITY: codes["perplexity"]}


def _csv_rows(task: Task, title: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per ranking: what was trained, then the metrics, those of cold targets and the spread."""
    about = {
        "data": task.data, "split by": task.split, "model": title, "settings": " ".join(task.settings),
        "seed": task.seed, "users": record.get("evaluated_users", record["split"].get("users")),
        "items": record["split"].get("items"),
        "split": str(record["split"].get("targets_sha256", ""))[:16], "seconds": record.get("seconds"),
        "stopped": record.get("config", {}).get("stopped", ""),
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
