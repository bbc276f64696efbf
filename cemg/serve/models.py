"""Loading another run in the background, while the present one is served."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cemg.errors import UserError
from cemg.serve.batching import StoppedError

Progress = Literal["loading", "ready", "failed"]

log = logging.getLogger("cemg.serve")


class LoadingError(UserError):
    """Another run is being loaded, or there is none to go back to."""


@dataclass(slots=True)
class Attempt:
    """The last attempt to load a run.

    Attributes:
        run: The folder.
        state: Whether it is being loaded, is served, or could not be loaded.
        reason: Why it could not be loaded.
        started: When it began, in seconds since 1970.
        seconds: How long it took; None while it runs.
    """

    run: Path
    state: Progress = "loading"
    reason: str | None = None
    started: float = field(default_factory=time.time)
    seconds: float | None = None


class Loader:
    """Loads one run at a time, in a thread.

    Args:
        folder: Runs below this folder may be loaded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.last: Attempt | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def path_of(self, run: str) -> Path:
        """The folder of a run, given by its path or by its path below ``folder``.

        Raises:
            UserError: It is not a folder below ``folder``, also after symbolic links are followed.
        """
        try:
            path = (self.folder / run).resolve()
            known = path != self.folder and path.is_relative_to(self.folder) and path.is_dir()
        except (OSError, ValueError, RuntimeError):  # a name that is too long, a NUL, a loop of links
            known = False
        if not known:
            raise UserError(
                f"run: {run[:200]!r} is not a run below {self.folder}",
                fix="name a folder there, or start the service with another --models FOLDER",
            )
        return path

    def start(self, run: Path, load: Callable[[], None]) -> Attempt:
        """Call ``load`` in the background. `last` says how it ended.

        Raises:
            LoadingError: Another run is being loaded.
        """
        with self._lock:
            if self.last is not None and self.last.state == "loading":
                raise LoadingError(f"{self.last.run} is being loaded", fix="wait: GET /v1/models")
            self.last = attempt = Attempt(run)
            self._thread = threading.Thread(
                target=self._run, args=(attempt, load), name="cemg-models", daemon=True
            )
            self._thread.start()
        return attempt

    def _run(self, attempt: Attempt, load: Callable[[], None]) -> None:
        try:
            load()
        except Exception as error:
            attempt.reason = _described(error)
            if not isinstance(error, UserError):
                log.exception("%s could not be loaded", attempt.run)
            elif not isinstance(error, StoppedError):
                log.warning("%s could not be loaded: %s", attempt.run, attempt.reason)
        attempt.seconds = time.time() - attempt.started
        attempt.state = "ready" if attempt.reason is None else "failed"

    def join(self, timeout: float) -> None:
        """Wait until nothing is being loaded, up to ``timeout`` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)


def _described(error: Exception) -> str:
    if not isinstance(error, UserError):
        return f"{type(error).__name__}: {error}"
    return "; ".join(part for part in (error.message, error.cause, error.fix) if part)
