"""Progress bars on stderr, and the logs that training writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: ``[bold]`` and ``:smile:`` are text, not markup."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def printable(text: str) -> str:
    """``text`` on one line, with every character that could move the cursor or reorder the line written as
    an escape: control characters, line separators, bidirectional controls, lone surrogates."""
    return UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], text)


console = plain_console(stderr=True)


class Log(Protocol):
    """Takes the figures of one step: ``log(step, {"rqvae/recon": 0.4})``."""

    def __call__(self, step: int, values: dict[str, float]) -> None: ...


def track(items: Iterable[T], label: str, *, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on stderr; where stderr is no terminal, silently."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    if not console.is_terminal:
        yield from items
        return
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, total=total, description=label)
