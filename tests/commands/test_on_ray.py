"""Parts and tasks on a Ray cluster: a node that dies, other versions, and addresses that do not answer.

The tests that start a cluster need Ray: ``pip install 'cemg[distributed]'``.
"""

from __future__ import annotations

import csv
import json
import pickle
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cemg.baselines.__main__ import main as baselines_main
from cemg.commands import experiment, on_ray, recommend, tasks_on_ray
from cemg.commands.all_users import AllUsers
from cemg.commands.shards import write_parts
from cemg.data import Dataset
from cemg.errors import UserError
from cemg.experiments import Store, Task, plan, work, write_experiment_report
from cemg.experiments.work import Options, Source, run_tasks
from cemg.features import ImageConfig, TextConfig
from cemg.features import shards as feature_shards
from cemg.features.shards import FeatureWork
from cemg.recommender import Recommender
from cemg.storage import files
from cemg.storage.parts import Parts
from cemg.storage.run import Run
from cemg.version import __version__

SECONDS = 0.5  # of a part, so that parts are left when a node dies


class Slow:
    """Work whose workers take longer. The results are those of the work."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)

    def worker(self) -> Any:
        make = self.work.worker()

        def slow() -> Any:
            encode = make()

            def later(payload: Any) -> pa.Table:
                time.sleep(SECONDS)
                return encode(payload)

            return later

        return slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster whose head computes nothing. Tests add nodes."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 makes tests beside others very slow
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        yield made
        made.shutdown()


@pytest.fixture
def nodes(cluster) -> Iterator[list[Any]]:
    """Two nodes with one CPU each."""
    added = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield added
    for node in set(added) & set(cluster.list_all_nodes()):
        cluster.remove_node(node)


def work_of(kind: str, tiny_run: Path, tiny_text_model: Path) -> Any:
    if kind == "recommendations":
        options = {"top": 5, "beams": 20, "exclude_history": True, "memory": "gate"}
        return AllUsers(Recommender.from_run(tiny_run), part="all", options=options, part_users=4)
    texts = [" ".join(["plain", "garden", "music"] * (n % 7)) + f" a{n}" for n in range(40)]
    text = TextConfig(str(tiny_text_model), batch_size=2)
    return FeatureWork(texts, [None] * 40, text=text, image=ImageConfig())


@pytest.mark.parametrize("kind", ["recommendations", "features"])
def test_a_node_that_dies_loses_and_repeats_no_row(
    kind, cluster, nodes, tiny_run, tiny_text_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(feature_shards, "PART_ITEMS", 4)
    work = work_of(kind, tiny_run, tiny_text_model)
    expected = write_parts(work, tmp_path / "expected.parquet", shard=None, label="")
    assert work.total == 10
    write, written = Parts.write, list[int]()

    def killing(self: Parts, number: int, table: pa.Table) -> None:
        write(self, number, table)
        written.append(number)
        if len(written) == 3:
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    monkeypatch.setattr(Parts, "write", killing)
    out = write_parts(Slow(work), tmp_path / "out.parquet", shard=None, label="", ray=cluster.address)
    assert sorted(written) == list(range(10)) and len(nodes) == 1
    assert out.read_bytes() == expected.read_bytes()


def test_a_node_with_another_version_is_refused(
    cluster, nodes, tiny_run, tiny_text_model, tmp_path, monkeypatch
):
    work = work_of("features", tiny_run, tiny_text_model)
    monkeypatch.setattr(on_ray, "__version__", "9.9")
    with pytest.raises(
        UserError, match=rf"node .* has version {__version__} of CEMG, and this command is version 9\.9"
    ):
        write_parts(work, tmp_path / "out.parquet", shard=None, label="", ray=cluster.address)
    assert not list(tmp_path.iterdir())


def test_a_worker_with_another_version_run_or_file_sends_an_error(tiny_run, tiny_text_model, tmp_path):
    def message(work: Any, version: str = __version__) -> str:
        worker = on_ray.Worker(pickle.dumps(work.worker()), version)
        row = worker({"number": 0, "payload": pickle.dumps(work.payload(0))})
        assert row["table"] == b""
        return str(pickle.loads(row["error"]))

    work = work_of("recommendations", tiny_run, tiny_text_model)
    assert f"has version {__version__} of CEMG, and this command is version 9.9" in message(work, "9.9")
    work.about["generator of the run"] = "0" * 64
    assert "is another run than that of the command" in message(work)
    features = work_of("features", tiny_run, tiny_text_model)
    features.contents["text"] = [f"{text}!" for text in features.contents["text"]]
    assert "is missing, or another one than that of the command" in message(features)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--ray", "local", "--join"), "--ray and --join exclude each other"),
        (("--ray", "head"), "--ray must be local or HOST:PORT, got 'head'"),
        (("--ray", "127.0.0.1:1"), "no Ray cluster can be reached at 127.0.0.1:1"),
        (("--ray", "local"), "--ray needs Ray, which is not installed"),
    ],
)
def test_invalid_options_are_refused(command, capsys, tiny_run, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr(on_ray, "_installed", lambda: not said.endswith("not installed"))
    assert command(recommend.main, "--run", tiny_run, "--all-users", tmp_path / "a.parquet", *options) == 2
    assert f"error: {said}" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---- the tasks of an experiment

SLOW_MODEL = """
import os, time
from dataclasses import asdict

import torch
from cemg.baselines.loop import LoopConfig, train
from cemg.baselines.registry import Fitted, Job
from cemg.baselines.samples import Samples


class Last(torch.nn.Module):
    def __init__(self, items):
        super().__init__()
        self.scores = torch.nn.Embedding(items, items)

    def loss(self, batch, generator):
        time.sleep(float(os.environ.get("SECONDS_PER_STEP", "1")))
        last = batch.inputs[torch.arange(len(batch.lengths)), batch.lengths - 1]
        return torch.nn.functional.cross_entropy(self.scores(last), batch.targets)

    def logits(self, histories):
        return self.scores(torch.tensor([int(history[-1]) for history in histories])).detach()


def fit(job: Job) -> Fitted:
    config, split = job.config(LoopConfig), job.data.split()
    torch.manual_seed(config.seed)
    model = Last(job.data.num_items)
    samples = Samples.prefixes(list(split.train), 5)
    options = {"settings": asdict(config), "folder": job.folder, "budget": job.budget}
    log = train(model, samples, split, config=config, loss=model.loss, scorer=model, **options)
    rank = lambda histories, top: model.logits(histories).topk(top).indices
    return Fitted.of_log(rank, asdict(config), log, select=config.select)
"""


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    """A ring: item i + 1 follows item i. Beside it, a model of 12 epochs of a second each."""
    rng = np.random.default_rng(0)
    sequences = [((s + np.arange(6)) % 30).astype(np.int32) for s in rng.integers(30, size=60)]
    ids, blank = [str(i) for i in range(60)], [None] * 30
    Dataset("toy", ids, ids[:30], sequences, [""] * 30, [*blank], [*blank], "as written").save(
        tmp_path / "toy"
    )
    (tmp_path / "slow.py").write_text(SLOW_MODEL)
    return tmp_path / "toy"


def options_of(ring: Path) -> Options:
    source = Source.of(Dataset.load(ring), "leave-one-out")
    return Options(sources={("toy", "leave-one-out"): source})


def place_of(store: Store, **changes: str) -> tasks_on_ray.Place:
    """The place of a command on this machine, with its token written."""
    files.write_text(store.folder / tasks_on_ray.TOKEN, "token")
    place = tasks_on_ray.Place(Path.cwd(), store.folder, "token", socket.gethostname(), __version__)
    return replace(place, **changes)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1800):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within three minutes")


def without_times(value: Any) -> Any:
    """A result without what differs between two trainings of a model in two folders: machine and seconds."""
    if isinstance(value, dict):
        other = {"hardware", "code", "command", "sha256"}  # sha256: of the whole record
        return {k: without_times(v) for k, v in value.items() if k not in other and "seconds" not in k}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def table_of(store: Store, tasks: list[Task]) -> list[dict[str, str]]:
    """``results.csv``, without seconds."""
    write_experiment_report(store, tasks, ["rq1"])
    rows = csv.DictReader((store.folder / "results.csv").open())
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def test_tasks_of_a_cancelled_command_and_of_a_node_that_died_end_with_the_results_of_one_machine(
    cluster, nodes, ring, tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    store, alone, options = Store(Path("out")), Store(tmp_path / "alone"), options_of(ring)
    settings = ["slow:epochs=12", "slow:patience=12"]
    tasks = plan(["rq1"], {"toy": ring}, models=["popularity", "slow.py"], seeds=2, settings=settings)
    popularity, first, second = tasks

    def saved(task: Task) -> bool:
        return (store.path(task) / "run" / "checkpoint.safetensors").exists()

    run = tasks_on_ray.tasks_on_ray(cluster.address, store, options, cpus=1)
    with store.locked():
        results = run(tasks)
        assert next(results) == (popularity, "")
        until(lambda: saved(first))
        results.close()  # as Ctrl-C does
    for task in (first, second):
        Run(store.path(task) / "run").check_unlocked()  # its training was waited for
        assert not store.finished(task)
    assert not (store.folder / tasks_on_ray.TOKEN).exists()

    def kill() -> None:
        until(lambda: saved(second))
        cluster.remove_node(nodes.pop(), allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    assert run_tasks(tasks, store, options, run=run) == []
    killer.join()
    assert len(nodes) == 1
    logs = [(store.path(task) / "log.txt").read_text() for task in (first, second)]
    # the first was cancelled, the second too if it had started, and one of them was killed
    assert sum(log.count("$ ") for log in logs) in (4, 5)
    for log in logs:
        epochs = [int(number) for number in re.findall(r"^epoch +(\d+) ", log, re.MULTILINE)]
        assert epochs == sorted({*epochs}) and epochs[-1] == 12  # none was repeated

    def here(words: list[str], log: int) -> int:
        return command(baselines_main, *words[3:])

    monkeypatch.setattr(work, "run_command", here)
    monkeypatch.setenv("SECONDS_PER_STEP", "0")
    assert run_tasks(tasks, alone, options) == []
    for task in tasks:
        one, other = (
            json.loads((folder.path(task) / "result.json").read_text()) for folder in (store, alone)
        )
        assert without_times(one) == without_times(other)
    assert table_of(store, tasks) == table_of(alone, tasks)


def recorded(task: Task, store: Store, options: Any, place: Any, identity: Any, cpus: int, base: Any) -> str:
    """In place of a training: notes when it begins and ends."""
    with (Path(place.directory) / "events").open("a") as file:
        file.write(f"{task.name} begins\n")
        file.flush()
        time.sleep(1)
        file.write(f"{task.name} ends\n")
    return "as planned" if task.variant == "without memory" else ""


def test_a_task_waits_for_its_base_and_a_failed_one_keeps_no_other_from_running(
    cluster, nodes, ring, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks_on_ray, "run_in_worker", recorded)
    store = Store(tmp_path / "out")
    tasks = plan(["rq1"], {"toy": ring}, models=["cemg", "popularity"])
    own, without, popularity = sorted(tasks, key=lambda task: (task.model, task.variant))
    assert without.base == own.name
    run = tasks_on_ray.tasks_on_ray(cluster.address, store, options_of(ring), cpus=1)
    assert run_tasks([own, without, popularity], store, options_of(ring), run=run) == [without.name]
    events = (tmp_path / "events").read_text().splitlines()
    assert len(events) == 6
    assert events.index(f"{own.name} ends") < events.index(f"{without.name} begins")
    assert f"{without.name} failed: as planned" in capsys.readouterr().err


def test_a_cluster_that_cannot_run_the_tasks_is_refused_before_they_start(
    cluster, nodes, ring, tmp_path, monkeypatch
):
    store, options = Store(tmp_path / "out"), options_of(ring)
    tasks = plan(["rq1"], {"toy": ring}, models=["popularity"])
    on_cluster = tasks_on_ray.tasks_on_ray
    with pytest.raises(UserError, match="no node of the Ray cluster has 64 CPUs"):
        run_tasks(tasks, store, options, run=on_cluster(cluster.address, store, options, cpus=64))
    gpu = replace(options, device="cuda")
    with pytest.raises(UserError, match="no node of the Ray cluster has 1 CPU and a GPU"):
        run_tasks(tasks, store, gpu, run=on_cluster(cluster.address, store, gpu, cpus=1))
    monkeypatch.setattr(files, "write_text", lambda path, text: None)  # no node finds the token
    with pytest.raises(UserError, match=r"node .* cannot run tasks") as error:
        run_tasks(tasks, store, options, run=on_cluster(cluster.address, store, options, cpus=1))
    assert "out is not the folder of the command" in str(error.value.cause) and "--out" in str(
        error.value.fix
    )
    assert not (store.folder / "tasks").exists()


def test_a_worker_with_another_version_folder_data_or_file_runs_nothing(ring, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, options = Store(tmp_path / "out"), options_of(ring)
    popularity, slow = plan(["rq1"], {"toy": ring}, models=["popularity", "slow.py"])
    monkeypatch.setattr(tasks_on_ray, "run_timed", lambda *arguments: "it ran")

    def said(task: Task = popularity, **changes: Any) -> str:
        identity = options.identity(task) | changes.pop("identity", {})
        place = place_of(store, **changes)
        return tasks_on_ray.run_in_worker(task, store, options, place, identity, 1, None)

    assert said() == "it ran"
    assert f"has version {__version__} of CEMG, and this command is version 9.9" in said(version="9.9")
    assert f"its {tmp_path}/out is not the folder of the command" in said(token="another")
    assert "it has no folder /nowhere, in which the command was started" in said(directory=Path("/nowhere"))
    assert said(host="elsewhere") == said(slow, host="elsewhere") == "it ran"
    other = {"data_sha256": "0" * 64, "file_sha256": "0" * 64}
    assert f"{ring} of node" in said(host="elsewhere", identity=other)
    del other["data_sha256"]
    assert "slow.py of node" in said(slow, host="elsewhere", identity=other)
    assert said(slow, identity=other) == "it ran"  # on the machine of the command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--cpus", "2"), "--cpus needs --ray"),
        (("--ray", "local", "--cpus", "0"), "--cpus must be 1 or more, got 0"),
        (("--ray", "local", "--device", "cuda:1"), "--ray with --device cuda:1"),
        (("--ray", "127.0.0.1:1"), "no Ray cluster can be reached at 127.0.0.1:1"),
        (("--ray", "local"), "--ray needs Ray, which is not installed"),
    ],
)
def test_invalid_options_of_an_experiment_are_refused(
    command, capsys, ring, tmp_path, monkeypatch, options, said
):
    monkeypatch.setattr(on_ray, "_installed", lambda: not said.endswith("not installed"))
    words = ("rq1", "--data", ring, "--models", "popularity", "--out", tmp_path / "out")
    assert command(experiment.main, *words, *options) == 2
    assert f"error: {said}" in capsys.readouterr().err and not (tmp_path / "out").exists()
