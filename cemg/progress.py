"""Progress bars on stderr, and the logs that training writes."""

from __future__ import annotations

import sys
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
console = Console(file=sys.stderr, stderr=True)


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
