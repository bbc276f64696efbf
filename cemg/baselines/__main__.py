"""``python -m cemg.baselines``: trains a baseline, tests it on the whole catalog and writes a result file."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cemg.baselines.registry import FITTED, MODELS, Job, check_fitted, check_settings, fit, parse_settings
from cemg.commands import console as command
from cemg.data import Dataset, read_dataset
from cemg.data.choices import SplitBy
from cemg.errors import UserError
from cemg.evaluation import Sample, evaluate, hardware, result_table, write_result
from cemg.processes import Stopwatch
from cemg.progress import print_table
from cemg.storage.run import Run

SECONDS = ".seconds"  # file of the seconds of training by all processes
OWN_OPTIONS = {
    "loss": "--loss", "seed": "--seed", "epochs": "--epochs", "folds": "--users-fold",
    "fold": "--users-fold",
}  # fmt: skip


class Loss(StrEnum):
    """The losses of SASRec, BSARec and LLM-ESR."""

    ce = "ce"
    bce = "bce"


def run(
    data: Annotated[
        Path, typer.Option(help="Folder or file that cemg-data reads, or a folder that it prepared.")
    ],
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(FITTED)}; or a Python file that defines fit(job).")
    ],
    out: Annotated[Path, typer.Option(help="Result file to write, JSON.")],
    folder: Annotated[
        Path | None, typer.Option("--run", help="Folder for the checkpoints, the log and the model.")
    ] = None,
    loss: Annotated[
        Loss | None,
        typer.Option(help="Of SASRec, BSARec and LLM-ESR: softmax cross-entropy (ce), or binary (bce)."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting of the model, e.g. --set dim=128; repeatable."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Largest number of epochs.")] = None,
    split: Annotated[
        SplitBy,
        typer.Option(help="Test targets: the last item of each user, or the first one after a time."),
    ] = "leave-one-out",
    users_fold: Annotated[
        str | None, typer.Option(help="Fold/folds, e.g. 0/2: leaves the users of this fold out of training.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Hours of training after which it stops, within an epoch too.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of the features of texts and images. Default: cache, in the run's folder."),
    ] = None,
    users: Annotated[
        int, typer.Option(help="Test this many users, the same ones for every model and seed; 0: all.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of weights, batch order, dropout and negatives.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: the choice of torch.")] = None,
) -> None:
    """Train a baseline, rank the whole catalog for every test user, and write the metrics to a file.

    Example: python -m cemg.baselines --data data/beauty --model sasrec --loss ce
    --out results/beauty-sasrec.json --run runs/sasrec
    """
    command.check_device(device)
    command.check_result(out, "--out")
    check_fitted(model)
    if budget is not None and not budget > 0:
        raise UserError(f"--budget must be more than 0 hours, got {budget}")
    if users < 0:
        raise UserError(f"--users must be 0 or more, got {users}")
    if threads is not None:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    changes = _parse_settings(settings or []) | _parse_fold(users_fold)
    changes |= {k: v for k, v in (("loss", loss and loss.value), ("epochs", epochs)) if v is not None}
    check_settings(model, changes)
    if folder is None and (model not in MODELS or MODELS[model].trains):
        fix = f"add --run runs/{Path(model).stem}"
        raise UserError(f"{model} needs a folder for its checkpoints", fix=fix)
    dataset = read_source(data, split=split)
    job = Job(
        dataset, folder or Path(), seed=seed, device=device, settings=changes,
        budget=None if budget is None else 3600 * budget,
        cache=cache if cache is not None or folder is None else folder / "cache",
    )  # fmt: skip
    trains = folder is not None and (model not in MODELS or MODELS[model].trains)
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(Run(folder).locked())
        watch = stack.enter_context(Stopwatch(job.folder / SECONDS if trains else None))
        fitted = fit(model, job)
    write_result(
        out,
        dataset=dataset.name,
        command=shlex.join(["python", "-m", "cemg.baselines", *sys.argv[1:]]),
        config={**fitted.config, "model": fitted.config.get("model", Path(model).stem), "seed": seed},
        seed=seed,
        hardware=hardware(device),
        evaluation=evaluate(fitted.rank, dataset.split(), users=Sample(users) if users else None),
        seconds=watch.before + time.perf_counter() - started,
        further=fitted.further,
    )
    print_table(result_table([out]))


def read_source(source: Path, *, split: str = "leave-one-out") -> Dataset:
    """A prepared folder, or a source in its usual form.

    Raises UserError. If a source needs options, which only cemg-data has, the fix prepares it.
    """
    try:
        return read_dataset(source, split=split)
    except UserError as error:
        if "--" not in (error.fix or "") or (source / "dataset.json").is_file():
            raise
        prepare = f"cemg-data prepare {shlex.quote(str(source))} OUT"
        fix = f"{prepare}, with an option as below, and then --data OUT. {error.fix}"
        raise UserError(error.message, cause=error.cause, fix=fix) from error


def _parse_fold(text: str | None) -> dict[str, int]:
    """Parse ``"0/2"`` to ``{"fold": 0, "folds": 2}``."""
    if text is None:
        return {}
    fold, _, folds = text.partition("/")
    if not (fold.isdecimal() and folds.isdecimal()):
        raise UserError(f"--users-fold {text}: not fold/folds", fix="for example --users-fold 0/2")
    return {"fold": int(fold), "folds": int(folds)}


def _parse_settings(settings: list[str]) -> dict[str, Any]:
    """Split ``["dim=128"]`` into ``{"dim": "128"}``."""
    changes: dict[str, Any] = dict(parse_settings(settings))
    for name in changes:
        if name in OWN_OPTIONS:
            raise UserError(f"--set {name}: this setting has an option", fix=OWN_OPTIONS[name])
    return changes


def main() -> None:
    """Run the command. A UserError is printed and exits with code 2."""
    app = command.command_line()
    app.command()(run)
    command.run(app)


if __name__ == "__main__":
    main()
