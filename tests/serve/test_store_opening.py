"""The store: migrations, what is not a store, databases that fail, and values that cannot be stored."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing, suppress
from dataclasses import replace

import pytest
import sqlalchemy as sa

from cemg.errors import DamagedError, UserError
from cemg.serve import database, schema
from cemg.serve.database import BusyError
from cemg.serve.rows import MAX_ID, MAX_IMAGE, MAX_TEXT, Item
from cemg.serve.store import Store
from cemg.storage.files import StorageError

from .test_store import event, ids

# Schema


def test_migrations_run_once_and_in_one_transaction(location, monkeypatch):
    with Store.open(location) as store:
        store.append_events([event("e1")])
    runs = []

    def add_column(connection: sa.Connection) -> None:
        connection.execute(sa.text("ALTER TABLE cemg_events ADD COLUMN place TEXT"))
        connection.execute(sa.text("UPDATE cemg_events SET place = 'shop'"))
        runs.append("column")

    known = schema.MIGRATIONS
    monkeypatch.setattr(schema, "MIGRATIONS", [*known, add_column, lambda _: runs.append("second")])
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
        schema,
        "MIGRATIONS",
        [*schema.MIGRATIONS, lambda c: c.execute(sa.text("CREATE TABLE extra (a INT)")), fail],
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
        newer.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, lambda _: None])
        Store.open(location).close()
    with pytest.raises(UserError, match="newer version of CEMG") as caught:
        Store.open(location)
    newest = schema.newest()
    assert f"version {newest + 1}; this version reads up to {newest}" in caught.value.cause


def test_a_store_of_the_first_version_gets_an_index_by_which_pending_items_are_found(tmp_path):
    path = tmp_path / "store.sqlite"
    with Store.open(path) as store:
        store.put_items([Item("a"), Item("b")])
        store.place_items({"a": [1]})
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP INDEX cemg_items_by_state")
        connection.execute("UPDATE cemg_meta SET value = '1' WHERE name = 'schema'")
        connection.commit()
    with Store.open(path) as store:
        assert [one.item.item_id for one in store.list_items(states=("pending",))] == ["b"]
        assert store.count_items("pending") == 1
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT title FROM cemg_items WHERE item_id > '' AND state IN (?) ORDER BY item_id LIMIT 9"
        plan = connection.execute(f"EXPLAIN QUERY PLAN {query}", ("pending",)).fetchall()
        assert "cemg_items_by_state" in str(plan) and "TEMP B-TREE" not in str(plan)


def test_a_store_has_one_service_and_any_number_of_readers(location, new_location):
    with Store.open(location, claim="alone") as first:
        with pytest.raises(BusyError, match="in use by another cemg-serve") as caught:
            Store.open(location, claim="alone")
        assert "--store" in caught.value.fix
        with Store.open(location) as reader, Store.open(new_location(), claim="alone"):
            first.append_events([event("e1")])
            assert ids(reader.history("ann")) == ["e1"]
    with Store.open(location, claim="alone") as second:
        assert second.append_events([event("e1"), event("e2")]) == [False, True]


def test_a_service_that_lost_postgres_does_not_write_beside_its_successor(new_postgres):
    import psycopg

    location = new_postgres()
    with Store.open(location, claim="alone") as first:
        first.append_events([event("e1")])
        with psycopg.connect(location, autocommit=True) as admin:
            mine = "objid = (hashtext(current_schema())::bigint & 4294967295)::oid"
            admin.execute(f"SELECT pg_terminate_backend(pid) FROM pg_locks WHERE objsubid = 2 AND {mine}")
        with Store.open(location, claim="alone") as second:
            for error in (StorageError, BusyError):  # the connection is lost, and so is the lock
                with pytest.raises(error):
                    first.append_events([event("e2")])
            second.append_events([event("e3")])
        first.append_events([event("e4")])
        assert ids(first.history("ann")) == ["e1", "e3", "e4"]


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
