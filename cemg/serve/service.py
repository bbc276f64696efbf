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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

from cemg.errors import UserError
from cemg.serve.batching import ModelThread, Result, StoppedError
from cemg.serve.database import STORE_FILE, BusyError
from cemg.serve.engine import Answer, Engine, Query, Request
from cemg.serve.interface import LaggingError, Status
from cemg.serve.models import Attempt, Loader, LoadingError
from cemg.serve.named_filters import NamedFilters
from cemg.serve.new_items import NewItems
from cemg.serve.replica import Follower
from cemg.serve.rows import (
    Event,
    Item,
    Models,
    ServedModel,
    StoredItem,
    UnknownItemError,
    patched,
)
from cemg.serve.served_run import ServedRun, run_of
from cemg.serve.shadow import Shadows
from cemg.serve.store import Store
from cemg.storage.run import Run
from cemg.tokenizer import Catalog

TRIES = 20  # of a write to the catalog while other replicas write
FEW = 100  # changes that a run may still lack when writes wait for it

log = logging.getLogger("cemg.serve")


class Service:
    """A run with its store.

    Args:
        run: The folder of the run. If the store says that another one was chosen, that one is served.
        store: Path of an SQLite file or URL of PostgreSQL; None takes a file in the run.
        filters: The named filters.
        device: "cpu", "cuda", …
        max_batch: Largest number of requests in one search.
        max_queue: Number of waiting requests beyond which another one is refused.
        models: Runs below this folder may be loaded; None: those beside ``run``.
        move_store: Whether ``run`` is served even if the store belongs to another one, and is moved to it.
        replica: Whether other replicas may use the store at the same time: see `cemg.serve.replica`.

    Attributes:
        store: The durable store.
        model: The thread that searches.
        loader: Loads other runs.
        status: What the service is doing.
        order: Held while a change is stored and queued for the engine.
        shadows: Compares another run with the one that answers.
        new_items: The thread that computes semantic IDs.

    Raises:
        UserError: The run or the store cannot be opened, or they do not belong together.
    """

    def __init__(
        self, run: Path, *, store: str | Path | None = None, filters: NamedFilters | None = None,
        device: str = "cpu", max_batch: int = 64, max_queue: int = 1024, models: Path | None = None,
        move_store: bool = False, replica: bool = False,
    ) -> None:  # fmt: skip
        self.status, self._device, self._named = Status(), device, filters
        self._follower: Follower | None = None
        Run.existing(run)  # before the store makes a folder in it
        place = run / STORE_FILE if store is None else store
        self.store = Store.open(place, claim="replica" if replica else "alone")
        try:
            self._loaded = loaded = self._opened(run, move_store=move_store)
        except BaseException:
            self.store.close()
            raise
        if replica:
            self.store.required = loaded.catalog
        self.model = ModelThread(loaded.engine, max_batch=max_batch, max_queue=max_queue)
        self.loader = Loader(run.resolve().parent if models is None else models)
        self._sorted: tuple[Catalog, list[str]] | None = None
        self.shadows = Shadows(self, kept=not replica)
        self.order = threading.Lock()
        if replica:
            self._follower = Follower(self)
        self.new_items = NewItems(self)
        self.shadows.resume()
        self.status.ready = True

    def wake(self) -> None:
        """Look for new items without semantic IDs."""
        self.new_items.wake()

    def drain(self, timeout: float) -> None:
        """Prepare to close, within ``timeout`` seconds: health says so, and new requests are refused."""
        self.status.draining, self.status.ready = True, False
        self._end = time.monotonic() + timeout
        self.new_items.wake()

    def close(self, *, timeout: float = 10.0) -> None:
        """Answer what is queued, and close the store, within the time of `drain` or ``timeout`` seconds."""
        if not self.status.draining:
            self.drain(timeout)
        self.model.stop(timeout=max(0.1, self._end - time.monotonic()))
        self.new_items.join(max(0.1, self._end - time.monotonic()))
        if self._follower is not None:
            self._follower.close(max(0.1, self._end - time.monotonic()))
        self.loader.join(max(0.1, self._end - time.monotonic()))
        self.shadows.close()
        if self.model.ended and time.monotonic() < self._end:
            self.new_items.save_at_end()
        self.store.close()

    # ---- models

    def _opened(self, run: Path, *, move_store: bool) -> ServedRun:
        """The run that is served at first, as the store has it."""
        place = run if move_store else run_of(run, self.store)
        loaded = ServedRun.load(place, self.store, device=self._device, named=self._named)
        if not move_store:
            self.store.adopt(loaded.catalog, loaded.ids)
        loaded.follow(self.store)
        if move_store:
            self._record(loaded, None)
        return loaded

    @property
    def loaded(self) -> ServedRun:
        """The run that is served. It may be replaced at any moment."""
        return self._loaded

    @property
    def model_version(self) -> str:
        """Identifies the run that is served."""
        return self._loaded.engine.model_version

    def models(self) -> Models:
        """The run that is served, and the one before it."""
        stored = self.store.models
        return Models(self._loaded.served_model, None if stored is None else stored.previous)

    def chosen(self) -> ServedModel:
        """The run that the store says is served. A replica may not have loaded it yet."""
        stored = self.store.models
        return self._loaded.served_model if stored is None else stored.current

    def load_model(self, run: str, *, events: int | None = None) -> Attempt:
        """Load another run in the background, and serve it from then on: see `Loader`.

        Args:
            run: A folder below that of the loader.
            events: Number of the last stored event that its data have; None: as its data say.

        Raises:
            UserError: The folder is not allowed, or there is no such event.
            LoadingError: Another run is being loaded.
        """
        self.check_number(events)
        path = self.loader.path_of(run)
        return self.loader.start(path, partial(self._replace, path, events))

    def check_number(self, events: int | None) -> None:
        """Raise UserError for a number that no stored event has: the next event would count as known."""
        last = self.store.last_number
        if events is not None and events > last:
            raise UserError(f"events: the last stored event has the number {last}, got {events}")

    def roll_back(self) -> Attempt:
        """Load the run that was served before, with everything that changed since.

        Raises:
            LoadingError: There is none, or another run is being loaded.
        """
        before = self.models().previous
        if before is None:
            raise LoadingError("no other model was served before this one", fix="POST /v1/models")
        path = Path(before.run)
        return self.loader.start(path, partial(self._replace, path, before.events, before.version))

    def load(self, run: Path, events: int | None) -> ServedRun:
        """Open a run for `swap`; ``events`` as in `load_model`."""
        loaded = ServedRun.load(run, self.store, device=self._device, named=self._named)
        if events is not None:
            loaded.events = events
        return loaded

    def _replace(self, run: Path, events: int | None, version: str | None = None) -> None:
        """Load a run beside the present one, and let it answer all searches from some moment on."""
        loaded = self.load(run, events)
        found = loaded.engine.model_version
        chosen = self.chosen()
        if (found, str(run)) == (chosen.version, chosen.run):
            raise UserError(f"{run} is served already, as model {found}")
        if version is not None and found != version:
            raise UserError(
                f"{run} was changed since it was served",
                cause=f"it is model {found} now, not {version}",
                fix="to serve it as it is now, load it: POST /v1/models",
            )
        self.swap(loaded, choose=True)

    def swap(self, loaded: ServedRun, *, choose: bool = False) -> None:
        """Let a loaded run answer all searches from some moment on.

        Args:
            loaded: The run, from `load`.
            choose: Whether the store says so, for the next start and for other replicas.
        """
        while loaded.follow(self.store) > FEW and not self.status.draining:
            pass
        loaded.warm_up()
        while loaded.follow(self.store) > FEW and not self.status.draining:
            pass
        with self.order:  # nothing is written here meanwhile; searches go on
            if self.status.draining:
                raise StoppedError("the service shuts down")
            loaded.follow(self.store)
            if choose:
                self._record(loaded, self.models().current)
            self.model.change(partial(self._take, loaded)).result()
        self.wake()
        self.shadows.stop()  # semantic IDs in the store are others from here on

    def _record(self, loaded: ServedRun, previous: ServedModel | None) -> None:
        """Store that a run is served from now on. Its items get their new semantic IDs at the same time."""
        models = Models(loaded.served_model, previous)
        version = self.store.change_catalog(loaded.catalog, loaded.ids, codes=loaded.codes, models=models)
        loaded.keeps_codes = True
        if self._follower is None:  # else other replicas may have written since the last `follow`
            loaded.version = loaded.engine.version = version

    def _take(self, loaded: ServedRun, _: Engine) -> None:
        """Called by the thread of the model, between two searches."""
        self._loaded, self.model.engine = loaded, loaded.engine
        self.status.failed_items.clear()
        if self._follower is not None:
            self.store.required, self.store.run_items = loaded.catalog, loaded.ids
            self._follower.follow(loaded.engine)

    def apply(self, change: Callable[[Engine], None]) -> Future[None]:
        """Queue what a stored change does to the engine. A replica applies all that the store has."""
        return self.model.change(change if self._follower is None else self._follower.follow)

    def _read(self, read: Callable[[Engine], Result]) -> Result:
        """Read something from the engine, after all that the store has."""

        self.catch_up()
        return self.model.change(read).result()

    def catch_up(self) -> None:
        """Let a replica apply all that the store has."""
        if self._follower is not None:
            self.model.change(self._follower.follow).result()

    # ---- recommendations

    def recommend(self, request: Request, *, timeout: float) -> Future[Answer]:
        """Queue a request: see `ModelThread.search`."""
        loaded = self._loaded
        exclude = request.exclude_history
        query = Query(
            user=request.user, history=request.history, limit=request.limit,
            beams=max(request.beams or loaded.beams, request.limit),
            exclude_history=loaded.excludes_history if exclude is None else exclude,
            exact=request.exact, filter=request.filter, explain=request.explain,
        )  # fmt: skip
        future = self.model.search(query, timeout=timeout)
        self.shadows.offer(query, future)
        return future

    # ---- events and users

    def add_events(self, events: Sequence[Event]) -> list[bool]:
        """Store events and learn them. Returns which were new: see `Store.append_events`."""
        with self.order:
            now = time.time()
            stored = self.store.append_events(events)
            new = [event for event, is_new in zip(events, stored, strict=True) if is_new]

            def learn(engine: Engine) -> None:
                for event in new:
                    when = now if event.timestamp is None else event.timestamp
                    engine.learn(event.user_id, event.item_id, when)

            learned = self.apply(learn)
        learned.result()
        return stored

    def history(self, user: str) -> list[str] | None:
        """The item ids of a user, oldest first; None for an unknown user."""
        return self._read(lambda engine: engine.history(user) if engine.knows(user) else None)

    def users(self, prefix: str, after: str, limit: int) -> list[str]:
        """The first ids of users that begin with ``prefix``, those after ``after``."""
        self.catch_up()
        return self._loaded.engine.users(prefix, after, limit)

    def delete_user(self, user: str) -> int:
        """Delete a user's events, and the interactions of the run's data from history and memory."""
        with self.order:
            known = self._read(lambda engine: engine.interactions(user))
            deleted = self.store.delete_user(user)
            forgotten = self.apply(lambda engine: engine.forget(user))
        forgotten.result()
        return max(deleted, known)

    # ---- the catalog

    def sizes(self) -> dict[str, int]:
        """Version and sizes of the catalog, and numbers of stored events and of users with events."""
        self.catch_up()
        with self.status.placing_lock:  # before the others: an item is never in none of the counts
            pending = self.store.count_items("pending") + self.status.placing
        engine = self._loaded.engine
        removed = len(engine.recommender.removed)
        return {
            "catalog_version": engine.version, "items": len(engine.recommender.catalog) - removed,
            "removed": removed, "pending": pending,
            "events": self.store.count_events(), "users": self.store.users(),
        }  # fmt: skip

    def codes(self, item: str) -> list[int] | None:
        """The semantic ID of an item; None if it has none."""
        return self._loaded.engine.codes(item)

    def list_items(self, after: str, limit: int) -> list[StoredItem]:
        """Items of the run and of the store in the order of their ids, those after ``after``."""
        ids = self._sorted_ids()
        start = bisect.bisect_right(ids, after)
        stored = {one.item.item_id: one for one in self.store.list_items(after=after, limit=limit)}
        names = sorted({*ids[start : start + limit], *stored})[:limit]
        found = [stored.get(name) or self.get_item(name) for name in names]
        return [one for one in found if one is not None]

    def _sorted_ids(self) -> list[str]:
        catalog = self._loaded.engine.recommender.catalog
        if self._sorted is None or self._sorted[0] is not catalog:
            self._sorted = catalog, sorted(map(str, catalog.item_ids))
        return self._sorted[1]

    def get_item(self, item: str) -> StoredItem | None:
        """An item as the store or the run has it; None if neither does."""
        stored, loaded = self.store.get_item(item), self._loaded
        if stored is not None or not loaded.engine.has(item):
            return stored
        found = loaded.run_items.get(item)
        title, has_image = loaded.engine.titles.get(item) or found.title, found.image is not None
        started = self.status.started
        return StoredItem(Item(item, title, found.text), "active", None, 0, started, has_image)

    def find_items(self, query: str, after: str, limit: int) -> list[StoredItem]:
        """Items whose id begins with ``query``, or whose title contains it: see `ItemSearch.find`."""
        found = [self.get_item(item) for item in self._loaded.search.find(query, after, limit)]
        return [one for one in found if one is not None]

    def has_picture(self, stored: StoredItem) -> bool:
        """Whether the store or the run names a picture of an item."""
        return stored.has_image or self._loaded.run_items.get(stored.item.item_id).image is not None

    def picture(self, item: str) -> bytes | None:
        """The bytes of the image of an item, from the store or from the file that the run names."""
        stored = self.store.get_item(item)
        if stored is not None and stored.item.image is not None:
            return stored.item.image
        return self._loaded.run_items.picture(item) if self._loaded.engine.has(item) else None

    def similar(self, item: str, limit: int) -> list[tuple[str, float]]:
        """The items that the memory connects most with an item: see `Engine.similar`."""
        return self._read(lambda engine: engine.similar(item, limit))

    def put_items(self, items: Sequence[Item]) -> int:
        """Insert or replace items. New ones are recommended once they have semantic IDs.

        Raises:
            UserError: A value cannot be stored, or has another type than the attribute has in other items.
        """
        with self.order:
            check = self.attribute_check({item.item_id: item.attributes for item in items})
            version = self._written(lambda: self.store.put_items(items, check=check))
            applied = self._apply_items(items, version)
        applied.result()
        return version

    def patch_item(self, item: str, values: Mapping[str, object]) -> int:
        """Change some fields of an item.

        Raises:
            UnknownItemError: There is no such item.
            UserError: As in `put_items`.
        """
        with self.order:
            known = self.get_item(item)
            if known is None or known.state == "removed":
                raise UnknownItemError(f"there is no item {item}")
            changed = patched(known.item, values)
            check = self.attribute_check({item: changed.attributes})
            base = known.item
            version = self._written(lambda: self.store.patch_item(item, values, base=base, check=check))
            applied = self._apply_items([changed], version)
        applied.result()
        return version

    def _apply_items(self, items: Sequence[Item], version: int) -> Future[None]:
        here = {item.item_id: item for item in items if item.item_id in self._loaded.table}
        if self._follower is None:
            self._loaded.table.update({name: item.attributes for name, item in here.items()})
        for item in items:
            self.status.failed_items.pop(item.item_id, None)
        if len(here) < len({item.item_id for item in items}):
            self.new_items.wake()

        def apply(engine: Engine) -> None:
            self._loaded.describe([*here.values()])
            engine.restore([*here], version)

        return self.apply(apply)

    def attribute_check(self, attributes: Mapping[str, Mapping[str, object]]) -> Callable[[], None]:
        """The check of attributes that a write to the store makes, when no other write can come between."""

        def check() -> None:
            if self._follower is not None and self.store.version != self._loaded.version:
                raise LaggingError("another replica has changed the catalog")
            self._loaded.table.check(attributes)

        return check

    def _written(self, write: Callable[[], int]) -> int:
        """Write to the catalog from its newest version. The lock of the store is not held meanwhile."""
        for _ in range(TRIES):
            self.catch_up()
            with suppress(LaggingError):
                return write()
        raise BusyError(
            "the catalog is changed by others at this moment; nothing was stored", fix="try again"
        )

    def remove_item(self, item: str) -> int:
        """Never recommend an item again, from the next request on.

        Raises:
            UnknownItemError: There is no such item.
        """
        with self.order:
            known = self.get_item(item)
            version = self.store.remove_item(item, base=None if known is None else known.item)
            self.status.failed_items.pop(item, None)
            if self._follower is None and item in self._loaded.table:
                self._loaded.table.update({item: {}})
            removed = self.apply(lambda engine: engine.remove([item], version))
        removed.result()
        return version
