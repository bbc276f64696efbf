"""One of several services on the same store: it applies what the others write, and loads what they load.

All replicas apply the same log in the same order, so their catalogs and memories agree. Before each search, a
replica reads the position of the log and applies what is new, so that a request that follows an acknowledged
change sees it, whichever replica took the change.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cemg.errors import UserError
from cemg.serve.batching import StoppedError
from cemg.serve.database import BusyError
from cemg.serve.engine import Engine
from cemg.serve.interface import ServiceInterface
from cemg.serve.models import LoadingError
from cemg.serve.rows import ServedModel
from cemg.storage.files import StorageError

POLL = 1.0  # seconds between two looks at the store of a replica without requests
STORE_TIMEOUT = 1.0  # seconds that a search waits for the store
PAUSE = 5.0  # seconds in which searches do not ask a store that failed
RETRY = 10.0  # seconds between two looks at new items of others, and between two attempts to load a run

log = logging.getLogger("cemg.serve")


class Follower:
    """Keeps a replica up to date with the store, until it is closed.

    Args:
        service: The replica.
    """

    def __init__(self, service: ServiceInterface) -> None:
        self._service = service
        self._paused = 0.0  # of time.monotonic
        self._behind = ""
        self._load_after = 0.0
        self._closed = threading.Event()
        self._stuck = ""
        self._position: Future[tuple[int, int]] | None = None
        self._reader = ThreadPoolExecutor(1, "cemg-position")
        service.model.before_search = self.before_search
        self._thread = threading.Thread(target=self._run, name="cemg-follower", daemon=True)
        self._thread.start()

    def close(self, timeout: float) -> None:
        """End the thread."""
        self._closed.set()
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._thread.join(timeout)

    def before_search(self, engine: Engine) -> None:
        """Apply what the store has, in the thread of the model.

        While the store cannot be reached, searches go on with what is known.
        """
        if time.monotonic() < self._paused or not (self._position is None or self._position.done()):
            return
        try:
            self._position = self._reader.submit(self._service.store.position)
            if self._position.result(timeout=STORE_TIMEOUT) != self._reached():
                self.follow(engine)
        except (StorageError, BusyError, TimeoutError) as error:
            self._paused = time.monotonic() + PAUSE
            log.warning("the store cannot be followed for the moment: %s", error or "it does not answer")
        except Exception:  # searches go on
            self._paused = time.monotonic() + PAUSE

    def follow(self, engine: Engine) -> None:
        """Apply what the store has, in the thread of the model.

        Raises:
            StorageError, BusyError: The store fails. The next call continues.
        """
        service = self._service
        try:
            if service.store.position() != self._reached():
                service.loaded.follow(service.store)
        except (StorageError, BusyError):
            raise
        except Exception as error:
            self._stuck = f"the store cannot be followed: {type(error).__name__}: {error}"
            log.exception("the store could not be followed")
            raise
        self._paused, self._stuck = 0.0, ""

    def _reached(self) -> tuple[int | None, int]:
        loaded = self._service.loaded
        return loaded.version, loaded.number

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(POLL):
            service = self._service
            if service.status.draining:
                return
            try:
                self._load_if_replaced()
                service.model.change(self.follow).result()
                if time.monotonic() > looked + RETRY:  # a replica that took an item may have ended
                    looked = time.monotonic()
                    service.wake()
            except StoppedError:
                return
            except UserError as error:
                log.warning("the store cannot be followed for the moment: %s", error.message)
            except Exception:
                log.exception("the store could not be followed")
            service.status.behind = self._stuck or self._behind

    def _load_if_replaced(self) -> None:
        """Load the run that another replica has chosen, or this one again if its semantic IDs are stale."""
        service, loaded, current = self._service, self._service.loaded, self._service.chosen()
        returned = not loaded.keeps_codes and service.store.catalog == loaded.catalog
        if current.version == loaded.engine.model_version and not returned:
            self._behind = ""
            return
        last = service.loader.last
        if last is not None and last.state == "failed" and last.run == Path(current.run):
            self._behind = f"{last.run}, which is served now, cannot be loaded: {last.reason}"
        if time.monotonic() > self._load_after:
            self._load_after = time.monotonic() + RETRY
            try:
                service.loader.start(Path(current.run), partial(self._join, current))
            except LoadingError:  # it is loaded already, or another one is, and this one comes next
                self._load_after = 0.0

    def _join(self, current: ServedModel) -> None:
        """Load a run, and let it answer all searches from some moment on."""
        run = Path(current.run)
        loaded = self._service.load(run, current.events)
        if loaded.engine.model_version != current.version:
            raise UserError(
                f"{run} is not the run that is served now",
                cause=f"it is model {loaded.engine.model_version}, and {current.version} is served",
                fix="copy the run to this machine, or load it anew: POST /v1/models",
            )
        self._service.swap(loaded)
