"""``cemg-experiment``: the experiments of the paper, planned, run, resumed and reported."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from cemg.commands import console as command
from cemg.commands.shards import RayOption
from cemg.errors import UserError
from cemg.processes import signals_raise
from cemg.progress import console, print_table

if TYPE_CHECKING:
    from cemg.data import Dataset
    from cemg.experiments import Store, Task
    from cemg.experiments.work import Options

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
            help="Stop the training of a baseline after this time, within an epoch too. CEMG always trains "
            "to the end.",
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
        typer.Option(
            metavar="NAME=VALUE",
            help="Change a setting of all CEMG trainings, or MODEL:NAME=VALUE of another model. Repeatable.",
        ),
    ] = None,
    device: command.DeviceOption = "cpu",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Precision of the generator: float32, or bfloat16 where it is native.",
        ),
    ] = "float32",
    ray: RayOption = "",
    cpus: Annotated[
        int | None, typer.Option(metavar="N", help="With --ray: CPUs and threads of each task. Default: 1.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the tasks, with an estimate of their time.")
    ] = False,
    report_only: Annotated[
        bool,
        typer.Option(
            "--report-only",
            help="Only write the report of what is finished; --data adds tasks that are missing.",
        ),
    ] = False,
    version: command.VersionOption = False,
) -> None:
    """Answer questions of the paper on any data set: train what is missing, test it, and write a report.

    Tasks run one after the other, or side by side with --ray. After an interruption, the same command
    continues; finished tasks are not repeated. FOLDER/report.html and FOLDER/results.csv have everything that
    is finished in FOLDER.
    """
    from cemg.experiments import Store, plan, write_experiment_report
    from cemg.experiments.plan import NEW_ITEMS, check_task, sources_of
    from cemg.experiments.work import Options, Source, measure_latencies, run_tasks

    _check_options(budget, users, dtype)
    _check_machines(ray, cpus, device)
    store = Store(out)
    names, chosen, splits = (_parts(text) for text in (",".join(data or ()), models, split))
    questions = [name.lower() for name in questions]
    if not names and not report_only:
        raise UserError("--data is missing", fix="--data data/beauty, or --data synthetic")
    if "synthetic" in names and "time" in splits and not Path("synthetic").exists():
        raise UserError(
            "the synthetic data set has no times, so it has no --split time",
            fix="--split leave-one-out, or --data of a data set with timestamps",
        )
    for option, given, parts in (("--models", models, chosen), ("--split", split, splits)):
        if not parts and (given or option == "--split"):
            raise UserError(f"{option} {quote(given)} names nothing", fix=f"leave out {option}")
    # checks the names before anything is read or written
    plan(questions, {}, models=chosen, seeds=seeds, settings=set or (), splits=splits)
    in_folder = store.tasks()
    if report_only and not in_folder:
        raise UserError(
            f"there is no experiment in {out}",
            fix="--out FOLDER of an experiment, or leave out --report-only",
        )
    with ExitStack() as stack:
        folder = out / "data"
        if dry_run and not (folder / "synthetic").exists():  # which writes nothing there
            folder = Path(stack.enter_context(TemporaryDirectory()))
        sources = sources_of(names, folder)
        known = {
            (name, split): Source.of(_read(source, split), split)
            for name, source in sources.items()
            for split in splits
        }
        tasks = plan(questions, sources, models=chosen, seeds=seeds, settings=set or (), splits=splits)
        options = Options(device, dtype, budget, users, known)
        for task in tasks:  # a report or a plan must not be that of other settings
            check_task(task, known[task.data, task.split].items)
            store.check(task, options.identity(task))
        repeat = f"cemg-experiment {' '.join(questions)} … --out {quote(str(out))}"
        if not report_only:
            _print_plan(store, tasks, options, ray=bool(ray))
            if "rq5" in questions and "time" in splits:
                console.print(f"note: {NEW_ITEMS} are tested with --split leave-one-out only")
        if dry_run:
            return
        kept = f"finished tasks are kept; the same command continues: {repeat}"
        command.set_interrupt_message(kept)
        stack.enter_context(signals_raise(kept))
        stack.enter_context(store.locked())
        tables = {task.table: known[task.data, task.split].about for task in tasks}
        store.remember(questions, tables)
        run = None
        if ray:
            from cemg.commands.tasks_on_ray import tasks_on_ray

            run = tasks_on_ray(ray, store, options, cpus=cpus or 1)
        failed = [] if report_only else run_tasks(tasks, store, options, run=run)
        if not report_only and "rq3" in questions:
            failed += measure_latencies([t for t in tasks if t.belongs_to("rq3")], store, options)
        page = write_experiment_report(store, tasks, questions)
    console.print(f"report: {page}", soft_wrap=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(tasks)} tasks failed", cause=", ".join(failed),
            fix="see the reasons above and the logs; the same command tries them again",
        )  # fmt: skip


def _check_options(budget: float | None, users: int, dtype: str) -> None:
    """Raise UserError for a value that an option cannot have."""
    if budget is not None and not budget > 0:
        raise UserError(f"--budget must be more than 0 hours, got {budget}")
    if users < 0:
        raise UserError(f"--users must be 0 or more, got {users}")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype must be float32 or bfloat16, got {dtype!r}")


def _check_machines(ray: str, cpus: int | None, device: str) -> None:
    """Raise UserError if the tasks cannot run there."""
    if not ray:
        if cpus is not None:
            raise UserError("--cpus needs --ray", fix="OMP_NUM_THREADS=N sets the threads without --ray")
        command.check_device(device)
        return
    if cpus is not None and cpus < 1:
        raise UserError(f"--cpus must be 1 or more, got {cpus}")
    if device not in ("cpu", "cuda"):
        raise UserError(
            f"--ray with --device {device}", fix="--device cuda: each task gets a GPU of its node"
        )
    from cemg.commands.on_ray import check_ray

    check_ray(ray)


def _parts(text: str) -> list[str]:
    """The different parts of a list that is separated by commas, without empty ones."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _read(source: Path, split: str) -> Dataset:
    """Read a data set. Errors name the options of this command, and what only cemg-data can do."""
    from cemg.baselines.__main__ import read_source

    return read_source(source, split=split)


def _print_plan(store: Store, tasks: list[Task], options: Options, *, ray: bool) -> None:
    """Print each task with the time that it will take, and the sum."""
    from rich.table import Table

    from cemg.experiments.store import START, TEST_SECONDS

    table = Table("task", "state", "estimate")
    total, unknown = 0.0, 0
    sizes = {task.data: options.sources[task.data, task.split].interactions for task in tasks}
    for task in tasks:
        if store.finished(task, users=options.users):
            table.add_row(task.name, "finished", "")
            continue
        seconds = store.seconds(task, sizes)
        if seconds is not None and options.budget is not None and task.model != "cemg":
            users = options.users or options.sources[task.data, task.split].about["users"]
            tested = TEST_SECONDS.get(task.model, 0.0) * users
            seconds = min(seconds, START + 3600 * options.budget + tested)
        state = "to be continued" if store.path(task).exists() else "to do"
        if store.finished(task):
            state, seconds = "to be tested again", None
        if damaged := store.damaged(task):
            state = f"to be repeated: {damaged} is damaged"
        table.add_row(task.name, state, "unknown" if seconds is None else duration(seconds))
        total, unknown = total + (seconds or 0.0), unknown + (seconds is None)
    print_table(table)
    more = f", and {unknown} of unknown length" if unknown else ""
    order = "several tasks" if ray else "one task"
    console.print(f"about {duration(total)} in all{more}, {order} at a time", highlight=False)


def duration(seconds: float) -> str:
    """Seconds as text, such as "3 h 20 min"."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def main() -> None:
    """Run ``cemg-experiment`` on the command line's arguments."""
    command.run(app)
