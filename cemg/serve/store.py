"""The durable store of a service: events of users, added and changed items, and a numbered log of changes.

A call that writes returns when its rows are on the disk; a call that raises stores nothing, unless the disk
fails, see `cemg.serve.database`. Any number of threads and processes may use a store at once.
"""

from __future__ import annotations

import heapq
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Integer, Select, bindparam, delete, func, insert, null, select

from cemg.errors import UserError
from cemg.serve.database import Database, Synchronous
from cemg.serve.log import (
    COUNTERS,
    ITEM,
    ITEM_OF,
    KNOWN_EVENTS,
    KNOWN_USERS,
    ChangeLog,
    chunks,
    count,
    lock_counters,
    present,
    states_of,
    stored_items,
)
from cemg.serve.rows import (
    STATES,
    Change,
    Deletion,
    DroppedError,
    Event,
    Item,
    Models,
    State,
    StoredEvent,
    StoredItem,
    UnknownItemError,
    check_codes,
    check_events,
    check_item,
    check_names,
    describe,
    patched,
    to_json,
)
from cemg.serve.schema import changes, check_catalog, deletions, events, items, meta, prepare, set_meta, users
from cemg.storage.read import parse_json

T = TypeVar("T", StoredEvent, Deletion)
GROUP = 5_000  # events of several calls in one transaction
PAGE = 1_000  # items in one query of an iteration
EVENT = (
    events.c.number,
    events.c.event_id,
    events.c.user_id,
    events.c.item_id,
    events.c.timestamp,
    events.c.type,
    events.c.received,
)
# Statements that are often executed are built once, as building one takes longer than executing it.
HISTORY = (
    select(*EVENT)
    .where(events.c.user_id == bindparam("user"))
    .order_by(events.c.time.desc(), events.c.number.desc())
)
NEWEST = HISTORY.limit(bindparam("limit", type_=Integer))
ADD_USERS, ADD_EVENTS = insert(users), insert(events)


@dataclass(slots=True)
class _Append:
    """A call of `Store.append_events` that waits for its result."""

    events: list[Event]
    stored: list[bool] | None = None
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.stored is not None or self.error is not None


class Store:
    """The durable store of a service.

    Example:
        >>> store = Store.open("runs/demo/store.sqlite")
        >>> store.append_events([Event("e1", "ann", "item-1")])
        [True]
        >>> [event.item_id for event in store.history("ann")]
        ['item-1']

    Attributes:
        run_items: The items of the run that is served, for a test of membership. They are active before the
            store has a row for them. None: unknown, so any item may be one of the run.
    """

    def __init__(self, database: Database, catalog: str, run_items: Container[str] | None) -> None:
        self.run_items = run_items
        self._database = database
        self._catalog = catalog
        self._waiting: deque[_Append] = deque()
        self._turn = threading.Condition()
        self._appending = False  # whether a thread commits for those that wait

    @classmethod
    def open(
        cls,
        url_or_path: str | Path,
        *,
        catalog: str = "",
        run_items: Container[str] | None = None,
        synchronous: Synchronous = "FULL",
        create: bool = True,
        exclusive: bool = False,
    ) -> Store:
        """Open a store, and create or migrate it first if necessary.

        Args:
            url_or_path: A path is an SQLite file; a URL is a PostgreSQL database.
            catalog: Digest of the catalog of the run. A store belongs to the first one that it was opened
                with. "" opens any store.
            run_items: See the attribute.
            synchronous: "NORMAL" is faster, and may lose the last acknowledged rows in a power cut, though
                not when the process is killed. Only for SQLite.
            create: Whether a missing SQLite file is created.
            exclusive: Whether no other process may open the store in this way until it is closed. A service
                does so, because it does not see the changes of others.

        Raises:
            UserError: The store belongs to another catalog, is newer than this version, is not a store, is
                missing, or cannot be reached.
            BusyError: Another process has opened it as ``exclusive``.
        """
        database = Database.open(url_or_path, synchronous=synchronous, create=create, exclusive=exclusive)
        try:
            with database.write() as connection:
                found = prepare(connection, catalog=catalog, where=database.where)
        except BaseException:
            database.close()
            raise
        return cls(database, found, run_items)

    def check_catalog(self, catalog: str) -> None:
        """Raise UserError if the store belongs to another catalog than that with this digest."""
        check_catalog(self._catalog, catalog, where=self._database.where)

    def adopt(self, catalog: str, run_items: Container[str]) -> None:
        """Let the store belong to a catalog, unless it belongs to one.

        Args:
            catalog: Digest of the catalog of the run.
            run_items: See the attribute.

        Raises:
            UserError: It belongs to another one.
        """
        with self._database.write() as connection:
            self._catalog = prepare(connection, catalog=catalog, where=self._database.where)
        self.run_items = run_items

    def close(self) -> None:
        """Close the store. Later calls raise UserError."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def catalog(self) -> str:
        """The digest of the catalog that the store belongs to, or ""."""
        return self._catalog

    def append_events(self, new: Sequence[Event]) -> list[bool]:
        """Store events; all of them or, after an exception, none.

        An event with a known id is skipped, also one that is twice in ``new``. The ids of deleted events are
        not known any more. Calls of several threads at once share a transaction, and so a flush of the disk.

        Returns:
            True for each event that was stored, False for each that was known.

        Raises:
            UserError: An event has an invalid id, type or timestamp.
            BusyError: Another process writes for too long.
            StorageError: The disk is full or fails.
        """
        call = _Append(list(new))
        check_events(call.events)
        if not call.events:
            return []
        with self._turn:
            self._waiting.append(call)
            while self._appending and not call.done:
                self._turn.wait()
            self._appending = self._appending or not call.done
        if not call.done:  # this thread commits for all that wait
            try:
                while not call.done:
                    self._append_group()
            finally:
                with self._turn:
                    self._appending = False
                    self._turn.notify_all()
        if call.error is not None:
            raise call.error
        return call.stored or []

    def _append_group(self) -> None:
        """Store the events of the calls that wait, up to GROUP of them, in one transaction."""
        group: list[_Append] = []
        while self._waiting and sum(len(call.events) for call in group) < GROUP:
            group.append(self._waiting.popleft())
        try:
            stored = iter(self._append([event for call in group for event in call.events]))
        except Exception as error:
            for call in group:
                call.error = error
        except BaseException:  # this thread is interrupted; the others try again
            self._waiting.extendleft(reversed(group))
            raise
        else:
            for call in group:
                call.stored = list(islice(stored, len(call.events)))

    def _append(self, new: Sequence[Event]) -> list[bool]:
        with self._database.write() as connection:
            before = lock_counters(connection)
            number = before.number
            seen = present(connection, KNOWN_EVENTS, {event.event_id for event in new})
            received, rows, stored = time.time(), [], []
            for event in new:
                stored.append(event.event_id not in seen)
                if stored[-1]:
                    seen.add(event.event_id)
                    number += 1
                    rows.append(_row(event, number, received))
            if rows:
                here = {row["user_id"] for row in rows}
                fresh = here - present(connection, KNOWN_USERS, here)
                if fresh:
                    connection.execute(ADD_USERS, [{"user_id": user} for user in sorted(fresh)])
                connection.execute(ADD_EVENTS, rows)
                count(connection, number, before.events + len(rows), before.users + len(fresh))
        return stored

    def history(self, user_id: str, limit: int | None = None) -> list[StoredEvent]:
        """The events of a user, oldest first; with ``limit``, only the newest ones.

        Events are ordered by their timestamp, or by the time at which they were stored if they have none, and
        then by their number.
        """
        if limit is None:
            found = self._read(HISTORY, {"user": user_id})
        else:
            found = self._read(NEWEST, {"user": user_id, "limit": _limit(limit)})
        return [StoredEvent(*row) for row in reversed(found)]

    def events_after(self, number: int, limit: int = 10_000) -> list[StoredEvent]:
        """The events with a larger number, in the order of arrival."""
        query = select(*EVENT).where(events.c.number > number).order_by(events.c.number).limit(_limit(limit))
        return [StoredEvent(*row) for row in self._read(query)]

    def deletions_after(self, number: int, limit: int = 10_000) -> list[Deletion]:
        """The deletions of users with a larger number, in order; numbers are those of `events_after`."""
        columns = (deletions.c.number, deletions.c.user_id, deletions.c.events, deletions.c.time)
        query = select(*columns).where(deletions.c.number > number).order_by(deletions.c.number)
        return [Deletion(*row) for row in self._read(query.limit(_limit(limit)))]

    def log(self, *, after: int = 0) -> Iterator[StoredEvent | Deletion]:
        """All events and deletions of users with a number larger than ``after``, by number."""
        return heapq.merge(
            _pages(self.events_after, after),
            _pages(self.deletions_after, after),
            key=lambda entry: entry.number,
        )

    def delete_user(self, user_id: str) -> int:
        """Delete the events of a user, and record that. Returns how many events were deleted."""
        check_names([user_id], "user", source="users")
        with self._database.write() as connection:
            before = lock_counters(connection)
            number = before.number + 1
            gone = connection.execute(delete(events).where(events.c.user_id == user_id)).rowcount
            known = connection.execute(delete(users).where(users.c.user_id == user_id)).rowcount
            row = {"number": number, "user_id": user_id, "events": gone, "time": time.time()}
            connection.execute(insert(deletions).values(row))
            count(connection, number, before.events - gone, before.users - known)
        return gone

    def list_users(self, *, after: str = "", limit: int = 100) -> list[str]:
        """A page of the users with events, by id; the last one is the cursor ``after`` of the next page."""
        query = select(users.c.user_id).where(users.c.user_id > after).order_by(users.c.user_id)
        return [row.user_id for row in self._read(query.limit(_limit(limit)))]

    def users(self) -> int:
        """The number of users with events."""
        return int(self._state().users)

    def count_events(self) -> int:
        """The number of events."""
        return int(self._state().events)

    @property
    def last_number(self) -> int:
        """The number of the last event or deletion."""
        return int(self._state().number)

    @property
    def version(self) -> int:
        """The version of the catalog: the number of its last change. It only grows."""
        return int(self._state().version)

    def put_item(self, item: Item) -> int:
        """Add or replace an item, and return the new version of the catalog.

        A new item is pending until `place_items`. One that has a semantic ID, or that is in the run, keeps it
        and is active, also after a removal.
        """
        return self.put_items([item])

    def put_items(self, new: Iterable[Item]) -> int:
        """Add or replace items in one transaction, and return the last version. Each item is one change."""
        rows = [check_item(item) for item in new]
        with self._database.write() as connection:
            log = ChangeLog(connection)
            for chunk in chunks(rows):
                before = states_of(connection, [item.item_id for item in chunk])
                for item in chunk:
                    old, codes = before.get(item.item_id, (None, None))
                    placed = old == "active" or codes is not None or self._in_run(item.item_id)
                    before[item.item_id] = ("active" if placed else "pending", codes)
                    log.add("put", item.item_id, describe(item))
                    log.save(item, before[item.item_id][0])
            return log.write()

    def patch_item(self, item_id: str, values: Mapping[str, object], *, base: Item | None = None) -> int:
        """Change some of title, text, image and attributes, and return the new version of the catalog.

        Attributes are merged: None removes one, and those that are not in ``values`` are kept.

        Args:
            item_id: The item.
            values: The new values.
            base: The item as it is in the run, used if the store has no row for it yet.

        Raises:
            UnknownItemError: There is no such item, or it was removed.
            UserError: A field is unknown, or its value cannot be stored.
        """
        merged = values.get("attributes")
        with self._database.write() as connection:
            log = ChangeLog(connection)
            row = connection.execute(ITEM_OF, {"item": item_id}).one_or_none()
            old = base if row is None else stored_items([row])[0].item
            if old is None or old.item_id != item_id or (row is not None and row.state == "removed"):
                raise _unknown(item_id)
            item = patched(old, values)
            log.add("patch", item_id, describe(item, [name for name in values if name != "attributes"]))
            if isinstance(merged, Mapping):  # `patched` refuses other values
                log.rows[-1]["payload"]["attributes"] = dict(merged)
            log.save(item, "active" if row is None else row.state)
            return log.write()

    def remove_item(self, item_id: str) -> int:
        """Remove an item, and return the version of the catalog. A second removal changes nothing.

        Raises:
            UnknownItemError: The item is neither in the store nor in ``run_items``.
        """
        check_names([item_id], "item", source="items")
        with self._database.write() as connection:
            log = ChangeLog(connection)
            found = states_of(connection, [item_id]).get(item_id)
            if found is not None and found[0] == "removed":
                return log.version
            if found is None and self.run_items is not None and item_id not in self.run_items:
                raise _unknown(item_id)
            log.add("remove", item_id, {})
            if found is None:
                log.save(Item(item_id), "removed")
            else:
                log.mark(item_id, state="removed")
            return log.write()

    def place_items(self, codes: Mapping[str, Sequence[int]]) -> int:
        """Give pending items their semantic IDs. They become active together, in one new version.

        Items that are not pending are skipped, because they were removed in the meantime or have an ID that
        must not change. Returns the version of the catalog, which is the old one if all were skipped.
        """
        plain = check_codes(codes)
        with self._database.write() as connection:
            log = ChangeLog(connection)
            waiting: dict[str, list[int]] = {}
            for chunk in chunks(list(plain)):
                found = states_of(connection, chunk)
                waiting |= {i: plain[i] for i in chunk if found.get(i, ("",))[0] == "pending"}
            if waiting:
                log.add("place", "", {"codes": waiting})
                for item_id, values in waiting.items():
                    log.mark(item_id, state="active", codes=to_json(values))
            return log.write()

    def change_catalog(
        self,
        catalog: str,
        run_items: Container[str],
        *,
        codes: Mapping[str, Sequence[int]] | None = None,
        models: Models | None = None,
    ) -> int:
        """Move the store to another run, and return the new version of the catalog.

        Items that are in the new run are active, those in ``codes`` too, others are pending again, and
        removed ones stay removed. Semantic IDs that belonged to the old catalog are dropped.

        Args:
            catalog: Digest of the catalog of the new run.
            run_items: The items of the new run.
            codes: Semantic IDs of the added items in the new run.
            models: The run that is served from now on, and the one before it.
        """
        plain = check_codes(codes or {})
        with self._database.write() as connection:
            log = ChangeLog(connection)
            version_of = {} if models is None else {"model_version": models.current.version}
            log.add("catalog", "", {"catalog": catalog, **version_of})
            if catalog != self._catalog:
                log.place_again(plain, run_items)
            if models is not None:
                set_meta(connection, "models", to_json(asdict(models)))
            set_meta(connection, "catalog", catalog)
            version = log.write()
        self._catalog, self.run_items = catalog, run_items
        return version

    @property
    def models(self) -> Models | None:
        """The run that was chosen last, and the one before it; None if none was chosen."""
        found = self._meta("models")
        return None if found is None else parse_json(found, Models, name="the store's choice of a model")

    @property
    def created(self) -> str:
        """Identifies the store, also in its copies: when it was created."""
        return self._meta("created") or ""

    def _meta(self, name: str) -> str | None:
        found = self._read(select(meta.c.value).where(meta.c.name == name))
        return found[0].value if found else None

    def get_item(self, item_id: str) -> StoredItem | None:
        """An item with its image, also a removed one. None: the store has no row for it."""
        found = self._read(ITEM_OF, {"item": item_id})
        return stored_items(found)[0] if found else None

    def count_items(self, in_state: State) -> int:
        """The number of items that have a row and are in a state."""
        query = select(func.count()).select_from(items).where(items.c.state == in_state)
        return int(self._read(query)[0][0])

    def list_items(
        self,
        *,
        after: str = "",
        limit: int = 100,
        states: Collection[State] = STATES,
        images: bool = False,
    ) -> list[StoredItem]:
        """A page of items by id; the last id is the cursor ``after`` of the next page.

        Args:
            after: Only items with larger ids, compared by code points.
            limit: Size of the page.
            states: Only items in these states.
            images: Whether to read the images.
        """
        image = items.c.image if images else null().label("image")
        query = select(*ITEM, image).where(items.c.item_id > after).order_by(items.c.item_id)
        if set(states) != set(STATES):
            query = query.where(items.c.state.in_(sorted(states)))
        return stored_items(self._read(query.limit(_limit(limit))))

    def items(self, *, states: Collection[State] = STATES, images: bool = False) -> Iterator[StoredItem]:
        """All items by id, read in pages: those that are added meanwhile may be missing, none is repeated."""
        after = ""
        while page := self.list_items(after=after, limit=PAGE, states=states, images=images):
            yield from page
            after = page[-1].item.item_id

    def changes_after(self, version: int, limit: int = 1000) -> list[Change]:
        """The changes of the catalog after a version, in order.

        Raises:
            DroppedError: Some of them are too old to be kept.
        """
        columns = (changes.c.version, changes.c.kind, changes.c.item_id, changes.c.payload, changes.c.time)
        query = select(*columns).where(changes.c.version > version).order_by(changes.c.version)
        found = self._read(query.limit(_limit(limit)))
        if found and found[0].version != version + 1:  # versions have no gaps
            raise DroppedError(
                f"the changes {version + 1} to {found[0].version - 1} of the catalog are not kept",
                fix="read all items again, then the changes after the version that the catalog had before",
            )
        return [
            Change(row.version, row.kind, row.item_id, json.loads(row.payload), row.time) for row in found
        ]

    @contextmanager
    def snapshot(self) -> Iterator[Store]:
        """The store as it is now, to be read by one thread; later changes do not reach it."""
        with self._database.snapshot() as frozen:
            yield Store(frozen, self._catalog, self.run_items)

    def backup(self, path: Path | str) -> None:
        """Write a copy of the store to one file, completely or not at all, while others read and write.

        The copy has all that was committed before the call. `cemg.serve.backup.restore` brings it back.

        Raises:
            UserError: The store is in PostgreSQL, which has pg_dump.
            StorageError: The disk is full or fails.
        """
        self._database.backup(path)

    def _in_run(self, item_id: str) -> bool:
        return self.run_items is not None and item_id in self.run_items

    def _state(self) -> Any:
        return self._read(COUNTERS)[0]

    def _read(self, query: Select[Any], values: Mapping[str, object] | None = None) -> Sequence[Any]:
        with self._database.read() as connection:
            return connection.execute(query, values).all()


def _row(event: Event, number: int, received: float) -> dict[str, Any]:
    timestamp = None if event.timestamp is None else float(event.timestamp)
    return {
        "number": number,
        "event_id": event.event_id,
        "user_id": event.user_id,
        "item_id": event.item_id,
        "timestamp": timestamp,
        "type": event.type,
        "received": received,
        "time": received if timestamp is None else timestamp,
    }


def _pages(read: Callable[[int], Sequence[T]], number: int) -> Iterator[T]:
    """All entries of a log after a number."""
    while page := read(number):
        yield from page
        number = page[-1].number


def _limit(limit: int) -> int:
    if limit < 0:
        raise UserError(f"limit {limit} is negative", fix="use a positive number")
    return limit


def _unknown(item_id: str) -> UnknownItemError:
    return UnknownItemError(f"there is no item {item_id!r}", fix="add it first")
