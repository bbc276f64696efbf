"""The readers of a run. Each returns what a user would see, so that two outcomes can be compared."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


@dataclass(frozen=True, slots=True)
class Places:
    """Folders of a session: runs and prepared data are read-only, ``cache`` is shared."""

    whole: Path  # a finished run to whose catalog an item was added
    other: Path  # of another seed
    torn: Path  # killed in the training of its generator
    data: Path  # what cemg-data synthetic wrote
    baseline: Path  # a SASRec model
    cache: Path
    shelves: Path  # a copy of the cache

    def settings(self) -> list[str]:
        return ["--cache", str(self.cache)]


class Refused(Exception):
    """The command printed an error and ended with 2."""


def call(main: Callable[[], None], *arguments: object) -> str:
    """The stdout of a command. Raises Refused with the message if the exit code is 2."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["cemg", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        said = err.getvalue()
        if end.code == 2 and said.strip() and "Traceback" not in said:
            raise Refused(said.strip()) from None
        if end.code:
            raise RuntimeError(f"exit code {end.code}: {said}") from end
    finally:
        sys.argv = argv
    return out.getvalue()


def recommend(run: Path, places: Places) -> Any:
    from cemg.commands.recommend import main

    return call(main, "--run", run, "--user", "user-0003", "--top", "10", "--beams", "20", "--json")


def recommend_unverified(run: Path, places: Places) -> Any:
    from cemg.commands.recommend import main

    options = ("--user", "user-0003", "--top", "10", "--beams", "20", "--json", "--no-verify")
    return call(main, "--run", run, *options)


def evaluate(run: Path, places: Places) -> Any:
    from cemg.commands.evaluate import main

    call(main, "--run", run, "--users", "6", "--beams", "10", "--result", run / "out.json")
    record = json.loads((run / "out.json").read_text())
    return {key: record[key] for key in ("metrics", "metrics_history_removed", "split", "cold")}


def show(run: Path, places: Places) -> Any:
    from cemg.commands.catalog import main

    return call(main, "show", "--run", run, "--item", "item-0007")


def add(run: Path, places: Places) -> Any:
    from cemg.commands.catalog import main

    table = run.parent / "new.csv"
    table.write_text(
        "item,text,title\nnew-a,a plain telescope,Plain telescope\nnew-b,a garden rudder,Rudder\n"
    )
    printed = call(main, "add", "--run", run, "--items", table)
    return printed + recommend(run, places)


def report(run: Path, places: Places) -> Any:
    from cemg.report import write_report

    return write_report(run).read_text().partition("<main>")[2]  # above it stands the time of the report


def train(run: Path, places: Places) -> Any:
    """Continues the training. A rebuilt stage must give the same results."""
    from cemg.commands.train import main

    said = call(main, "--run", run, *places.settings())
    assert said is not None
    return outcome(run)


def rebuild(run: Path, places: Places) -> Any:
    """Rebuilds the damaged stages with the command that errors suggest."""
    from cemg.commands.train import main

    call(main, "--run", run, "--rebuild", *places.settings())
    return outcome(run)


def outcome(run: Path) -> Any:
    """The weights, codes and figures of a finished run."""
    weights = load_file(run / "generator" / "weights.safetensors")
    codes = load_file(run / "catalog" / "catalog.safetensors")["codes"]
    found = hashlib.sha256(codes.numpy().tobytes())
    for name, tensor in sorted(weights.items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    figures = [json.loads(path.read_text()) for path in sorted((run / "results").glob("*-test.json"))]
    return [found.hexdigest(), *(f["metrics"] for f in figures)]


def prepared(folder: Path, places: Places) -> Any:
    from cemg.data import read_dataset

    data = read_dataset(folder)
    sequences = [s.tolist() for s in data.sequences]
    fields = (data.name, data.user_ids, data.item_ids, data.titles, data.texts, data.tie_rule, data.notes)
    return json.dumps([sequences, *fields, data.synthetic, [p and p.name for p in data.images]])


def stats(folder: Path, places: Places) -> Any:
    from cemg.commands.data import main

    return call(main, "stats", folder, "--json")


def rank(folder: Path, places: Places) -> Any:
    import numpy as np

    from cemg.dense import DenseRanker

    ranker = DenseRanker.load(folder)
    return ranker([np.array([3, 4, 5]), np.array([7])], 10).tolist()


def resume_baseline(folder: Path, places: Places) -> Any:
    from cemg.baselines.__main__ import main

    options = ("--set", "dim=8", "--set", "batch_size=16", "--epochs", "3")
    call(
        main,
        "--data",
        places.data,
        "--model",
        "sasrec",
        "--run",
        folder,
        "--out",
        folder / "o.json",
        *options,
    )
    return json.loads((folder / "o.json").read_text())["metrics"]


def cached_features(folder: Path, places: Places) -> Any:
    """Rows of a damaged shard would be computed again. Here they count as not found."""
    from cemg.features import FeatureCache

    found: dict[str, Any] = {}
    for shelf in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        found |= {key.hex(): row.tolist() for key, row in FeatureCache(folder).shelf(shelf).rows.items()}
    return found


Reader = Callable[[Path, Places], Any]
READERS: dict[str, tuple[Reader, ...]] = {  # by the first part of a file's path in the run
    "config.yaml": (recommend, evaluate, add, report, train, rebuild),
    "data": (recommend, recommend, evaluate, add, report, recommend_unverified),
    "features": (add, train, report, recommend, rebuild),
    "graph": (report, train, recommend, rebuild),
    "tokenizer": (add, report, train, recommend, rebuild),
    "catalog": (recommend, recommend, show, evaluate, add, report, recommend_unverified),
    "generator": (recommend, recommend, evaluate, report, recommend_unverified),
    "results": (report, report, evaluate),
}
EXPENSIVE = (train, rebuild)
