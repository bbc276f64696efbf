"""``cemg-serve backup`` and ``restore``."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cemg.commands.serve import main
from cemg.serve.database import STORE_FILE
from cemg.serve.rows import Event
from cemg.serve.store import Store

from .process import COMMAND, ServerProcess, copy_of
from .test_shutdown import refused


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_run, tmp_path)


def test_a_backup_of_a_running_service_is_restored_and_served(
    run: Path, tmp_path: Path, command, capsys
) -> None:
    copy, store = tmp_path / "copy.sqlite", run / STORE_FILE
    event = {"user_id": "ann", "item_id": "item-0001"}
    with ServerProcess(run) as server:
        server.json("POST", "/v1/events", {"events": [event | {"event_id": "1"}]})
        assert command(main, "backup", "--run", run, "--out", copy) == 0
        server.json("POST", "/v1/events", {"events": [event | {"event_id": "2"}]})
        text = refused(capsys, command, "restore", "--run", run, "--from", copy)
        assert "is in use by another cemg-serve" in text
        assert server.stop() == 0
    assert "already exists" in refused(capsys, command, "backup", "--run", run, "--out", copy)
    assert "already exists" in refused(capsys, command, "restore", "--run", run, "--from", copy)
    store.unlink()
    assert command(main, "restore", "--run", run, "--from", copy) == 0
    with ServerProcess(run) as server:
        assert server.json("GET", "/v1/users/ann")["history"] == ["item-0001"]
        answer = server.json("POST", "/v1/events", {"events": [event | {"event_id": "1"}]})
        assert answer["known"] == ["1"]


def test_changes_that_are_not_kept_are_gone_and_the_service_goes_on(run: Path) -> None:
    few = "from cemg.serve import log; log.KEPT, log.DROPPED_AT_ONCE = 5, 1; "
    with ServerProcess(run, command=few + COMMAND) as server:
        server.json("GET", "/v1/items?query=item")  # the search by titles follows the changes from here on
        for number in range(8):
            server.json("PATCH", "/v1/items/item-0001", {"title": f"Title {number}"})
        found = server.json("GET", "/v1/catalog/changes?after=3")
        assert [one["version"] for one in found["changes"]] == [4, 5, 6, 7, 8]
        answer = server.http.get("/v1/catalog/changes?after=0")
        assert answer.status_code == 410 and "the changes 1 to 3" in answer.json()["detail"]
        assert server.json("GET", "/v1/items?query=title 7")["items"][0]["item_id"] == "item-0001"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    with Store.open(tmp_path / "source.sqlite", catalog="abc") as store:
        store.append_events([Event(str(n), "ann", "item") for n in range(2000)])
        store.backup(tmp_path / "copy.sqlite")
    return tmp_path / "copy.sqlite"


def damage(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8192] = bytes(8192)
    copy.write_bytes(content)


def newer(copy: Path) -> None:
    with closing(sqlite3.connect(copy)) as database, database:
        database.execute("UPDATE cemg_meta SET value = '999' WHERE name = 'schema'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damage, "is damaged"),
        (newer, "newer version"),
        (lambda copy: copy.write_bytes(copy.read_bytes()[:10_000]), "is not a whole SQLite file"),
        (lambda copy: copy.write_bytes(b"text" * 1000), "is not a whole SQLite file"),
        (lambda copy: copy.write_bytes(b""), "is not a store of CEMG"),
        (lambda copy: copy.unlink(), "there is no file"),
        (lambda copy: copy.with_name("copy.sqlite-wal").write_bytes(b"1"), "cemg-serve backup first"),
    ],
)
def test_what_is_not_a_whole_backup_is_not_restored(copy, change, words, tmp_path, command, capsys) -> None:
    change(copy)
    before = sorted(path.name for path in tmp_path.iterdir())
    text = refused(capsys, command, "restore", "--store", tmp_path / "new.sqlite", "--from", copy)
    assert words in text
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "new.sqlite.lock"])


def test_a_backup_of_another_run_is_not_restored_into_a_run(copy, run, command, capsys) -> None:
    assert "belongs to another catalog" in refused(capsys, command, "restore", "--run", run, "--from", copy)


def test_a_log_that_is_left_of_another_store_is_not_applied(copy, tmp_path, command, capsys) -> None:
    (tmp_path / "new.sqlite-wal").write_bytes(b"old")
    text = refused(capsys, command, "restore", "--store", tmp_path / "new.sqlite", "--from", copy)
    assert "new.sqlite-wal already exists" in text


def test_a_damaged_store_is_not_backed_up(copy, tmp_path, command, capsys) -> None:
    damage(copy)
    shutil.copy(copy, tmp_path / "store.sqlite")
    text = refused(capsys, command, "backup", "--store", tmp_path / "store.sqlite", "--out", tmp_path / "out")
    assert "damaged" in text and not (tmp_path / "out").exists()


def test_a_store_must_be_named_and_exist(tmp_path, command, capsys) -> None:
    assert "--store PATH" in refused(capsys, command, "backup", "--out", tmp_path / "out")
    missing = tmp_path / "missing.sqlite"
    assert "there is no store" in refused(
        capsys, command, "backup", "--store", missing, "--out", tmp_path / "out"
    )
    assert list(tmp_path.iterdir()) == []


def test_stores_in_postgres_have_pg_dump(tmp_path, command, capsys) -> None:
    url = "postgresql://shop@localhost/shop"
    text = refused(capsys, command, "restore", "--store", url, "--from", tmp_path / "copy")
    assert "pg_restore" in text
