"""A second run that searches a sample of the requests, beside the one that answers, and is only compared."""

from __future__ import annotations

import json
import logging
import queue
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from cemg.serve.engine import Answer, Query
from cemg.serve.served_run import ServedRun
from cemg.serve.store import Store

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
