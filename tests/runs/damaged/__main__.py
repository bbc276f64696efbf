"""``python -m damaged --cases 2600`` in ``tests/runs``: damages files of tiny runs and counts the outcomes.

Every case is one damage to one file and one command that reads it, in a process of its own. An outcome is

- refused: an error in a few lines, exit code 2, or a report that names what it leaves out;
- same: the results of the undamaged run, bit for bit;
- rebuilt: the same results, after a line that says what was built anew;
- unverified: other results under ``--no-verify``, which asks for no comparison;
- silent, traceback, crash: what must not happen.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from damaged.cases import (
    EXPENSIVE,
    READERS,
    Places,
    Reader,
    Refused,
    cached_features,
    prepared,
    rank,
    recommend_unverified,
    report,
    resume_baseline,
    stats,
    train,
)
from damaged.kinds import Damage, another_stage, copy_run, kinds_for, stage_deleted, table_changed

LIMIT = 120  # seconds of one case
STAGES = ("data", "features", "graph", "memory", "tokenizer", "catalog", "generator", "gate")
BAD = ("silent", "traceback", "crash")
SAID = ("built anew", "trained again", "from the beginning", "computed again", "damaged")


def in_child(work: Callable[[], Any], *, limit: float = LIMIT) -> dict[str, Any]:
    """``work()`` in a forked process: its value, its output, or the signal that killed it."""
    folder = Path(tempfile.mkdtemp(prefix="damaged-"))
    pid = os.fork()
    if pid == 0:
        _child(work, folder)
    try:
        status = _wait(pid, limit)
        said = (folder / "said").read_text(errors="replace") if (folder / "said").exists() else ""
        if status is None:
            return {"crash": f"no end within {limit} s", "said": said}
        if not os.WIFEXITED(status) or not (folder / "found.json").exists():
            return {"crash": f"status {status}", "said": said}
        return json.loads((folder / "found.json").read_text()) | {"said": said}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _child(work: Callable[[], Any], folder: Path) -> None:
    found: dict[str, Any] = {}
    os.setsid()
    number = os.open(folder / "said", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(number, 1)
    os.dup2(number, 2)
    warnings.simplefilter("always")
    _draw_nothing()
    try:
        found = {"value": work()}
    except Refused as error:
        found = {"refused": str(error)}
    except BaseException as error:
        from cemg.errors import UserError

        is_clear = isinstance(error, UserError)
        found = {"refused": str(error)} if is_clear else {"traceback": traceback.format_exc()}
    (folder / "found.json").write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _draw_nothing() -> None:
    """The pages of a report are compared without their charts, which take seconds."""
    from markupsafe import Markup
    from sklearn.manifold import TSNE

    from cemg.report import charts

    charts._svg = lambda figure, salt: Markup("")
    TSNE.fit_transform = lambda self, z: z[:, :2]


def _wait(pid: int, limit: float) -> int | None:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def classify(reader: Reader, found: dict[str, Any], wanted: Any) -> str:
    for name in ("crash", "traceback", "refused"):
        if name in found:
            return name
    value = found["value"]
    if reader is cached_features and all(wanted.get(key) == row for key, row in value.items()):
        return "same" if len(value) == len(wanted) else "rebuilt"
    if value == wanted:
        return "rebuilt" if any(word in found["said"] for word in SAID) else "same"
    if reader is recommend_unverified:
        return "unverified"
    if reader is report and _leaves_out(value, wanted):
        return "refused"
    return "silent"


def _leaves_out(page: str, whole: str) -> bool:
    """Whether every part of the page is that of the whole one or names what it leaves out."""
    parts, others = (
        dict(part.split("\n", 1) for part in text.split("\n<section ")[1:]) for text in (page, whole)
    )
    return all(parts[title] == others[title] or "Left out" in parts[title] for title in others)


# ---- what is damaged


def make_places(places: Places, settings: Sequence[str]) -> None:
    """Trains each run in a new process, because this one must not start a thread before it forks."""
    options = [part for setting in settings for part in ("--set", setting)]

    def do(work: Callable[[], Any]) -> None:
        found = in_child(work, limit=600)
        if "value" not in found:
            raise RuntimeError(found)

    def run(place: Path, *more: str) -> None:
        from cemg.commands.train import main
        from damaged.cases import call

        call(main, "--run", place, *places.settings(), *options, *more)

    def torn() -> None:
        from cemg.progress import StageLog

        log, steps = StageLog.__call__, [0]

        def dying(self: Any, step: int, values: dict[str, float]) -> None:
            steps[0] += "generator/loss" in values
            if steps[0] == 14:
                os._exit(0)
            log(self, step, values)

        StageLog.__call__ = dying  # type: ignore[method-assign]
        run(places.torn)

    def added() -> None:
        from cemg.commands.catalog import main
        from damaged.cases import call

        table = places.whole.with_name("added.csv")
        table.write_text("item,text,title\nadded,a sturdy telescope,Sturdy telescope\n")
        call(main, "add", "--run", places.whole, "--items", table)

    def data() -> None:
        from cemg.commands.data import main
        from damaged.cases import call

        call(main, "synthetic", places.data, "--users", "40", "--items", "50")

    do(lambda: run(places.whole))
    do(added)
    do(lambda: run(places.other, "--seed", "1"))
    in_child(torn, limit=600)
    do(data)
    do(lambda: bool(resume_baseline(places.baseline, places)))
    shutil.copytree(places.cache, places.shelves)  # trainings add to the cache


class Damages:
    """Draws cases, runs them and records the outcomes."""

    def __init__(self, places: Places, *, seed: int) -> None:
        self.places, self.rng = places, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wanted: dict[tuple[Path, str], Any] = {}
        self.bad: list[str] = []

    def run(self, cases: int) -> None:
        """Draw cases until so many are counted."""
        weights: dict[Callable[[], None], int] = {self._of_run: 150}
        if self.places.torn.exists():  # else there is a finished run only
            weights |= {self._of_torn: 12, self._of_data: 12, self._of_baseline: 12, self._of_cache: 8}
            weights |= {self._of_stage: 10, self._of_pictures: 2}
        while (done := sum(self.counts.values())) < cases:
            self.rng.choices(list(weights), list(weights.values()))[0]()
            if done and done % 100 == 0:
                print(done, dict(self.counts), flush=True)

    def _of_run(self) -> None:
        places = self.places
        path = self._draw(places.whole, lambda p: p.parts[0] in READERS and "tensorboard" not in p.parts)
        reader = self.rng.choice(READERS[path.parts[0]])
        if reader in EXPENSIVE and (self.rng.random() < 0.7 or not places.torn.exists()):
            reader = READERS[path.parts[0]][0]
        twin = places.other / path
        donors = [*self._files(places.whole), *([twin] * 40 if twin.is_file() else [])]
        self.case(places.whole, path, reader, donors)

    def _of_stage(self) -> None:
        """A whole stage is gone, or is that of another run."""
        places, stage = self.places, self.rng.choice(STAGES)
        reader = self.rng.choice([r for r in READERS[stage] if r not in (*EXPENSIVE, recommend_unverified)])
        damage = self.rng.choice((another_stage, stage_deleted))
        self.case(places.whole, Path(stage), reader, [places.other / stage], damage=damage)

    def _of_pictures(self) -> None:
        """The pictures of the synthetic set are drawn anew by every training."""
        path = self._draw(self.places.whole, lambda p: p.suffix == ".png" and p.parts[0] == "synthetic")
        self.case(self.places.whole, path, train, self._files(self.places.other / "synthetic"))

    def _of_torn(self) -> None:
        path = self._draw(
            self.places.torn, lambda p: p.parts[0].startswith(".") and "tensorboard" not in p.parts
        )
        self.case(self.places.torn, path, train, self._files(self.places.torn), wanted=self._trained())

    def _trained(self) -> Any:
        key = (self.places.torn, "train")
        if key not in self.wanted:
            self.wanted[key] = self._undamaged(self.places.torn, train)
        return self.wanted[key]

    def _of_data(self) -> None:
        path = self._draw(self.places.data, lambda p: p.suffix in (".json", ".parquet") and len(p.parts) == 1)
        reader = self.rng.choice((prepared, prepared, stats))
        self.case(self.places.data, path, reader, self._files(self.places.whole / "data"))

    def _of_baseline(self) -> None:
        path = self._draw(self.places.baseline, lambda p: p.suffix in (".json", ".safetensors"))
        reader = resume_baseline if "checkpoint" in path.name else rank
        self.case(self.places.baseline, path, reader, self._files(self.places.baseline))

    def _of_cache(self) -> None:
        path = self._draw(self.places.shelves, lambda p: p.suffix == ".safetensors")
        self.case(self.places.shelves, path, cached_features, self._files(self.places.shelves))

    def _files(self, folder: Path) -> list[Path]:
        return sorted(p for p in folder.rglob("*") if p.is_file())

    def _draw(self, folder: Path, fits: Callable[[Path], bool]) -> Path:
        """A file of a folder, relative to it."""
        names = [p.relative_to(folder) for p in self._files(folder)]
        return self.rng.choice([name for name in names if fits(name)])

    def _undamaged(self, source: Path, reader: Reader) -> Any:
        with tempfile.TemporaryDirectory(prefix="damaged-") as folder:
            copy = Path(folder) / "run"
            copy_run(source, copy)
            found = in_child(lambda: reader(copy, self.places))
        if "value" not in found:
            raise RuntimeError(f"{reader.__name__} of an undamaged {source.name}: {found}")
        return found["value"]

    def case(
        self, source: Path, path: Path, reader: Reader, donors: Sequence[Path], *, wanted: Any = None,
        damage: Damage | None = None,
    ) -> None:  # fmt: skip
        key = (source, reader.__name__)
        if wanted is None:
            if key not in self.wanted:
                self.wanted[key] = self._undamaged(source, reader)
            wanted = self.wanted[key]
        damage = damage or self.rng.choice(kinds_for(path))
        state = self.rng.randrange(2**32)
        with tempfile.TemporaryDirectory(prefix="damaged-") as folder:
            copy = Path(folder) / "run"
            copy_run(source, copy)
            if not self._apply(damage, copy / path, state, donors):
                return
            found = in_child(lambda: reader(copy, self.places))
            kind = classify(reader, found, wanted)
            name = f"{source.name}/{path}: {damage.__name__}, {reader.__name__}, seed {state}: {kind}"
            if kind in BAD:
                self._note(name, found)
        self.counts[kind] += 1

    def _apply(self, damage: Damage, path: Path, state: int, donors: Sequence[Path]) -> bool:
        """In a child where it writes Parquet: Polars starts threads."""
        if damage is not table_changed:
            return damage(path, random.Random(state), donors) is not False
        found = in_child(lambda: damage(path, random.Random(state), donors) is not False)
        return bool(found.get("value"))

    def _note(self, name: str, found: dict[str, Any]) -> None:
        why = found.get("crash") or found.get("traceback") or str(found.get("value"))[:600]
        self.bad.append(f"{name}\n{why[-2500:]}\nsaid: {found['said'][-600:]}")
        print("BAD", self.bad[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=2600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are made, or were")
    parser.add_argument("--whole", type=Path, help="damage this finished run only")
    parser.add_argument("--settings", required=True, help="JSON list of the --set of a tiny run")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)

    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="damaged-runs-"))
    places = Places(*(folder / field.name for field in dataclasses.fields(Places)))
    if arguments.whole:
        places = dataclasses.replace(places, whole=arguments.whole)
    elif not places.shelves.is_dir():
        make_places(places, json.loads(arguments.settings))
    gc.freeze()  # what is imported stays shared between the children
    started = time.monotonic()
    damages = Damages(places, seed=arguments.seed)
    damages.run(arguments.cases)
    seconds = round(time.monotonic() - started)
    record = {
        "cases": sum(damages.counts.values()),
        "seconds": seconds,
        **dict(sorted(damages.counts.items())),
    }
    print(json.dumps(record))
    sys.exit(1 if damages.bad else 0)


if __name__ == "__main__":
    main()
