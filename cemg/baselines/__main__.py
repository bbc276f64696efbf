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

from cemg.baselines import SasrecConfig, train_sasrec
from cemg.commands import console as command
from cemg.data import Dataset, read_dataset
from cemg.errors import UserError
from cemg.evaluation import PopularityRanker, Rank, evaluate, hardware, result_table, write_result
from cemg.progress import console

OWN_OPTIONS = ("loss", "seed", "epochs")  # fields of SasrecConfig with an option of their own: not for --set


class Model(StrEnum):
    """The baselines that this command trains."""

    popularity = "popularity"
    sasrec = "sasrec"


class Loss(StrEnum):
    """The losses of SASRec."""

    ce = "ce"
    bce = "bce"


def run(
    data: Annotated[
        Path, typer.Option(help="Folder or file that cemg-data reads, or a folder that it prepared.")
    ],
    model: Annotated[Model, typer.Option(help="The baseline.")],
    out: Annotated[Path, typer.Option(help="Result file to write, JSON.")],
    folder: Annotated[
        Path | None, typer.Option("--run", help="Folder for the checkpoints and the log of SASRec.")
    ] = None,
    loss: Annotated[
        Loss,
        typer.Option(help="Softmax cross-entropy over all items (ce), or binary with one negative (bce)."),
    ] = Loss.ce,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting of SASRec, e.g. --set dim=128; repeatable."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Largest number of epochs.")] = None,
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
    dataset = Dataset.load(data) if (data / "dataset.json").is_file() else read_dataset(data)
    if model is Model.popularity:
        ranker, config = _fit_popularity(dataset)
    else:
        changes = _parse_settings(settings or []) | {"loss": loss.value, "seed": seed}
        ranker, config = _train(dataset, changes, epochs=epochs, folder=folder, device=device)
    _write(out, dataset, ranker=ranker, config=config | {"seed": seed}, device=device, started=started)


def _write(
    out: Path, data: Dataset, *, ranker: Rank, config: dict[str, Any], device: str, started: float
) -> None:
    evaluation = evaluate(ranker, data.split())
    write_result(
        out,
        dataset=data.name,
        command=shlex.join(["python", "-m", "cemg.baselines", *sys.argv[1:]]),
        config=config,
        seed=config["seed"],
        hardware=hardware(device),
        seconds=time.perf_counter() - started,
        evaluation=evaluation,
    )
    console.print(result_table([out]))


def _fit_popularity(data: Dataset) -> tuple[Rank, dict[str, Any]]:
    return PopularityRanker.fit(data.split()), {"model": "popularity"}


def _train(
    data: Dataset, changes: dict[str, Any], *, epochs: int | None, folder: Path | None, device: str
) -> tuple[Rank, dict[str, Any]]:
    if folder is None:
        raise UserError("SASRec needs a folder for its checkpoints", fix="add --run runs/sasrec")
    config = SasrecConfig(**changes | ({} if epochs is None else {"epochs": epochs}))
    ranker = train_sasrec(data, config, folder=folder, device=device)
    log = json.loads((folder / "log.json").read_text())
    best = max(log, key=lambda row: row["valid_NDCG@10"])
    early_stopping = {
        "best_epoch": best["epoch"],
        "epochs_run": len(log),
        "valid_NDCG@10": best["valid_NDCG@10"],
    }
    cost = {"train_seconds": round(sum(row["train_seconds"] for row in log), 1)}
    return ranker, {"model": "sasrec", **dataclasses.asdict(config), **early_stopping, **cost}


def _parse_settings(settings: list[str]) -> dict[str, Any]:
    """Parse ``["dim=128"]`` to ``{"dim": 128}``. Raises UserError for an unknown name."""
    defaults = {k: v for k, v in dataclasses.asdict(SasrecConfig()).items() if k not in OWN_OPTIONS}
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
