"""Reads recommendations from a table, as ``cemg-recommend --all`` or another program wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from cemg.data.dataset import Dataset, Split
from cemg.errors import UserError


def read_lists(
    path: Path, data: Dataset, split: Split, *, catalog: Sequence[str | int] = ()
) -> tuple[Tensor, list[str]]:
    """Lists [T, C] int64 of item rows, best first, -1 for none, one per user of ``split.users``; and notes.

    The items of ``catalog`` that the data lack are rows from ``data.num_items`` on.

    The table (Parquet or CSV) has the columns ``user``, ``item`` and maybe ``rank``; without ranks a user's
    rows are best first. ``item`` may be a list per user. Users that the file lacks have an empty list.
    Raises UserError for a file that cannot be read, a missing column, an unknown item, and an item that a
    user has twice.
    """
    table = _long(_read(path), path)
    items = dict.fromkeys([*data.item_ids, *map(str, catalog)])  # the data's first
    row_of = {item: row for row, item in enumerate(items)}
    unknown = table.filter(~pl.col("item").is_in(list(row_of)))
    if unknown.height:
        raise UserError(
            f"{path}: item {unknown['item'][0]!r} is not among the {len(row_of)} of this run",
            fix=f"its ids are written like {data.item_ids[0]!r}",
        )
    twice = table.filter(table.select("user", "item").is_duplicated())
    if twice.height:
        user, item = twice.select("user", "item").row(0)
        raise UserError(f"{path}: user {user!r} has item {item!r} more than once")
    place = {data.user_ids[user]: row for row, user in enumerate(split.users)}
    known = table.filter(pl.col("user").is_in(list(place)))
    groups = {user: items for user, items in known.group_by("user").agg("item").iter_rows()}
    lists = np.full((len(place), max(map(len, groups.values()), default=1)), -1, dtype=np.int64)
    for user, items in groups.items():
        lists[place[user], : len(items)] = [row_of[item] for item in items]
    return torch.from_numpy(lists), _notes(
        len(place), len(place) - len(groups), table["user"].n_unique() - len(groups)
    )


def _read(path: Path) -> pl.DataFrame:
    try:
        if path.suffix == ".csv":
            return pl.read_csv(path, infer_schema=False, glob=False)
        return pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        cause = str(error).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as a table", cause=cause, fix="a .parquet or .csv file"
        ) from None


def _long(table: pl.DataFrame, path: Path) -> pl.DataFrame:
    """One row per user and item, as text, ordered by rank."""
    for name in ("user", "item"):
        if name not in table.columns:
            raise UserError(f"{path} has no column {name}", cause=f"it has {', '.join(table.columns)}")
    if isinstance(table["item"].dtype, pl.List | pl.Array):
        table = table.select("user", "item").explode("item")
    for name in ("user", "item", "rank"):
        kind = table[name].dtype if name in table.columns else pl.String()
        if kind.is_nested() or kind in (pl.Binary, pl.Object):
            raise UserError(f"{path}: column {name} is of type {kind}, not of numbers or texts")
    if "rank" in table.columns:
        table = table.with_columns(pl.col("rank").cast(pl.Float64, strict=False))
        if table["rank"].is_null().any():
            raise UserError(f"{path}: a rank is not a number")
        table = table.sort("rank", maintain_order=True)
    table = table.select(pl.col("user", "item").cast(pl.String))
    if table.null_count().sum_horizontal().item():
        raise UserError(f"{path} has rows without a user or without an item")
    return table


def _notes(users: int, missing: int, others: int) -> list[str]:
    lacking = f"{missing} of {users} users have no recommendations and count as misses"
    spare = f"{others} users of the file are not among the evaluated ones"
    return [text for count, text in ((missing, lacking), (others, spare)) if count]
