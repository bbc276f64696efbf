"""Named profiler ranges around operations and stages: ``record_function``, and NVTX on a GPU.

They are off by default. ``CEMG_NVTX=1`` in the environment or ``use_ranges(True)`` turns them on.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

ENVIRONMENT = "CEMG_NVTX"
_enabled = os.environ.get(ENVIRONMENT, "0") == "1"
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def use_ranges(enabled: bool) -> None:
    """Turns the ranges on or off for this process, whatever the environment variable says."""
    global _enabled
    _enabled = enabled


def ranges_enabled() -> bool:
    """Returns whether ranges are on: by the last ``use_ranges``, otherwise by ``CEMG_NVTX`` at import."""
    return _enabled


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """Context manager: opens a range of this name while the block runs, if ranges are on."""
    if not _enabled or torch.compiler.is_compiling():
        yield
        return
    on_gpu = torch.cuda.is_available()
    with torch.profiler.record_function(name):
        if on_gpu:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.nvtx.range_pop()


def ranged(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: opens a range with the function's name around each call."""

    @functools.wraps(function)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        if not _enabled or torch.compiler.is_compiling():
            return function(*arguments, **options)
        with named_range(function.__qualname__):
            return function(*arguments, **options)

    return run
