"""A second run that searches a sample of the requests, beside the one that answers, and is only compared."""

from __future__ import annotations

import json
import logging
import queue
import random
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cemg.errors import UserError
from cemg.serve.engine import Answer, Query
from cemg.serve.interface import ServiceInterface
from cemg.serve.models import Attempt
from cemg.serve.rows import ShadowModel
from cemg.serve.served_run import ServedRun
from cemg.serve.store import Store

JOIN = 1.0  # seconds to wait for the search of a shadow that ends
WAITING = 64  # requests that may wait for the comparison; beyond it, they are left out

log = logging.getLogger("cemg.serve.shadow")


@dataclass(slots=True)
class Compared:
    """What was compared so far.

    Attributes:
        requests: Number of requests that both runs searched.
        overlaps: Sum of their overlaps: the share of the answered items that the shadow lists, too.
        left_out: Sampled requests that were not searched, because too many waited.
        failed: Requests whose search by the shadow failed.
    """

    requests: int = 0
    overlaps: float = 0.0
    left_out: int = 0
    failed: int = 0


class Shadow:
    """Searches requests in a thread of its own, and writes a line of the log for each.

    Args:
        loaded: The run, which follows the store from here on.
        store: The store of the service.
        sample: Share of the requests that are searched, above 0 to 1.
    """

    def __init__(self, loaded: ServedRun, store: Store, *, sample: float) -> None:
        self.loaded, self.sample, self.compared = loaded, sample, Compared()
        self._store, self._stopped = store, False
        self._draw = random.Random()
        self._waiting: queue.Queue[tuple[Query, Answer] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="cemg-shadow", daemon=True)
        self._thread.start()

    def offer(self, query: Query, answer: Answer) -> None:
        """Compare an answer, or leave it out. Returns at once."""
        if self._stopped or self._draw.random() >= self.sample:
            return
        try:
            self._waiting.put_nowait((query, answer))
        except queue.Full:
            self.compared.left_out += 1

    def stop(self, *, timeout: float | None = None) -> None:
        """End the thread; what waits is left out."""
        self._stopped = True
        with suppress(queue.Full):  # then the thread sees `_stopped` after its search
            self._waiting.put_nowait(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (taken := self._waiting.get()) is not None and not self._stopped:
            try:
                self._compare(*taken)
            except Exception as error:
                if self._stopped:
                    return
                self.compared.failed += 1
                about = {
                    "shadow": self.loaded.engine.model_version,
                    "error": f"{type(error).__name__}: {error}",
                }
                log.warning(json.dumps(about))

    def _compare(self, query: Query, answer: Answer) -> None:
        self.loaded.follow(self._store)
        begun = time.perf_counter()
        same = replace(query, user="", history=tuple(answer.history), explain=False)
        (other,) = self.loaded.engine.recommend([same])
        seconds = time.perf_counter() - begun
        common = len({*answer.items} & {*other.items})
        overlap = common / len(answer.items) if answer.items else float(not other.items)
        self.compared.requests += 1
        self.compared.overlaps += overlap
        about = {
            "shadow": other.model_version, "model": answer.model_version,
            "catalog_version": answer.catalog_version, "limit": query.limit, "overlap": round(overlap, 4),
            "items": answer.items, "shadow_items": other.items, "shadow_ms": round(1000 * seconds, 2),
        }  # fmt: skip
        log.info(json.dumps(about))


class Shadows:
    """The shadow of a service: at most one, which the store names, so that it continues after a restart.

    Args:
        service: The service, whose store, loader and status are used.
        kept: Whether the store names the shadow. Replicas share a store, and each has a shadow of its own.
    """

    def __init__(self, service: ServiceInterface, *, kept: bool) -> None:
        self._service, self._kept = service, kept
        self.current: Shadow | None = None
        self._attempt: Attempt | None = None  # the last one to load a shadow
        self._ended = 0  # number of times that a shadow was ended, also while it was loaded

    def load(self, run: str, *, sample: float, events: int | None = None) -> Attempt:
        """Load a run in the background that is only compared with the one that answers: see `Shadow`.

        It ends with `stop`, with another shadow, and when another model answers.

        Args:
            run: A folder below that of the loader.
            sample: Share of the requests that are compared.
            events: As in `Service.load_model`.

        Raises:
            UserError: The folder is not allowed.
            LoadingError: Another run is being loaded.
        """
        loader = self._service.loader
        path = loader.path_of(run)
        self._attempt = loader.start(path, partial(self._begin, path, sample, events, ended=self._ended))
        return self._attempt

    def resume(self) -> None:
        """Load the shadow that the store names, in the background. `Loader.last` says if that fails."""
        stored = self._service.store.shadow if self._kept else None
        if stored is not None:
            path, model = Path(stored.model.run), stored.model
            begin = partial(
                self._begin, path, stored.sample, model.events, version=model.version, ended=self._ended
            )
            self._attempt = self._service.loader.start(path, begin)

    def stop(self) -> bool:
        """End the comparison, also for later starts. Returns whether there was one."""
        self._ended += 1
        stored = self._kept and self._service.store.shadow is not None
        if stored:
            self._service.store.set_shadow(None)
        is_loading = self._attempt is not None and self._attempt.state == "loading"
        return self.close() or stored or is_loading

    def close(self) -> bool:
        """End the comparison until the next start. Returns whether there was one."""
        shadow, self.current = self.current, None
        if shadow is not None:
            shadow.stop(timeout=JOIN)
        return shadow is not None

    def offer(self, query: Query, future: Future[Answer]) -> None:
        """Compare a request with the shadow, if there is one, once it is answered."""
        if self.current is not None:
            future.add_done_callback(partial(_offer, self.current, query))

    def _begin(
        self, run: Path, sample: float, events: int | None, *, ended: int, version: str | None = None
    ) -> None:
        service = self._service
        loaded = service.load(run, events)
        found = loaded.engine.model_version
        if version is not None and found != version:
            raise UserError(
                f"{run}, the shadow, was changed since it was loaded",
                cause=f"it is model {found} now, not {version}",
                fix="load it again, or end it: DELETE /v1/models/shadow",
            )
        loaded.follow(service.store)
        loaded.warm_up()
        if ended != self._ended:
            raise UserError(f"the comparison with {run} was ended while it was loaded")
        self.close()
        if not service.status.draining:
            if self._kept:
                service.store.set_shadow(ShadowModel(loaded.served_model, sample))
            self.current = Shadow(loaded, service.store, sample=sample)


def _offer(shadow: Shadow, query: Query, future: Future[Answer]) -> None:
    """Called by the thread of the model when a request is answered."""
    if not future.cancelled() and future.exception() is None:
        shadow.offer(query, future.result())
