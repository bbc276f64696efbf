"""The store: kills, full disks, failing commits, several processes and threads, and backups."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from cemg.errors import UserError
from cemg.serve.rows import Item
from cemg.serve.store import Store
from cemg.storage.files import StorageError

from .test_store import event, ids

WRITER = Path(__file__).with_name("writer.py")
KILLS = int(os.environ.get("CEMG_TEST_KILLS", "30"))


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
        "import sys; from cemg.serve.rows import Event, Item; from cemg.serve.store import Store\n"
        "s = Store.open(sys.argv[1])\n"
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
