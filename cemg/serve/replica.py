"""One of several services on the same store: it applies what the others write, and loads what they load.

All replicas apply the same log in the same order, so their catalogs and memories agree. Before each search, a
replica reads the position of the log and applies what is new, so that a request that follows an acknowledged
change sees it, whichever replica took the change.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from pathlib import Path

from cemg.errors import UserError
from cemg.serve.batching import StoppedError
from cemg.serve.database import BusyError
from cemg.serve.engine import Engine
from cemg.serve.host import Host
from cemg.serve.models import LoadingError
from cemg.serve.served_run import ServedRun
from cemg.storage.files import StorageError

EVERY = 1.0  # seconds between two looks at the store of a replica without requests
PAUSE = 5.0  # seconds in which searches do not ask a store that failed
RETRY = 10.0  # seconds between two looks at new items of others, and between two attempts to load a run

log = logging.getLogger("cemg.serve")


class Follower:
    """Keeps a replica level with the store, until it is closed.

    Args:
        service: The replica.
    """

    def __init__(self, service: Host) -> None:
        self._service = service
        self._paused = 0.0  # of time.monotonic
        self._behind = ""
        self._load_after = 0.0
        self._closed = threading.Event()
        service.model.before_search = self.catch_up
        self._thread = threading.Thread(target=self._run, name="cemg-follower", daemon=True)
        self._thread.start()

    def close(self, timeout: float) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(timeout)

    def catch_up(self, engine: Engine) -> None:
        """Apply what the store has. Only the thread of the model may call it.

        While the store cannot be reached, searches go on with what is known, and changes are refused.
        """
        if time.monotonic() < self._paused:
            return
        try:
            self.follow(self._service.loaded)
        except (StorageError, BusyError) as error:
            self._paused = time.monotonic() + PAUSE
            log.warning("the store cannot be followed for the moment: %s", error.message)
        except Exception:  # searches go on
            self._paused = time.monotonic() + PAUSE
            log.exception("the store could not be followed")

    def follow(self, loaded: ServedRun) -> None:
        """Apply what the store has to a run."""
        store = self._service.store
        if store.position() != (loaded.version, loaded.number):
            loaded.follow(store)

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(EVERY):
            service = self._service
            if service.status.draining:
                return
            try:
                self._load_if_replaced()
                service.model.change(self.catch_up).result()
                if time.monotonic() > looked + RETRY:  # a replica that took an item may have ended
                    looked = time.monotonic()
                    service.wake()
            except StoppedError:
                return
            except UserError as error:
                log.warning("the store cannot be followed for the moment: %s", error.message)

    def _load_if_replaced(self) -> None:
        """Load the run that another replica has chosen."""
        service, loaded = self._service, self._service.loaded
        models = service.store.models
        moved = models is not None and models.current.version != loaded.engine.model_version
        returned = not loaded.keeps_codes and service.store.catalog == loaded.catalog
        if models is None or not (moved or returned):
            service.status.behind = ""
            return
        last = service.loader.last
        if last is not None and last.state == "failed" and last.run == Path(models.current.run):
            service.status.behind = f"{last.run}, which is served now, cannot be loaded: {last.reason}"
        if time.monotonic() > self._load_after:
            self._load_after = time.monotonic() + RETRY
            try:
                service.loader.start(Path(models.current.run), partial(self._join, Path(models.current.run)))
            except LoadingError:  # it is loaded already, or another one is, and this one comes next
                self._load_after = 0.0

    def _join(self, run: Path) -> None:
        """Load a run, and let it answer all searches from some moment on."""
        service, models = self._service, self._service.store.models
        assert models is not None
        loaded = service.load(run, models.current.events)
        if loaded.engine.model_version != models.current.version:
            raise UserError(
                f"{run} is not the run that is served now",
                cause=f"it is model {loaded.engine.model_version}, and {models.current.version} is served",
                fix="copy the run to this machine, or load it anew: POST /v1/models",
            )
        service.swap(loaded)
