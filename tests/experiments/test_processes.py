"""A training ends with the process that started it, and its seconds are those of all its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cemg.baselines.__main__ import main
from cemg.errors import UserError
from cemg.experiments import Store, plan
from cemg.experiments.work import Options, Source, run_tasks
from cemg.processes import Stopwatch
from cemg.storage.run import Run

CHILD = """
import os, sys, time
from pathlib import Path
from cemg.processes import follow_parent

follow_parent()
try:
    Path("pid.part").write_text(str(os.getpid()))
    os.replace("pid.part", "pid")
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(0.2)  # it is waited for
    print("interrupted", flush=True)
    sys.exit(130)
"""
PARENT = """
import signal
import sys
from pathlib import Path
from cemg.processes import run_command, signals_raise

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
with signals_raise("the same command continues"), Path("log").open("a") as log:
    run_command([sys.executable, "child.py"], log.fileno())
"""


def runs(number: int) -> bool:
    """Whether a process is there. One that has ended and that nobody waited for is not."""
    try:
        os.kill(number, 0)
        status = Path(f"/proc/{number}/stat")
        return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")
    except (ProcessLookupError, FileNotFoundError):
        return False


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within two minutes")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_command_ends_with_the_process_that_runs_it(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    words = [sys.executable, "-c", PARENT]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as parent:
        until(lambda: (tmp_path / "pid").exists())
        child = int((tmp_path / "pid").read_text())
        parent.send_signal(number)
        _, printed = parent.communicate(timeout=60)
    if number == signal.SIGKILL:
        until(lambda: not runs(child))
        return
    assert not runs(child) and "interrupted" in (tmp_path / "log").read_text()  # it was waited for
    assert parent.returncode == 128 + number
    assert f"ended by {number.name}: the same command continues" in printed


def test_a_stopwatch_continues_and_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cemg.processes.BEAT", 0.001)
    file = tmp_path / "seconds"
    file.write_text("100")
    with Stopwatch(file) as watch:
        until(lambda: file.read_text() != "100")  # written before the end
    assert watch.before == 100 and float(file.read_text()) == pytest.approx(watch.seconds, abs=0.01)
    assert watch.seconds > 100
    file.write_text("damaged")
    with Stopwatch(file) as watch:
        pass
    assert watch.before == 0
    with Stopwatch(None) as watch:
        pass
    assert watch.seconds >= 0 and [path.name for path in tmp_path.iterdir()] == ["seconds"]


MODEL = """
import torch
from cemg.baselines.registry import Fitted, Job

def fit(job: Job) -> Fitted:
    return Fitted(lambda histories, top: torch.arange(top).repeat(len(histories), 1), {})
"""


@pytest.fixture
def source(source: Path, tmp_path: Path) -> Path:
    """The ring, with a model of a file beside it."""
    (tmp_path / "mine.py").write_text(MODEL)
    return source


def test_the_seconds_of_a_result_are_those_of_all_its_processes(source: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    (task,) = plan(["rq1"], {"toy": source}, models=[str(tmp_path / "mine.py")])
    for folder, seconds in ((store.path(task) / "run", "1000"), (store.path(task), "2000")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".seconds").write_text(seconds)  # what an interrupted training has left
    assert run_tasks([task], store, Options(sources={("toy", "leave-one-out"): Source(360, "a" * 64)})) == []
    record, took = (
        json.loads((store.path(task) / name).read_text()) for name in ("result.json", "took.json")
    )
    assert 1000 <= record["seconds"] < 2000 <= took["seconds"] < 3000


def test_two_trainings_do_not_share_a_folder(
    source: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run, result = tmp_path / "run", tmp_path / "result.json"
    words = ["--data", source, "--model", "popularity", "--out", result, "--run", run]
    with Run(run).locked():
        assert command(main, *words) == 2
    assert f"run is in use by process {os.getpid()}" in capsys.readouterr().err
    assert command(main, *words) == 0


def test_an_interrupted_stage_counts_its_first_process(tmp_path: Path) -> None:
    def interrupted(part: Path) -> None:
        raise UserError("interrupted")

    with pytest.raises(UserError):
        Run(tmp_path).stage("graph", {}, interrupted)
    (tmp_path / ".graph.part" / ".seconds").write_text("100")
    Run(tmp_path).stage("graph", {}, lambda part: None)
    assert 100 <= json.loads((tmp_path / "graph" / "manifest.json").read_text())["seconds"] < 110
    assert not (tmp_path / "graph" / ".seconds").exists()
