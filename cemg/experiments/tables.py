"""The tables of an experiment: means over seeds with intervals, differences to the best baseline, costs.

A deterministic model has one result, which stands for all seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cemg.baselines.registry import MODELS
from cemg.evaluation import Sample, differences_of, printed_rows, restrict
from cemg.evaluation.metrics import seed_interval
from cemg.evaluation.results import KEPT, REMOVED, intervals_key, same_results

Record = dict[str, Any]
DETERMINISTIC = "deterministic"
PAPER = "CEMG paper"  # source of what it prints
SEARCH = {"CEMG": "CEMG, search alone"}  # a model of the paper: the title of its method
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

    The papers are CEMG's and, where it prints a result on this data set, the one of the model itself. What
    the CEMG paper prints for CEMG is beside the search alone: the paper has neither memory nor item softmax.
    """
    names = board.metrics
    whole = paper and key == KEPT and Sample.of(board.split) is None
    shown = printed_rows(board.data, board.split.get("users"), board.split.get("items")) if whole else []
    printed = [
        {SEARCH.get(row.model, row.model): row for row in shown if (row.source == PAPER) == is_cemg}
        for is_cemg in (True, False)
    ]
    labels = ("in the paper", "in its own paper")
    used = [(by, label) for by, label in zip(printed, labels, strict=True) if by.keys() & board.rows.keys()]
    of_papers = [f"{name} {label}" for _, label in used for name in ("HR@10", "NDCG@10")]
    notes = {title: _training(records) for title, records in board.rows.items()}
    columns = ["model", "seeds", *names, *of_papers, *(["training"] if any(notes.values()) else [])]
    rows = []
    for title, records in board.rows.items():
        cells = [figure(records, key, name) for name in names]
        row = [title, seeds_of(title, records), *cells]
        for known in (printed_by.get(title) for printed_by, _ in used):
            row += [f"{known.hr10:.4f}", f"{known.ndcg10:.4f}"] if known else ["", ""]
        rows.append([*row, notes[title]] if any(notes.values()) else row)
    return columns, rows


def seeds_of(title: str, records: Sequence[Record]) -> str:
    """The number of seeds as text, or "deterministic"."""
    return DETERMINISTIC if _is_deterministic(title, records) else str(len(records))


def _is_deterministic(title: str, records: Sequence[Record]) -> bool:
    """Whether a model has the same results with every seed."""
    untrained = any(title == model.title and not model.trains for model in MODELS.values())
    return untrained or same_results(records)


def _training(records: Sequence[Record]) -> str:
    """What a row says of a model that was not trained to its end, with some seed; "" for the others.

    Where the best epoch is the last one, more epochs would probably help.
    """
    configs = [record.get("config", {}) for record in records]
    epochs_of = [config.get("epochs") or config.get("generator", {}).get("epochs") for config in configs]
    wanted = f" of {epochs_of[0]} epochs" if epochs_of[0] else ""
    stopped = [record for record in records if record.get("config", {}).get("stopped")]
    if not stopped:
        improving = (epochs and config.get("best_epoch") == epochs
                     for config, epochs in zip(configs, epochs_of, strict=True))  # fmt: skip
        return f"the best epoch is the last{wanted}" if any(improving) else ""
    config = stopped[0]["config"]
    seconds = config.get("train_seconds") or config.get("stage_seconds", {}).get("generator")
    epochs = sum(row.get("share", 1) for row in stopped[0].get("training", ()))
    done = f"{epochs:.1f}{wanted or ' epochs'}" if epochs else f"a part{wanted}" if wanted else ""
    which = f" with {len(stopped)} of {len(records)} seeds" if len(stopped) < len(records) else ""
    parts = [f"stopped by the budget{which}", f"{seconds:,.0f} s" if seconds else "", done]
    return ", ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Figure:
    """A metric of a row.

    Attributes:
        mean: Over the seeds.
        half: Half of its 95 % interval: over users for one seed, Student's over at least 3 seeds.
        deviation: Standard deviation over the seeds; None for one seed.
    """

    mean: float
    half: float | None = None
    deviation: float | None = None

    def __str__(self) -> str:
        half = "" if self.half is None else f" ± {self.half:.4f}"
        return f"{self.mean:.4f}{half}" + ("" if self.deviation is None else f" (SD {self.deviation:.4f})")


def figure(records: Sequence[Record], key: str, name: str) -> str:
    """A metric as text: see ``figure_of``; "" if a record does not have it."""
    found = figure_of(records, key, name)
    return "" if found is None else str(found)


def figure_of(records: Sequence[Record], key: str, name: str) -> Figure | None:
    """A metric over the seeds of a model; None if a record does not have it."""
    if any(name not in record.get(key, {}) for record in records):
        return None
    values = [float(record[key][name]) for record in records]
    if len(values) == 1 or same_results(records):
        interval = records[0].get(intervals_key(key), {}).get(name)
        return Figure(values[0], None if interval is None else (interval[1] - interval[0]) / 2)
    return Figure(statistics.mean(values), seed_interval(values), statistics.stdev(values))


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


def best_baseline(board: Board, *, trained: bool = False) -> str | None:
    """The model other than CEMG with the highest NDCG@10, the history removed; None without one.

    ``trained`` leaves out popularity and the item memory.
    """
    untrained = {model.title for model in MODELS.values() if trained and not model.trains}
    baselines = [title for title in board.rows if not title.startswith(OWN) and title not in untrained]
    if not baselines:
        return None
    return max(baselines, key=lambda title: _mean(board.rows[title], REMOVED, "NDCG@10"))


def _mean(records: Sequence[Record], key: str, name: str) -> float:
    return statistics.mean(float(record[key][name]) for record in records)


def difference_rows(board: Board, baseline: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the differences to a baseline, user by user, over the seeds that both have.

    Results of earlier versions without ranks have no row.
    """
    rankings = {KEPT: "history kept", REMOVED: "history removed"}
    names = ("HR@10", "NDCG@10")
    columns = ["model", "seeds", *(f"{name}, {label}" for label in rankings.values() for name in names)]
    rows = []
    for title in board.rows:
        if title == baseline or any("ranks" not in one for t in (title, baseline) for one in board.rows[t]):
            continue
        pairs, seeds = _pairs(board, title, baseline)
        if not pairs:
            rows.append([title, "none in common", *[""] * (len(columns) - 2)])
            continue
        found = differences_of(*pairs)
        parts = [found[key][name] for key in rankings for name in names]
        cells = [f"{d['mean']:+.4f} ({d['low']:+.4f} … {d['high']:+.4f})" for d in parts]
        rows.append([title, seeds, *cells])
    return columns, rows


def _pairs(board: Board, title: str, baseline: str) -> tuple[list[tuple[Record, Record]], str]:
    """The results of two models by seed, for the seeds that both have, and the number of seeds as text."""
    names = (title, baseline)
    fixed = [board.rows[name][0] if _is_deterministic(name, board.rows[name]) else None for name in names]
    first, second = ({record.get("seed", 0): record for record in board.rows[name]} for name in names)
    if fixed[0] and fixed[1]:
        return [(fixed[0], fixed[1])], DETERMINISTIC
    seeds = sorted(first if fixed[1] else second if fixed[0] else first.keys() & second.keys())
    pairs = [(fixed[0] or first[seed], fixed[1] or second[seed]) for seed in seeds]
    return pairs, str(len(pairs))


def cost_rows(board: Board) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of seconds, means over the seeds: the whole task, and the stages of CEMG's runs."""
    stages = ["features", "graph", "memory", "tokenizer", "generator", "gate"]
    columns = ["model", "seconds", "training alone", *stages, "threads", "processor", "note"]
    rows = []
    for title, records in board.rows.items():
        configs = [record.get("config", {}) for record in records]
        by_stage = [config.get("stage_seconds", {}) for config in configs]
        cells = [_mean_seconds([part.get(stage) for part in by_stage]) for stage in stages]
        spent = _mean_seconds([record.get("seconds", 0) for record in records])
        training = _mean_seconds([config.get("train_seconds") for config in configs])
        threads = {str(record.get("hardware", {}).get("threads", "")) for record in records}
        processors = {str(record.get("hardware", {}).get("cpu", "")) for record in records}
        note = next((str(config["stopped"]) for config in configs if config.get("stopped")), "")
        of_machine = [", ".join(sorted(found)) for found in (threads, processors)]
        rows.append([title, spent, training, *cells, *of_machine, note])
    used = [i for i, _ in enumerate(columns) if any(row[i] for row in rows)]
    return [columns[i] for i in used], [[row[i] for i in used] for row in rows]


def _mean_seconds(values: Sequence[float | None]) -> str:
    """The mean as text; "" unless all seeds have a value."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):,.0f}" if known and len(known) == len(values) else ""
