"""The interface of a service that its background threads use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cemg.errors import UserError
from cemg.serve.batching import ModelThread
from cemg.serve.engine import Engine
from cemg.serve.models import Loader
from cemg.serve.rows import ServedModel
from cemg.serve.served_run import ServedRun
from cemg.serve.store import Store


@dataclass(slots=True)
class Status:
    """What the service is doing, for its health endpoints."""

    ready: bool = False
    draining: bool = False
    behind: str = ""  # why a replica does not serve what the others do
    requests: int = 0  # that are not answered yet
    started: float = field(default_factory=time.time)
    failed_items: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Of items without a semantic ID, by id: the version that failed, and why."""
    placing: int = 0  # items with stored semantic IDs that the searches do not have yet
    placing_lock: threading.Lock = field(default_factory=threading.Lock)


class LaggingError(UserError):
    """A replica does not have all changes of the store yet."""


class ServiceInterface(Protocol):
    """Implemented by `cemg.serve.service.Service`, which describes the attributes and methods."""

    store: Store
    model: ModelThread
    loader: Loader
    status: Status
    order: threading.Lock

    @property
    def loaded(self) -> ServedRun:
        """The run that is served."""

    def apply(self, change: Callable[[Engine], None]) -> Future[None]:
        """Queue what a stored change does to the engine."""

    def chosen(self) -> ServedModel:
        """The run that the store says is served."""

    def attribute_check(self, attributes: Mapping[str, Mapping[str, object]]) -> Callable[[], None]:
        """The check of attributes that a write to the store makes."""

    def load(self, run: Path, events: int | None) -> ServedRun:
        """Open a run for `swap`."""

    def swap(self, loaded: ServedRun, *, choose: bool = False) -> None:
        """Let a loaded run answer all searches from some moment on."""

    def catch_up(self) -> None:
        """Let a replica apply all that the store has."""

    def wake(self) -> None:
        """Look for new items without semantic IDs."""
