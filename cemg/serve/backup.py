"""Backups of stores in SQLite, and their way back."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from cemg.errors import DamagedError, UserError
from cemg.serve import schema
from cemg.serve.database import lock_file, sqlite_path
from cemg.serve.store import Store
from cemg.storage import files


def backup(store: str | Path, out: Path) -> None:
    """Copy a store to a file, completely or not at all, while a service may run on it.

    Raises:
        UserError: There is no store, it is in PostgreSQL, or ``out`` exists.
        DamagedError: The store is damaged, and so is its copy, which is deleted.
    """
    _check_absent(out, "choose another file")
    with Store.open(store, create=False) as opened:
        opened.backup(out)
    try:
        check(out)
    except BaseException:
        out.unlink()
        raise


def restore(file: Path, store: str | Path, *, catalog: str = "") -> None:
    """Copy a backup to the place of a store, completely or not at all.

    Args:
        file: The backup.
        store: Path of the store, which must not exist.
        catalog: Digest of the catalog that the backup must belong to; "" admits any.

    Raises:
        UserError: The store exists, is in PostgreSQL, or has a service; or the backup belongs to another
            catalog, is newer than this version, or is not a store.
        DamagedError: The backup is damaged.
    """
    path = sqlite_path(store)
    if path is None:
        raise UserError("cemg-serve does not restore PostgreSQL", fix="pg_restore --clean --dbname=URL FILE")
    with lock_file(path):
        for part in (path, Path(f"{path}-wal")):  # SQLite would apply the log of another file
            _check_absent(part, "move it away, or restore to another --store")
        check(file, catalog=catalog)
        files.copy_file(file, path)


def check(file: Path, *, catalog: str = "") -> None:
    """Raise UserError unless a file is a whole store that this version of CEMG reads: see `restore`."""
    if not file.is_file():
        raise UserError(f"there is no file {file}", fix="name a file that cemg-serve backup wrote")
    log = Path(f"{file}-wal")
    if log.exists() and log.stat().st_size:
        raise UserError(
            f"{file} is the store of a service, or of one that was killed",
            cause=f"{log.name} has changes that are not in it",
            fix="copy it by cemg-serve backup first",
        )
    uri = f"file:{quote(str(file.absolute()))}?immutable=1"  # no files are written beside it

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(uri, uri=True)

    try:
        with closing(connect()) as connection:
            problem = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if problem != "ok":
            raise DamagedError(f"{file} is damaged", cause=problem, fix="use another backup")
        engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)
        with engine.connect() as reader:
            schema.check(reader, catalog=catalog, where=str(file))
    except sqlite3.Error as error:
        raise DamagedError(
            f"{file} is not a whole SQLite file", cause=str(error), fix="use another backup"
        ) from error


def _check_absent(path: Path, fix: str) -> None:
    if path.exists():
        raise UserError(f"{path} already exists", fix=fix)
