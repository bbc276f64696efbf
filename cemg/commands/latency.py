"""``python -m cemg.commands.latency``: the time of a recommendation by the models of an experiment (RQ3).

The models take turns, round by round, so that noise on the machine affects all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from cemg.baselines.registry import Job, fit
from cemg.commands import console as command
from cemg.data import read_dataset
from cemg.errors import UserError
from cemg.evaluation import hardware, seeded_sample
from cemg.evaluation.results import code_version
from cemg.experiments.store import Store
from cemg.recommender import Recommender
from cemg.storage import files

TOP = 10
BATCHES = (1, 8)  # histories at once
DONE = 1e-9  # seconds of training: none where there is a checkpoint
Search = Callable[[Sequence[np.ndarray]], object]

app = command.command_line()


@app.command(cls=command.Command)
def latency(
    experiment: Annotated[Path, typer.Option(help="Folder of cemg-experiment.")],
    tasks: Annotated[str, typer.Option(help="Names of finished tasks in it, separated by commas.")],
    data: Annotated[Path, typer.Option(help="Their data: a folder or file that cemg-data reads.")],
    result: Annotated[Path, typer.Option(help="JSON file to write.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds: searches per model and batch size.")] = 30,
    split: Annotated[str, typer.Option(help="leave-one-out or time.")] = "leave-one-out",
    device: command.DeviceOption = "cpu",
) -> None:
    """Measure a recommendation of ten items by each model, from the histories to the items.

    Models with semantic IDs are searched by the engine of CEMG and by ``generate()`` with a Python trie, both
    with the beams of their settings.
    """
    command.check_device(device)
    store, source = Store(experiment), read_dataset(data, split=split)
    known = {task.name: task for task in store.tasks()}
    searches: dict[tuple[str, str], Search] = {}
    for name in tasks.split(","):
        if name not in known or not store.finished(known[name]):
            raise UserError(f"{experiment} has no finished task {name}", fix="run cemg-experiment rq3 first")
        task, run = known[name], store.path(name) / "run"
        if task.runs_pipeline:
            alone = "" if task.config else ", search alone"
            for engine in ("cemg", "transformers"):
                recommender = Recommender.from_run(run, device, engine=engine)
                search = partial(_recommend, recommender, source.item_ids)
                searches[task.title + alone, engine] = partial(search, memory="off")
                if alone and engine == "cemg":  # the only engine that searches a mixture
                    searches[task.title, engine] = partial(search, memory=None)
        else:
            fitted = fit(task.model, Job(source, run, task.seed, device, budget=DONE, cache=store.cache))
            searches[task.title, "its own"] = partial(_rank, fitted.rank)
    parts = source.split()
    histories = parts.histories("test")
    users = seeded_sample(parts, max(BATCHES) * rounds)
    rows = [
        {"model": model, "engine": engine, "histories": batch, **_figures(times)}
        for batch in BATCHES
        for (model, engine), times in _measure(searches, [histories[u] for u in users], batch, rounds).items()
    ]
    about = {"data": source.name, "top": TOP, "hardware": hardware(device), "code": code_version()}
    files.write_json(result, {**about, "tasks": tasks.split(","), "rows": rows})


def _recommend(
    recommender: Recommender, ids: Sequence[str], histories: Sequence[np.ndarray], *, memory: str | None
) -> object:
    beams = max(recommender.artifacts.config.decoding.beams, TOP)
    return recommender.recommend(
        [[ids[item] for item in h] for h in histories], top=TOP, beams=beams, memory=memory
    )


def _rank(rank: Callable[[list[np.ndarray], int], object], histories: Sequence[np.ndarray]) -> object:
    with torch.inference_mode():
        return rank([*histories], TOP)


def _measure(
    searches: dict[tuple[str, str], Search], histories: Sequence[np.ndarray], batch: int, rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of each search in each round, after one that is not counted."""
    times: dict[tuple[str, str], list[float]] = {name: [] for name in searches}
    for number in range(-1, rounds):
        start = max(number, 0) * batch % max(len(histories) - batch + 1, 1)
        chosen = histories[start : start + batch]
        for name, search in searches.items():
            begun = time.perf_counter()
            search(chosen)
            if number >= 0:
                times[name].append(1000 * (time.perf_counter() - begun))
    return times


def _figures(times: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, in milliseconds."""
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
    return {
        "p25_ms": round(low, 3), "p50_ms": round(middle, 3), "p75_ms": round(high, 3),
        "mean_ms": round(statistics.mean(times), 3),
    }  # fmt: skip


if __name__ == "__main__":
    command.run(app)
