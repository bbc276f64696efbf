"""The store of the service: nothing acknowledged is lost, versions only grow, and errors say what to do."""

from __future__ import annotations

import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cemg.errors import DamagedError, UserError
from cemg.serve import database, schema
from cemg.serve.database import BusyError
from cemg.serve.rows import MAX_ID, MAX_IMAGE, MAX_TEXT
from cemg.serve.store import Event, Item, Store, UnknownItemError
from cemg.storage.files import StorageError

WRITER = Path(__file__).with_name("writer.py")
KILLS = int(os.environ.get("CEMG_TEST_KILLS", "30"))


def event(name: str, user: str = "ann", item: str = "item", timestamp: float | None = None) -> Event:
    return Event(name, user, item, timestamp)


def ids(events) -> list[str]:
    return [each.event_id for each in events]


# Events


def test_an_event_with_a_known_id_is_not_stored_again(store):
    first, second = event("e1", timestamp=1.0), event("e2", timestamp=2.0)
    assert store.append_events([first, second]) == [True, True]
    assert store.append_events([replace(first, item_id="other"), event("e3")]) == [False, True]
    assert [each.item_id for each in store.history("ann")] == ["item"] * 3
    assert store.count_events() == 3


def test_an_event_that_is_twice_in_one_call_is_stored_once(store):
    assert store.append_events([event("e1"), event("e2"), event("e1")]) == [True, True, False]
    assert ids(store.events_after(0)) == ["e1", "e2"]
    assert store.append_events([]) == []


def test_a_history_is_in_the_order_of_time_then_of_arrival(store, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 50.0)
    store.append_events([event("none-1"), event("late", timestamp=99), event("tie-1", timestamp=7)])
    store.append_events(
        [event("tie-2", timestamp=7.0), event("none-2"), event("before-1970", timestamp=-1.0)]
    )
    store.append_events([event("other", "bob")])
    history = store.history("ann")
    assert ids(history) == ["before-1970", "tie-1", "tie-2", "none-1", "none-2", "late"]
    assert [each.time for each in history] == [-1.0, 7.0, 7.0, 50.0, 50.0, 99.0]
    assert history[1].timestamp == 7.0 and history[3].timestamp is None and history[1].received == 50.0
    assert ids(store.history("ann", limit=2)) == ["none-2", "late"]
    assert store.history("ann", limit=0) == [] and store.history("nobody") == []


def test_a_replay_sees_events_in_the_order_of_arrival(store):
    store.append_events([event(f"e{n}", timestamp=float(-n)) for n in range(10)])
    first = store.events_after(0, limit=4)
    rest = store.events_after(first[-1].number)
    assert ids([*first, *rest]) == [f"e{n}" for n in range(10)]
    assert store.events_after(rest[-1].number) == [] and store.last_number == rest[-1].number


def test_a_deletion_of_a_user_is_in_the_order_of_the_events(store):
    store.append_events([event("a1"), event("b1", "bob"), event("a2")])
    assert store.delete_user("ann") == 2
    assert store.history("ann") == [] and store.users() == 1 and store.count_events() == 1
    store.append_events([event("a3")])
    deletion = store.deletions_after(0)[0]
    assert (deletion.user_id, deletion.events) == ("ann", 2)
    assert store.history("bob")[0].number < deletion.number < store.history("ann")[0].number
    assert store.delete_user("nobody") == 0
    assert [each.user_id for each in store.deletions_after(deletion.number)] == ["nobody"]


def test_numbers_are_not_used_again_after_a_deletion_and_a_restart(location):
    with Store.open(location) as store:
        store.append_events([event("e1"), event("e2")])
        store.delete_user("ann")
    with Store.open(location) as store:
        store.append_events([event("e3")])
        assert store.events_after(0)[0].number == 4


def test_deleted_events_are_not_in_the_files_any_more(tmp_path):
    path = tmp_path / "store.sqlite"
    with Store.open(path) as store:
        store.append_events([event(f"secret-{n}", "ann") for n in range(200)])
        store.delete_user("ann")
    assert b"secret-" not in path.read_bytes()


def test_users_are_listed_in_pages(store):
    names = ["Zoë", "ann", "bob", "Émile", "😀", "ann "]
    store.append_events([event(f"e{n}", name) for n, name in enumerate([*names, "bob"])])
    found, after = [], ""
    while page := store.list_users(after=after, limit=2):
        found, after = found + page, page[-1]
    assert found == sorted(names) and store.users() == len(names)


def test_more_events_than_one_query_has_names_for(store):
    events = [event(f"e{n}", f"user-{n % 1500}") for n in range(2000)]
    assert all(store.append_events(events)) and store.users() == 1500
    assert not any(store.append_events(events))


# Items


def test_an_added_item_is_pending_until_it_is_placed(store):
    item = Item(
        "new", "Title", "Text", b"\x89PNG\x00", {"price": 9.5, "stock": 3, "sale": True, "tags": ["a", "ä"]}
    )
    assert store.put_item(item) == 1
    found = store.get_item("new")
    assert (found.item, found.state, found.codes, found.version) == (item, "pending", None, 1)
    assert store.put_items([Item("b"), Item("a")]) == 3
    assert store.place_items({"new": [1, 2, 3], "a": [4, 5, 6], "unknown": [7]}) == 4
    assert [(i.item.item_id, i.state, i.codes) for i in store.list_items()] == [
        ("a", "active", (4, 5, 6)), ("b", "pending", None), ("new", "active", (1, 2, 3)),
    ]  # fmt: skip
    assert [i.item.item_id for i in store.items(states=["pending"])] == ["b"]
    assert store.get_item("unknown") is None


def test_codes_of_a_placed_item_never_change(store):
    store.put_item(Item("new", text="old text"))
    store.place_items({"new": [1, 2]})
    assert store.place_items({"new": [3, 4]}) == 2 and store.version == 2
    store.put_item(Item("new", text="new text"))
    assert (store.get_item("new").state, store.get_item("new").codes) == ("active", (1, 2))
    store.remove_item("new")
    assert store.place_items({"new": [5, 6]}) == store.version
    store.put_item(Item("new"))
    assert (store.get_item("new").state, store.get_item("new").codes) == ("active", (1, 2))


def test_an_item_that_was_removed_before_it_was_placed_is_pending_when_it_is_added_again(store):
    store.put_item(Item("new"))
    store.remove_item("new")
    assert store.place_items({"new": [1]}) == store.version == 2
    store.put_item(Item("new"))
    assert store.get_item("new").state == "pending"


def test_an_item_of_the_run_has_a_row_once_it_is_changed(location, open_store):
    store = open_store(location, run_items={"old-1", "old-2", "old-3"})
    assert store.get_item("old-1") is None
    store.remove_item("old-1")
    assert (store.get_item("old-1").state, store.get_item("old-1").codes) == ("removed", None)
    store.put_item(Item("old-1", "again"))
    store.put_item(Item("old-2", "replaced"))
    store.patch_item(
        "old-3", {"attributes": {"stock": 0}}, base=Item("old-3", "Title", attributes={"price": 1})
    )
    assert {i.state for i in store.items()} == {"active"}
    assert store.get_item("old-3").item == Item("old-3", "Title", attributes={"price": 1, "stock": 0})
    with pytest.raises(UnknownItemError, match="no item 'missing'"):
        store.remove_item("missing")


def test_without_the_items_of_the_run_each_removal_is_recorded(store):
    assert store.remove_item("maybe") == 1
    assert store.remove_item("maybe") == 1, "the second removal changes nothing"
    assert store.get_item("maybe").state == "removed"


def test_a_patch_keeps_what_it_does_not_name(store):
    store.put_item(Item("a", "Title", "Text", b"image", {"price": 1, "stock": 2, "tags": ["x"]}))
    store.patch_item("a", {"title": "New", "attributes": {"price": 3.5, "stock": None}})
    assert store.get_item("a").item == Item("a", "New", "Text", b"image", {"price": 3.5, "tags": ["x"]})
    store.patch_item("a", {"image": None})
    assert not store.get_item("a").has_image
    for values, problem in [
        ({"codes": [1]}, "'codes' cannot be changed"),
        ({"title": 3}, "not text"),
        ({"attributes": {"x": {}}}, "attribute 'x'"),
        ({"attributes": 1}, "not an object"),
    ]:
        with pytest.raises(UserError, match=problem):
            store.patch_item("a", values)
    store.remove_item("a")
    for missing in ("a", "b"):
        with pytest.raises(UnknownItemError):
            store.patch_item(missing, {"title": "x"})
    assert store.version == 4


def test_the_log_of_changes_tells_a_replica_everything(store):
    store.put_item(Item("a", "T", "Text", b"image", {"p": 1}))
    store.put_item(Item("b"))
    store.place_items({"a": [1], "b": [2]})
    store.patch_item("a", {"attributes": {"p": None}})
    store.remove_item("b")
    assert [(c.version, c.kind, c.item_id, c.payload) for c in store.changes_after(0)] == [
        (1, "put", "a", {"title": "T", "text": "Text", "image": True, "attributes": {"p": 1}}),
        (2, "put", "b", {"title": "", "text": "", "image": False, "attributes": {}}),
        (3, "place", "", {"codes": {"a": [1], "b": [2]}}),
        (4, "patch", "a", {"attributes": {"p": None}}),
        (5, "remove", "b", {}),
    ]
    assert [c.version for c in store.changes_after(2, limit=2)] == [3, 4]
    assert store.changes_after(5) == []


def test_versions_grow_over_restarts_and_removals(location):
    seen = []
    for name in "abc":
        with Store.open(location) as store:
            assert store.version == (seen[-1] if seen else 0)
            seen += [store.put_item(Item(name)), store.remove_item(name), store.put_item(Item(name))]
    assert seen == list(range(1, 10))


def test_one_call_that_puts_an_item_twice_keeps_the_last(store):
    assert store.put_items([Item("a", "1"), Item("b"), Item("a", "2")]) == 3
    assert (store.get_item("a").item.title, store.get_item("a").version) == ("2", 3)
    assert store.put_items([]) == 3 and store.place_items({}) == 3


def test_pages_of_items_are_complete_while_items_are_added(store):
    before = {f"item-{n:03}" for n in range(0, 300, 2)}
    store.put_items([Item(name, image=b"x") for name in before])
    found, after, number = [], "", 1
    while page := store.list_items(after=after, limit=7):
        found, after = found + [i.item.item_id for i in page], page[-1].item.item_id
        store.put_items([Item(f"item-{(number * 37) % 300 | 1:03}"), Item(f"added-{number}")])
        number += 1
    assert found == sorted(found) and len(set(found)) == len(found) and before <= set(found)
    page = store.list_items(limit=1000)
    assert {i.item.image for i in page} == {None} and sum(i.has_image for i in page) == 150
    assert sum(i.item.image is not None for i in store.items(images=True)) == 150
    assert store.list_items(states=[]) == []


def test_another_run_makes_added_items_pending_again(location):
    with Store.open(location, catalog="old") as store:
        store.put_items([Item("added"), Item("trained"), Item("gone")])
        store.place_items({"added": [1], "trained": [2], "gone": [3]})
        store.remove_item("gone")
        version = store.change_catalog("new", {"trained"})
        assert {i.item.item_id: (i.state, i.codes) for i in store.items()} == {
            "added": ("pending", None), "trained": ("active", None), "gone": ("removed", None),
        }  # fmt: skip
        assert (store.changes_after(version - 1)[0].kind, store.catalog) == ("catalog", "new")
    Store.open(location, catalog="new").close()


# Kills, failing disks, several processes


class Kills:
    """A process that writes, and is killed at random moments."""

    def __init__(self, location: str) -> None:
        self.events: set[str] = set()
        self.items: dict[str, int] = {}
        self.process = subprocess.Popen(
            [sys.executable, WRITER, location], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def round(self, prefix: str, calls: int, delay: float) -> int:
        """Kill a writer some time after it acknowledged ``calls``. Returns how many it did in total."""
        self.process.stdin.write(f"{prefix}\n".encode())
        child = int(self._line().split()[1])
        for _ in range(calls):
            self._note(self._line())
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        while (line := self._line()) != "end":
            self._note(line)
            calls += 1
        return calls

    def _note(self, line: str) -> None:
        kind, *words = line.split()
        assert kind in ("events", "item"), line
        if kind == "events":
            self.events |= set(words)
        else:
            self.items[words[0]] = int(words[1])

    def _line(self) -> str:
        assert select.select([self.process.stdout], [], [], 60)[0], "the writer does not answer"
        return self.process.stdout.readline().decode().strip()


@pytest.mark.medium
def test_nothing_acknowledged_is_lost_by_kills_at_random_moments(location, new_location):
    """CEMG_TEST_KILLS is the number of kills."""
    rng = random.Random(1)
    kills = Kills(location)
    counts = []
    try:
        for number in range(KILLS):
            opening = number % 6 == 0  # killed while it opens the store
            calls = 0 if opening else rng.randrange(1, 8)
            counts.append(kills.round(f"r{number}", calls, rng.uniform(0, 0.03 if opening else 0.012)))
            with Store.open(location) as store:
                assert kills.events <= set(ids(store.events_after(0, limit=10**9)))
                assert {name: store.get_item(name).version for name in kills.items} == kills.items
                assert [c.version for c in store.changes_after(0, 10**9)] == list(range(1, store.version + 1))
                assert store.count_events() == len(store.events_after(0, limit=10**9)) <= store.last_number
                per_batch = [len(store.history(user)) % 7 for user in store.list_users() if user != "ann"]
                assert not any(per_batch), "a batch was stored in part"
    finally:
        kills.process.stdin.close()
        kills.process.wait(timeout=30)
    assert sum(counts) > KILLS, "the writers had no time to write"


def test_a_full_disk_refuses_events_and_keeps_what_was_acknowledged(tmp_path):
    path = tmp_path / "store.sqlite"
    with Store.open(path) as store:
        store.append_events([event("e0")])
        with store._database.write() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 4}")
        writer = store._database._writer
        acknowledged, refused = ["e0"], []
        for number in range(1, 9):
            names = [f"e{number}-{n}" for n in range(60)]
            try:
                store.append_events([event(name) for name in names])
                acknowledged += names
            except StorageError as error:
                assert "disk full" in error.message and str(path) in error.message and "df -h" in error.fix
                refused += names
                store._database._writer = writer  # the limit is one of this connection
                break
        assert refused and store._database._writer is not None
        assert ids(store.events_after(0)) == acknowledged and store.count_events() == len(acknowledged)
    with Store.open(path) as store:  # space was freed
        assert all(store.append_events([event(name) for name in refused]))


@pytest.mark.parametrize("fails", ["before", "after"])
def test_a_failing_commit_is_not_acknowledged_and_the_next_write_works(store, monkeypatch, fails):
    store.append_events([event("e0")])
    real = sa.engine.default.DefaultDialect.do_commit

    def broken(self, connection):
        if fails == "after":
            real(self, connection)
        error = self.loaded_dbapi.OperationalError("disk I/O error")
        if self.name == "sqlite":
            error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
        raise error

    monkeypatch.setattr(sa.engine.default.DefaultDialect, "do_commit", broken)
    with pytest.raises(StorageError, match="not acknowledged"):
        store.append_events([event("e1"), event("e2")])
    with pytest.raises(StorageError, match="not acknowledged"):
        store.put_item(Item("a"))
    monkeypatch.undo()
    known = fails == "after"  # the disk had the rows before it failed: a retry does not store them again
    assert ids(store.events_after(0)) == (["e0", "e1", "e2"] if known else ["e0"])
    assert store.append_events([event("e1"), event("e2")]) == [not known] * 2
    assert store.put_item(Item("b")) == 1 + known


def test_an_exception_in_a_transaction_undoes_all_of_it(store, monkeypatch):
    store.put_item(Item("a"))
    monkeypatch.setattr("cemg.serve.log.ChangeLog.write", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.patch_item("a", {"title": "x"})
    monkeypatch.undo()
    assert store.get_item("a").item.title == "" and store.version == 1


def test_two_processes_write_to_one_store(location):
    code = (
        "import sys; from cemg.serve.store import *; s = Store.open(sys.argv[1])\n"
        "for n in range(40):\n"
        "    me = sys.argv[2]\n"
        "    s.append_events([Event(f'{me}-{n}', me, 'i'), Event(f'both-{n}', 'both', 'i')])\n"
        "    s.put_item(Item(f'{me}-{n}'))\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, location, name]) for name in ("one", "two")]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    with Store.open(location) as store:
        assert store.count_events() == 120 and store.users() == 3 and store.version == 80
        assert [each.number for each in store.events_after(0)] == list(range(1, 121))


def test_threads_write_and_read_at_once(location):
    with Store.open(location) as store:
        problems = []

        def work(name: str) -> None:
            try:
                for number in range(10):
                    store.append_events([event(f"{name}-{number}", name), event(f"{number}", "all")])
                    version = store.put_item(Item(f"{name}-{number}"))
                    assert store.version >= version and len(store.history(name)) == number + 1
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not problems and store.count_events() == 90 and store.version == 80


class Commits:
    """Makes the first commit wait until other calls of `append_events` wait, and counts commits."""

    def __init__(self, store: Store, monkeypatch, others: int, *, fail: bool = False) -> None:
        self.count = 0
        real = sa.engine.default.DefaultDialect.do_commit

        def commit(dialect, connection):
            deadline = time.monotonic() + 30
            while self.count == 0 and len(store._waiting) < others and time.monotonic() < deadline:
                time.sleep(0.001)
            self.count += 1
            if fail:
                raise dialect.loaded_dbapi.OperationalError("disk I/O error")
            real(dialect, connection)

        monkeypatch.setattr(sa.engine.default.DefaultDialect, "do_commit", commit)


def _in_threads(count: int, work) -> list:
    outcomes = []

    def run(name: int) -> None:
        try:
            outcomes.append(work(name))
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return outcomes


def test_calls_of_several_threads_share_a_commit(store, monkeypatch):
    with monkeypatch.context() as patch:
        commits = Commits(store, patch, others=9)
        outcomes = _in_threads(
            10, lambda name: store.append_events([event("shared"), event(f"{name}"), event(f"{name}")])
        )
    assert commits.count == 2
    assert [stored[1:] for stored in outcomes] == [[True, False]] * 10
    assert sum(stored[0] for stored in outcomes) == 1, "one of the threads stored it"
    assert store.count_events() == 11 and len(set(ids(store.events_after(0)))) == 11


def test_a_failing_shared_commit_is_refused_to_all_threads(store, monkeypatch):
    with monkeypatch.context() as patch:
        commits = Commits(store, patch, others=5, fail=True)
        outcomes = _in_threads(6, lambda name: store.append_events([event(f"{name}")]))
    assert commits.count == 2 and len(outcomes) == 6
    assert all(isinstance(outcome, Exception) for outcome in outcomes)
    assert store.count_events() == 0 and store.append_events([event("0")]) == [True]


# Backup


def test_a_backup_is_complete_while_writes_go_on(tmp_path):
    with Store.open(tmp_path / "store.sqlite", catalog="abc") as store:
        store.append_events([event(f"before-{n}") for n in range(2000)])
        stop, written = threading.Event(), []

        def write() -> None:
            while not stop.is_set():
                store.append_events([event(f"during-{len(written)}"), event(f"with-{len(written)}")])
                written.append(True)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for number in range(5):
                count, copy = len(written), tmp_path / f"backup-{number % 2}.sqlite"
                store.backup(copy)
                with Store.open(copy, catalog="abc") as backup:
                    found = set(ids(backup.events_after(0, 10**9)))
                    assert {f"before-{n}" for n in range(2000)} <= found
                    assert {f"during-{n}" for n in range(count)} <= found
                    assert (len(found) - 2000) % 2 == 0 and backup.count_events() == len(found)
        finally:
            stop.set()
            thread.join()
        with pytest.raises(UserError, match="is the store itself"):
            store.backup(tmp_path / "store.sqlite")
        with pytest.raises(UserError, match="is a file, not a folder"):
            store.backup(tmp_path / "store.sqlite" / "below")
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.endswith(".part")) == []


def test_a_backup_of_postgres_names_pg_dump(new_postgres, open_store, tmp_path):
    with pytest.raises(UserError) as caught:
        open_store(new_postgres()).backup(tmp_path / "copy")
    assert caught.value.fix.startswith("pg_dump --format=custom") and not (tmp_path / "copy").exists()


# Schema


def test_migrations_run_once_and_in_one_transaction(location, monkeypatch):
    with Store.open(location) as store:
        store.append_events([event("e1")])
    runs = []

    def add_column(connection: sa.Connection) -> None:
        connection.execute(sa.text("ALTER TABLE cemg_events ADD COLUMN place TEXT"))
        connection.execute(sa.text("UPDATE cemg_events SET place = 'shop'"))
        runs.append("column")

    monkeypatch.setattr(schema, "MIGRATIONS", [add_column, lambda _: runs.append("second")])
    for _ in range(2):
        with Store.open(location) as store, store._database.read() as connection:
            assert connection.execute(sa.text("SELECT place FROM cemg_events")).scalar_one() == "shop"
            assert ids(store.history("ann")) == ["e1"]
    assert runs == ["column", "second"]


def test_a_failing_migration_leaves_the_store_as_it_was(location, monkeypatch):
    with Store.open(location) as store:
        store.append_events([event("e1")])

    def fail(connection: sa.Connection) -> None:
        connection.execute(sa.text("DELETE FROM cemg_events"))
        connection.execute(sa.text("DROP TABLE cemg_users"))
        raise RuntimeError("a mistake")

    before = _dump(location)
    monkeypatch.setattr(
        schema, "MIGRATIONS", [lambda c: c.execute(sa.text("CREATE TABLE extra (a INT)")), fail]
    )
    with pytest.raises(RuntimeError, match="a mistake"):
        Store.open(location)
    monkeypatch.undo()
    assert _dump(location) == before
    with Store.open(location) as store:
        assert ids(store.history("ann")) == ["e1"] and store.users() == 1


def _dump(location: str) -> list[str]:
    if "://" in location:
        return []
    with closing(sqlite3.connect(location)) as connection:
        return list(connection.iterdump())


def test_a_store_of_a_newer_version_is_refused(location, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(schema, "MIGRATIONS", [lambda _: None])
        Store.open(location).close()
    with pytest.raises(UserError, match="newer version of CEMG") as caught:
        Store.open(location)
    assert "version 2; this version reads up to 1" in caught.value.cause


def test_a_store_of_another_catalog_is_refused(location):
    Store.open(location).close()
    with Store.open(location, catalog="a" * 64) as store:  # the first catalog is recorded
        assert store.catalog == "a" * 64
    with Store.open(location) as store:  # a tool that does not know the catalog
        assert store.catalog == "a" * 64
    with pytest.raises(UserError, match="belongs to another catalog") as caught:
        Store.open(location, catalog="b" * 64)
    assert "aaaaaaaaaaaa, not bbbbbbbbbbbb" in caught.value.cause


# Errors


@pytest.mark.parametrize("content", [b"no database\n", b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_file_that_is_not_sqlite_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "store.sqlite"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not an SQLite file"):
        Store.open(path)
    assert path.read_bytes() == content


def test_a_database_of_another_program_is_refused_and_kept(tmp_path):
    path = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE notes (text)")
    content = path.read_bytes()
    with pytest.raises(UserError, match="is not a store of CEMG"):
        Store.open(path)
    assert path.read_bytes() == content


def test_folders_are_created_and_a_folder_is_not_a_store(tmp_path):
    Store.open(tmp_path / "a" / "b" / "store.sqlite").close()
    assert (tmp_path / "a" / "b" / "store.sqlite").exists()
    with pytest.raises(UserError, match="is a folder"):
        Store.open(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        Store.open(tmp_path / "file" / "store.sqlite")
    Store.open(f"sqlite:///{tmp_path}/url.sqlite").close()
    assert (tmp_path / "url.sqlite").exists()


def test_a_damaged_store_says_so(tmp_path):
    path = tmp_path / "store.sqlite"
    with Store.open(path) as store:
        store.append_events([event(f"e{n}") for n in range(500)])
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="is damaged"), Store.open(path) as store:
        store.history("ann")


def test_a_locked_store_is_busy_and_stores_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    path = tmp_path / "store.sqlite"
    with Store.open(path) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        store.append_events([event("e1")])
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(BusyError, match="locked by another process"):
            store.append_events([event("e2")])
        assert ids(store.history("ann")) == ["e1"], "readers do not wait"
        other.execute("ROLLBACK")
        assert store.append_events([event("e2")]) == [True]


def test_a_locked_row_of_postgres_is_busy(new_postgres, monkeypatch, open_store):
    import psycopg

    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    location = new_postgres()
    store = open_store(location)
    with psycopg.connect(location) as other:
        other.execute("SELECT * FROM cemg_state FOR UPDATE")
        with pytest.raises(BusyError, match="locked by another process"):
            store.append_events([event("e1")])
    assert store.append_events([event("e1")]) == [True]


def test_a_lost_connection_to_postgres_is_an_error_once(new_postgres, open_store):
    import psycopg

    location = new_postgres()
    store = open_store(location)
    store.append_events([event("e1")])
    with psycopg.connect(location, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    with suppress(StorageError):
        store.append_events([event("e2")])
    store.append_events([event("e2")])
    assert ids(store.history("ann")) == ["e1", "e2"]


def test_a_server_that_is_not_there_is_an_error_without_the_password(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(StorageError) as caught:
        Store.open(f"postgresql://ann:secret@/db?host={tmp_path}")
    assert "cannot be used" in caught.value.message and "secret" not in str(caught.value)


def test_a_missing_driver_of_postgres_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError) as caught:
        Store.open("postgresql://ann@localhost/db")
    assert caught.value.fix == "pip install 'psycopg[binary]'"


@pytest.mark.parametrize(
    "url", ["mysql://localhost/db", "sqlite://", "sqlite:///a.db?mode=ro", "postgres ql://x"]
)
def test_other_urls_are_refused(url):
    with pytest.raises(UserError):
        Store.open(url)


def test_a_closed_store_says_so(store):
    store.append_events([event("e1")])
    store.close()
    for call in (lambda: store.version, lambda: store.append_events([event("e2")])):
        with pytest.raises(UserError, match="is closed"):
            call()


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (event(""), "is empty"),
        (event("e\n"), "control character"),
        (event("x" * (MAX_ID + 1)), "has 257 characters"),
        (event("e", user="\ud800"), "control character"),
        (event("e", item=3), "is not text"),
        (event("e", timestamp=float("nan")), "not a finite number"),
        (event("e", timestamp=10**400), "not a finite number"),
        (event("e", timestamp="1"), "not a finite number"),
        (replace(event("e"), type="x" * 65), "has 65 characters"),
    ],
)  # fmt: skip
def test_an_invalid_event_refuses_the_whole_call(store, bad, problem):
    with pytest.raises(UserError, match=problem):
        store.append_events([event("good"), bad])
    assert store.count_events() == 0


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (Item(" \x1b"), "control character"),
        (Item("a", title="x" * 1001), "title has 1001 characters"),
        (Item("a", text="x" * (MAX_TEXT + 1)), "text has 100001 characters"),
        (Item("a", text="\x00"), "NUL"),
        (Item("a", image="path"), "not bytes"),
        (Item("a", image=bytes(MAX_IMAGE + 1)), "image has 16777217 bytes"),
        (Item("a", attributes={"x": float("inf")}), "attribute 'x' is inf"),
        (Item("a", attributes={"x": None}), "attribute 'x' is None"),
        (Item("a", attributes={"x": [1]}), "attribute 'x'"),
        (Item("a", attributes={"x": 2**63}), "attribute 'x'"),
        (Item("a", attributes={"": 1}), "is empty"),
        (Item("a", attributes={"x": "y" * 70_000}), "attributes have 70008 bytes"),
    ],
)
def test_an_invalid_item_refuses_the_whole_call(store, item, problem):
    with pytest.raises(UserError, match=problem):
        store.put_items([Item("good"), item])
    assert store.version == 0 and store.list_items() == []


@pytest.mark.parametrize("codes", [[], [-1], [1] * 65])
def test_an_invalid_semantic_id_is_refused(store, codes):
    store.put_item(Item("a"))
    with pytest.raises(UserError, match="is not a semantic ID"):
        store.place_items({"a": codes})
    with pytest.raises(UserError, match="negative"):
        store.history("ann", limit=-1)


# Random operations against a plain model

NAMES = st.sampled_from(["a", "b", "Ä", "z z"])
EVENTS = st.lists(
    st.builds(
        Event, st.sampled_from([f"e{n}" for n in range(12)]), NAMES, NAMES, st.sampled_from([None, 1.0, 2.0])
    ),
    max_size=4,
)
STEPS = st.one_of(
    st.tuples(st.just("events"), EVENTS),
    st.tuples(st.sampled_from(["delete", "put", "patch", "remove", "place"]), NAMES),
    st.tuples(st.just("reopen"), st.none()),
)


class Model:
    """What a store does, in plain Python. `a` is an item of the run."""

    def __init__(self) -> None:
        self.events: list[tuple[int, Event]] = []
        self.items: dict[str, tuple[str, bool, int]] = {}  # state, whether it has codes, number of patches
        self.number = self.version = 0

    def step(self, kind: str, value) -> object:
        if kind == "events":
            stored = []
            for each in value:
                stored.append(all(each.event_id != old.event_id for _, old in self.events))
                if stored[-1]:
                    self.number += 1
                    self.events.append((self.number, each))
            return stored
        if kind == "delete":
            self.number += 1
            before = len(self.events)
            self.events = [(number, each) for number, each in self.events if each.user_id != value]
            return before - len(self.events)
        state, placed, patches = self.items.get(value, (None, False, 0))
        if kind == "put":
            self.items[value] = ("active" if placed or value == "a" else "pending", placed, 0)
        elif kind == "patch" and state in ("active", "pending"):
            self.items[value] = (state, placed, patches + 1)
        elif kind == "place" and state == "pending":
            self.items[value] = ("active", True, patches)
        elif kind == "remove" and (state or value == "a"):
            if state == "removed":
                return self.version
            self.items[value] = ("removed", placed, patches)
        else:
            return self.version if kind == "place" else UnknownItemError
        self.version += 1
        return self.version

    def history(self, user: str) -> list[str]:
        mine = [(each.timestamp or 1e9, number, each) for number, each in self.events if each.user_id == user]
        return [each.event_id for _, _, each in sorted(mine, key=lambda entry: entry[:2])]


def _step(store: Store, kind: str, value, patches: int) -> object:
    calls = {
        "events": lambda: store.append_events(value),
        "delete": lambda: store.delete_user(value),
        "put": lambda: store.put_item(Item(value)),
        "patch": lambda: store.patch_item(value, {"attributes": {"n": patches + 1}}),
        "remove": lambda: store.remove_item(value),
        "place": lambda: store.place_items({value: [1, 2]}),
    }
    try:
        return calls[kind]()
    except UnknownItemError:
        return UnknownItemError


@pytest.mark.medium
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(STEPS, max_size=25))
def test_a_store_equals_a_plain_model(new_location, steps):
    location, model = new_location(), Model()
    store = Store.open(location, run_items={"a"}, synchronous="NORMAL")
    try:
        for kind, value in steps:
            if kind == "reopen":
                store.close()
                store = Store.open(location, run_items={"a"}, synchronous="NORMAL")
            else:
                patches = model.items.get(value, ("", False, 0))[2] if kind == "patch" else 0
                assert _step(store, kind, value, patches) == model.step(kind, value)
            assert (store.version, store.last_number) == (model.version, model.number)
        users = {each.user_id for _, each in model.events}
        assert store.list_users() == sorted(users) and store.users() == len(users)
        assert {user: ids(store.history(user)) for user in users} == {u: model.history(u) for u in users}
        assert [(e.number, e.event_id) for e in store.events_after(0)] == [
            (n, e.event_id) for n, e in model.events
        ]
        assert {i.item.item_id: (i.state, i.codes is not None, i.item.attributes.get("n", 0))
                for i in store.items()} == model.items  # fmt: skip
        assert [c.version for c in store.changes_after(0)] == list(range(1, model.version + 1))
    finally:
        store.close()
