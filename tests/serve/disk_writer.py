"""Writes to a store on the disk of disk.c, notes what was acknowledged, and ends without closing anything.

``python tests/serve/disk_writer.py FOLDER SYNCHRONOUS CALLS``. Each line of FOLDER/notes is written when a
call returned: the outcome, and the ids of its events or the version of its item.
"""

from __future__ import annotations

import os
import sys

from cemg.serve.rows import Event, Item
from cemg.serve.store import Store
from cemg.storage.files import StorageError

folder, synchronous, calls = sys.argv[1:]
notes, end = os.open(f"{folder}/notes", os.O_WRONLY | os.O_CREAT), 0


def note(*words: object) -> None:
    """Append a line, so that the record has it among the writes of the store."""
    global end
    end += os.pwrite(notes, (" ".join(map(str, words)) + "\n").encode(), end)


def opened() -> Store:
    """The store; opening it may fail, too."""
    while True:
        try:
            return Store.open(f"{folder}/store.sqlite", synchronous=synchronous)
        except StorageError:
            note("refused")


store = opened()
for step in range(int(calls)):
    ids = [f"{step}-{number}" for number in range(1 if step % 3 else 9)]
    try:
        with store._database.write() as connection:  # often, so that power is cut inside it
            connection.exec_driver_sql("PRAGMA wal_autocheckpoint=30")
        if step % 4 == 3:
            note("item", store.put_item(Item(f"item-{step}", text="x" * 9000)))
        else:
            store.append_events([Event(name, f"user-{step % 5}", "item") for name in ids])
            note("events", *ids)
    except StorageError as error:
        note("refused", *ids)
        if "notes" in os.environ.get("CEMG_DISK_SHOW", ""):
            print(error, file=sys.stderr)
os._exit(0)
