"""Kills a training, a retraining and `cemg-catalog add` at many moments and checks that nothing is lost.

``python tests/runs/kills.py FOLDER ABOUT COUNT`` prints how many kills each command survived. ABOUT is a
JSON file with the ``settings`` of a tiny run and its ``cache`` (see test_kills.py). A command gets SIGKILL at
a random disk operation or after a random share of its time. Then the run is opened: a finished run must
recommend as before the command or as after it. Then the next command must end with the settings, codes and
weights of a run that was never killed.

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

from cemg.commands import catalog, recommend, train
from cemg.storage import files

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
    command: Callable[[], None], *arguments: object, log: Path, at_step: int = 0, after: float = 0.0
) -> Ended:
    """Runs a command in a fork and kills it before step ``at_step`` or after ``after`` seconds, unless they are 0."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _run(command, arguments, log, at_step)
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


def _run(command: Callable[[], None], arguments: tuple[object, ...], log: Path, at_step: int) -> None:
    """Runs in the child and never returns."""
    torch.set_num_threads(1)
    log.unlink(missing_ok=True)
    output = log.open("w")
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.argv = ["cemg", *map(str, arguments)]
    count = [0]

    def counting(step: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*values: object, **options: object) -> object:
            count[0] += 1
            if count[0] == at_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*values, **options)

        return wrapped

    for owner, name in STEPS:
        setattr(owner, name, counting(getattr(owner, name)))
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
        for name in ("config.yaml", "catalog/catalog.json", "generator/weights.safetensors"):
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


def main() -> None:
    folder, about, kills = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
    Kills(folder, about["settings"], cache=about["cache"]).count(kills)


if __name__ == "__main__":
    main()
