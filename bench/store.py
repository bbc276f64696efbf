"""The store of the service on SQLite: events per second, the history of a user, changes of items.

python bench/store.py [--events 1000000] [--folder DIR] [--json PATH] [--plot PATH]

The store is filled with events of users with 100 events each, in random order. The folder is where the file
lies, so that its disk is measured. ``floor_ms`` is the time of one write and flush of a page. The peer writes
the same rows with the module sqlite3 into one table with the same indexes and settings.
"""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
import statistics
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

from harness import Report, apply_options, make_parser

from cemg.serve.rows import Event, Item
from cemg.serve.store import Store

PER_USER, ITEMS, BATCH, THREADS = 100, 12_000, 100, 16
TABLE = """
CREATE TABLE events (number INTEGER PRIMARY KEY, event_id TEXT NOT NULL UNIQUE, user_id TEXT, item_id TEXT,
    timestamp REAL, type TEXT, received REAL, time REAL);
CREATE INDEX of_user ON events (user_id, time, number);
"""


def draw(count: int, users: int, rng: random.Random) -> list[Event]:
    """Events of random users, with ids as long as a UUID."""

    def event(number: int) -> Event:
        user, item = f"user-{rng.randrange(users)}", f"item-{rng.randrange(ITEMS)}"
        return Event(f"{rng.getrandbits(128):032x}", user, item, 1e9 + number)

    return [event(number) for number in range(count)]


def flush_ms(folder: Path) -> float:
    """The median time of writing and flushing a page of 4 KiB."""
    times = []
    with (folder / "flush").open("wb", buffering=0) as file:
        for _ in range(100):
            begun = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1000


class Peer:
    """The module sqlite3 with one table."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"cache_size={-64 * 1024}"):
            self.connection.execute(f"PRAGMA {pragma}")
        self.connection.executescript(TABLE)

    def append(self, events: list[Event]) -> None:
        """Insert events in one transaction."""
        rows = [(e.event_id, e.user_id, e.item_id, e.timestamp, e.type, 0.0, e.timestamp) for e in events]
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany("INSERT INTO events VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", rows)
        self.connection.execute("COMMIT")

    def history(self, user: str) -> list[tuple[object, ...]]:
        """The rows of a user."""
        query = "SELECT * FROM events WHERE user_id = ? ORDER BY time, number"
        return self.connection.execute(query, (user,)).fetchall()


def append_in_threads(store: Store, calls: list[list[Event]]) -> None:
    """One call per thread, at the same time."""
    threads = [threading.Thread(target=store.append_events, args=(events,)) for events in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run(report: Report, folder: Path, count: int) -> None:
    """Adds all rows."""
    rng, users = random.Random(0), max(count // PER_USER, 1)
    filled = draw(count, users, rng)
    floor = flush_ms(folder)
    peer = Peer(folder / "peer.sqlite")
    with Store.open(folder / "store.sqlite") as store, closing(peer.connection):
        begun = time.perf_counter()
        for start in range(0, count, 5000):
            store.append_events(filled[start : start + 5000])
            peer.append(filled[start : start + 5000])
        print(f"{count:,} events stored twice in {time.perf_counter() - begun:.0f} s", flush=True)
        names = [f"user-{rng.randrange(users)}" for _ in range(1000)]
        for name in names[:20]:
            assert [e.event_id for e in store.history(name)] == [row[1] for row in peer.history(name)]
        equal, turn = "rows of the peer", itertools.cycle(names)
        for size in (1, BATCH):
            report.case(
                f"append {size}",
                {"store": lambda size=size: store.append_events(draw(size, users, rng))},
                {"sqlite3": lambda size=size: peer.append(draw(size, users, rng))},
                equal, floor, events=size,
            )  # fmt: skip
        report.case(
            f"append 1 in {THREADS} threads",
            {"store": lambda: append_in_threads(store, [draw(1, users, rng) for _ in range(THREADS)])},
            {}, equal, floor, events=THREADS,
        )  # fmt: skip
        report.case(
            f"history {PER_USER}",
            {"store": lambda: store.history(next(turn))},
            {"sqlite3": lambda: peer.history(next(turn))},
            equal,
        )
        store.put_items(Item(f"item-{n}", "Title", "text " * 40, None, {"price": 1.0}) for n in range(1000))
        number = itertools.cycle(range(1000))

        def patch() -> None:
            store.patch_item(f"item-{next(number)}", {"attributes": {"price": 2.0}})

        report.case("patch", {"store": patch}, {}, equal, floor)
        report.case("version", {"store": lambda: store.version}, {}, equal)


def main() -> None:
    parser = make_parser(__doc__, rounds=100)
    parser.add_argument("--events", type=int, default=1_000_000, help="events in the store")
    parser.add_argument("--folder", type=Path, help="where the files are written")
    options = parser.parse_args()
    report = Report("store", options, apply_options(options))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(report, Path(folder), options.events)
    report.finish()


if __name__ == "__main__":
    main()
