"""Progress bars and messages on stderr, and the logs of training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

T = TypeVar("T")
WIDEST = 1000  # columns of a table
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain_console(*, stderr: bool = False) -> Console:
    """Create a console that prints text unchanged: ``[bold]`` and ``:smile:`` are not markup."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def printable(text: str) -> str:
    """Escape every character that could move the cursor or reorder the line.

    These are control characters, line separators, bidirectional controls and lone surrogates.
    """
    return UNPRINTABLE.sub(lambda match: ascii(match.group())[1:-1], text)


console = plain_console(stderr=True)


def print_table(table: Table, to: Console | None = None) -> None:
    """Print a table in its full width, however narrow the terminal is: no figure is cut."""
    target = to or console
    needed = Measurement.get(target, target.options.update(max_width=WIDEST), table).maximum
    if needed > target.width:  # print() would cut the table to the width of its console
        target = Console(file=target.file, width=needed, markup=False, highlight=False, emoji=False)
    target.print(table)


class Log(Protocol):
    """Records the metrics of one step: ``log(step, {"rqvae/recon": 0.4})``."""

    def __call__(self, step: int, values: dict[str, float]) -> None: ...


def track(items: Iterable[T], label: str, *, total: int | None = None, done: int = 0) -> Iterator[T]:
    """Iterate with a progress bar on stderr, or without one if stderr is not a terminal.

    Args:
        items: What to iterate over.
        label: Label of the bar.
        total: Number of items; None takes the length of ``items``, if it has one, and ``done``.
        done: Number of items that were done before.
    """
    if total is None and isinstance(items, Sized):
        total = len(items) + done
    with bar(label, total=total, done=done) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def bar(
    label: str, *, total: int | None, done: int = 0, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr, if it is a terminal; yields the function ``advance(steps)``.

    The bar is full at the end of the block, even before ``total`` steps, as when training stops early.

    Args:
        label: Label of the bar.
        total: Number of steps; None if unknown.
        done: Number of steps already done.
        shown: Whether to show a bar at all.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
    task = progress.add_task(label, total=total, completed=done)
    with progress:
        yield lambda steps: progress.advance(task, steps)
        progress.update(task, total=progress.tasks[0].completed)


class StageLog:
    """Writes the metrics of a stage to ``log.jsonl`` and to TensorBoard.

    Args:
        folder: Folder of the stage.
        resumes: Whether existing logs are continued, not replaced.
    """

    def __init__(self, folder: Path, *, resumes: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a slow import, needed only for training

        path = folder / "log.jsonl"
        if not resumes:  # remove the logs of an interrupted attempt
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        if not resumes or not path.is_file():  # a pipe would block until it has a reader
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.lines = path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"))

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self.lines.write(json.dumps({"step": step} | values) + "\n")
        self.lines.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def __enter__(self) -> StageLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lines.close()
        self.board.close()
