"""The semantic IDs of new items, computed in the background and added to the catalog of a service."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

from cemg.errors import UserError
from cemg.serve.batching import StoppedError
from cemg.serve.database import BusyError
from cemg.serve.engine import Engine
from cemg.serve.interface import LaggingError, ServiceInterface
from cemg.serve.rows import State, StoredItem
from cemg.serve.served_run import images_of, text_of
from cemg.storage.files import StorageError

PLACED_AT_ONCE = 256  # new items whose semantic IDs are computed together
TRIES = 20  # while other replicas write
RETRY = 10  # seconds after which new items are tried again when the store has failed

log = logging.getLogger("cemg.serve")


class NewItems:
    """A thread that gives the pending items of a service their semantic IDs, until the service drains.

    Args:
        service: The service, whose store, model and status are used.
    """

    def __init__(self, service: ServiceInterface) -> None:
        self._service = service
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
            self._new.wait(again)
            self._new.clear()
            if self._service.status.draining:
                return
            try:
                while self._place_some() and not self._service.status.draining:
                    pass
                again = None
            except StoppedError:
                return
            except Exception:
                log.exception("new items could not be stored; the next try is in %d s", RETRY)
                again = RETRY

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
        titles = {name: item.title for name, item in items.items()}
        extended = loaded.engine.extended(codes, {name: title for name, title in titles.items() if title})

        def add(engine: Engine) -> None:  # a filter of a search needs the table to have the trie's items
            loaded.table.extend([*codes], attributes)
            engine.titles |= titles
            engine.add(extended, texts, version)

        check = self._service.attribute_check(attributes)
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
                    version = self._service.store.place_items(codes, check=check)
                    self._service.apply(add).result()  # within the lock, as `check` must hold for `extend`
                    return

    def _any_placed(self, pending: Sequence[StoredItem]) -> bool:
        return any(self._service.loaded.engine.has(one.item.item_id) for one in pending)

    def _failed_version(self, item: str) -> int | None:
        return self._service.status.failed_items.get(item, (None, ""))[0]

    def _version_of(self, item: str) -> int | None:
        stored = self._service.store.get_item(item)
        return None if stored is None else stored.version
