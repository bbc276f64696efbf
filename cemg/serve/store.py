"""The durable store of a service: events of users, added and changed items, and a numbered log of changes.

A call that writes returns when its rows are on the disk; a call that raises stores nothing, unless the disk
fails, see `cemg.serve.database`. Any number of threads and processes may use a store at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, func, null, select

from cemg.serve.database import BusyError, Claim, Database, Synchronous
from cemg.serve.event_store import EventStore, limit_of
from cemg.serve.log import (
    ITEM,
    ITEM_OF,
    ChangeLog,
    chunks,
    states_of,
    stored_items,
)
from cemg.serve.rows import (
    STATES,
    Change,
    DroppedError,
    Item,
    Models,
    ShadowModel,
    State,
    StoredItem,
    UnknownItemError,
    check_codes,
    check_item,
    check_names,
    describe,
    patched,
    to_json,
)
from cemg.serve.schema import changes, check_catalog, items, meta, prepare, set_meta
from cemg.storage.read import parse_json

Check = Callable[[], None]
PAGE = 1_000  # items in one query of an iteration
CHANGES_AT_ONCE = 100  # changes in one query
CHANGE_BYTES = 2_000_000  # of changes, after which no further query is made


class Store(EventStore):
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
        required: Digest of the catalog that the store must belong to when items are added or changed; ""
            does not require any.
    """

    def __init__(self, database: Database, run_items: Container[str] | None) -> None:
        super().__init__(database)
        self.run_items, self.required = run_items, ""

    @classmethod
    def open(
        cls,
        url_or_path: str | Path,
        *,
        catalog: str = "",
        run_items: Container[str] | None = None,
        synchronous: Synchronous = "FULL",
        create: bool = True,
        claim: Claim | None = None,
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
            claim: "alone": no other process may claim the store until it is closed. A service does so, as it
                does not see the changes of others. "replica": only others that claim it as replicas.

        Raises:
            UserError: The store belongs to another catalog, is newer than this version, is not a store, is
                missing, or cannot be reached.
            BusyError: Other processes have claimed the store.
        """
        database = Database.open(url_or_path, synchronous=synchronous, create=create, claim=claim)
        try:
            with database.write() as connection:
                prepare(connection, catalog=catalog, where=database.where)
        except BaseException:
            database.close()
            raise
        return cls(database, run_items)

    def check_catalog(self, catalog: str) -> None:
        """Raise UserError if the store belongs to another catalog than that with this digest."""
        check_catalog(self.catalog, catalog, where=self._database.where)

    def adopt(self, catalog: str, run_items: Container[str]) -> None:
        """Let the store belong to a catalog, unless it belongs to one.

        Args:
            catalog: Digest of the catalog of the run.
            run_items: See the attribute.

        Raises:
            UserError: It belongs to another one.
        """
        with self._database.write() as connection:
            prepare(connection, catalog=catalog, where=self._database.where)
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
        return self._meta("catalog") or ""

    def position(self) -> tuple[int, int]:
        """The version of the catalog, and the number of the last event or deletion."""
        state = self._state()
        return int(state.version), int(state.number)

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

    def put_items(self, new: Iterable[Item], *, check: Check | None = None) -> int:
        """Add or replace items in one transaction, and return the last version. Each item is one change.

        Args:
            new: The items.
            check: Called when no other process can write; if it raises, nothing is stored.
        """
        rows = [check_item(item) for item in new]
        with self._database.write() as connection:
            log = self._change_log(connection, check)
            for chunk in chunks(rows):
                before = states_of(connection, [item.item_id for item in chunk])
                for item in chunk:
                    old, codes = before.get(item.item_id, (None, None))
                    placed = old == "active" or codes is not None or self._in_run(item.item_id)
                    before[item.item_id] = ("active" if placed else "pending", codes)
                    log.add("put", item.item_id, describe(item))
                    log.save(item, before[item.item_id][0])
            return log.write()

    def patch_item(
        self,
        item_id: str,
        values: Mapping[str, object],
        *,
        base: Item | None = None,
        check: Check | None = None,
    ) -> int:
        """Change some of title, text, image and attributes, and return the new version of the catalog.

        Attributes are merged: None removes one, and those that are not in ``values`` are kept.

        Args:
            item_id: The item.
            values: The new values.
            base: The item as it is in the run, used if the store has no row for it yet.
            check: As in `put_items`.

        Raises:
            UnknownItemError: There is no such item, or it was removed.
            UserError: A field is unknown, or its value cannot be stored.
        """
        merged = values.get("attributes")
        with self._database.write() as connection:
            log = self._change_log(connection, check)
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

    def remove_item(self, item_id: str, *, base: Item | None = None) -> int:
        """Remove an item, and return the version of the catalog. A second removal changes nothing.

        Args:
            item_id: The item.
            base: As in `patch_item`.

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
                log.save(Item(item_id) if base is None else base, "removed")
            else:
                log.mark(item_id, state="removed")
            return log.write()

    def place_items(self, codes: Mapping[str, Sequence[int]], *, check: Check | None = None) -> int:
        """Give pending items their semantic IDs. They become active together, in one new version.

        Items that are not pending are skipped, because they were removed in the meantime or have an ID that
        must not change. Returns the version of the catalog, which is the old one if all were skipped.
        """
        plain = check_codes(codes)
        with self._database.write() as connection:
            log = self._change_log(connection, check)
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
            if catalog != _catalog_of(connection):
                log.place_again(plain, run_items)
            if models is not None:
                set_meta(connection, "models", to_json(asdict(models)))
            set_meta(connection, "catalog", catalog)
            version = log.write()
        self.run_items = run_items
        return version

    @property
    def models(self) -> Models | None:
        """The run that was chosen last, and the one before it; None if none was chosen."""
        found = self._meta("models")
        return None if found is None else parse_json(found, Models, name="the store's choice of a model")

    @property
    def shadow(self) -> ShadowModel | None:
        """The run that is compared with the one that answers, also after a restart; None if there is none."""
        found = self._meta("shadow")
        return parse_json(found, ShadowModel, name="the store's choice of a shadow") if found else None

    def set_shadow(self, shadow: ShadowModel | None) -> None:
        """Store which run is compared from now on."""
        with self._database.write() as connection:
            set_meta(connection, "shadow", "" if shadow is None else to_json(asdict(shadow)))

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
        return stored_items(self._read(query.limit(limit_of(limit))))

    def items(self, *, states: Collection[State] = STATES, images: bool = False) -> Iterator[StoredItem]:
        """All items by id, read in pages: those that are added meanwhile may be missing, none is repeated."""
        after = ""
        while page := self.list_items(after=after, limit=PAGE, states=states, images=images):
            yield from page
            after = page[-1].item.item_id

    def changes_after(self, version: int, limit: int = 1000) -> list[Change]:
        """The changes of the catalog after a version, in order: fewer than ``limit`` if they are large.

        Raises:
            DroppedError: Some of them are too old to be kept.
        """
        columns = (changes.c.version, changes.c.kind, changes.c.item_id, changes.c.payload, changes.c.time)
        found, last, size, limit = list[Row[Any]](), version, 0, limit_of(limit)
        while len(found) < limit and size < CHANGE_BYTES:
            count = min(limit - len(found), CHANGES_AT_ONCE)
            query = select(*columns).where(changes.c.version > last).order_by(changes.c.version)
            some = self._read(query.limit(count))
            found += some
            if len(some) < count:
                break
            last, size = some[-1].version, size + sum(len(row.payload) for row in some)
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
            yield Store(frozen, self.run_items)

    def backup(self, path: Path | str) -> None:
        """Write a copy of the store to one file, completely or not at all, while others read and write.

        The copy has all that was committed before the call. `cemg.serve.backup.restore` brings it back.

        Raises:
            UserError: The store is in PostgreSQL, which has pg_dump.
            StorageError: The disk is full or fails.
        """
        self._database.backup(path)

    def _change_log(self, connection: Connection, check: Check | None) -> ChangeLog:
        """The log of a transaction, if the store belongs to the required catalog and ``check`` agrees."""
        log = ChangeLog(connection)  # which locks, so the catalog is the same until the end
        if self.required and _catalog_of(connection) != self.required:
            raise BusyError(
                "the store has moved to another model, which this process is loading; nothing was stored",
                fix="try again",
            )
        if check is not None:
            check()
        return log

    def _in_run(self, item_id: str) -> bool:
        return self.run_items is not None and item_id in self.run_items


def _catalog_of(connection: Connection) -> str:
    return str(connection.execute(select(meta.c.value).where(meta.c.name == "catalog")).scalar_one())


def _unknown(item_id: str) -> UnknownItemError:
    return UnknownItemError(f"there is no item {item_id!r}", fix="add it first")
