"""The thread that owns the model: requests that wait together share a search, and changes come in between.

A request that finds the thread idle is searched at once. A change (an event, a removal) is applied before the
next search, so a request that is sent after a change was acknowledged sees the change.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cemg.errors import UserError
from cemg.serve.engine import Answer, Engine, Query

Result = TypeVar("Result")


class FullError(UserError):
    """The queue of requests is full."""


class LateError(UserError):
    """A request waited until its deadline."""


class StoppedError(UserError):
    """The service shuts down."""


@dataclass(slots=True)
class _Waiting:
    query: Query
    future: Future[Answer]
    deadline: float  # of time.monotonic


@dataclass(slots=True)
class Figures:
    """What the thread has done, for metrics."""

    searches: int = 0
    queries: int = 0
    late: int = 0
    cancelled: int = 0
    batch_sizes: deque[int] = field(default_factory=lambda: deque(maxlen=1000))


class ModelThread:
    """Runs searches and changes of an engine, one after the other.

    Args:
        engine: The engine; nothing else may call it while the thread runs.
        max_batch: Largest number of queries in one search.
        max_queue: Number of waiting queries beyond which another one is refused.

    Attributes:
        before_search: Called with the engine before each search.
    """

    def __init__(self, engine: Engine, *, max_batch: int = 64, max_queue: int = 1024) -> None:
        self.engine, self.max_batch, self.max_queue = engine, max_batch, max_queue
        self.figures = Figures()
        self.before_search: Callable[[Engine], None] | None = None
        self._queries: deque[_Waiting] = deque()
        self._changes: deque[tuple[Callable[[Engine], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="cemg-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of queries that wait."""
        return len(self._queries)

    @property
    def ended(self) -> bool:
        """Whether the thread has ended, so that another one may call the engine."""
        return not self._thread.is_alive()

    def search(self, query: Query, *, timeout: float) -> Future[Answer]:
        """Queue a query. The future fails with `LateError` if no search has begun after ``timeout`` seconds.

        Raises:
            FullError: Too many queries wait.
            StoppedError: The thread was stopped.
        """
        future: Future[Answer] = Future()
        with self._wake:
            self._check()
            if len(self._queries) >= self.max_queue:
                raise FullError(f"{len(self._queries)} requests wait already", fix="try again later")
            self._queries.append(_Waiting(query, future, time.monotonic() + timeout))
            self._wake.notify()
        return future

    def change(self, change: Callable[[Engine], Result]) -> Future[Result]:
        """Queue a change of the engine, which is applied before the next search.

        Raises:
            StoppedError: The thread was stopped.
        """
        future: Future[Result] = Future()
        with self._wake:
            self._check()
            self._changes.append((change, future))
            self._wake.notify()
        return future

    def stop(self, *, timeout: float | None = None) -> None:
        """Finish what is queued, and end the thread. Nothing is accepted any more.

        What is still queued after ``timeout`` seconds fails with `StoppedError`.
        """
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join(timeout)
        with self._wake:
            left = [waiting.future for waiting in self._queries] + [future for _, future in self._changes]
            self._queries.clear()
            self._changes.clear()
        for future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(StoppedError("the service shuts down", fix="try again"))

    def _check(self) -> None:
        if self._stopped:
            raise StoppedError("the service shuts down", fix="try again")

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._changes or self._queries or self._stopped):
                    self._wake.wait()
                if self._stopped and not self._changes and not self._queries:
                    return
                changes, batch = [*self._changes], []
                self._changes.clear()
                if not changes:
                    batch = self._take()
            for change, future in changes:
                self._apply(change, future)
            if batch:
                if self.before_search is not None:
                    self.before_search(self.engine)
                self._search(batch)

    def _take(self) -> list[_Waiting]:
        """The first query and those after it that can share its search, without late and cancelled ones."""
        now, batch, others = time.monotonic(), list[_Waiting](), deque[_Waiting]()
        while self._queries and len(batch) < self.max_batch:
            waiting = self._queries.popleft()
            if batch and waiting.query.group != batch[0].query.group:
                others.append(waiting)
            elif not waiting.future.set_running_or_notify_cancel():
                self.figures.cancelled += 1
            elif waiting.deadline < now:
                self.figures.late += 1
                waiting.future.set_exception(
                    LateError("the request waited until its deadline", fix="try again later")
                )
            else:
                batch.append(waiting)
        self._queries.extendleft(reversed(others))
        return batch

    def _search(self, batch: list[_Waiting]) -> None:
        self.figures.searches += 1
        self.figures.queries += len(batch)
        self.figures.batch_sizes.append(len(batch))
        try:
            answers = self.engine.recommend([waiting.query for waiting in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for waiting in batch:  # one of them is at fault; the others get their answers
                self._search([waiting])
            return
        for waiting, answer in zip(batch, answers, strict=True):
            waiting.future.set_result(answer)

    def _apply(self, change: Callable[[Engine], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(change(self.engine))
        except Exception as error:
            future.set_exception(error)
