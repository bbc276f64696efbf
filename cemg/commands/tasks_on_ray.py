"""``cemg-experiment --ray``: the tasks of an experiment on a Ray cluster, each in a worker.

Tasks write to the folder of the experiment, which is at the same path on all nodes. Ray runs a task whose
worker or node died again elsewhere, and it continues at its last checkpoint.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cemg.baselines.__main__ import read_source
from cemg.commands.on_ray import check_nodes, connected, on_nodes, other_version
from cemg.errors import UserError
from cemg.experiments import Store, Task
from cemg.experiments.work import Options, Run, Source, run_timed
from cemg.processes import GRACE
from cemg.progress import console
from cemg.storage import files
from cemg.storage.run import Run as RunFolder
from cemg.version import __version__

TOKEN = ".ray-token"  # in the folder of the experiment: a node that reads it shares the folder
RETRIES = 20  # of a task whose worker or node died; each continues at the last checkpoint
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tasks run, as the command sees it.

    Attributes:
        directory: Working directory of the command, to which its paths are relative.
        folder: Folder of the experiment.
        token: Content of its `TOKEN`.
        host: Machine of the command.
        version: Version of CEMG.
    """

    directory: Path
    folder: Path
    token: str
    host: str
    version: str

    def problem(self) -> str:
        """Why tasks cannot run in this process; "" if they can."""
        if self.version != __version__:
            return other_version(__version__, self.version).message
        if not self.directory.is_dir():
            return f"it has no folder {self.directory}, in which the command was started"
        try:
            found = (self.directory / self.folder / TOKEN).read_text(encoding="utf-8")
        except OSError:
            found = ""
        return "" if found == self.token else f"its {self.folder.absolute()} is not the folder of the command"


def tasks_on_ray(address: str, store: Store, options: Options, *, cpus: int) -> Run:
    """A function that runs tasks on a Ray cluster, side by side, and yields them as they end.

    A task starts when its base has ended. A failed base fails it.

    Args:
        address: "local" for a cluster on this machine that ends with the command; or HOST:PORT of the head of
            a cluster that this machine belongs to.
        store: The folder of the experiment, at the same path on every node.
        options: Options of all tasks. With the device "cuda", each task gets a GPU.
        cpus: CPUs and threads of each task.

    Raises:
        UserError: The cluster cannot be reached, a node has another version of CEMG or does not share the
            folder, or no node has the CPUs and the GPU of a task.
    """

    def run(tasks: Sequence[Task]) -> Iterator[tuple[Task, str]]:
        if not tasks:
            return
        token = store.folder / TOKEN
        place = Place(Path.cwd(), store.folder, secrets.token_hex(), socket.gethostname(), __version__)
        with connected(address, kept="finished tasks"):
            check_nodes()
            files.write_text(token, place.token)
            try:
                _check_place(place, cpus=cpus, gpus=_gpus(options))
                yield from _results(tasks, store, options, place, cpus)
            finally:
                token.unlink(missing_ok=True)

    return run


def _gpus(options: Options) -> int:
    return int(options.device != "cpu")


def _check_place(place: Place, *, cpus: int, gpus: int) -> None:
    """Raise UserError if no node can run a task, or if one that can does not share the folder."""
    able = 0
    for node, problem in on_nodes(Place.problem, place):
        if any(node["Resources"].get(name, 0) < count for name, count in (("CPU", cpus), ("GPU", gpus))):
            continue
        able += 1
        if problem:
            raise UserError(
                f"node {node['NodeManagerAddress']} of the Ray cluster cannot run tasks", cause=problem,
                fix="name a folder with --out that all machines share, at the same path",
            )  # fmt: skip
    if not able:
        needs = f"{cpus} CPU{'s' if cpus > 1 else ''}{' and a GPU' if gpus else ''}"
        raise UserError(
            f"no node of the Ray cluster has {needs}, which a task needs",
            fix="fewer --cpus; or start more nodes: ray start --address HOST:PORT",
        )


def _results(
    tasks: Sequence[Task], store: Store, options: Options, place: Place, cpus: int
) -> Iterator[tuple[Task, str]]:
    """Run the tasks, and yield each with why it failed, or "". Unfinished ones are cancelled at the end."""
    import ray

    remote = ray.remote(num_cpus=cpus, num_gpus=_gpus(options), max_retries=RETRIES)(run_in_worker)
    running: dict[ray.ObjectRef, Task] = {}
    made: dict[str, ray.ObjectRef] = {}
    for task in tasks:
        identity = options.identity(task)
        made[task.name] = remote.remote(task, store, options, place, identity, cpus, made.get(task.base))
        running[made[task.name]] = task
    console.print(f"{len(tasks)} tasks on the Ray cluster, {cpus} CPU(s) each", highlight=False)
    try:
        while running:
            (ended,), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(ended)
            try:
                problem = ray.get(ended)
            except ray.exceptions.RayError as error:
                problem = str(error).strip().split("\n")[-1][:300]
            done = f"[{len(tasks) - len(running)}/{len(tasks)}] {task.name}"
            console.print(f"{done} {'failed' if problem else 'is finished'}", highlight=False, markup=False)
            yield task, problem
    finally:
        for reference in running:
            ray.cancel(reference)
        if running:  # trainings end with a checkpoint or without; both are continued
            ray.wait(list(running), num_returns=len(running), timeout=GRACE)


def run_in_worker(
    task: Task,
    store: Store,
    options: Options,
    place: Place,
    identity: dict[str, str],
    cpus: int,
    base: object,
) -> str:
    """Run a task in a worker of the cluster. Returns why it failed, or "".

    Args:
        task: The task.
        store: The folder of the experiment.
        options: Options of all tasks.
        place: Where the command was started.
        identity: What the command knows of the task; data or a file that differs on this node are refused.
        cpus: Number of threads.
        base: The result of its base, for which Ray waits.
    """
    problem = place.problem()
    if problem:
        return f"node {socket.gethostname()}: {problem}"
    os.chdir(place.directory)
    os.environ |= dict.fromkeys(THREADS, str(cpus))
    try:
        if socket.gethostname() != place.host:
            _check_inputs(task, options, identity)
        _wait_for(store.path(task) / "run")
        return run_timed(task, store, options)
    except UserError as error:
        return " / ".join(line.strip() for line in error.lines())


def _check_inputs(task: Task, options: Options, identity: dict[str, str]) -> None:
    """Raise UserError if the data or the model's file of this node are not those of the command."""
    source = Source.of(read_source(task.source, split=task.split), task.split)
    found = replace(options, sources={(task.data, task.split): source}).identity(task)
    for name, value in identity.items():
        if found.get(name) != value:
            file = task.model if name == "file_sha256" else task.source
            raise UserError(
                f"{file} of node {socket.gethostname()} is not that of the command",
                cause=f"its {name} is {found.get(name)} instead of {value}", fix="copy it to every machine",
            )  # fmt: skip


def _wait_for(run: Path) -> None:
    """Wait until the training of a worker that died has ended, which it does by itself."""
    until = time.monotonic() + GRACE
    while time.monotonic() < until:
        try:
            RunFolder(run).check_unlocked()
            return
        except UserError:
            time.sleep(1)
