"""Kills a training, a retraining and `cemg-catalog add` at many moments and checks that nothing is lost.

``python tests/runs/kills.py stage NAME RUN FOLDER`` kills a training inside one stage of copies of a finished
tiny run, see CASES. ``python tests/runs/kills.py FOLDER ABOUT COUNT`` prints how many kills each command
survived. ABOUT is a JSON file with the ``settings`` of a tiny run and its ``cache`` (see test_kills.py). A
command gets SIGKILL at a random disk operation or after a random share of its time. Then the run is opened: a
finished run must recommend as before the command or as after it. Then the next command must end with the
settings, codes and weights of a run that was never killed.

Each command runs in a fork of one process that has imported everything and started no thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cemg.artifacts import RunArtifacts
from cemg.commands import catalog, recommend, train
from cemg.pipeline import Pipeline
from cemg.storage import files
from cemg.storage.manifest import LOGS, Manifest

STEPS = ((files, "_open"), (files, "_fsync"), (files, "_replace"), (files, "_mkdir"), (shutil, "rmtree"),
         (Path, "unlink"), (Path, "rmdir"), (os, "unlink"), (os, "rmdir"))  # fmt: skip
HISTORY = "item-0003 item-0004"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a forked command ended: exit code (−9 if it was killed), output, steps and seconds."""

    code: int
    text: str
    steps: int
    seconds: float


def forked(
    command: Callable[[], object], *arguments: object, log: Path, at_step: int = 0, after: float = 0.0,
    stage: str = "",
) -> Ended:  # fmt: skip
    """Runs a command in a fork, and kills it before a step or after some seconds, unless they are 0.

    With ``stage``, only steps of this stage of a training count.
    """
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _run(command, arguments, log, at_step, stage)
    if after:
        while time.monotonic() - started < after and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
    seconds = time.monotonic() - started
    text = log.read_text() if log.exists() else ""
    about = json.loads(log.with_suffix(".json").read_text()) if log.with_suffix(".json").exists() else {}
    log.with_suffix(".json").unlink(missing_ok=True)
    return Ended(about.get("code", -signal.SIGKILL), text, about.get("steps", 0), seconds)


def _run(
    command: Callable[[], object], arguments: tuple[object, ...], log: Path, at_step: int, stage: str
) -> None:
    """Runs in the child and never returns."""
    torch.set_num_threads(1)
    log.unlink(missing_ok=True)
    output = log.open("w")
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.argv = ["cemg", *map(str, arguments)]
    count, counts = [0], [not stage]

    def counting(step: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*values: object, **options: object) -> object:
            count[0] += counts[0]
            if counts[0] and count[0] == at_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*values, **options)

        return wrapped

    for owner, name in STEPS:
        setattr(owner, name, counting(getattr(owner, name)))
    if stage:
        build = getattr(Pipeline, stage)

        def counted(pipeline: Pipeline) -> None:
            counts[0] = True
            build(pipeline)
            counts[0] = False

        setattr(Pipeline, stage, counted)
    code = 0
    try:
        command()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    log.with_suffix(".json").write_text(json.dumps({"code": code, "steps": count[0]}))
    os._exit(0)


class Kills:
    """The three killed commands, on runs in ``folder`` with the ``settings`` of a tiny run."""

    def __init__(self, folder: Path, settings: list[str], *, cache: str, seed: int = 0) -> None:
        self.folder, self.log, self.draw = folder, folder / "log", random.Random(seed)
        self.new = [part for one in settings for part in ("--set", one)]
        self.cache = ("--cache", cache)
        self.again = ("--set", "tokenizer.epochs=5", "--seed", 3, "--force", *self.cache)
        self.csv = folder / "new.csv"
        self.kills: Counter[str] = Counter()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.csv.write_text("item,text\nn1,a plain telescope\nn2,a sturdy garden\n")
        self.first, self.second, self.larger = (folder / name for name in ("first", "second", "larger"))
        self.trained = self.ends(train.main, "--run", self.first, *self.new, *self.cache)
        shutil.copytree(self.first, self.second)
        self.retrained = self.ends(train.main, "--run", self.second, *self.again)
        shutil.copytree(self.first, self.larger)
        self.added = self.ends(catalog.main, "add", "--run", self.larger, "--items", self.csv)
        self.answers = {name: self.recommended(folder / name) for name in ("first", "second", "larger")}
        assert self.answers["first"] != self.answers["second"]

    def ends(self, command: Callable[[], None], *arguments: object) -> Ended:
        """The command runs to its end."""
        ended = forked(command, *arguments, log=self.log)
        assert ended.code == 0, ended.text
        return ended

    def killed(self, name: str, whole: Ended, command: Callable[[], None], *arguments: object) -> Ended:
        """The command is killed at a moment of ``whole``, an uninterrupted one; it may end before."""
        if sum(self.kills.values()) % 2:
            ended = forked(command, *arguments, log=self.log, at_step=self.draw.randint(1, whole.steps))
        else:
            ended = forked(command, *arguments, log=self.log, after=self.draw.uniform(0.01, whole.seconds))
        assert ended.code in (0, -signal.SIGKILL), ended.text
        self.kills[name] += ended.code == -signal.SIGKILL
        return ended

    def recommended(self, run: Path) -> str:
        ended = self.ends(recommend.main, "--run", run, "--history", HISTORY, "--json")
        return ended.text[ended.text.index("{") :]

    def assert_is(self, run: Path, whole: Path) -> None:
        """Settings, codes and weights of two runs are equal, and nothing unfinished lies about."""
        for name in ("config.yaml", "catalog/catalog.json", "memory/memory.safetensors",
                     "generator/weights.safetensors", "gate/gate.json"):  # fmt: skip
            assert (run / name).read_bytes() == (whole / name).read_bytes(), name
        assert (run / "report" / "report.html").is_file()
        left = {path.name for path in run.rglob(".*")} - {".lock", ".image-hashes.json"}
        assert left == set(), left

    def train(self, run: Path) -> None:
        """A training that is killed six times, then continued to its end."""
        for _ in range(6):
            begun = (run / ".config.next.yaml").exists() or (run / "config.yaml").exists()
            self.killed("training", self.trained, train.main, "--run", run, *self.cache,
                        *(() if begun else self.new))  # fmt: skip
        begun = (run / ".config.next.yaml").exists() or (run / "config.yaml").exists()
        self.ends(train.main, "--run", run, *self.cache, *(() if begun else self.new))
        self.assert_is(run, self.first)

    def retrain(self, run: Path) -> None:
        """A finished run is trained anew, killed and opened three times, and continued to its end."""
        shutil.copytree(self.first, run)
        begun = False
        for _ in range(3):
            own = () if begun else self.again
            self.killed("retraining", self.retrained, train.main, "--run", run, *self.cache, *own)
            answer = self.recommended(run)
            assert answer in (self.answers["first"], self.answers["second"]), answer
            begun = (run / ".config.next.yaml").exists() or answer == self.answers["second"]
        self.ends(train.main, "--run", run, *self.cache)
        self.assert_is(run, self.second if begun else self.first)

    def add(self, run: Path) -> None:
        """Items are added; the killed command is given again, unless all of them are there."""
        shutil.copytree(self.first, run)
        self.killed("catalog add", self.added, catalog.main, "add", "--run", run, "--items", self.csv)
        answer = self.recommended(run)
        assert answer in (self.answers["first"], self.answers["larger"]), answer
        if len(json.loads((run / "catalog" / "catalog.json").read_text())["item_ids"]) == 50:
            self.ends(catalog.main, "add", "--run", run, "--items", self.csv)
        self.assert_is(run, self.larger)

    def count(self, kills: int) -> Counter[str]:
        """So many kills, a third of them in each command; AssertionError where one loses something."""
        commands = {"training": self.train, "retraining": self.retrain, "catalog add": self.add}
        while min(self.kills[name] for name in commands) < kills / 3:
            name = min(commands, key=lambda name: self.kills[name])
            run = self.folder / "run"
            commands[name](run)
            shutil.rmtree(run)
            print(dict(self.kills), flush=True)
        return self.kills


CASES = {  # stages that are missing, the stage in which the training is killed, its options
    "the first graph": (("graph",), "graph", ()),
    "the first tokenizer": (("tokenizer",), "tokenizer", ()),
    "the first memory": (("memory", "gate"), "memory", ()),
    "the first gate": (("gate",), "gate", ()),
    "another memory": ((), "memory", ("--set", "memory.window=3", "--force")),
    "another gate": ((), "gate", ("--set", "gate.users=30")),
}
RESUMED = ("graph", "tokenizer")  # continue at a checkpoint; the settings of a tiny run write one per step


def kill_in_stage(name: str, run: Path, folder: Path) -> None:
    """Kills trainings of a finished run inside a stage, and continues them."""
    folder.mkdir(parents=True)
    missing, stage, options = CASES[name]
    whole, copy, log = folder / "whole", folder / "copy", folder / "log"
    _copied(run, whole, missing)
    ended = forked(train.main, "--run", whole, *options, log=log, stage=stage)
    assert ended.code == 0 and ended.steps > 8, ended.text
    expected = _contents(whole)
    for step in (ended.steps // 2, ended.steps):
        _copied(run, copy, missing)
        before = _contents(copy)
        killed = forked(train.main, "--run", copy, *options, log=log, at_step=step, stage=stage)
        assert killed.code == -signal.SIGKILL, killed.text
        if stage not in RESUMED:  # a run without them does not open
            opened = forked(lambda: _opens(copy), log=log)
            assert opened.code == 0, opened.text
        assert all(files == before.get(part, expected[part]) for part, files in _contents(copy).items())
        continued = forked(train.main, "--run", copy, *options, log=log)
        assert continued.code == 0 and _contents(copy) == expected, continued.text
        if stage in RESUMED and step < ended.steps:  # before the last step the stage is complete
            assert f"{stage}: resumed" in continued.text, continued.text
        left = {path.name for path in copy.rglob(".*")} - {".lock", ".image-hashes.json"}
        assert left == set(), left
        print(f"killed at step {step} of {ended.steps}", flush=True)


def _copied(run: Path, copy: Path, missing: tuple[str, ...]) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    for stage in missing:
        shutil.rmtree(copy / stage)


def _contents(run: Path) -> dict[str, dict[str, str]]:
    """sha256 per file of each finished stage, without logs."""
    stages = {path.parent.name: Manifest.read(path.parent).files for path in run.glob("[!.]*/manifest.json")}
    return {
        stage: {name: sha for name, sha in files.items() if name.split("/")[0] not in LOGS}
        for stage, files in stages.items()
    }


def _opens(run: Path) -> None:
    """The run opens, and its memory and gate are there as a whole or not at all."""
    artifacts = RunArtifacts.open(run)
    assert not artifacts.has_memory() or artifacts.load_memory().num_items == 50
    assert not artifacts.has_gate() or artifacts.load_gate().constant


def main() -> None:
    if sys.argv[1] == "stage":
        kill_in_stage(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return
    folder, about, kills = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
    Kills(folder, about["settings"], cache=about["cache"]).count(kills)


if __name__ == "__main__":
    main()
