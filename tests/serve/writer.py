"""Writes to a store until it is killed, in a fork per line of the input, and prints what was acknowledged.

``python tests/serve/writer.py LOCATION``. Each line of the input is a prefix for new ids.
"""

from __future__ import annotations

import itertools
import os
import sys

from cemg.serve.rows import Event, Item
from cemg.serve.store import Store


def say(*words: object) -> None:
    """Print a line by one system call: it is there completely or not at all."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def write(location: str, prefix: str) -> None:
    """Append single events and batches, and change items."""
    say("pid", os.getpid())
    store = Store.open(location)
    for step in itertools.count():
        if step % 5 == 3:
            item = f"{prefix}-{step}"
            say("item", item, store.put_item(Item(item, text="x" * 5000)))
        elif step % 5 == 4:
            ids = [f"{prefix}-{step}-{number}" for number in range(7)]
            store.append_events([Event(event, f"user-{step}", "item") for event in ids])
            say("events", *ids)
        else:
            store.append_events([Event(f"{prefix}-{step}", "ann", "item", float(step))])
            say("events", f"{prefix}-{step}")


def main() -> None:
    """A fork per line of the input."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                write(sys.argv[1], line.strip())
            except BaseException as error:
                say("failed", repr(error))
            os._exit(1)
        os.waitpid(child, 0)
        say("end")


if __name__ == "__main__":
    main()
