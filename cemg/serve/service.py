"""The service behind the endpoints: what is stored, what is searched, and what happens in the background.

A change is written to the store first and then applied to the engine, so what was acknowledged survives, and
the next answer reflects it. Both happen under one lock, so the engine sees changes in the order of their
versions. New items wait in the store until their semantic IDs are computed.
"""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from cemg.data.readers.text import clean, item_text
from cemg.errors import UserError
from cemg.recommender import Recommender
from cemg.serve.attributes import AttributeTable
from cemg.serve.batching import ModelThread, StoppedError
from cemg.serve.database import STORE_FILE, BusyError
from cemg.serve.engine import Answer, Engine, Query
from cemg.serve.expressions import Filter, NamedFilter
from cemg.serve.filters import Filters
from cemg.serve.named_filters import NamedFilters
from cemg.serve.rows import Deletion, Event, Item, State, StoredItem, UnknownItemError, patched
from cemg.serve.run_items import ItemSearch, RunItems
from cemg.serve.store import Store
from cemg.storage.files import StorageError
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter

PLACED_AT_ONCE = 256  # new items whose semantic IDs are computed together
RETRY = 10  # seconds after which new items are tried again when the store has failed

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
        explain: Whether the share of the memory in each item is computed.
    """

    user: str = ""
    history: tuple[str, ...] = ()
    limit: int = 10
    beams: int | None = None
    exclude_history: bool | None = None
    exact: bool = False
    filter: Filter | NamedFilter | None = None
    explain: bool = False


@dataclass(slots=True)
class Status:
    """What the service is doing, for its health endpoints."""

    ready: bool = False
    draining: bool = False
    requests: int = 0  # that are not answered yet
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
            catalog=recommender.catalog.digest(), run_items=frozenset(ids), exclusive=True,
        )  # fmt: skip
        self.model_version = recommender.catalog.digest()[:12]
        engine = Engine(recommender, version=self.store.version)
        self.table = AttributeTable(ids)
        self._restore(engine)
        self.filters = Filters(self.table, filters)
        self.model = ModelThread(engine, max_batch=max_batch, max_queue=max_queue)
        self._defaults = recommender.artifacts.config.decoding.beams, not _users_return(recommender)
        self._sorted: tuple[Catalog, list[str]] | None = None
        self._order = threading.Lock()  # held while a change is stored and queued for the engine
        self.run_items = RunItems(run)
        self._search = ItemSearch(self.store, self.run_items)
        self._new = threading.Event()
        self._new.set()
        self._worker = threading.Thread(target=self._place_new_items, name="cemg-items", daemon=True)
        self._worker.start()
        self.status.ready = True

    def drain(self, timeout: float) -> None:
        """Prepare to close, within ``timeout`` seconds: health says so, and new requests are refused."""
        self.status.draining, self.status.ready = True, False
        self._end = time.monotonic() + timeout
        self._new.set()

    def close(self, *, timeout: float = 10.0) -> None:
        """Answer what is queued, and close the store, within the time of `drain` or ``timeout`` seconds."""
        if not self.status.draining:
            self.drain(timeout)
        self.model.stop(timeout=max(0.1, self._end - time.monotonic()))
        self._worker.join(max(0.1, self._end - time.monotonic()))
        self.store.close()

    # ---- start

    def _restore(self, engine: Engine) -> None:
        """Bring the engine to where the store is: items, removals, and events in their order of arrival."""
        stored = [*self.store.items(states=("active", "removed"))]
        placed = [one for one in stored if one.codes is not None]  # removed ones keep their semantic IDs
        active = [one for one in stored if one.state == "active"]
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
        engine.titles |= {one.item.item_id: one.item.title for one in active}
        engine.remove([one.item.item_id for one in stored if one.state == "removed"], self.store.version)
        for entry in self.store.log():
            if isinstance(entry, Deletion):
                engine.forget(entry.user_id)
            else:
                engine.learn(entry.user_id, entry.item_id, entry.time)

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
            explain=request.explain,
        )  # fmt: skip
        return self.model.search(query, timeout=timeout)

    def _compiled(self, expression: Filter | NamedFilter, recommender: Recommender) -> ItemFilter | None:
        return self.filters.compile(expression, recommender.catalog.trie, self.model.engine.version)

    # ---- events and users

    def add_events(self, events: Sequence[Event]) -> list[bool]:
        """Store events and learn them. Returns which were new: see `Store.append_events`."""
        with self._order:
            now = time.time()
            stored = self.store.append_events(events)
            new = [event for event, is_new in zip(events, stored, strict=True) if is_new]

            def learn(engine: Engine) -> None:
                for event in new:
                    when = now if event.timestamp is None else event.timestamp
                    engine.learn(event.user_id, event.item_id, when)

            learned = self.model.change(learn)
        learned.result()
        return stored

    def history(self, user: str) -> list[str] | None:
        """The item ids of a user, oldest first; None for an unknown user."""
        return self.model.change(lambda engine: engine.history(user) if engine.knows(user) else None).result()

    def users(self, prefix: str, after: str, limit: int) -> list[str]:
        """The first ids of users that begin with ``prefix``, those after ``after``."""
        return self.model.engine.users(prefix, after, limit)

    def delete_user(self, user: str) -> int:
        """Delete a user's events, and the interactions of the run's data from history and memory."""
        with self._order:
            deleted = self.store.delete_user(user)
            forgotten = self.model.change(lambda engine: engine.forget(user))
        return max(deleted, forgotten.result())

    # ---- the catalog

    def sizes(self) -> dict[str, int]:
        """Version and sizes of the catalog, and numbers of stored events and of users with events."""
        engine = self.model.engine
        removed = len(engine.recommender.removed)
        return {
            "catalog_version": engine.version, "items": len(engine.recommender.catalog) - removed,
            "removed": removed, "pending": self.store.count_items("pending"),
            "events": self.store.count_events(), "users": self.store.users(),
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
        found = self.run_items.get(item)
        title, has_image = self.model.engine.titles.get(item) or found.title, found.image is not None
        started = self.status.started
        return StoredItem(Item(item, title, found.text), "active", None, 0, started, has_image)

    def find_items(self, query: str, after: str, limit: int) -> list[StoredItem]:
        """Items whose id begins with ``query``, or whose title contains it: see `ItemSearch.find`."""
        found = [self.get_item(item) for item in self._search.find(query, after, limit)]
        return [one for one in found if one is not None]

    def has_picture(self, stored: StoredItem) -> bool:
        """Whether the store or the run names a picture of an item."""
        return stored.has_image or self.run_items.get(stored.item.item_id).image is not None

    def picture(self, item: str) -> bytes | None:
        """The bytes of the image of an item, from the store or from the file that the run names."""
        stored = self.store.get_item(item)
        if stored is not None and stored.item.image is not None:
            return stored.item.image
        return self.run_items.picture(item) if self.model.engine.has(item) else None

    def similar(self, item: str, limit: int) -> list[tuple[str, float]]:
        """The items that the memory connects most with an item: see `Engine.similar`."""
        return self.model.change(lambda engine: engine.similar(item, limit)).result()

    def put_items(self, items: Sequence[Item]) -> int:
        """Insert or replace items. New ones are recommended once they have semantic IDs.

        Raises:
            UserError: A value cannot be stored, or has another type than the attribute has in other items.
        """
        with self._order:
            self.table.check({item.item_id: item.attributes for item in items})
            version = self.store.put_items(items)
            applied = self._apply_items(items, version)
        applied.result()
        return version

    def patch_item(self, item: str, values: Mapping[str, object]) -> int:
        """Change some fields of an item.

        Raises:
            UnknownItemError: There is no such item.
            UserError: As in `put_items`.
        """
        with self._order:
            known = self.get_item(item)
            if known is None or known.state == "removed":
                raise UnknownItemError(f"there is no item {item}")
            changed = patched(known.item, values)
            self.table.check({item: changed.attributes})
            version = self.store.patch_item(item, values, base=known.item)
            applied = self._apply_items([changed], version)
        applied.result()
        return version

    def _apply_items(self, items: Sequence[Item], version: int) -> Future[None]:
        here = {item.item_id: item for item in items if item.item_id in self.table}
        self.table.update({name: item.attributes for name, item in here.items()})
        for item in items:
            self.status.failed_items.pop(item.item_id, None)
        if len(here) < len({item.item_id for item in items}):
            self._new.set()

        def apply(engine: Engine) -> None:
            engine.titles |= {name: item.title for name, item in here.items()}
            engine.restore([*here], version)

        return self.model.change(apply)

    def remove_item(self, item: str) -> int:
        """Never recommend an item again, from the next request on.

        Raises:
            UnknownItemError: There is no such item.
        """
        with self._order:
            version = self.store.remove_item(item)
            removed = self.model.change(lambda engine: engine.remove([item], version))
        removed.result()
        return version

    def _place_new_items(self) -> None:
        """Compute the semantic IDs of pending items, in the background, until the service closes."""
        again = None
        while True:
            self._new.wait(again)
            self._new.clear()
            if self.status.draining:
                return
            try:
                while self._place_some() and not self.status.draining:
                    pass
                again = None
            except StoppedError:
                return
            except Exception:
                log.exception("new items could not be stored; the next try is in %d s", RETRY)
                again = RETRY

    def _place_some(self) -> bool:
        """Place up to PLACED_AT_ONCE pending items. Returns whether there may be more."""
        state: State = "pending"
        waiting = self.store.items(states=(state,))
        new = (one for one in waiting if one.item.item_id not in self.status.failed_items)
        pending = [*islice(new, PLACED_AT_ONCE)]
        if pending:
            self._place(pending)
        return bool(pending)

    def _place(self, pending: Sequence[StoredItem]) -> None:
        """Compute the semantic IDs of items and add them; those that fail are noted in the status."""
        try:
            self._add(pending)
        except (StorageError, BusyError, StoppedError):  # not the fault of an item
            raise
        except Exception as error:
            if len(pending) > 1:
                for one in pending:
                    self._place([one])
                return
            item_id = pending[0].item.item_id
            if not isinstance(error, UserError):
                log.exception("the semantic ID of item %s could not be computed", item_id)
            problem = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.status.failed_items[item_id] = problem

    def _add(self, pending: Sequence[StoredItem]) -> None:
        """Add items to the catalog, unless one of them was changed or removed in the meantime."""
        items = {one.item.item_id: one.item for one in pending}
        attributes = {name: item.attributes for name, item in items.items()}
        texts = [_text(item) for item in items.values()]
        if None in texts:
            raise UserError("it has neither a title nor a text")
        self.table.check(attributes)
        engine = self.model.engine
        codes = dict(zip(items, engine.encode(texts).tolist(), strict=True))
        titles = {name: item.title for name, item in items.items()}
        extended = engine.extended(codes, {name: title for name, title in titles.items() if title})

        def add(engine: Engine) -> None:  # a filter of a search needs the table to have the trie's items
            self.table.extend([*codes], attributes)
            engine.titles |= titles
            engine.add(extended, texts, version)

        with self._order:
            if any(self._version_of(one.item.item_id) != one.version for one in pending):
                return
            self.table.check(attributes)
            version = self.store.place_items(codes)
            self.model.change(add).result()  # within the lock, as `check` must hold for `extend`

    def _version_of(self, item: str) -> int | None:
        stored = self.store.get_item(item)
        return None if stored is None else stored.version


def _text(item: Item) -> str | None:
    """The text that the encoder reads, composed as for ``cemg-catalog add``."""
    return item_text(clean(item.title), [clean(item.text)])


def _users_return(recommender: Recommender) -> bool:
    return recommender.artifacts.has_gate() and recommender.artifacts.load_gate().repeats
