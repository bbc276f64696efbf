"""The events of the users of a service in its store, and the deletions of users."""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Integer, Select, bindparam, delete, insert, select

from cemg.errors import UserError
from cemg.serve.database import Database
from cemg.serve.log import COUNTERS, KNOWN_EVENTS, KNOWN_USERS, count, lock_counters, present
from cemg.serve.rows import Deletion, Event, StoredEvent, check_events, check_names
from cemg.serve.schema import deletions, events, users

T = TypeVar("T", StoredEvent, Deletion)
GROUP = 5_000  # events of several calls in one transaction
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


class EventStore:
    """The events of a store.

    Args:
        database: Where they are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: deque[_Append] = deque()
        self._turn = threading.Condition()
        self._appending = False  # whether a thread commits for those that wait

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
            found = self._read(NEWEST, {"user": user_id, "limit": limit_of(limit)})
        return [StoredEvent(*row) for row in reversed(found)]

    def events_after(self, number: int, limit: int = 10_000) -> list[StoredEvent]:
        """The events with a larger number, in the order of arrival."""
        query = (
            select(*EVENT).where(events.c.number > number).order_by(events.c.number).limit(limit_of(limit))
        )
        return [StoredEvent(*row) for row in self._read(query)]

    def deletions_after(self, number: int, limit: int = 10_000) -> list[Deletion]:
        """The deletions of users with a larger number, in order; numbers are those of `events_after`."""
        columns = (deletions.c.number, deletions.c.user_id, deletions.c.events, deletions.c.time)
        query = select(*columns).where(deletions.c.number > number).order_by(deletions.c.number)
        return [Deletion(*row) for row in self._read(query.limit(limit_of(limit)))]

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
        return [row.user_id for row in self._read(query.limit(limit_of(limit)))]

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


def limit_of(limit: int) -> int:
    if limit < 0:
        raise UserError(f"limit {limit} is negative", fix="use a positive number")
    return limit
