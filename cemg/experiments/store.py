"""The folder of an experiment: a lock, a folder per task, its result files, and estimates of time.

OUT/tasks/NAME/task.json   what the task is, written before it starts
OUT/tasks/NAME/run/        its run or checkpoints, with which an interrupted task continues
OUT/tasks/NAME/*.json      its results, written at its end; a task without any is not finished
OUT/tasks/NAME/log.txt     what its command printed
OUT/latency/*.json         the time of a recommendation by each model (RQ3)
OUT/data.json              what was read of each data set
OUT/questions.json         the questions that were asked so far, for the report
OUT/cache/                 features of texts and images, shared by all tasks
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from typing_extensions import TypedDict  # pydantic reads that of typing from Python 3.12 on

from cemg.baselines.registry import MODELS
from cemg.errors import UserError
from cemg.evaluation import Sample, read_result
from cemg.experiments.plan import NEW_ITEMS, Task
from cemg.experiments.settings import CEMG
from cemg.storage import files
from cemg.storage.read import read_json
from cemg.storage.run import Run
from cemg.version import __version__

FORMAT = "2"  # of task.json
TASK, RESULT, CODES = "task.json", "result.json", "codes.json"
SECONDS = ".seconds"  # file of the seconds of a task by all processes that worked on it
ALL_USERS, NO_BUDGET = "all", "none"  # values of "users" and "budget" in a task
ASKED, DATA = "questions.json", "data.json"
SEARCH, FREE, MEMORY = "search.json", "free.json", "memory.json"  # further results of some tasks
# Seconds per 1,000 interactions with the default settings on one core (AMD EPYC), from trainings on Beauty;
# those of TIGER, LETTER and LlamaRec are extrapolated from a few steps.
SECONDS_PER_1000 = {
    "popularity": 0.004, "memory": 0.4, "gru4rec": 2.7, "sasrec": 10.0, "bsarec": 5.7, CEMG: 11.0,
    "llm-esr": 3.6, "mmsrec": 1.5, "missrec": 2.7,
    "tiger": 2600.0, "letter": 1350.0, "mmgrec": 10.0, "llamarec": 2900.0,
}  # fmt: skip
TEST_SECONDS = {"llamarec": 0.9}  # per user that is tested, of models whose test is slow, on the same core
START = 6.0  # seconds until a process has imported its libraries
GATE_SECONDS = 1.3  # the same for the gate alone, with its test


class AboutData(TypedDict):
    """What was read of a data set and split, for the report."""

    users: int
    items: int
    interactions: int
    notes: list[str]


class Codes(TypedDict):
    """The share of items whose codes were not theirs alone, and the mean perplexity of a level."""

    colliding: float
    perplexity: float


class Latency(TypedDict):
    """The time that a model needs for the recommendations of some histories."""

    model: str
    engine: str
    histories: int
    p25_ms: float
    p50_ms: float
    p75_ms: float


class Latencies(TypedDict):
    """The times of the models of a data set and split, measured in turns."""

    top: int
    hardware: dict[str, Any]
    tasks: list[str]
    rows: list[Latency]


@dataclass(frozen=True, slots=True)
class Store:
    """The folder of an experiment."""

    folder: Path

    def path(self, task: Task | str) -> Path:
        """The folder of a task."""
        return self.folder / "tasks" / (task if isinstance(task, str) else task.name)

    def tasks(self) -> list[Task]:
        """All tasks of the folder, by name.

        Raises:
            UserError: The description of one is damaged, or was written by another version.
        """
        return [Task.read(self._about(path)) for path in sorted(self.folder.glob(f"tasks/*/{TASK}"))]

    def _about(self, path: Path) -> dict[str, str]:
        fix = f"delete {quote(str(path.parent))}, or use another --out folder"
        stored = read_json(path, dict[str, str], fix=fix)
        if stored.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {stored.get('format')}; this version reads format {FORMAT}", fix=fix
            )
        try:
            Task.read(stored)
        except (KeyError, ValueError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise UserError(f"{path} is damaged", cause=cause, fix=fix) from error
        return stored

    @property
    def cache(self) -> Path:
        """The folder of the features that tasks share."""
        return self.folder / "cache"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from working in the folder.

        Raises:
            UserError: One does.
        """
        try:
            lock = Run(self.folder).locked()
            lock.__enter__()
        except UserError as error:
            raise UserError(error.message, fix="wait for it, or use another --out folder") from None
        try:
            yield
        finally:
            lock.__exit__(None, None, None)

    def begin(self, task: Task, identity: Mapping[str, str]) -> None:
        """Record what a task is.

        Raises:
            UserError: Its folder is that of a task with another identity.
        """
        self.check(task, identity)
        files.make_folder(self.path(task))
        about = {"format": FORMAT, "version": __version__, **identity}
        files.write_json(self.path(task) / TASK, about)

    def check(self, task: Task, identity: Mapping[str, str]) -> None:
        """Raise UserError if the folder of a task is that of another one with the same name.

        The number of tested users may differ: a test is repeated alone. The budget may differ if the training
        ended by itself. Before the training has written anything, everything may differ.
        """
        path = self.path(task) / TASK
        if not path.exists():
            if self._has_begun(task):
                fix = f"delete {quote(str(path.parent))}, or use another --out folder"
                raise UserError(f"{path.parent} has results, but no {TASK} that says of what", fix=fix)
            return
        if not self._has_begun(task):
            return
        stored = self._about(path)
        for key, value in identity.items():
            is_path = key == "model" and "file_sha256" in identity  # of a file, which may be moved
            if stored.get(key) == value or key == "users" or is_path:
                continue
            if key == "budget":
                self._check_budget(task, stored.get(key, NO_BUDGET), value)
                continue
            raise UserError(
                f"{path.parent} was trained with {key} {stored.get(key)!r}, this task has {value!r}",
                fix=f"delete {quote(str(path.parent))}, or use another --out folder",
            )

    def _has_begun(self, task: Task) -> bool:
        """Whether a task has a result, or a file of its training other than locks and clocks."""
        folder = self.path(task)
        trained = (one for one in folder.glob("run/**/*") if one.is_file() and not one.name.startswith("."))
        return (folder / RESULT).exists() or any(trained)

    def _check_budget(self, task: Task, stored: str, wanted: str) -> None:
        """Raise UserError for another budget, unless the training ended by itself."""
        result = self.results(task).get(task.title)
        if result is not None and not result.get("config", {}).get("stopped"):
            return
        same = "no --budget" if stored == NO_BUDGET else f"--budget {stored.removesuffix(' h')}"
        delete = f"delete {quote(str(self.path(task)))} to train it anew"
        begun = "is unfinished" if result is None else "was stopped by its budget"
        if damaged := self.damaged(task):
            begun = f"has results that are damaged ({damaged})"
        raise UserError(
            f"{self.path(task)} {begun}, and has another budget than this command",
            cause=f"it has {stored}, this command {wanted}",
            fix=f"use {same}; or {delete}; or use another --out folder",
        )

    def results(self, task: Task) -> dict[str, dict[str, Any]]:
        """The results of a finished task by their titles in tables; empty if it is not finished.

        If one of them is damaged or missing, all are, so that the task runs again.
        """
        found = {title: _read(path) for title, path in self._files(task).items()}
        whole = {title: record for title, record in found.items() if record is not None}
        return whole if len(whole) == len(found) else {}

    def damaged(self, task: Task) -> str:
        """The result files of a task that are there but cannot be read, for a message; or ""."""
        there = self._files(task).values()
        return ", ".join(path.name for path in there if path.exists() and _read(path) is None)

    def _files(self, task: Task) -> dict[str, Path]:
        """The result files of a finished task, by their titles in tables."""
        folder = self.path(task)
        found = {task.title: folder / RESULT}
        if task.has_search:
            found[f"{task.title}, search alone"] = folder / SEARCH
        if task.variant == NEW_ITEMS:
            found[f"{MODELS['memory'].title}, {NEW_ITEMS}"] = folder / MEMORY
        if task.config:
            found[f"{task.title}, free beams"] = folder / FREE
        return found

    def finished(self, task: Task, *, users: int | None = None) -> bool:
        """Whether the results of a task are there; with ``users``, those of a test of so many, 0 for all.

        A test of all users counts for each sample, which can be taken from it.
        """
        result = self.results(task).get(task.title)
        if result is None or users is None or task.runs_pipeline:
            return result is not None
        sample = Sample.of(result["split"])
        return sample is None or sample.count == users

    def remember(self, questions: Iterable[str], data: Mapping[str, AboutData]) -> None:
        """Record what was asked, and what was read of each data set and split, for the report."""
        files.write_json(self.folder / ASKED, sorted({*self.questions(), *questions}))
        files.write_json(self.folder / DATA, self.data() | dict(data))

    def questions(self) -> list[str]:
        """The questions that were asked so far."""
        path = self.folder / ASKED
        return read_json(path, list[str], fix=f"delete {quote(str(path))}") if path.exists() else []

    def data(self) -> dict[str, AboutData]:
        """What was read of each data set and split."""
        path, kind = self.folder / DATA, dict[str, AboutData]
        return read_json(path, kind, fix=f"delete {quote(str(path))}") if path.exists() else {}

    def latency_path(self, table: str) -> Path:
        """The file of the latencies of the models of a data set and split."""
        return self.folder / "latency" / f"{table.replace(', ', '-').replace(' ', '-')}.json"

    def latencies(self, table: str) -> Latencies | None:
        """The latencies of the models of a data set and split; None if they were not measured."""
        path = self.latency_path(table)
        return read_json(path, Latencies, fix=f"delete {quote(str(path))}") if path.exists() else None

    def codes(self, task: Task) -> Codes:
        """What the item codes of a task are like."""
        path = self.path(task)
        return read_json(path / CODES, Codes, fix=f"delete {quote(str(path))} to train it anew")

    def remove(self, task: Task) -> None:
        """Delete the folder of a task."""
        shutil.rmtree(self.path(task), ignore_errors=True)

    def seconds(self, task: Task, interactions: Mapping[str, int]) -> float | None:
        """Estimate the seconds of a task; None for a model that has never run.

        Args:
            task: The task.
            interactions: Number of interactions by name of the data set.
        """
        size = interactions[task.data]
        measured = [
            max(record["seconds"] - START, 0.0) / max(record["interactions"], 1)
            for record in self._records(task.model, bool(task.base))
        ]
        if measured:
            return START + size * sum(measured) / len(measured)
        if not task.base and task.model not in SECONDS_PER_1000:
            return None
        return START + (GATE_SECONDS if task.base else SECONDS_PER_1000[task.model]) * size / 1000

    def _records(self, model: str, gate_only: bool) -> Iterator[dict[str, float]]:
        """What finished tasks of a model took."""
        for path in sorted(self.folder.glob("tasks/*/took.json")):
            with suppress(UserError, LookupError, TypeError, ValueError):  # then the estimate lacks one task
                record = read_json(path, dict[str, Any])
                found = {name: float(record[name]) for name in ("seconds", "interactions")}
                if record["model"] == model and record["gate_only"] == gate_only:
                    yield found

    def record_seconds(self, task: Task, seconds: float, interactions: int) -> None:
        """Record what a task took, for later estimates."""
        about = {"model": task.model, "gate_only": bool(task.base), "seconds": round(seconds, 1)}
        files.write_json(self.path(task) / "took.json", about | {"interactions": interactions})


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_result(path)
    except (UserError, OSError):
        return None


def link_run(source: Path, target: Path) -> None:
    """Copy a finished run without copying its data: files are linked, since commands replace whole files."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:  # another file system
            shutil.copy2(one, other)

    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    left_out = shutil.ignore_patterns(".lock", "results", "report")
    shutil.copytree(source, part, copy_function=link, ignore=left_out)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
