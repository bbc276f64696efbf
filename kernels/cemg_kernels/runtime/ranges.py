"""Named ranges round each operation and stage, for profilers: NVTX on a GPU, ``record_function`` anywhere.

Off by default. ``CEMG_NVTX=1`` in the environment or ``use_ranges(True)`` turns them on.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

ENVIRONMENT = "CEMG_NVTX"
_enabled = os.environ.get(ENVIRONMENT, "0") == "1"
Function = TypeVar("Function", bound=Callable[..., object])


def use_ranges(enabled: bool) -> None:
    """Turn the ranges on or off for this process; outranks the environment."""
    global _enabled
    _enabled = enabled


def ranges_enabled() -> bool:
    """What ``use_ranges`` said last, else what ``CEMG_NVTX`` was at import."""
    return _enabled


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """A range of this name while the block runs; nothing where ranges are off."""
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


def ranged(function: Function) -> Function:
    """The function, each call of it a range of its name."""

    @functools.wraps(function)
    def run(*arguments: object, **options: object) -> object:
        if not _enabled or torch.compiler.is_compiling():
            return function(*arguments, **options)
        with named_range(function.__qualname__):
            return function(*arguments, **options)

    return run  # type: ignore[return-value]
