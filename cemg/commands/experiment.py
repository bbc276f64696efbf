"""``cemg-experiment``: the experiments of the paper, planned, run, resumed and reported."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from cemg.commands import console as command
from cemg.errors import UserError
from cemg.progress import console, print_table

if TYPE_CHECKING:
    from cemg.experiments import Store, Task

app = command.command_line()


@app.command(
    cls=command.Command,
    epilog=command.examples(
        "cemg-experiment rq1 --data synthetic --models popularity,memory,gru4rec,cemg",
        "cemg-experiment rq1 rq5 --data data/beauty --seeds 3 --budget 2 --out runs/beauty-experiment",
        "cemg-experiment rq2 --data ml-100k --dry-run",
    ),
)
def experiment(
    questions: Annotated[
        list[str],
        typer.Argument(
            metavar="QUESTION…",
            help="rq1 (all models), rq2 (ablations), rq3 (training time and latency), rq4 (tokenizer), "
            "rq5 (cold and new items).",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Data set: a path that cemg-data reads, the name of a folder in data/, or synthetic. "
            "Repeatable, or separated by commas.",
        ),
    ] = None,
    models: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help="Models, or Python files that define one. Default: all of the question.",
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.")] = 1,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="HOURS",
            help="Stop the training of a baseline after this time, within an epoch too. CEMG trains whole.",
        ),
    ] = None,
    users: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Test baselines on a sample of N users; its table has models tested on all users, too.",
        ),
    ] = 0,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of the tasks, their results and the report.")
    ] = Path("runs/experiment"),
    split: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help="leave-one-out, time (test targets after a time that is the same for all users), or both.",
        ),
    ] = "leave-one-out",
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Change a setting of all CEMG trainings. Repeatable."),
    ] = None,
    device: command.DeviceOption = "cpu",
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Precision of the generator: float32 or bfloat16.")
    ] = "float32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the tasks, with an estimate of their time.")
    ] = False,
    report_only: Annotated[
        bool,
        typer.Option(
            "--report-only",
            help="Only write the report of what is finished; without --data, of all tasks in the folder.",
        ),
    ] = False,
    version: command.VersionOption = False,
) -> None:
    """Answer questions of the paper on any data set: train what is missing, test it, and write a report.

    Tasks run one after the other. After an interruption, the same command continues; finished tasks are not
    repeated. The report is FOLDER/report.html, all metrics are in FOLDER/results.csv.
    """
    from cemg.data import read_dataset
    from cemg.experiments import Store, plan, write_experiment_report
    from cemg.experiments.plan import sources_of
    from cemg.experiments.work import Options, Source, measure_latencies, run_tasks

    command.check_device(device)
    if budget is not None and not budget > 0:
        raise UserError(f"--budget must be more than 0 hours, got {budget}")
    if users < 0:
        raise UserError(f"--users must be 0 or more, got {users}")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype must be float32 or bfloat16, got {dtype!r}")
    store = Store(out)
    names = [name for one in data or () for name in one.split(",") if name]
    if not names and not report_only:
        raise UserError("--data is missing", fix="--data data/beauty, or --data synthetic")
    chosen = [name for name in models.split(",") if name]
    splits = [name for name in split.split(",") if name]
    plan(
        questions, {}, models=chosen, seeds=seeds, splits=splits
    )  # checks the names before anything is read or written
    sources = sources_of(names, out / "data")
    if names:
        tasks = plan(questions, sources, models=chosen, seeds=seeds, settings=set or (), splits=splits)
    else:
        tasks = store.tasks()
    with store.locked():
        repeat = f"cemg-experiment {' '.join(questions)} … --out {quote(str(out))}"
        command.set_interrupt_message(f"finished tasks are kept; the same command continues: {repeat}")
        failed: list[str] = []
        known = {
            (name, split): Source.of(read_dataset(source, split=split), split)
            for name, source in sources.items()
            for split in splits
        }
        options = Options(device, dtype, budget, users, known)
        for task in tasks if names else ():  # a report or a plan must not be that of other settings
            store.check(task, options.identity(task))
        if not report_only:
            _print_plan(store, tasks, {name: known[name, splits[0]].interactions for name in sources}, budget)
            if dry_run:
                return
            failed = run_tasks(tasks, store, options)
            if "rq3" in questions:
                failed += measure_latencies([t for t in tasks if t.belongs_to("rq3")], store, options)
        page = write_experiment_report(store, tasks, questions)
    console.print(f"report: {page}", soft_wrap=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(tasks)} tasks failed", cause="; ".join(failed),
            fix="read their log.txt; the same command tries them again",
        )  # fmt: skip


def _print_plan(store: Store, tasks: list[Task], sizes: dict[str, int], budget: float | None) -> None:
    """Print each task with the time that it will take, and the sum."""
    from rich.table import Table

    table = Table("task", "state", "estimate")
    total, unknown = 0.0, 0
    for task in tasks:
        if store.finished(task):
            table.add_row(task.name, "finished", "")
            continue
        seconds = store.seconds(task, sizes)
        if seconds is not None and budget is not None and task.model != "cemg":
            seconds = min(seconds, 3600 * budget)
        state = "to be continued" if store.path(task).exists() else "to do"
        table.add_row(task.name, state, "unknown" if seconds is None else duration(seconds))
        total, unknown = total + (seconds or 0.0), unknown + (seconds is None)
    print_table(table)
    more = f", and {unknown} of unknown length" if unknown else ""
    console.print(f"about {duration(total)} in all{more}, one task at a time", highlight=False)


def duration(seconds: float) -> str:
    """Seconds as text, such as "3 h 20 min"."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def main() -> None:
    """Run ``cemg-experiment`` on the command line's arguments."""
    command.run(app)
