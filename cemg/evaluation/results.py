"""Result files (one JSON a run, with the fingerprint of its split) and the tables made of them."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from rich import box
from rich.table import Table

from cemg.errors import DamagedError, UserError
from cemg.evaluation.metrics import Metrics
from cemg.evaluation.paper import printed_rows
from cemg.evaluation.protocol import COLD, Evaluation
from cemg.storage import files
from cemg.storage.read import check_signature, parse_json, read_bytes, signed

EXCLUDED = "metrics_history_excluded_in_search"  # of a record: what exclude_history=True serves
SEED = re.compile(r"-seed\d+$")


def hardware(device: str = "cpu") -> dict[str, str | int]:
    """CPU, cores, GPU when used, and versions; no name of a host or a user."""
    about: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
    if torch.device(device).type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def write_result(
    path: Path,
    *,
    dataset: str,
    command: str,
    config: Mapping[str, Any],
    seed: int,
    hardware: Mapping[str, str | int],
    seconds: float,
    evaluation: Evaluation,
    further: Mapping[str, Any] | None = None,
) -> None:
    """Write one run's figures as JSON, atomically: the file is whole or it is not there.

    ``seconds`` is the wall time of training and evaluation together; ``further`` figures stand beside the
    metrics. Raises TypeError where ``config`` holds what JSON cannot.
    """
    record = {
        "dataset": dataset,
        "command": command,
        "config": dict(config),
        "seed": seed,
        "hardware": dict(hardware),
        "seconds": round(seconds, 1),
        **_figures(evaluation),
        **(further or {}),
    }
    files.write_json(path, signed(record | {"file": path.name}))


def result_table(paths: Sequence[Path], *, paper: bool = True) -> Table:
    """A rich table: the figures of each result file and, with ``paper``, the printed rows of its dataset.

    A file has a row with the history kept, one with it removed, and one over cold targets if it has any.
    Files whose names differ in ``-seedN`` alone are one model: the mean over its seeds, with the half width
    of Student's 95 % interval.

    Raises UserError where the files' splits differ: numbers of different targets do not compare.
    """
    board = result_rows(paths, paper=paper)
    table = Table(title=board.title, box=box.SIMPLE, padding=0)
    for i, name in enumerate(board.columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in board.rows:
        table.add_row(*row)
    return table


def result_markdown(paths: Sequence[Path], *, paper: bool = True) -> str:
    """The same table as Markdown; refuses as ``result_table`` does."""
    board = result_rows(paths, paper=paper)
    rule = ["---"] + ["---:"] * (len(board.columns) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [board.columns, rule, *board.rows]) + "\n"


@dataclass(frozen=True, slots=True)
class ResultRows:
    """The cells of a table of results. The first column holds the names of the models."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def result_rows(paths: Sequence[Path], *, paper: bool = True) -> ResultRows:
    """The same table as plain cells. Raises UserError as ``result_table`` does."""
    records = [read_result(p) for p in paths]
    if not records:
        raise UserError("there is no result to put in a table", fix="name one result file or more")
    _refuse_mixed(paths, records)
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
    """History kept, removed from the list, excluded in the search where that was measured, and, where there
    are any, cold targets (history kept)."""
    label = name if len(group) == 1 else f"{name} ({len(group)} seeds)"
    rows = [[label, *_seed_cells([r["metrics"] for r in group], names)]]
    removed = [r["metrics_history_removed"] for r in group]
    rows.append(["- history removed from the list", *_seed_cells(removed, names)])
    excluded = [r.get(EXCLUDED, {}) for r in group]
    if all(excluded):
        rows.append(["- history excluded in the search", *_seed_cells(excluded, names)])
    cold = [r.get("cold", {}).get("metrics", {}) for r in group]
    return rows + ([["- cold targets", *_seed_cells(cold, names)]] if all(cold) else [])


def _seed_cells(seeds: list[Metrics], names: list[str]) -> list[str]:
    if len(seeds) == 1:
        return _cells(seeds[0], names)
    from scipy.stats import t as student  # late: a recommendation does not need it

    half = float(student.ppf(0.975, len(seeds) - 1)) / len(seeds) ** 0.5
    columns = [[values[name] for values in seeds] for name in names]
    return [f"{statistics.mean(c):.4f} ± {half * statistics.stdev(c):.4f}" for c in columns]


def _cells(values: Metrics, names: list[str]) -> list[str]:
    return [f"{values[name]:.4f}" if name in values else "" for name in names]


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "split": evaluation.fingerprint,
        "metrics": evaluation.metrics,
        "metrics_history_removed": evaluation.metrics_history_removed,
        "intervals_95": evaluation.intervals(),
        "cold": {
            "at_most_training_interactions": COLD,
            "targets": int(evaluation.cold.sum()),
            "metrics": evaluation.cold_metrics,
            "metrics_history_removed": evaluation.cold_metrics_history_removed,
        },
        "targets_in_history": evaluation.targets_in_history,
        "short_lists_history_removed": evaluation.short_lists,
    }


@dataclass(frozen=True, slots=True)
class _Cold:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Split:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True)

    users: int
    items: int
    subset: str = ""


@dataclass(frozen=True, slots=True)
class _Figures:
    """What a table shows of a result file; there is more in it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    dataset: str
    split: _Split
    metrics: dict[str, float]
    metrics_history_removed: dict[str, float]
    cold: _Cold | None = None


def read_result(path: Path) -> dict[str, Any]:
    """The record of a result file. Raises DamagedError where it is missing, altered or something else.

    Files that earlier versions wrote have no digest to compare.
    """
    fix = "name a result file, or write it again: cemg-eval --run RUN"
    content = read_bytes(path, fix=fix)
    record = parse_json(content, dict[str, Any], name=str(path), fix=fix)
    for key in ("dataset", "split", "metrics", "metrics_history_removed"):
        if key not in record:
            raise DamagedError(f"{path} is not a result file", cause=f"it has no {key!r}", fix=fix)
    parse_json(content, _Figures, name=str(path), fix=fix)
    if record["metrics"].keys() != record["metrics_history_removed"].keys():
        raise DamagedError(f"{path} is damaged", cause="its figures are of different metrics", fix=fix)
    if "sha256" in record:
        check_signature(record, name=str(path), fix=fix)
    return record


def results_of(folder: Path, pattern: str, *, generator: str) -> tuple[list[Path], list[str]]:
    """The result files of a run that belong to its generator, and what is wrong with the others.

    ``generator`` is the key of the generator's manifest.
    """
    good: dict[Path, dict[str, Any]] = {}
    wrong: list[str] = []
    for path in sorted(folder.glob(pattern)):
        if path.name.startswith("."):
            continue
        try:
            record = read_result(path)
        except UserError as error:
            wrong.append(error.message)
            continue
        if record.get("file", path.name) != path.name:
            wrong.append(f"{path} is a copy of {record['file']}")
        elif record.get("generator_key", generator) != generator:
            wrong.append(f"{path} was measured with another generator")
        else:
            good[path] = record
    return list(good), wrong + _alone(folder, good)


def _alone(folder: Path, records: Mapping[Path, dict[str, Any]]) -> list[str]:
    """What is missing of the pairs that an evaluation writes: a model's result and popularity's beside it."""
    beside = {record["beside"] for record in records.values() if "beside" in record}
    gone = [f"{folder / name} is missing" for name in sorted(beside) if not (folder / name).exists()]
    for path, record in records.items():
        if "file" in record and record["config"].get("model") == "popularity" and path.name not in beside:
            gone.append(f"the result of a model beside {path} is missing")
    return gone


def _refuse_mixed(paths: Sequence[Path], records: list[dict[str, Any]]) -> None:
    first = records[0]["split"]
    for path, record in zip(paths, records, strict=True):
        keys = [k for k in {**first, **record["split"]} if first.get(k) != record["split"].get(k)]
        if keys:
            raise UserError(
                f"{path} and {paths[0]} were measured on different splits",
                cause=f"{keys[0]}: {record['split'].get(keys[0])} and {first.get(keys[0])}",
                fix="put them in tables of their own, or evaluate both on one split",
            )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
