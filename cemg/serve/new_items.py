"""The background work on added items: their semantic IDs, and the file of their text similarities."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice

from cemg.errors import UserError
from cemg.memory.similarity import Similarity
from cemg.serve.batching import StoppedError
from cemg.serve.database import BusyError
from cemg.serve.engine import Engine
from cemg.serve.interface import LaggingError, ServiceInterface
from cemg.serve.rows import State, StoredItem
from cemg.serve.served_run import ServedRun, images_of, text_of
from cemg.storage.files import StorageError

PLACED_AT_ONCE = 256  # new items whose semantic IDs are computed together
TRIES = 20  # while other replicas write
SAVE_PAUSE = 10.0  # seconds between two writes of text similarities
SAVE_SHARE = 20  # and as many times the seconds of the last write
SAVE_RETRY = 600.0  # seconds after which a write is tried again when the disk has failed
RETRY = 10  # seconds after which new items are tried again when the store has failed

log = logging.getLogger("cemg.serve")


class NewItems:
    """A thread that gives the pending items of a service their semantic IDs, until the service drains.

    Args:
        service: The service, whose store, model and status are used.
    """

    def __init__(self, service: ServiceInterface) -> None:
        self._service = service
        self._save_after = 0.0  # of time.monotonic
        self._new = threading.Event()
        self._new.set()
        self._thread = threading.Thread(target=self._run, name="cemg-items", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look for pending items, or for the end of the service."""
        self._new.set()

    def join(self, timeout: float) -> None:
        """Wait for the thread to end, at most ``timeout`` seconds."""
        self._thread.join(timeout)

    def _run(self) -> None:
        """Compute the semantic IDs of pending items, in the background, until the service closes."""
        again = None
        while True:
            self._new.wait(self._pause(again))
            self._new.clear()
            if self._service.status.draining:
                return
            try:
                if time.monotonic() >= self._save_after:
                    self._save_similarity()
                while self._place_some() and not self._service.status.draining:
                    pass
                again = None
            except StoppedError:
                return
            except Exception:
                log.exception("new items could not be stored; the next try is in %d s", RETRY)
                again = RETRY

    def _pause(self, again: float | None) -> float | None:
        """Seconds until there is something to do by itself; None: never."""
        if not self._service.loaded.unsaved:
            return again
        save = max(0.0, self._save_after - time.monotonic())
        return save if again is None else min(save, again)

    def _save_similarity(self) -> None:
        """Write the text similarities of the added items for the next start, if some are not written."""
        loaded, begun = self._service.loaded, time.monotonic()
        frozen = self._service.model.change(lambda _: loaded.frozen_similarity()).result()
        if frozen is None:
            return
        replace = _saved(loaded, frozen)
        if replace is None:
            self._save_after = time.monotonic() + SAVE_RETRY
            return
        self._service.model.change(lambda _: replace()).result()
        self._save_after = time.monotonic() + max(SAVE_PAUSE, SAVE_SHARE * (time.monotonic() - begun))

    def save_at_end(self) -> None:
        """Write the text similarities that are not written, after the model's thread has ended."""
        frozen = self._service.loaded.frozen_similarity()
        if frozen is not None:
            _saved(self._service.loaded, frozen)

    def _place_some(self) -> bool:
        """Place up to PLACED_AT_ONCE pending items. Returns whether there may be more: something changed."""
        state: State = "pending"
        before = self._progress()
        waiting = self._service.store.items(states=(state,))
        new = (one for one in waiting if one.version != self._failed_version(one.item.item_id))
        pending = [*islice(new, PLACED_AT_ONCE)]
        if pending:
            self._place(pending)
        return bool(pending) and self._progress() != before

    def _progress(self) -> tuple[int, dict[str, tuple[int, str]]]:
        return self._service.store.version, dict(self._service.status.failed_items)

    def _place(self, pending: Sequence[StoredItem]) -> None:
        """Compute the semantic IDs of items and add them; those that fail are noted in the status."""
        loaded = self._service.loaded
        try:
            self._add(pending)
        except (StorageError, BusyError, StoppedError):  # not the fault of an item
            raise
        except Exception as error:
            if loaded is not self._service.loaded or self._any_placed(pending):  # another run, or replica
                return
            if len(pending) > 1:
                for one in pending:
                    self._place([one])
                return
            item_id = pending[0].item.item_id
            if not isinstance(error, UserError):
                log.exception("the semantic ID of item %s could not be computed", item_id)
            problem = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self._service.status.failed_items[item_id] = pending[0].version, problem

    def _add(self, pending: Sequence[StoredItem]) -> None:
        """Add items to the catalog, unless one of them was changed or removed in the meantime."""
        items = {one.item.item_id: one.item for one in pending}
        attributes = {name: item.attributes for name, item in items.items()}
        texts = [text_of(item) for item in items.values()]
        if any(text is None and not one.has_image for text, one in zip(texts, pending, strict=True)):
            raise UserError("it has neither a title nor a text nor an image")
        self._service.catch_up()
        loaded = self._service.loaded
        if self._any_placed(pending):
            return
        loaded.table.check(attributes)
        size = len(loaded.engine.recommender.catalog)
        found = loaded.engine.encode(texts, images_of(pending, self._service.store)).tolist()
        codes = dict(zip(items, found, strict=True))
        extended = loaded.engine.extended(codes)

        def add(_: Engine) -> None:  # a filter of a search needs the table to have the trie's items
            loaded.table.extend([*codes], attributes)
            loaded.add([*items.values()], extended, version)

        check, status = self._service.attribute_check(attributes), self._service.status
        with self._service.order:
            for _ in range(TRIES):
                self._service.catch_up()
                changed = any(self._version_of(one.item.item_id) != one.version for one in pending)
                # new semantic IDs differ from those in the catalog, as it was when they were computed
                if changed or loaded is not self._service.loaded:
                    return
                if len(loaded.engine.recommender.catalog) != size:
                    return
                with suppress(LaggingError):
                    with status.placing_lock:
                        version = self._service.store.place_items(codes, check=check)
                        status.placing = len(codes)
                    try:
                        self._service.apply(add).result()  # in the lock, as `check` must hold for `extend`
                    finally:
                        status.placing = 0
                    return

    def _any_placed(self, pending: Sequence[StoredItem]) -> bool:
        return any(self._service.loaded.engine.has(one.item.item_id) for one in pending)

    def _failed_version(self, item: str) -> int | None:
        return self._service.status.failed_items.get(item, (None, ""))[0]

    def _version_of(self, item: str) -> int | None:
        stored = self._service.store.get_item(item)
        return None if stored is None else stored.version


def _saved(loaded: ServedRun, frozen: tuple[dict[str, bytes], Similarity]) -> Callable[[], None] | None:
    """`ServedRun.save_similarity`; None, and a warning, if the disk fails."""
    try:
        return loaded.save_similarity(*frozen)
    except (StorageError, OSError) as error:
        loaded.unsaved = True
        log.warning("the next start computes similarities anew: %s", error)
        return None
