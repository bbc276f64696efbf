"""Polars in a forked process: if the parent has used it, a call waits for ever for threads of the parent."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from cemg.errors import UserError

THREADS = Path("/proc/self/task")
_ran = False  # whether Polars had threads when this process last began to fork
_lost = False  # whether they stayed in a parent


def check_polars(purpose: str) -> None:
    """UserError where Polars would not answer: in a process that was forked after Polars had started its
    threads."""
    if _lost:
        raise UserError(
            f"{purpose} needs Polars, which this forked process cannot use",
            cause="its threads stayed in the parent, which used it before the fork",
            fix="do this in the parent before it forks (Recommender.recommend keeps the titles), "
            "or start the process anew: multiprocessing.get_context('spawn')",
        )


def _before() -> None:
    global _ran
    _ran = _polars_runs()


def _in_child() -> None:
    global _lost
    _lost = _lost or _ran


def _polars_runs() -> bool:
    """Whether Polars has started its threads; where nobody can tell, whether it has been imported."""
    if "polars" not in sys.modules:
        return False
    try:
        names = [(thread / "comm").read_text() for thread in THREADS.iterdir()]
    except OSError:
        return not THREADS.is_dir()
    return any(re.match(r"polars-\d", name) for name in names)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_in_child)
