"""``cemg-recommend --all``: recommendations for every user of a run, as one Parquet file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cemg.progress import bar
from cemg.recommender import Recommender
from cemg.storage import files

Row = tuple[str, int, str, str, float]  # as in SCHEMA
SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("rank", pa.int32()),
        ("item", pa.string()),
        ("title", pa.string()),
        ("score", pa.float32()),
    ]
)
ROW_GROUP = 65536  # rows written at once


def write_all(recommender: Recommender, path: Path, *, part: str, options: dict[str, Any]) -> int:
    """Write one row per user and recommended item, best first.

    The file is written completely or not at all.

    Args:
        recommender: The run and its decoder.
        path: Parquet file to write.
        part: "all" uses each user's whole history; "test" and "valid" use the history before the item that
            the evaluation holds out.
        options: Keyword arguments of `Recommender.recommend`.

    Returns:
        The number of users.
    """
    popularity = (options.get("memory") or recommender.default_memory) != "off"
    users, histories = _users_and_histories(recommender, part, popularity=popularity)
    with (
        files.durable(path) as unfinished,
        pq.ParquetWriter(unfinished, SCHEMA) as writer,
        bar("recommend", total=len(users)) as advance,
    ):
        rows: list[Row] = []
        for batch_users, batch_rows in _batches(recommender, users, histories, options):
            rows += batch_rows
            if len(rows) >= ROW_GROUP:
                writer.write_table(_table(rows))
                rows = []
            advance(batch_users)
        writer.write_table(_table(rows))
    return len(users)


def _users_and_histories(
    recommender: Recommender, part: str, *, popularity: bool
) -> tuple[list[str], list[list[str]]]:
    """Return the ids of users and the item ids of their histories.

    Users without a history are left out unless ``popularity`` ranks for them.
    """
    data = recommender.artifacts.load_data()
    rows: Iterable[int]
    sequences: Iterable[np.ndarray]
    if part == "all":
        rows, sequences = range(data.num_users), data.sequences
    else:
        split = data.split()
        rows, sequences = split.users_of(part), split.histories(part)
    nonempty = [
        (data.user_ids[row], items)
        for row, items in zip(rows, sequences, strict=True)
        if len(items) or popularity
    ]
    return [user for user, _ in nonempty], [[data.item_ids[item] for item in items] for _, items in nonempty]


def _batches(
    recommender: Recommender, users: list[str], histories: list[list[str]], options: dict[str, Any]
) -> Iterator[tuple[int, list[Row]]]:
    """Yield the number of users and the rows of one batch after another."""
    size = recommender.artifacts.config.decoding.batch_size
    for start in range(0, len(users), size):
        batch = slice(start, start + size)
        top = recommender.recommend(histories[batch], **options)
        lists = zip(users[batch], top.ids, top.titles, top.scores.tolist(), strict=True)
        yield (
            len(users[batch]),
            [
                (user, rank, str(item), title or "", score)
                for user, ids, titles, scores in lists
                for rank, (item, title, score) in enumerate(zip(ids, titles, scores, strict=True), start=1)
                if item is not None
            ],
        )


def _table(rows: list[Row]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    return pa.table([pa.array(c, t.type) for c, t in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
