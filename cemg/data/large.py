"""A synthetic data set of any size, written block by block: memory does not grow with users or items.

Item n belongs to cluster n mod C, and its text has the words of the cluster alone. After an item of cluster
c, the next one is of cluster ``following[c]`` with probability HABIT, else of any cluster. In each cluster,
popularity falls with the rank of the item, n // C, as a power of it.

U users, N items, C clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cemg.data.dataset import FORMAT
from cemg.errors import UserError
from cemg.progress import bar
from cemg.storage import files
from cemg.storage.read import file_digest, signed

BLOCK = 1 << 16  # users or items of a block; each block has a random generator of its own
CLUSTERS, CLUSTER_ITEMS = 1000, 10  # at most so many clusters, of at least so many items
HABIT = 0.7  # probability of the cluster that follows
SKEW = 3.0  # the rank of a drawn item is a uniform number to this power, times the size of the cluster
SHORTEST, MEAN, LONGEST = 5, 12, 50  # items of a history
MOST = 2**31 - 1  # rows are int32
USERS = pa.schema([("user_id", pa.string())])
ITEMS = pa.schema([(name, pa.string()) for name in ("item_id", "title", "text", "image")])
INTERACTIONS = pa.schema([("user", pa.int32()), ("item", pa.int32())])
SYLLABLES = ("ba", "do", "ki", "lu", "me", "no", "pa", "ri", "sa", "tu")


def write_large(folder: Path, *, users: int, items: int, seed: int = 0) -> int:
    """Write a prepared folder.

    Args:
        folder: The folder to write.
        users: U.
        items: N.
        seed: Random seed. The same one gives the same files.

    Returns:
        The number of interactions.

    Raises:
        UserError: A number is too small or too large.
    """
    for name, count in (("users", users), ("items", items)):
        if not CLUSTER_ITEMS <= count <= MOST:
            raise UserError(f"--{name} must be from {CLUSTER_ITEMS} to {MOST:,}, got {count:,}")
    clusters = len(following_clusters(items, seed))
    interactions = 0
    _write(folder / "users.parquet", USERS, users, map(_user_ids, _blocks(users)))
    _write(folder / "items.parquet", ITEMS, items, (_items(rows, clusters) for rows in _blocks(items)))

    def bought() -> Iterator[pa.Table]:
        nonlocal interactions
        for number, rows in enumerate(_blocks(users)):
            table = _interactions(rows, items, rng=np.random.default_rng([seed, 1, number]), seed=seed)
            interactions += table.num_rows
            yield table

    _write(folder / "interactions.parquet", INTERACTIONS, users, bought())
    tables = ("users.parquet", "items.parquet", "interactions.parquet")
    about = {
        "format": FORMAT, "name": "synth", "tie_rule": "source", "synthetic": True, "notes": [],
        "files": {name: file_digest(folder / name) for name in tables},
    }  # fmt: skip
    files.write_json(folder / "dataset.json", signed(about))
    return interactions


def following_clusters(items: int, seed: int = 0) -> np.ndarray:
    """The cluster that follows each cluster, [C] int32: one cycle through all of them."""
    order = np.random.default_rng([seed, 0]).permutation(min(CLUSTERS, items // CLUSTER_ITEMS))
    following = np.empty(len(order), np.int32)
    following[order] = np.roll(order, -1)
    return following


def _blocks(count: int) -> Iterator[range]:
    return (range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def _user_ids(rows: range) -> pa.Table:
    return pa.table([[f"u{row}" for row in rows]], schema=USERS)


def _items(rows: range, clusters: int) -> pa.Table:
    words = [_word(row % clusters) for row in rows]
    texts = [
        f"{word} {word[::-1]}, size {row // clusters % 40}" for word, row in zip(words, rows, strict=True)
    ]
    titles = [f"{word} {row // clusters}" for word, row in zip(words, rows, strict=True)]
    ids = [f"i{row}" for row in rows]
    return pa.table([ids, titles, texts, pa.nulls(len(ids), pa.string())], schema=ITEMS)


def _word(cluster: int) -> str:
    return "".join(SYLLABLES[int(digit)] for digit in f"{cluster:03}")


def _interactions(rows: range, items: int, *, rng: np.random.Generator, seed: int) -> pa.Table:
    """Draw the histories of a block of users."""
    following = following_clusters(items, seed)
    lengths = np.minimum(SHORTEST + rng.geometric(1 / (MEAN - SHORTEST + 1), len(rows)) - 1, LONGEST)
    bought = np.empty((len(rows), int(lengths.max())), np.int32)
    cluster = rng.integers(len(following), size=len(rows))
    for step in range(bought.shape[1]):
        size = (items - 1 - cluster) // len(following) + 1  # items of the cluster
        rank = (rng.random(len(rows)) ** SKEW * size).astype(np.int64)
        bought[:, step] = rank * len(following) + cluster
        other = rng.integers(len(following), size=len(rows))
        cluster = np.where(rng.random(len(rows)) < HABIT, following[cluster], other)
    kept = np.arange(bought.shape[1]) < lengths[:, None]
    users = np.repeat(np.arange(rows.start, rows.stop, dtype=np.int32), lengths)
    return pa.table([users, bought[kept]], schema=INTERACTIONS)


def _write(path: Path, schema: pa.Schema, total: int, blocks: Iterator[pa.Table]) -> None:
    with (
        files.durable(path) as part,
        pq.ParquetWriter(part, schema) as writer,
        bar(path.name, total=-(-total // BLOCK)) as advance,
    ):
        for table in blocks:
            writer.write_table(table)
            advance(1)
