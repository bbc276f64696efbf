"""The tables of an experiment: means over seeds with intervals, differences to the best baseline, costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cemg.evaluation import Sample, differences_of, printed_rows, restrict
from cemg.evaluation.results import KEPT, REMOVED, intervals_key

Record = dict[str, Any]
PAPER = "CEMG paper"  # source of what it prints
OWN = "CEMG"  # titles of what is compared with the best baseline begin with it


@dataclass(frozen=True, slots=True)
class Board:
    """The results on one split of one data set.

    Attributes:
        data: Name of the data set, and how it is split unless leave-one-out.
        split: The fingerprint of the split.
        rows: Title of a model: its records, one per seed.
        missing: Names of tasks without a result.
    """

    data: str
    split: Mapping[str, Any]
    rows: Mapping[str, Sequence[Record]]
    missing: Sequence[str] = ()

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, as in the records."""
        return list(next(iter(self.rows.values()))[0][KEPT])


def boards(results: Sequence[tuple[str, str, Record]], missing: Mapping[str, Sequence[str]]) -> list[Board]:
    """Sort results into boards: those of different splits never share one.

    Where a model was tested on a sample of the users, its board has the other models on the same users.

    Args:
        results: Data set and split, title and record of each.
        missing: Names of tasks without a result, by data set.
    """
    found: dict[tuple[str, str], tuple[Mapping[str, Any], dict[str, list[Record]]]] = {}
    for data, title, record in results:
        for shown in (record, *_on_samples(data, record, results)):
            key = (data, str(sorted(shown["split"].items())))
            found.setdefault(key, (shown["split"], {}))[1].setdefault(title, []).append(shown)
    made = [Board(data, split, rows, missing.get(data, ())) for (data, _), (split, rows) in found.items()]
    without = [data for data in missing if missing[data] and data not in {board.data for board in made}]
    return made + [Board(data, {}, {}, missing[data]) for data in without]


def _on_samples(data: str, record: Record, results: Sequence[tuple[str, str, Record]]) -> list[Record]:
    """The record restricted to each sample of its split on which another result was measured."""
    splits = [other["split"] for name, _, other in results if name == data and "subset" in other["split"]]
    samples = dict.fromkeys(
        Sample.of(split)
        for split in splits
        if {key: split[key] for key in split if key != "subset"} == dict(record["split"])
    )
    restricted = (restrict(record, sample) for sample in samples if sample is not None)
    return [one for one in restricted if one is not None]


def ranking_rows(board: Board, key: str, *, paper: bool) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the metrics with the history kept or removed, and what papers print beside them.

    The papers are CEMG's and, where it prints a result on this data set, the one of the model itself.
    """
    names = board.metrics
    shown = printed_rows(board.data) if paper and key == KEPT else []
    printed = [
        {row.model: row for row in shown if (row.source == PAPER) == is_cemg} for is_cemg in (True, False)
    ]
    labels = ("in the paper", "in its own paper")
    used = [(by, label) for by, label in zip(printed, labels, strict=True) if by.keys() & board.rows.keys()]
    of_papers = [f"{name} {label}" for _, label in used for name in ("HR@10", "NDCG@10")]
    notes = {title: _stopped(records[0]) for title, records in board.rows.items()}
    columns = ["model", "seeds", *names, *of_papers, *(["training"] if any(notes.values()) else [])]
    rows = []
    for title, records in board.rows.items():
        cells = [figure(records, key, name) for name in names]
        row = [title, str(len(records)), *cells]
        for known in (printed_by.get(title) for printed_by, _ in used):
            row += [f"{known.hr10:.4f}", f"{known.ndcg10:.4f}"] if known else ["", ""]
        rows.append([*row, notes[title]] if any(notes.values()) else row)
    return columns, rows


def _stopped(record: Record) -> str:
    """What a row says of a model that was not trained to its end; "" for the others."""
    config = record.get("config", {})
    if not config.get("stopped"):
        return ""
    seconds = config.get("train_seconds") or config.get("stage_seconds", {}).get("generator")
    epochs = sum(row.get("share", 1) for row in record.get("training", ()))
    parts = [f"{seconds:,.0f} s" if seconds else "", f"{epochs:.1f} epochs" if epochs else ""]
    return ", ".join(["stopped by the budget", *(part for part in parts if part)])


def figure(records: Sequence[Record], key: str, name: str) -> str:
    """A metric as text: see ``value_of``; "" if a record does not have it."""
    found = value_of(records, key, name)
    if found is None:
        return ""
    value, half = found
    return f"{value:.4f}" + (f" ± {half:.4f}" if half is not None else "")


def value_of(records: Sequence[Record], key: str, name: str) -> tuple[float, float | None] | None:
    """The mean of a metric over seeds, and half of Student's 95 % interval.

    Of one seed, it is half of the interval over users; None if the record has none.
    """
    values = [record[key][name] for record in records if name in record.get(key, {})]
    if len(values) < len(records) or not values:
        return None
    if len(values) == 1:
        interval = records[0].get(intervals_key(key), {}).get(name)
        return values[0], None if interval is None else (interval[1] - interval[0]) / 2
    from scipy.stats import t as student  # a slow import

    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half


def spread_rows(board: Board) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the catalog coverage and the mean popularity of the first 10 items."""
    columns = ["model", "catalog coverage@10", "mean popularity@10 (training interactions)"]
    rows = []
    for title, records in board.rows.items():
        spreads = [record.get("spread", {}).get(KEPT) for record in records]
        if all(spreads):
            means = [statistics.mean(s[name] for s in spreads) for name in ("coverage@10", "popularity@10")]
            rows.append([title, f"{means[0]:.1%}", f"{means[1]:.1f}"])
    return columns, rows


def cold_rows(board: Board) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the targets with few training interactions."""
    columns = ["model", "targets", "HR@10", "NDCG@10", "history removed: HR@10", "history removed: NDCG@10"]
    rows = []
    for title, records in board.rows.items():
        cold = [record.get("cold") or {} for record in records]
        cells = [figure(cold, key, name) for key in (KEPT, REMOVED) for name in ("HR@10", "NDCG@10")]
        if any(cells):
            rows.append([title, f"{cold[0].get('targets', 0):,}", *cells])
    return columns, rows


def best_baseline(board: Board) -> str | None:
    """The model other than CEMG with the highest NDCG@10, the history removed; None without one."""
    baselines = [title for title in board.rows if not title.startswith(OWN)]
    if not baselines:
        return None
    return max(baselines, key=lambda title: _mean(board.rows[title], REMOVED, "NDCG@10"))


def _mean(records: Sequence[Record], key: str, name: str) -> float:
    return statistics.mean(float(record[key][name]) for record in records)


def difference_rows(board: Board, baseline: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the differences to a baseline, user by user, for the seed that both have first."""
    rankings = {KEPT: "history kept", REMOVED: "history removed"}
    names = ("HR@10", "NDCG@10")
    columns = ["model", *(f"{name}, {label}" for label in rankings.values() for name in names)]
    other = board.rows[baseline][0]
    rows = []
    for title, records in board.rows.items():
        if title == baseline or "ranks" not in records[0] or "ranks" not in other:
            continue
        found = differences_of(records[0], other)
        parts = [found[key][name] for key in rankings for name in names]
        rows.append([title, *(f"{d['mean']:+.4f} ({d['low']:+.4f} … {d['high']:+.4f})" for d in parts)])
    return columns, rows


def cost_rows(board: Board) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of seconds: the whole task, and the stages of CEMG's runs."""
    stages = ["features", "graph", "memory", "tokenizer", "generator", "gate"]
    columns = ["model", "seconds", "of them training", *stages, "threads", "note"]
    rows = []
    for title, records in board.rows.items():
        record = records[0]
        config = record.get("config", {})
        by_stage = config.get("stage_seconds", {})
        trained = config.get("train_seconds")
        cells = [f"{by_stage[stage]:,.0f}" if stage in by_stage else "" for stage in stages]
        spent = f"{record.get('seconds', 0):,.0f}"
        training = f"{trained:,.0f}" if trained is not None else ""
        threads = str(record.get("hardware", {}).get("threads", ""))
        rows.append([title, spent, training, *cells, threads, str(config.get("stopped", ""))])
    used = [i for i, _ in enumerate(columns) if any(row[i] for row in rows)]
    return [columns[i] for i in used], [[row[i] for i in used] for row in rows]
