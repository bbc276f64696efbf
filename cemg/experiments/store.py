"""The folder of an experiment: a lock, a folder per task, its result files, and estimates of time.

OUT/tasks/NAME/task.json   what the task is, written before it starts
OUT/tasks/NAME/run/        its run or checkpoints, with which an interrupted task continues
OUT/tasks/NAME/*.json      its results, written at its end; a task without any is not finished
OUT/tasks/NAME/log.txt     what its command printed
OUT/latency/*.json         the time of a recommendation by each model (RQ3)
OUT/cache/                 features of texts and images, shared by all tasks
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from cemg.baselines.registry import MODELS
from cemg.errors import UserError
from cemg.evaluation import read_result
from cemg.experiments.plan import CEMG, NEW_ITEMS, Task
from cemg.storage import files
from cemg.storage.read import read_json
from cemg.storage.run import Run
from cemg.version import __version__

FORMAT = "2"  # of task.json
TASK, RESULT, CODES = "task.json", "result.json", "codes.json"
ALL_USERS = "all"  # value of "users" in a task
SEARCH, FREE, MEMORY = "search.json", "free.json", "memory.json"  # further results of some tasks
# Seconds per 1,000 interactions with the default settings on one core (AMD EPYC), from trainings on Beauty;
# those of TIGER, LETTER and LlamaRec are extrapolated from a few steps.
SECONDS = {
    "popularity": 0.004, "memory": 0.4, "gru4rec": 2.7, "sasrec": 10.0, "bsarec": 5.7, CEMG: 11.0,
    "llm-esr": 3.6, "mmsrec": 1.5, "missrec": 2.7,
    "tiger": 2600.0, "letter": 1350.0, "mmgrec": 10.0, "llamarec": 2900.0,
}  # fmt: skip
GATE_SECONDS = 1.3  # the same for the gate alone, with its test


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

        The number of tested users may differ, unless a finished test of a sample is in the place of another
        one: a sample can be taken from a test of all users.
        """
        path = self.path(task) / TASK
        if not path.exists():
            return
        stored = {"users": ALL_USERS} | self._about(path)
        for key, value in identity.items():
            if key == "users" and (stored[key] == ALL_USERS or not self.finished(task)):
                continue
            if stored.get(key) != value:
                raise UserError(
                    f"{path.parent} was trained with {key} {stored.get(key)!r}, this task has {value!r}",
                    fix=f"delete {quote(str(path.parent))}, or use another --out folder",
                )

    def results(self, task: Task) -> dict[str, dict[str, Any]]:
        """The results of a finished task by their titles in tables; empty if it is not finished.

        A damaged result counts as missing, so that the task runs again.
        """
        folder = self.path(task)
        if not (folder / RESULT).exists():
            return {}
        found = {task.title: _read(folder / RESULT)}
        if task.has_search:
            found[f"{task.title}, search alone"] = _read(folder / SEARCH)
        if task.variant == NEW_ITEMS:
            found[f"{MODELS['memory'].title}, {NEW_ITEMS}"] = _read(folder / MEMORY)
        if task.config:
            found[f"{task.title}, free beams"] = _read(folder / FREE)
        return {title: record for title, record in found.items() if record is not None}

    def finished(self, task: Task) -> bool:
        """Whether the results of a task are there."""
        return task.title in self.results(task)

    def latency_path(self, table: str) -> Path:
        """The file of the latencies of the models of a data set and split."""
        return self.folder / "latency" / f"{table.replace(', ', '-').replace(' ', '-')}.json"

    def latencies(self, table: str) -> dict[str, Any]:
        """The latencies of the models of a data set and split; empty if they were not measured."""
        path = self.latency_path(table)
        return read_json(path, dict[str, Any], fix=f"delete {quote(str(path))}") if path.exists() else {}

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
            float(record["seconds"]) / max(int(record["interactions"]), 1)
            for record in self._records(task.model, bool(task.base))
        ]
        if measured:
            return size * sum(measured) / len(measured)
        if task.base:
            return GATE_SECONDS * size / 1000
        return SECONDS[task.model] * size / 1000 if task.model in SECONDS else None

    def _records(self, model: str, gate_only: bool) -> Iterator[dict[str, Any]]:
        """What finished tasks of a model took."""
        for path in sorted(self.folder.glob("tasks/*/took.json")):
            record = read_json(path, dict[str, Any])
            if record["model"] == model and record["gate_only"] == gate_only:
                yield record

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
