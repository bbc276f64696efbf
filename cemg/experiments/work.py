"""Running the tasks of an experiment, each by the command that a person would type."""

from __future__ import annotations

import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cemg.baselines.registry import MODELS
from cemg.data import Dataset
from cemg.errors import UserError
from cemg.experiments.plan import LEAVE_ONE_OUT, NEW_ITEMS, Task
from cemg.experiments.settings import CEMG
from cemg.experiments.store import (
    ALL_USERS,
    CODES,
    FREE,
    NO_BUDGET,
    RESULT,
    SEARCH,
    SECONDS,
    AboutData,
    Codes,
    Store,
    link_run,
)
from cemg.pipeline.changes import content_digest
from cemg.processes import Stopwatch, run_command
from cemg.progress import console
from cemg.storage import files
from cemg.storage.read import file_digest, read_json
from cemg.tokenizer import read_items

LAST_LINES = 5  # of the log, in an error


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of a data set before its tasks run.

    Attributes:
        interactions: Their number, for estimates.
        sha256: Of its content, by which a finished task is known to belong to it.
        items: Number of items.
        about: What was read, for the report.
    """

    interactions: int
    sha256: str
    items: int = 0
    about: AboutData = field(default_factory=lambda: AboutData(users=0, items=0, interactions=0, notes=[]))

    @classmethod
    def of(cls, data: Dataset, split: str) -> Source:
        """Of a data set that was read for a split.

        Images count by whether there is a file: cemg-train compares their bytes.

        Raises:
            UserError: The data set was prepared for another split.
        """
        if split == LEAVE_ONE_OUT and data.cuts is not None:
            raise UserError(f"{data.name} was prepared with a split in time", fix="--split time")
        present = [None if path is None or not path.is_file() else "image" for path in data.images]
        about = AboutData(
            users=data.num_users, items=data.num_items, interactions=data.num_interactions, notes=data.notes
        )
        return cls(data.num_interactions, content_digest(data, present), data.num_items, about)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of all tasks.

    Attributes:
        device: "cpu", "cuda", …
        dtype: Precision of the generator's training.
        budget: Hours of training of a baseline, None for no limit.
        users: Users that a baseline is tested on, 0 for all.
        sources: The data sets by name and split.
    """

    device: str = "cpu"
    dtype: str = "float32"
    budget: float | None = None
    users: int = 0
    sources: Mapping[tuple[str, str], Source] = field(default_factory=dict)

    def identity(self, task: Task) -> dict[str, str]:
        """What a task in the folder must have in common with this one to be continued or reused, as text."""
        about = task.about() | {"data_sha256": self.sources[task.data, task.split].sha256}
        if task.model != CEMG and task.model not in MODELS:
            about |= {"file_sha256": file_digest(Path(task.model))}
        if task.model == CEMG:
            return about | {"dtype": self.dtype}
        if task.config:  # cemg-train tests all users
            about |= {"dtype": self.dtype}
        else:
            about |= {"users": str(self.users) if self.users else ALL_USERS}
        if task.is_deterministic:
            return about
        return about | {"budget": NO_BUDGET if self.budget is None else f"{self.budget:g} h"}


Run = Callable[[Sequence[Task]], Iterator[tuple[Task, str]]]  # yields each task with why it failed, or ""


def run_tasks(tasks: Sequence[Task], store: Store, options: Options, *, run: Run | None = None) -> list[str]:
    """Run the tasks that are not finished. Returns the names of those that failed, whose reasons are printed.

    A failed task does not keep the others from running. Ctrl-C ends running tasks, too; the next call
    continues them.

    Args:
        tasks: The tasks. A task comes after its base.
        store: The folder of the experiment.
        options: Options of all tasks.
        run: Runs unfinished tasks in any order; None for one after the other.

    Raises:
        UserError: The folder has a task with other settings.
    """
    for task in tasks:
        store.check(task, options.identity(task))
    failed = []
    left = [task for task in tasks if not store.finished(task, users=options.users)]
    for task, problem in run(left) if run else _in_turn(tasks, left, store, options):
        if problem:
            failed.append(task.name)
            console.print(f"{task.name} failed: {problem}", highlight=False, markup=False)
    return failed


def _in_turn(
    tasks: Sequence[Task], left: Sequence[Task], store: Store, options: Options
) -> Iterator[tuple[Task, str]]:
    for number, task in enumerate(tasks, start=1):
        if task in left:
            console.print(f"[{number}/{len(tasks)}] {task.name}", highlight=False, markup=False)
            yield task, run_timed(task, store, options)


def run_timed(task: Task, store: Store, options: Options) -> str:
    """`run_task`, which also records the seconds of a task that did not fail."""
    with Stopwatch(store.path(task) / SECONDS) as watch:
        problem = run_task(task, store, options)
    if not problem:
        size = options.sources[task.data, task.split].interactions
        store.record_seconds(task, watch.seconds, size)
    return problem


def measure_latencies(tasks: Sequence[Task], store: Store, options: Options) -> list[str]:
    """Measure the finished models of each data set together, if it was not done.

    Returns the files that could not be made; the reasons are printed.
    """
    failed = []
    for table in dict.fromkeys(task.table for task in tasks):
        chosen = [
            task for task in tasks
            if task.table == table and task.seed == 0 and not task.variant and store.finished(task)
        ]  # fmt: skip
        names = [task.name for task in chosen]
        found = store.latencies(table)
        if not chosen or (found is not None and found["tasks"] == names):
            continue
        console.print(f"latency of {', '.join(names)}", highlight=False, markup=False)
        path = store.latency_path(table)
        command = [
            sys.executable, "-m", "cemg.commands.latency", "--experiment", str(store.folder), "--tasks",
            ",".join(names), "--data", str(chosen[0].source), "--split", chosen[0].split, "--result",
            str(path), "--device", options.device,
        ]  # fmt: skip
        problem = _logged([command], store.folder / "latency.txt")
        if problem:
            failed.append(path.name)
            console.print(f"latency failed: {problem}", highlight=False, markup=False)
    return failed


def run_task(task: Task, store: Store, options: Options) -> str:
    """Run one task and keep its results. Returns why it failed, or ""."""
    folder = store.path(task)
    store.begin(task, options.identity(task))
    if task.base:
        base = store.path(task.base) / "run"
        if not (store.path(task.base) / RESULT).exists():
            return f"{task.base} is not finished"
        if not (folder / "run" / "config.yaml").exists():
            link_run(base, folder / "run")
    problem = _logged(commands_of(task, store, options), folder / "log.txt")
    if problem:
        return problem
    if task.runs_pipeline and task.variant != NEW_ITEMS:
        return _collect(folder, mixture=not task.config)
    written = store.finished(task, users=options.users)
    return "" if written else f"{folder / RESULT} was not written"


def _logged(commands: Sequence[Sequence[str]], file: Path) -> str:
    """Run commands, one after the other, with their output in a file. Returns why one failed, or ""."""
    for command in commands:
        with file.open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            status = run_command(command, log.fileno())
        if status:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            last = [line for line in lines[-LAST_LINES:] if line.strip()]
            return f"exit status {status}; {file} ends with: {' / '.join(last)}"
    return ""


def commands_of(task: Task, store: Store, options: Options) -> list[list[str]]:
    """The command lines of a task, in order; after an interruption, without those that need no repetition."""
    if task.variant != NEW_ITEMS:
        free = [_free_search(store.path(task), options)] if task.config else []
        return [command_of(task, store, options), *free]
    folder, module = store.path(task), [sys.executable, "-m", "cemg.commands.new_items"]
    left_out, data = folder / "left-out", ["--data", str(task.source), "--seed", str(task.seed)]
    prepare = [*module, "prepare", *data, "--out", str(left_out)]
    train = [*command_of(replace(task, source=left_out / "data"), store, options), "--no-test"]
    table = left_out / "items.parquet"
    test = [*module, "test", *data, "--items", str(table), "--run", str(folder / "run"), "--out", str(folder)]
    return [*([] if table.exists() else [prepare]), train, test]


def command_of(task: Task, store: Store, options: Options) -> list[str]:
    """The command line that trains and tests a task."""
    folder = store.path(task)
    run, settings = folder / "run", _settings(task)
    common = ["--device", options.device, "--seed", str(task.seed)]
    if task.runs_pipeline:
        source = [] if task.base else ["--data", str(task.source)]
        source += [] if task.base or task.split == LEAVE_ONE_OUT else ["--set", f"data.split={task.split}"]
        source += ["--config", task.config] if task.config else []
        if task.config and options.budget is not None:
            settings = ["--set", f"generator.budget_hours={options.budget:.6g}", *settings]
        return [
            _script("cemg-train"), *source, "--run", str(run), "--dtype", options.dtype, "--cache",
            str(store.cache), *common, *settings,
        ]  # fmt: skip
    common += [] if task.split == LEAVE_ONE_OUT else ["--split", task.split]
    limits = [] if options.budget is None else ["--budget", f"{options.budget:.6g}"]
    limits += ["--users", str(options.users)] if options.users else []
    return [
        sys.executable, "-m", "cemg.baselines", "--data", str(task.source), "--model", task.model, "--run",
        str(run), "--out", str(folder / RESULT), "--cache", str(store.cache), *common, *limits, *settings,
    ]  # fmt: skip


def _settings(task: Task) -> list[str]:
    """The options that change the settings of a task."""
    words = []
    for setting in task.settings:
        name, _, value = setting.partition("=")
        if not task.runs_pipeline and name in ("epochs", "loss"):  # options of python -m cemg.baselines
            words += [f"--{name}", value]
        else:
            words += ["--set", setting]
    return words


def _free_search(folder: Path, options: Options) -> list[str]:
    """The command line that tests the run of a task without the trie."""
    return [
        _script("cemg-eval"), "--run", str(folder / "run"), "--engine", "free", "--result",
        str(folder / FREE), "--device", options.device,
    ]  # fmt: skip


def _script(name: str) -> str:
    """The path of a command of this installation."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise UserError(f"{name} is not installed beside {sys.executable}", fix="pip install -e .")
    return found


def _collect(folder: Path, *, mixture: bool) -> str:
    """Copy the results of a run beside it: that of the search and, with ``mixture``, that of the mixture.

    The main result, which marks the end, is that of the mixture, or else of the search.
    """
    results = folder / "run" / "results"
    found = sorted(results.glob("*-cemg*-test.json"))
    mixtures = [path for path in found if "-cemg-gate" in path.name]
    searches = [path for path in found if path not in mixtures]
    if not searches or (mixture and not mixtures):
        return f"{results} has no results of the search{' and of the mixture' if mixture else ''}"
    search = max(searches, key=lambda path: path.stat().st_mtime)
    files.write_json(folder / CODES, _codes(folder / "run"))
    if mixture:
        files.copy_file(search, folder / SEARCH)
        search = max(mixtures, key=lambda path: path.stat().st_mtime)
    files.copy_file(search, folder / RESULT)
    return ""


def _codes(run: Path) -> Codes:
    """What the item codes of a run are like."""
    counts = read_json(run / "catalog" / "uniqueness.json", dict[str, float])
    codes = read_items(run / "tokenizer" / "items.safetensors")["codes"].numpy()  # [N, M]
    perplexities = []
    for level in codes.T:
        shares = np.unique(level, return_counts=True)[1] / len(level)
        perplexities.append(float(np.exp(-(shares * np.log(shares)).sum())))
    colliding = counts["colliding_before"] / max(counts["items"], 1)
    return Codes(colliding=colliding, perplexity=statistics.mean(perplexities))
