"""Seconds per stage of a search, for benchmarks and profiling. Costs nothing outside ``record_timings``.

with record_timings() as timings:
    decoder.decode(input_ids, attention_mask, beams=50)
print(timings.seconds, timings.total)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from cemg_kernels.runtime.ranges import named_range

Stage = Literal["prefill", "decode_steps", "selection"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Events = list[tuple[str, float]]  # the name of each part, and its end in seconds since the begin of the first


@dataclass(slots=True)
class Timings:
    """What ``record_timings`` collects.

    Attributes:
        seconds: "prefill" (the encoder, or the prompt of a decoder-only model), "decode_steps" (the decoder's
            forward passes) and "selection" (softmax, trie and top-k).
        total: Seconds of the whole block, which includes preparation and the copy of the results.
        native_events: One list per call of the C++ decoder, while named ranges are on: each part of the call,
            and the seconds after the begin of the call at which it ended.
    """

    seconds: dict[Stage, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    total: float = 0.0
    native_events: list[Events] = field(default_factory=list)
    _open: list[Stage] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def measure(self, stage: Stage, range_name: str = "") -> Iterator[None]:
        """Adds the time of the block to ``stage``, less the time of stages measured inside it."""
        self._close_interval()
        self._open.append(stage)
        try:
            with _range(range_name):
                yield
        finally:
            self._close_interval()
            self._open.pop()

    def _close_interval(self) -> None:
        now = _now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


_current: ContextVar[Timings | None] = ContextVar("cemg_timings", default=None)


@contextmanager
def record_timings() -> Iterator[Timings]:
    """Records the searches of this block, in this thread. An outer block includes the inner ones.

    ``score_all`` is not a search and is not recorded.

    On a GPU, searches run without their CUDA graphs and wait for the device between stages, so the block
    takes longer than the same searches outside it.

    Yields:
        The timings. ``total`` is set when the block ends.

    Example:
        >>> with record_timings() as timings:
        ...     decoder.decode(input_ids, attention_mask, beams=50)
        >>> timings.seconds["selection"] / timings.total
    """
    timings, outer = Timings(), _current.get()
    token = _current.set(timings)
    begin = _now()
    try:
        yield timings
    finally:
        timings.total = _now() - begin
        _current.reset(token)
        if outer is not None:
            add_seconds(timings.seconds)
            outer.native_events.extend(timings.native_events)


def recording() -> bool:
    """Whether this thread is inside ``record_timings``."""
    return _current.get() is not None


def timed_stage(stage: Stage, range_name: str = "") -> AbstractContextManager[None]:
    """A stage of a search: a named range for profilers where it has a name, and time in ``Timings``."""
    timings = _current.get()
    return _range(range_name) if timings is None else timings.measure(stage, range_name)


def add_seconds(seconds: Mapping[Stage, float]) -> None:
    """Adds what a search in one C++ call measured itself."""
    timings = _current.get()
    if timings is not None:
        for stage, more in seconds.items():
            timings.seconds[stage] += more


def add_native_events(events: Events) -> None:
    """Adds the parts of one call of the C++ decoder."""
    timings = _current.get()
    if timings is not None:
        timings.native_events.append(events)


def _range(name: str) -> AbstractContextManager[None]:
    return named_range(name) if name else nullcontext()


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
