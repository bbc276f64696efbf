"""Processes of a long task: they end with the one that started them, and their seconds are summed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Self

FOLLOWS = "CEMG_ENDS_WITH_STDIN"  # environment variable of a process that `run_command` started
GRACE = 30.0  # seconds for a process to end after Ctrl-C
POLL = 0.5  # seconds between two looks for a signal that interrupts no system call, as that of Ray
BEAT = 5.0  # seconds between two writes of a stopwatch: what a killed process loses at most


def run_command(command: Sequence[str], log: int) -> int:
    """Run a command with its output in the file descriptor ``log``, and return its exit status.

    The command ends with this process: where this one is interrupted or ended by `signals_raise`, it gets
    Ctrl-C and is waited for; where this one is killed, it notices that its input is closed.
    """
    environment = os.environ | {"NO_COLOR": "1", FOLLOWS: "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, process_group=0
    ) as process:  # a process group of its own: Ctrl-C of a terminal reaches it once, through this process
        try:
            return _wait(process)
        except BaseException:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:  # it ignores Ctrl-C
                process.kill()
            except BaseException:
                process.kill()
                raise
            raise


def _wait(process: subprocess.Popen[bytes]) -> int:
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(POLL)


def follow_parent() -> None:
    """End this process with the one that started it, if that is `run_command`."""
    if os.environ.pop(FOLLOWS, ""):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM)
        )  # workers of Ray block them
        threading.Thread(target=_end_with_input, daemon=True).start()


def _end_with_input() -> None:
    with suppress(OSError):
        os.read(0, 1)  # returns when the other end of the pipe is closed; nothing is ever written to it
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def signals_raise(message: str) -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit in the block, after ``message`` on stderr, so that it can clean up.

    Signals that are ignored, such as SIGHUP under nohup, stay so.
    """

    def end(number: int, frame: FrameType | None) -> None:
        print(f"\nended by {signal.Signals(number).name}: {message}", file=sys.stderr)
        raise SystemExit(128 + number)

    chosen = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) == signal.SIG_DFL]
    for one in chosen:
        signal.signal(one, end)
    try:
        yield
    finally:
        for one in chosen:
            signal.signal(one, signal.SIG_DFL)


class Stopwatch:
    """The seconds of a task, those of its earlier processes included: ``with Stopwatch(file) as watch: …``.

    The file keeps them, so that a task that was interrupted or killed counts what all its processes took.

    Attributes:
        file: The file; None for a task that cannot be continued.
        before: Seconds of earlier processes.
    """

    def __init__(self, file: Path | None) -> None:
        self.file, self.before, self._started = file, 0.0, 0.0
        self._ended, self._ended_at = threading.Event(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds so far, or at the end of the block."""
        return self.before + (self._ended_at or time.monotonic()) - self._started

    def __enter__(self) -> Self:
        if self.file is not None:
            with suppress(OSError, ValueError):
                self.before = max(float(self.file.read_text(encoding="utf-8")), 0.0)
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._ended_at = time.monotonic()
        self._write()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self._write()

    def _write(self) -> None:
        """Not flushed to the disk, and an error is not one of the task: only a time would be lost."""
        if self.file is None:
            return
        part = self.file.with_name(f".{self.file.name}.{os.getpid()}.part")
        with suppress(OSError):
            part.write_text(f"{self.seconds:.2f}", encoding="utf-8")
            part.replace(self.file)
