"""Result files, one JSON per evaluation with the fingerprint of its split, and tables of them."""

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

EXCLUDED = "metrics_history_excluded_in_search"  # key of the metrics of exclude_history=True
SEED = re.compile(r"-seed\d+$")


def hardware(device: str = "cpu") -> dict[str, str | int]:
    """Describe CPU, cores, versions and, if used, the GPU. The names of host and user are left out."""
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
    """Write the metrics of one evaluation as JSON, atomically.

    Args:
        path: The file to write.
        dataset: Name of the data set.
        command: The command that measured the metrics.
        config: Settings of the model.
        seed: Seed of the training.
        hardware: See ``hardware``.
        seconds: Wall-clock time of training and evaluation together.
        evaluation: The evaluation.
        further: More entries of the file.

    Raises:
        TypeError: ``config`` has a value that JSON cannot represent.
    """
    record = {
        "dataset": dataset,
        "command": command,
        "config": dict(config),
        "seed": seed,
        "hardware": dict(hardware),
        "seconds": round(seconds, 1),
        **_metrics_of(evaluation),
        **(further or {}),
    }
    files.write_json(path, signed(record | {"file": path.name}))


def result_table(paths: Sequence[Path], *, paper: bool = True) -> Table:
    """Build a rich table of result files and, with ``paper``, of printed results on the same data set.

    A file has a row with the history kept, one with it removed, one with it excluded in the search if that
    was measured, and one over cold targets if there are any. Files whose names differ only in ``-seedN``
    are one model: the table shows the mean over the seeds with the half width of Student's 95 % interval.

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
    """The rows of one model: history kept, removed, excluded in the search, cold targets (if measured)."""
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
    from scipy.stats import t as student  # a slow import that recommendations do not need

    half = float(student.ppf(0.975, len(seeds) - 1)) / len(seeds) ** 0.5
    columns = [[values[name] for values in seeds] for name in names]
    return [f"{statistics.mean(c):.4f} ± {half * statistics.stdev(c):.4f}" for c in columns]


def _cells(values: Metrics, names: list[str]) -> list[str]:
    return [f"{values[name]:.4f}" if name in values else "" for name in names]


def _metrics_of(evaluation: Evaluation) -> dict[str, Any]:
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
class _Record:
    """The entries of a result file that a table shows."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    dataset: str
    split: _Split
    metrics: dict[str, float]
    metrics_history_removed: dict[str, float]
    cold: _Cold | None = None


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file. Raises DamagedError where it is missing, altered or not a result file.

    Files of earlier versions have no digest, so alterations of them are not detected.
    """
    fix = "name a result file, or write it again: cemg-eval --run RUN"
    content = read_bytes(path, fix=fix)
    record = parse_json(content, dict[str, Any], name=str(path), fix=fix)
    for key in ("dataset", "split", "metrics", "metrics_history_removed"):
        if key not in record:
            raise DamagedError(f"{path} is not a result file", cause=f"it has no {key!r}", fix=fix)
    parse_json(content, _Record, name=str(path), fix=fix)
    if record["metrics"].keys() != record["metrics_history_removed"].keys():
        raise DamagedError(f"{path} is damaged", cause="its entries have different metrics", fix=fix)
    if "sha256" in record:
        check_signature(record, name=str(path), fix=fix)
    return record


def results_of(folder: Path, pattern: str, *, generator: str) -> tuple[list[Path], list[str]]:
    """Find the result files of a run.

    Args:
        folder: The folder of result files.
        pattern: A glob pattern of their names.
        generator: The key in the manifest of the run's generator.

    Returns:
        The files that belong to the generator, and a message for each of the others.
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
    return list(good), wrong + _missing_partners(folder, good)


def _missing_partners(folder: Path, records: Mapping[Path, dict[str, Any]]) -> list[str]:
    """Name missing files of the pairs that an evaluation writes: the results of a model and of popularity."""
    beside = {record["beside"] for record in records.values() if "beside" in record}
    missing = [f"{folder / name} is missing" for name in sorted(beside) if not (folder / name).exists()]
    for path, record in records.items():
        if "file" in record and record["config"].get("model") == "popularity" and path.name not in beside:
            missing.append(f"the result of a model beside {path} is missing")
    return missing


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


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
