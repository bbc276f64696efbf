"""``python -m cemg.baselines``: trains a baseline, tests it on the whole catalog and writes a result file."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cemg.baselines.training import train_dense
from cemg.commands import console as command
from cemg.data import Dataset, read_dataset
from cemg.dense import DenseConfig
from cemg.errors import UserError
from cemg.evaluation import PopularityRanker, Rank, evaluate, hardware, result_table, write_result
from cemg.memory import MemoryConfig
from cemg.memory.build import fit_memory
from cemg.progress import console

Trained = tuple[Rank, dict[str, Any], dict[str, Any]]  # ranker, settings, further entries of the result file
OWN_OPTIONS = ("model", "loss", "seed", "epochs", "folds", "fold")  # options of their own: not for --set


class Model(StrEnum):
    """The baselines that this command trains."""

    popularity = "popularity"
    memory = "memory"
    sasrec = "sasrec"
    bsarec = "bsarec"


class Loss(StrEnum):
    """The losses of SASRec and BSARec."""

    ce = "ce"
    bce = "bce"


def run(
    data: Annotated[
        Path, typer.Option(help="Folder or file that cemg-data reads, or a folder that it prepared.")
    ],
    model: Annotated[Model, typer.Option(help="The baseline.")],
    out: Annotated[Path, typer.Option(help="Result file to write, JSON.")],
    folder: Annotated[
        Path | None, typer.Option("--run", help="Folder for the checkpoints, the log and the model.")
    ] = None,
    loss: Annotated[
        Loss,
        typer.Option(help="Softmax cross-entropy (ce), or binary with one negative (bce)."),
    ] = Loss.ce,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting of the model, e.g. --set dim=128; repeatable."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Largest number of epochs.")] = None,
    users_fold: Annotated[
        str | None, typer.Option(help="Fold/folds, e.g. 0/2: leaves the users of this fold out of training.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, batch order, dropout and negatives.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: the choice of torch.")] = None,
) -> None:
    """Train a baseline, rank the whole catalog for every test user, and write the metrics to a file.

    Example: python -m cemg.baselines --data data/beauty --model sasrec --loss ce
    --out results/beauty-sasrec-ce.json --run runs/sasrec-ce
    """
    command.check_device(device)
    command.check_result(out, "--out")
    if threads is not None:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    dataset = _read(data)
    if model is Model.popularity:
        ranker, config, further = _fit_popularity(dataset)
    elif model is Model.memory:
        ranker, config, further = _fit_memory(dataset)
    else:
        changes = _parse_settings(settings or []) | {"model": model.value, "loss": loss.value, "seed": seed}
        changes |= _parse_fold(users_fold) | ({} if epochs is None else {"epochs": epochs})
        ranker, config, further = _train(dataset, changes, folder=folder, device=device)
    write_result(
        out,
        dataset=dataset.name,
        command=shlex.join(["python", "-m", "cemg.baselines", *sys.argv[1:]]),
        config=config | {"seed": seed},
        seed=seed,
        hardware=hardware(device),
        evaluation=evaluate(ranker, dataset.split()),
        seconds=time.perf_counter() - started,
        further=further,
    )
    console.print(result_table([out]))


def _read(source: Path) -> Dataset:
    """A prepared folder, or a source in its usual form.

    Raises UserError. If the source needs options, which only cemg-data has, the fix prepares it.
    """
    if (source / "dataset.json").is_file():
        return Dataset.load(source)
    try:
        return read_dataset(source)
    except UserError as error:
        if "--" not in (error.fix or ""):
            raise
        prepare = f"cemg-data prepare {shlex.quote(str(source))} OUT"
        fix = f"{prepare}, with an option as below, and then --data OUT. {error.fix}"
        raise UserError(error.message, cause=error.cause, fix=fix) from error


def _fit_popularity(data: Dataset) -> Trained:
    return PopularityRanker.fit(data.split()), {"model": "popularity"}, {}


def _fit_memory(data: Dataset) -> Trained:
    """The item memory with the default settings, and its validation metrics."""
    split = data.split()
    memory = fit_memory(data, split, config=MemoryConfig())
    found = evaluate(memory.ranker(), split, part="valid")
    valid = {"metrics": found.metrics, "metrics_history_removed": found.metrics_history_removed}
    config = {"model": "memory", **dataclasses.asdict(memory.config)}
    constants = dataclasses.asdict(memory.constants)
    return memory.ranker(), config, {"constants": constants, "validation": valid}


def _train(data: Dataset, changes: dict[str, Any], *, folder: Path | None, device: str) -> Trained:
    config = DenseConfig(**changes)
    if folder is None:
        fix = f"add --run runs/{config.model}"
        raise UserError(f"{config.model} needs a folder for its checkpoints", fix=fix)
    ranker = train_dense(data, config, folder=folder, device=device)
    log = json.loads((folder / "log.json").read_text())
    best = max(log, key=lambda row: row[f"valid_{config.select}"])
    early_stopping = {"best_epoch": best["epoch"], "epochs_run": len(log)}
    early_stopping |= {name: best[name] for name in ("valid_HR@10", "valid_NDCG@10")}
    cost = {"train_seconds": round(sum(row["train_seconds"] for row in log), 1)}
    measured = {"training": [{name: round(value, 5) for name, value in row.items()} for row in log]}
    return ranker, {**dataclasses.asdict(config), **early_stopping, **cost}, measured


def _parse_fold(text: str | None) -> dict[str, int]:
    """Parse ``"0/2"`` to ``{"fold": 0, "folds": 2}``."""
    if text is None:
        return {}
    fold, _, folds = text.partition("/")
    if not (fold.isdecimal() and folds.isdecimal()):
        raise UserError(f"--users-fold {text}: not fold/folds", fix="for example --users-fold 0/2")
    return {"fold": int(fold), "folds": int(folds)}


def _parse_settings(settings: list[str]) -> dict[str, Any]:
    """Parse ``["dim=128"]`` to ``{"dim": 128}``. Raises UserError for an unknown name."""
    defaults = {k: v for k, v in dataclasses.asdict(DenseConfig()).items() if k not in OWN_OPTIONS}
    changes: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in defaults:
            raise UserError(f"--set {setting}: unknown setting", fix=f"one of {', '.join(defaults)}")
        kind = type(defaults[name])
        try:
            changes[name] = text if kind is str else kind(json.loads(text))
        except (ValueError, TypeError) as error:
            raise UserError(f"--set {setting}: {text!r} is not a valid {kind.__name__}") from error
    return changes


def main() -> None:
    """Run the command. A UserError is printed and exits with code 2."""
    command.run(lambda: typer.run(run))


if __name__ == "__main__":
    main()
