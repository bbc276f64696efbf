"""The service behind the endpoints: what is stored, what is searched, and what happens in the background.

A change is written to the store first and then applied to the engine, so what was acknowledged survives, and
the next answer reflects it. New items wait in the store until their semantic IDs are computed.
"""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from cemg.data.readers.text import clean, item_text
from cemg.recommender import Recommender
from cemg.serve.attributes import AttributeTable
from cemg.serve.batching import ModelThread
from cemg.serve.engine import Answer, Engine, Query
from cemg.serve.expressions import Filter, NamedFilter
from cemg.serve.filters import Filters
from cemg.serve.named_filters import NamedFilters
from cemg.serve.rows import Deletion, Event, Item, State, StoredEvent, StoredItem, UnknownItemError
from cemg.serve.store import Store
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter

PLACED_AT_ONCE = 256  # new items whose semantic IDs are computed together
ACTIVE: tuple[State, ...] = ("active",)
PENDING: tuple[State, ...] = ("pending",)
REMOVED: tuple[State, ...] = ("removed",)
Entry = TypeVar("Entry", StoredEvent, Deletion)
STORE_FILE = "serve/store.sqlite"  # in the folder of the run

log = logging.getLogger("cemg.serve")


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for: a known user or a history.

    Attributes:
        user: A user; empty for a history.
        history: Item ids, oldest first.
        limit: Number of items.
        beams: Beams of the search; None: those of the run, or ``limit`` if that is more.
        exclude_history: Whether items of the history are left out; None: unless users return to items.
        exact: Whether the list is proven to be the true top.
        filter: Admits only some of the items.
    """

    user: str = ""
    history: tuple[str, ...] = ()
    limit: int = 10
    beams: int | None = None
    exclude_history: bool | None = None
    exact: bool = False
    filter: Filter | NamedFilter | None = None


@dataclass(slots=True)
class Status:
    """What the service is doing, for its health endpoints."""

    ready: bool = False
    draining: bool = False
    started: float = field(default_factory=time.time)
    failed_items: dict[str, str] = field(default_factory=dict)  # id: why it has no semantic ID


class Service:
    """A run with its store.

    Args:
        run: The folder of the run.
        store: Path of an SQLite file or URL of PostgreSQL; None takes a file in the run.
        filters: The named filters.
        device: "cpu", "cuda", …
        max_batch: Largest number of requests in one search.
        max_queue: Number of waiting requests beyond which another one is refused.

    Raises:
        UserError: The run or the store cannot be opened, or they do not belong together.
    """

    def __init__(
        self, run: Path, *, store: str | Path | None = None, filters: NamedFilters | None = None,
        device: str = "cpu", max_batch: int = 64, max_queue: int = 1024,
    ) -> None:  # fmt: skip
        self.run, self.status = run, Status()
        recommender = Recommender.from_run(run, device)
        ids = [str(item) for item in recommender.catalog.item_ids]
        self.store = Store.open(
            run / STORE_FILE if store is None else store,
            catalog=recommender.catalog.digest(), run_items=frozenset(ids),
        )  # fmt: skip
        self.model_version = recommender.catalog.digest()[:12]
        engine = Engine(recommender, version=self.store.version)
        self.table = AttributeTable(ids)
        self._restore(engine)
        self.filters = Filters(self.table, filters)
        self.model = ModelThread(engine, max_batch=max_batch, max_queue=max_queue)
        self._defaults = recommender.artifacts.config.decoding.beams, not _users_return(recommender)
        self._sorted: tuple[Catalog, list[str]] | None = None
        self._new = threading.Event()
        self._new.set()
        self._worker = threading.Thread(target=self._place_new_items, name="cemg-items", daemon=True)
        self._worker.start()
        self.status.ready = True

    def close(self, *, timeout: float | None = None) -> None:
        """Answer what is queued, and close the store."""
        self.status.draining, self.status.ready = True, False
        self._new.set()
        self.model.stop(timeout=timeout)
        self._worker.join(timeout)
        self.store.close()

    # ---- start

    def _restore(self, engine: Engine) -> None:
        """Bring the engine to where the store is: items, removals, and events in their order of arrival."""
        active = [one for one in self.store.items(states=ACTIVE)]
        placed = [one for one in active if one.codes is not None]
        if placed:
            codes = {one.item.item_id: one.codes for one in placed if one.codes is not None}
            titles = {one.item.item_id: one.item.title for one in placed if one.item.title}
            engine.add(
                engine.extended(codes, titles), [_text(one.item) for one in placed], self.store.version
            )
            self.table.extend([*codes])
        self.table.update(
            {one.item.item_id: one.item.attributes for one in active if one.item.item_id in self.table}
        )
        gone = [one.item.item_id for one in self.store.items(states=REMOVED)]
        engine.remove(gone, self.store.version)
        for entry in self._log():
            if isinstance(entry, Deletion):
                engine.forget(entry.user_id)
            else:
                engine.learn(entry.user_id, entry.item_id, entry.time)

    def _log(self) -> Iterator[StoredEvent | Deletion]:
        """Events and deletions of users, in order."""
        deletions = _pages(self.store.deletions_after)
        deletion = next(deletions, None)
        for event in _pages(self.store.events_after):
            while deletion is not None and deletion.number <= event.number:
                yield deletion
                deletion = next(deletions, None)
            yield event
        if deletion is not None:
            yield deletion
            yield from deletions

    # ---- recommendations

    def recommend(self, request: Request, *, timeout: float) -> Future[Answer]:
        """Queue a request: see `ModelThread.search`."""
        beams, exclude = self._defaults
        query = Query(
            user=request.user, history=request.history, limit=request.limit,
            beams=max(request.beams or beams, request.limit),
            exclude_history=exclude if request.exclude_history is None else request.exclude_history,
            exact=request.exact,
            filter=None if request.filter is None else partial(self._compiled, request.filter),
        )  # fmt: skip
        return self.model.search(query, timeout=timeout)

    def _compiled(self, expression: Filter | NamedFilter, recommender: Recommender) -> ItemFilter | None:
        return self.filters.compile(expression, recommender.catalog.trie, self.model.engine.version)

    # ---- events and users

    def add_events(self, events: Sequence[Event]) -> list[bool]:
        """Store events and learn them. Returns which were new: see `Store.append_events`."""
        now = time.time()
        stored = self.store.append_events(events)
        new = [event for event, is_new in zip(events, stored, strict=True) if is_new]

        def learn(engine: Engine) -> None:
            for event in new:
                when = now if event.timestamp is None else event.timestamp
                engine.learn(event.user_id, event.item_id, when)

        if new:
            self.model.change(learn).result()
        return stored

    def history(self, user: str) -> list[str] | None:
        """The item ids of a user, oldest first; None for an unknown user."""
        return self.model.change(lambda engine: engine.history(user) if engine.knows(user) else None).result()

    def delete_user(self, user: str) -> int:
        """Delete a user's events, and the interactions of the run's data from history and memory."""
        deleted = self.store.delete_user(user)
        forgotten = self.model.change(lambda engine: engine.forget(user)).result()
        return max(deleted, forgotten)

    # ---- the catalog

    def sizes(self) -> dict[str, int]:
        """Version and sizes of the catalog, and numbers of stored events and of users with events."""
        engine = self.model.engine
        pending = sum(1 for _ in self.store.items(states=PENDING))
        removed = len(engine.recommender.removed)
        return {
            "catalog_version": engine.version, "items": len(engine.recommender.catalog) - removed,
            "removed": removed, "pending": pending, "events": self.store.count_events(),
            "users": self.store.users(),
        }  # fmt: skip

    def codes(self, item: str) -> list[int] | None:
        """The semantic ID of an item; None if it has none."""
        return self.model.engine.codes(item)

    def list_items(self, after: str, limit: int) -> list[StoredItem]:
        """Items of the run and of the store in the order of their ids, those after ``after``."""
        ids = self._sorted_ids()
        start = bisect.bisect_right(ids, after)
        stored = {one.item.item_id: one for one in self.store.list_items(after=after, limit=limit)}
        names = sorted({*ids[start : start + limit], *stored})[:limit]
        found = [stored.get(name) or self.get_item(name) for name in names]
        return [one for one in found if one is not None]

    def _sorted_ids(self) -> list[str]:
        catalog = self.model.engine.recommender.catalog
        if self._sorted is None or self._sorted[0] is not catalog:
            self._sorted = catalog, sorted(map(str, catalog.item_ids))
        return self._sorted[1]

    def get_item(self, item: str) -> StoredItem | None:
        """An item as the store or the run has it; None if neither does."""
        stored = self.store.get_item(item)
        if stored is not None or not self.model.engine.has(item):
            return stored
        title = self.model.engine.recommender.titles().get(item) or ""
        return StoredItem(Item(item, title), "active", None, 0, self.status.started, False)

    def put_items(self, items: Sequence[Item]) -> int:
        """Insert or replace items. New ones are recommended once they have semantic IDs."""
        version = self.store.put_items(items)
        self._apply_items(items, version)
        return version

    def patch_item(self, item: str, values: Mapping[str, object]) -> int:
        """Change some fields of an item.

        Raises:
            UnknownItemError: There is no such item.
        """
        known = self.get_item(item)
        if known is None:
            raise UnknownItemError(f"there is no item {item}")
        version = self.store.patch_item(item, values, base=known.item)
        changed = self.store.get_item(item)
        assert changed is not None
        self._apply_items([changed.item], version)
        return version

    def _apply_items(self, items: Sequence[Item], version: int) -> None:
        here = [item for item in items if item.item_id in self.table]
        self.table.update({item.item_id: item.attributes for item in here})
        self.model.change(lambda engine: engine.restore([item.item_id for item in here], version)).result()
        if len(here) < len(items):
            self._new.set()

    def remove_item(self, item: str) -> int:
        """Never recommend an item again, from the next request on.

        Raises:
            UnknownItemError: There is no such item.
        """
        version = self.store.remove_item(item)
        self.model.change(lambda engine: engine.remove([item], version)).result()
        return version

    def _place_new_items(self) -> None:
        """Compute the semantic IDs of pending items, in the background, until the service closes."""
        while True:
            self._new.wait()
            self._new.clear()
            if self.status.draining:
                return
            try:
                while self._place_some() and not self.status.draining:
                    pass
            except Exception:
                log.exception("the semantic IDs of new items could not be computed")

    def _place_some(self) -> bool:
        """Place up to PLACED_AT_ONCE pending items. Returns whether there may be more."""
        pending: list[Item] = []
        for one in self.store.items(states=PENDING):
            if one.item.item_id not in self.status.failed_items and len(pending) < PLACED_AT_ONCE:
                pending.append(one.item)
        texts = {item.item_id: _text(item) for item in pending}
        for item_id in [item_id for item_id, text in texts.items() if text is None]:
            self.status.failed_items[item_id] = "it has neither a title nor a text"
        pending = [item for item in pending if texts[item.item_id] is not None]
        if not pending:
            return False
        engine = self.model.engine
        rows = engine.encode([texts[item.item_id] for item in pending]).tolist()
        codes = {item.item_id: row for item, row in zip(pending, rows, strict=True)}
        extended = engine.extended(codes, {item.item_id: item.title for item in pending if item.title})
        version = self.store.place_items(codes)
        self.table.extend([*codes], {item.item_id: item.attributes for item in pending})
        added = [texts[item.item_id] for item in pending]
        self.model.change(lambda engine: engine.add(extended, added, version)).result()
        return True


def _pages(read: Callable[[int], Sequence[Entry]]) -> Iterator[Entry]:
    """All entries of a log that is read from a number on."""
    number = 0
    while page := read(number):
        yield from page
        number = page[-1].number


def _text(item: Item) -> str | None:
    """The text that the encoder reads, composed as for ``cemg-catalog add``."""
    return item_text(clean(item.title), [clean(item.text)])


def _users_return(recommender: Recommender) -> bool:
    return recommender.artifacts.has_gate() and recommender.artifacts.load_gate().repeats
