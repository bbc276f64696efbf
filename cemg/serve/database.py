"""The connections to the store's database: one that writes, and a pool of those that read.

SQLite runs in WAL mode with ``synchronous=FULL``: a commit returns after its pages were flushed to the disk,
and readers do not wait for the writer. A failed commit was not acknowledged. In the rare case that the disk
reports an error after it received the data, and the process then ends before another write, the rows may be
there after the restart; sending the events again is safe, because known ids are not stored again.
"""

from __future__ import annotations

import copy
import fcntl
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import Any, Literal, TextIO

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from cemg.errors import DamagedError, UserError
from cemg.serve import schema
from cemg.storage import files
from cemg.storage.files import StorageError

STORE_FILE = "serve/store.sqlite"  # in the folder of a run
WRITER_CACHE = 64 * 1024  # KiB; with less, SQLite writes pages of a large transaction twice
BUSY_SECONDS = 5.0  # how long a write waits for another process
CONNECT_SECONDS = 10  # to PostgreSQL
ALIVE = {  # of libpq: a connection that the network has cut is noticed after some ten seconds
    "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 10_000,
}  # fmt: skip
READERS, MORE_READERS = 8, 56  # connections that stay open, and further ones at peaks
# Flushing on macOS needs more than fsync. Deleted rows are overwritten, as they are about people.
PRAGMAS = ("fullfsync=1", "checkpoint_fullfsync=1", "secure_delete=1")
Synchronous = Literal["FULL", "NORMAL"]
Claim = Literal["alone", "replica"]  # of a store by services: one of them, or any number of replicas
# Of the schema in which the tables are, so that several stores fit into a database.
CLAIMS = {
    claim: text(f"SELECT {lock}({schema.LOCK}, hashtext(current_schema()))")
    for claim, lock in (("alone", "pg_try_advisory_lock"), ("replica", "pg_try_advisory_lock_shared"))
}
BUSY = {"SQLITE_BUSY", "SQLITE_LOCKED", "55P03", "40P01", "40001"}
DISK_FULL = {"SQLITE_FULL", "53100"}
READ_ONLY = {"SQLITE_READONLY", "SQLITE_PERM", "SQLITE_CANTOPEN", "25006", "42501"}
DISK_FAILS = {"SQLITE_IOERR", "SQLITE_PROTOCOL", "SQLITE_NOMEM", "SQLITE_NOLFS"}
DAMAGED = {"SQLITE_CORRUPT", "XX001", "XX002"}


class BusyError(UserError):
    """Another process holds the lock of the store. Nothing was stored; the same call may work later."""


class Database:
    """An open database with the tables of the store. Threads may share it; a fork must open its own."""

    def __init__(
        self, engine: Engine, where: str, *, lock: TextIO | None = None, claim: Claim | None = None
    ) -> None:
        self.where = where  # for errors; without a password
        self._lock_file, self._claim = lock, claim
        self.is_sqlite = engine.dialect.name == "sqlite"
        self._engine = engine
        self._readers = engine if self.is_sqlite else engine.execution_options(isolation_level="AUTOCOMMIT")
        self._writer: Connection | None = None
        self._keeper: Connection | None = None
        self._lock = threading.RLock()
        self._closed = False
        self._snapshot: Connection | None = None

    @classmethod
    def open(
        cls, url_or_path: str | Path, *, synchronous: Synchronous = "FULL", create: bool = True,
        claim: Claim | None = None,
    ) -> Database:  # fmt: skip
        """Connect to PostgreSQL by its URL, or to an SQLite file: see `Store.open`.

        Raises:
            UserError: The database cannot be used, or is missing and not to be created.
            BusyError: Services have opened it, and this claim does not go with theirs.
        """
        url, path = _parse(url_or_path), sqlite_path(url_or_path)
        if path is not None:
            if not create and not path.exists():
                raise UserError(f"there is no store {path}", fix="name another one: --store PATH")
            lock = None if claim is None else lock_file(path, claim)
            try:
                return cls._open_sqlite(url, synchronous, lock)
            except BaseException:
                if lock is not None:
                    lock.close()
                raise
        try:
            engine = create_engine(
                url,
                pool_size=READERS,
                max_overflow=MORE_READERS,
                pool_pre_ping=True,
                connect_args={"connect_timeout": CONNECT_SECONDS, **ALIVE},
            )
        except ImportError as error:
            raise UserError(
                "the driver of PostgreSQL is missing",
                cause=str(error),
                fix="pip install 'psycopg[binary]'",
            ) from error
        event.listen(engine, "connect", _set_up_postgres)
        shown = url.set(drivername="postgresql", query={})
        return cls(engine, shown.render_as_string(hide_password=True), claim=claim)

    @classmethod
    def _open_sqlite(cls, url: URL, synchronous: Synchronous, lock: TextIO | None) -> Database:
        path = Path(str(url.database))
        _make_folder(path.parent)
        if path.is_dir():
            raise UserError(f"{path} is a folder", fix="use the path of a file: --store FOLDER/store.sqlite")
        is_new = not path.exists()
        engine = create_engine(
            url, pool_size=READERS, max_overflow=MORE_READERS, connect_args={"timeout": BUSY_SECONDS}
        )

        @event.listens_for(engine, "connect")
        def set_up(connection: sqlite3.Connection, _: object) -> None:
            connection.isolation_level = None  # no transaction is begun behind our back
            for pragma in (f"synchronous={synchronous}", *PRAGMAS):
                connection.execute(f"PRAGMA {pragma}")

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            if connection.get_execution_options().get("writes"):
                connection.exec_driver_sql("BEGIN IMMEDIATE")

        database = cls(engine, str(path), lock=lock)
        try:
            database._use_wal()
            if is_new:
                files.sync_folder(path.parent)
            # While a connection is open, SQLite does not read its log from the disk again, which may end with
            # the rows of a commit that failed.
            database._keeper = engine.connect()
        except BaseException:
            database.close()
            raise
        return database

    def _use_wal(self) -> None:
        """Switch the file to WAL mode. SQLite does not wait here for other processes that do the same."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                with self.read() as connection:
                    schema.is_store(connection, where=self.where)  # else the file is left as it is
                    mode = connection.exec_driver_sql("PRAGMA journal_mode=WAL").scalar_one()
                break
            except BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if mode != "wal":
            raise UserError(
                f"{self.where} cannot use a write-ahead log",
                cause=f"SQLite keeps the journal mode {mode!r}, as on some network drives",
                fix="put the store on a local disk, or use PostgreSQL: --store postgresql://…",
            )

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for single statements that read; each sees all that is committed."""
        if self._snapshot is not None:
            yield self._snapshot
            return
        with self._translated():
            self._check_open()
            with self._readers.connect() as connection:
                yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Database]:
        """This database as it is now, to be read by one thread; what others commit meanwhile is not seen."""
        with self._translated():
            self._check_open()
            with self._engine.connect() as connection:
                if self.is_sqlite:
                    connection.exec_driver_sql("BEGIN")
                else:
                    connection.execution_options(isolation_level="REPEATABLE READ")
                connection.execute(
                    select(schema.state)
                ).one()  # the first read chooses the state that is seen
                frozen = copy.copy(self)
                frozen._snapshot = connection
                yield frozen

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction, durable at the end of the block; an exception undoes it."""
        assert self._snapshot is None, "a snapshot is not written"
        with self._lock, self._translated():
            self._check_open()
            try:
                if self._writer is None:
                    self._writer = self._connect_writer()
                with self._writer.begin():
                    yield self._writer
            except UserError:  # of the caller, rolled back
                raise
            except BaseException:
                self._drop_writer()
                raise

    def backup(self, path: Path | str) -> None:
        """Copy the store into one file while others read and write. See `Store.backup`."""
        if not self.is_sqlite:
            raise UserError(
                "cemg-serve does not back up PostgreSQL",
                fix=f"pg_dump --format=custom --table='cemg_*' --file={quote(str(path))} {self.where}",
            )
        source = Path(str(self._engine.url.database))
        if Path(path).absolute() == source or (Path(path).exists() and Path(path).samefile(source)):
            raise UserError(f"{path} is the store itself", fix="back it up to another file")
        _make_folder(Path(path).absolute().parent)
        with self._translated(str(path)), files.durable(path) as part, self.read() as reader:
            _copy(reader, part)

    def close(self) -> None:
        """Close all connections. The last process that closes an SQLite file merges its log into it."""
        with self._lock:
            self._closed = True
            with suppress(SQLAlchemyError):
                for connection in (self._writer, self._keeper):
                    if connection is not None:
                        connection.close()
            self._writer = self._keeper = None
            self._engine.dispose()
            if self._lock_file is not None:
                self._lock_file.close()

    def _connect_writer(self) -> Connection:
        connection = self._engine.connect().execution_options(writes=True)
        if self.is_sqlite:
            connection.connection.cursor().execute(f"PRAGMA cache_size={-WRITER_CACHE}")
        elif self._claim is not None:  # the lock is of the session that writes, and ends with it
            mine = connection.execute(CLAIMS[self._claim]).scalar_one()
            connection.rollback()
            if not mine:
                connection.close()
                raise _claimed(self.where, self._claim)
        return connection

    def _drop_writer(self) -> None:
        """After any other error, the next write takes a new connection."""
        writer, self._writer = self._writer, None
        with suppress(SQLAlchemyError, AttributeError):
            writer.invalidate()  # type: ignore[union-attr]
            writer.close()  # type: ignore[union-attr]

    def _check_open(self) -> None:
        if self._closed:
            raise UserError(f"{self.where} is closed", fix="open the store again")

    @contextmanager
    def _translated(self, where: str = "") -> Iterator[None]:
        try:
            yield
        except PoolTimeout as error:
            raise BusyError(f"{self.where}: too many reads at once", fix="try again later") from error
        except (DBAPIError, sqlite3.Error) as error:
            known = _user_error(error, where or self.where, is_sqlite=self.is_sqlite)
            if known is None:
                raise
            raise known from error


def sqlite_path(url_or_path: str | Path) -> Path | None:
    """The file of a store in SQLite; None for one in PostgreSQL."""
    url = _parse(url_or_path)
    return Path(str(url.database)) if url.get_backend_name() == "sqlite" else None


def lock_file(store: Path, claim: Claim = "alone") -> TextIO:
    """Lock an SQLite store against other services; the system releases the lock when the process ends.

    Raises:
        BusyError: A service runs on the store.
    """
    path = store.resolve()
    _make_folder(path.parent)
    file = path.with_name(f"{path.name}.lock").open("a")
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if claim == "alone" else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise _claimed(str(store), claim) from None
    return file


def _claimed(where: str, claim: Claim) -> BusyError:
    """The error of a second service, which would not see the changes of the first one."""
    fix = "stop that process, use another --store, or start all processes of the store with --replica"
    if claim == "replica":
        fix = "stop the process that was started without --replica"
    return BusyError(f"{where} is in use by another cemg-serve", fix=fix)


def _parse(url_or_path: str | Path) -> URL:
    """The URL of a database. Raises UserError for one that is not supported."""
    if isinstance(url_or_path, Path) or "://" not in url_or_path:
        return URL.create("sqlite", database=str(Path(url_or_path).absolute()))
    try:
        url = make_url(url_or_path)
    except (ArgumentError, ValueError) as error:
        raise UserError("the URL of the store is not valid", fix="postgresql://USER@HOST/DATABASE") from error
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername != "sqlite":
        raise UserError(
            f"the store cannot be in {url.drivername!r}", fix="use a path, or postgresql://USER@HOST/DATABASE"
        )
    if url.query or url.database in (None, "", ":memory:"):
        raise UserError("an SQLite store is a file without options", fix="use its path: --store store.sqlite")
    return url.set(database=str(Path(str(url.database)).absolute()))


def _make_folder(folder: Path) -> None:
    try:
        files.make_folder(folder)
    except FileExistsError as error:
        raise UserError(f"{error.filename} is a file, not a folder", fix="use another path") from error


def _copy(reader: Connection, path: Path) -> None:
    """Copy an SQLite database in one step, which sees one state of it. The caller flushes the copy."""
    with closing(sqlite3.connect(path, isolation_level=None)) as target:
        target.execute("PRAGMA journal_mode=OFF")
        target.execute("PRAGMA synchronous=OFF")
        source = reader.connection.driver_connection
        assert isinstance(source, sqlite3.Connection)
        source.backup(target)


def _set_up_postgres(connection: Any, _: object) -> None:
    """A commit waits for the disk also where the server's default is not to."""
    connection.autocommit = True
    connection.execute(f"SET lock_timeout = {int(BUSY_SECONDS * 1000)}")
    # a replica that the network has cut off does not hold the lock of the others for longer
    connection.execute(f"SET idle_in_transaction_session_timeout = {int(CONNECT_SECONDS * 1000)}")
    if connection.execute("SHOW synchronous_commit").fetchone() == ("off",):
        connection.execute("SET synchronous_commit = on")
    connection.autocommit = False


def _code(error: BaseException) -> str:
    """The name of an SQLite error or the SQLSTATE of PostgreSQL, or ""."""
    return str(getattr(error, "sqlite_errorname", None) or getattr(error, "sqlstate", None) or "")


def _user_error(error: DBAPIError | sqlite3.Error, where: str, *, is_sqlite: bool) -> UserError | None:
    """What a user can do about an error of the database; None for a mistake in CEMG."""
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    name, cause = _code(original), str(original).strip()
    primary = "_".join(name.split("_")[:2]) if is_sqlite else name  # SQLITE_IOERR_FSYNC is an SQLITE_IOERR
    nothing = "nothing of this call was stored"
    if primary in DISK_FULL:
        space = f"df -h {quote(str(Path(where).parent))}" if is_sqlite else "on the server"
        return StorageError(
            f"disk full: {where} cannot grow; {nothing}",
            cause=cause,
            fix=f"free space ({space}), then try again",
        )
    if primary in READ_ONLY:
        fix = "make it and its folder writable" if is_sqlite else "use a server and a role that may write"
        return StorageError(f"{where} cannot be written; {nothing}", cause=cause, fix=fix)
    if primary in BUSY:
        fix = "try again, or stop the other process"
        return BusyError(f"{where} is locked by another process; {nothing}", cause=cause, fix=fix)
    if primary in DAMAGED:
        return DamagedError(f"{where} is damaged", cause=cause, fix="restore a backup")
    if primary == "SQLITE_NOTADB":
        return UserError(f"{where} is not an SQLite file", fix="use another --store")
    if primary in DISK_FAILS or (not is_sqlite and _lost_connection(error, name)):
        fix = (
            "check the disk, then try again" if is_sqlite else "check the server and its URL, then try again"
        )
        return StorageError(f"{where} cannot be used; this call is not acknowledged", cause=cause, fix=fix)
    return None


def _lost_connection(error: DBAPIError | sqlite3.Error, state: str) -> bool:
    """Whether PostgreSQL could not be reached, or ended the connection."""
    return isinstance(error, OperationalError) and state[:2] in ("", "08", "28", "3D", "53", "57", "58")
