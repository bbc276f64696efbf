"""One transaction on the catalog: its numbered changes, and the rows that they write."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import BindParameter, Connection, Row, Select, bindparam, delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from cemg.serve.rows import Item, Kind, State, StoredItem, to_json
from cemg.serve.schema import changes, events, items, state, users

KEPT = 100_000  # changes in the log; older ones are dropped
DROPPED_AT_ONCE = 1_000  # changes, so that few transactions delete
CHUNK = 500  # ids in one query, below the limits of SQLite and PostgreSQL
ITEM = [
    *(column for column in items.c if column.name != "image"),
    items.c.image.is_not(None).label("has_image"),
]
ATTRIBUTES, CODES = (list(items.c.keys()).index(name) for name in ("attributes", "codes"))
T = TypeVar("T")
COUNTERS, LOCKED = select(state), select(state).with_for_update()
COUNT = update(state).values({name: bindparam(name) for name in ("number", "events", "users")})
NAMES: BindParameter[Any] = bindparam("names", expanding=True)
KNOWN_EVENTS = select(events.c.event_id).where(events.c.event_id.in_(NAMES))
KNOWN_USERS = select(users.c.user_id).where(users.c.user_id.in_(NAMES))
STATES_OF = select(items.c.item_id, items.c.state, items.c.codes).where(items.c.item_id.in_(NAMES))
ITEM_OF = select(*ITEM, items.c.image).where(items.c.item_id == bindparam("item"))
ADD_CHANGES = insert(changes)
SET_VERSION = update(state).values(version=bindparam("version"))


def _save_items(new: sqlite.Insert | postgresql.Insert) -> sqlite.Insert | postgresql.Insert:
    kept = ("item_id", "codes")
    values = {column.name: new.excluded[column.name] for column in items.c if column.name not in kept}
    return new.on_conflict_do_update(index_elements=["item_id"], set_=values)


SAVE_ITEMS = {
    "sqlite": _save_items(sqlite.insert(items)),
    "postgresql": _save_items(postgresql.insert(items)),
}


class ChangeLog:
    """The changes of one transaction: it numbers them, and writes them in few statements."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.version = int(lock_counters(connection).version)
        self.rows: list[dict[str, Any]] = []
        self._items: dict[str, dict[str, Any]] = {}
        self._marks: list[dict[str, Any]] = []
        self._time = time.time()

    def add(self, kind: Kind, item_id: str, payload: dict[str, Any]) -> None:
        """Begin the next change."""
        self.version += 1
        row = {"version": self.version, "kind": kind, "item_id": item_id, "payload": payload}
        self.rows.append(row | {"time": self._time})

    def save(self, item: Item, now_is: State) -> None:
        """Insert or replace an item, but keep its codes."""
        self._items[item.item_id] = {
            "item_id": item.item_id, "title": item.title, "text": item.text,
            "attributes": to_json(dict(item.attributes)), "state": now_is, "version": self.version,
            "time": self._time, "image": item.image,
        }  # fmt: skip

    def mark(self, item_id: str, **values: object) -> None:
        """Change the state or the codes of an item."""
        stamp = {"version": self.version, "time": self._time}
        self._marks.append({"key": item_id, **values, **stamp})

    def place_again(self, codes: Mapping[str, list[int]], run_items: Container[str]) -> None:
        """Give all items the states and semantic IDs that they have in another run, in the next changes."""
        before = self.connection.execute(select(items.c.item_id, items.c.state, items.c.codes)).all()
        added = [row for row in before if row.item_id in codes and row.item_id not in run_items]
        if added:
            self.add("place", "", {"codes": {row.item_id: codes[row.item_id] for row in added}})
        placed = {row.item_id: to_json(codes[row.item_id]) for row in added}
        for row in before:
            new = placed.get(row.item_id)
            here: State = "active" if new is not None or row.item_id in run_items else "pending"
            now: State = "removed" if row.state == "removed" else here
            if (now, new) != (row.state, row.codes):
                self.mark(row.item_id, state=now, codes=new)

    def write(self) -> int:
        """Write all, and return the version."""
        run = self.connection.execute
        if self._items:
            run(SAVE_ITEMS[self.connection.dialect.name], list(self._items.values()))
        if self._marks:
            names = [name for name in self._marks[0] if name != "key"]
            key = items.c.item_id == bindparam("key")
            run(update(items).where(key).values({name: bindparam(name) for name in names}), self._marks)
        if self.rows:
            run(ADD_CHANGES, [row | {"payload": to_json(row["payload"])} for row in self.rows])
            run(SET_VERSION, {"version": self.version})
            if self.version // DROPPED_AT_ONCE > (self.version - len(self.rows)) // DROPPED_AT_ONCE:
                run(delete(changes).where(changes.c.version <= self.version - KEPT))
        return self.version


def lock_counters(connection: Connection) -> Row[Any]:
    """The counters, locked until the end of the transaction."""
    return connection.execute(LOCKED).one()


def count(connection: Connection, number: int, events: int, users: int) -> None:
    """Set the counters of the events."""
    connection.execute(COUNT, {"number": number, "events": events, "users": users})


def present(connection: Connection, query: Select[Any], names: Collection[str]) -> set[str]:
    """The names that ``query`` finds: `KNOWN_EVENTS` or `KNOWN_USERS`."""
    found: set[str] = set()
    for chunk in chunks(sorted(names)):
        found.update(connection.execute(query, {"names": chunk}).scalars())
    return found


def states_of(connection: Connection, names: Sequence[str]) -> dict[str, tuple[State, str | None]]:
    """State and codes (as JSON) of the items that have a row."""
    found = connection.execute(STATES_OF, {"names": names})
    return {row.item_id: (row.state, row.codes) for row in found}


def stored_items(rows: Sequence[Any]) -> list[StoredItem]:
    """Items from rows of ITEM and an image, which may be null.

    The JSON of all rows is parsed by one call, because a start reads every item.
    """
    attributes = json.loads(f"[{','.join(row[ATTRIBUTES] for row in rows)}]")
    codes = json.loads(f"[{','.join(row[CODES] or 'null' for row in rows)}]")
    found = []
    for row, values, levels in zip(rows, attributes, codes, strict=True):
        item_id, title, text, _, state, _, version, time, has_image, image = row
        item = Item(item_id, title, text, None if image is None else bytes(image), values)
        placed = None if levels is None else tuple(levels)
        found.append(StoredItem(item, state, placed, version, time, bool(has_image)))
    return found


def chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]
