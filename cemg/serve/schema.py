"""The tables of the store, their version, and migrations from earlier versions.

All numbers come from the single row of ``state``. It is locked first in each transaction that writes, so that
numbers have no gaps, are never used again, and appear in their order also in PostgreSQL.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    insert,
    inspect,
    select,
    text,
    update,
)

from cemg.errors import UserError
from cemg.version import __version__

Migration = Callable[[Connection], None]
LOCK = 0x63656D67  # of PostgreSQL, held while the schema is checked: "cemg"

metadata = MetaData()
NAME = Text().with_variant(Text(collation="C"), "postgresql")  # compares bytes, as SQLite does
NUMBER = BigInteger().with_variant(Integer, "sqlite")  # the row id of SQLite

meta = Table(
    "cemg_meta",
    metadata,
    Column("name", NAME, primary_key=True),
    Column("value", Text, nullable=False),
)
state = Table(
    "cemg_state",
    metadata,
    Column("number", BigInteger, nullable=False),  # of the last event or deletion
    Column("version", BigInteger, nullable=False),  # of the last change of the catalog
    Column("events", BigInteger, nullable=False),
    Column("users", BigInteger, nullable=False),
)
events = Table(
    "cemg_events",
    metadata,
    Column("number", NUMBER, primary_key=True, autoincrement=False),
    Column("event_id", NAME, nullable=False, unique=True),
    Column("user_id", NAME, nullable=False),
    Column("item_id", NAME, nullable=False),
    Column("timestamp", Double),
    Column("type", NAME, nullable=False),
    Column("received", Double, nullable=False),
    Column("time", Double, nullable=False),  # timestamp, or received if there is none
)
Index("cemg_events_of_user", events.c.user_id, events.c.time, events.c.number)
users = Table(
    "cemg_users",  # those with events
    metadata,
    Column("user_id", NAME, primary_key=True),
    sqlite_with_rowid=False,
)
deletions = Table(
    "cemg_deletions",
    metadata,
    Column("number", NUMBER, primary_key=True, autoincrement=False),
    Column("user_id", NAME, nullable=False),
    Column("events", BigInteger, nullable=False),
    Column("time", Double, nullable=False),
)
items = Table(
    "cemg_items",
    metadata,
    Column("item_id", NAME, primary_key=True),
    Column("title", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("attributes", Text, nullable=False),  # JSON
    Column("state", NAME, nullable=False),
    Column("codes", Text),  # JSON
    Column("version", BigInteger, nullable=False),
    Column("time", Double, nullable=False),
    Column("image", LargeBinary),  # last, so that SQLite reads the others without it
)
items_by_state = Index("cemg_items_by_state", items.c.state, items.c.item_id)
changes = Table(
    "cemg_changes",
    metadata,
    Column("version", NUMBER, primary_key=True, autoincrement=False),
    Column("kind", NAME, nullable=False),
    Column("item_id", NAME, nullable=False),
    Column("payload", Text, nullable=False),  # JSON
    Column("time", Double, nullable=False),
)


MIGRATIONS: list[Migration] = [  # the first one makes version 2 out of version 1
    lambda connection: items_by_state.create(connection, checkfirst=True),
]


def prepare(connection: Connection, *, catalog: str, where: str) -> str:
    """Create the tables or migrate them, inside the transaction of ``connection``.

    Args:
        connection: A connection that holds the write lock.
        catalog: Digest of the catalog, recorded in a store that has none yet; "" checks nothing.
        where: The store, for errors.

    Returns:
        The digest of the catalog that the store belongs to, or "".

    Raises:
        UserError: The store belongs to another catalog, was written by a newer version of CEMG, or is a
            database of another program.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
    if not is_store(connection, where=where):
        _create(connection, catalog)
        return catalog
    stored = check(connection, catalog=catalog, where=where)
    recorded = stored.get("catalog", "")
    for migration in MIGRATIONS[int(stored["schema"]) - 1 :]:
        migration(connection)
    set_meta(connection, "schema", str(newest()))
    if catalog and not recorded:
        set_meta(connection, "catalog", catalog)
    return recorded or catalog


def check(connection: Connection, *, catalog: str, where: str) -> dict[str, str]:
    """Return the values of ``meta``. Raises UserError as `prepare` does, also where there are no tables."""
    if not is_store(connection, where=where):
        raise UserError(f"{where} is not a store of CEMG", cause="it has no tables", fix="use another file")
    stored: dict[str, str] = {row.name: row.value for row in connection.execute(select(meta))}
    _check_version(stored, where)
    recorded = stored.get("catalog", "")
    check_catalog(recorded, catalog, where=where)
    return stored


def check_catalog(recorded: str, catalog: str, *, where: str) -> None:
    """Raise UserError if a store of the catalog ``recorded`` does not belong to ``catalog``; "" is any."""
    if catalog and recorded and catalog != recorded:
        raise UserError(
            f"{where} belongs to another catalog",
            cause=f"it was made for catalog {recorded[:12]}, not {catalog[:12]}",
            fix="serve the run that it belongs to, use another --store, or move it: cemg-serve --move-store",
        )


def is_store(connection: Connection, *, where: str) -> bool:
    """Whether the tables exist. Raises UserError for an SQLite file with tables of another program."""
    names = set(inspect(connection).get_table_names())
    if meta.name in names:
        return True
    if names and connection.dialect.name == "sqlite":
        raise UserError(
            f"{where} is not a store of CEMG",
            cause=f"it is an SQLite file with the table {min(names)!r}",
            fix="use another --store",
        )
    return False


def newest() -> int:
    """The version of the schema that this version of CEMG writes."""
    return 1 + len(MIGRATIONS)


def set_meta(connection: Connection, name: str, value: str) -> None:
    """Insert or replace a value of ``meta``."""
    known = connection.execute(update(meta).where(meta.c.name == name).values(value=value)).rowcount
    if not known:
        connection.execute(insert(meta).values(name=name, value=value))


def _create(connection: Connection, catalog: str) -> None:
    metadata.create_all(connection, checkfirst=False)
    values = {"schema": newest(), "catalog": catalog, "created": time.time(), "cemg": __version__}
    connection.execute(insert(meta), [{"name": name, "value": str(value)} for name, value in values.items()])
    connection.execute(insert(state).values(number=0, version=0, events=0, users=0))


def _check_version(stored: dict[str, str], where: str) -> None:
    found = stored.get("schema", "")
    if not found.isdecimal() or int(found) < 1:
        raise UserError(f"{where} is not a store of CEMG", cause=f"its schema has version {found!r}")
    if int(found) > newest():
        raise UserError(
            f"{where} was written by a newer version of CEMG",
            cause=f"its schema has version {found}; this version reads up to {newest()}",
            fix="pip install --upgrade cemg",
        )
