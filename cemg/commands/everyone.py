"""Recommendations for every user of a run, as one Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cemg import files
from cemg.progress import bar
from cemg.recommender import Recommender

SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("rank", pa.int32()),
        ("item", pa.string()),
        ("title", pa.string()),
        ("score", pa.float32()),
    ]
)
ROW_GROUP = 65536  # rows that are written at once


def write_all(recommender: Recommender, path: Path, *, part: str, options: dict[str, Any]) -> int:
    """Write ``path``, a row per user and item, best first; returns the number of users.

    ``part`` "all" uses each user's whole history; "test" and "valid" the history before the item that the
    evaluation holds out. ``options`` go to ``recommend``. The file is written whole or not at all.
    """
    users, histories = _requests(recommender, part)
    with (
        files.durable(path) as unfinished,
        pq.ParquetWriter(unfinished, SCHEMA) as writer,
        bar("recommend", total=len(users)) as advance,
    ):
        rows: list[tuple[Any, ...]] = []
        for batch, found in _batches(recommender, users, histories, options):
            rows += found
            if len(rows) >= ROW_GROUP:
                writer.write_table(_table(rows))
                rows = []
            advance(batch)
        writer.write_table(_table(rows))
    return len(users)


def _requests(recommender: Recommender, part: str) -> tuple[list[str], list[list[str]]]:
    data = recommender.pipeline.load_data()
    if part == "all":
        rows, sequences = range(data.num_users), data.sequences
    else:
        split = data.split()
        rows, sequences = split.users, split.histories(part)  # type: ignore[assignment]
    own = [(data.user_ids[row], items) for row, items in zip(rows, sequences, strict=True) if len(items)]
    return [user for user, _ in own], [[data.item_ids[item] for item in items] for _, items in own]


def _batches(
    recommender: Recommender, users: list[str], histories: list[list[str]], options: dict[str, Any]
) -> Iterator[tuple[int, list[tuple[Any, ...]]]]:
    """How many users a batch has, and its rows."""
    size = recommender.pipeline.config.decoding.batch_size
    for start in range(0, len(users), size):
        batch = slice(start, start + size)
        found = recommender.recommend(histories[batch], **options)
        listed = zip(users[batch], found.ids, found.titles, found.scores.tolist(), strict=True)
        yield (
            len(users[batch]),
            [
                (user, rank, str(item), title or "", score)
                for user, ids, titles, scores in listed
                for rank, (item, title, score) in enumerate(zip(ids, titles, scores, strict=True), start=1)
                if item is not None
            ],
        )


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    return pa.table([pa.array(c, t.type) for c, t in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
