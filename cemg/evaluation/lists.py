"""Reads recommendations from a table that ``cemg-recommend --all-users`` or another program wrote."""

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
    """Read one list of items per user.

    The table has the columns ``user`` and ``item``, and optionally ``rank``. Without ranks, the rows of a
    user are in order, best first. ``item`` may be a list per user. Users that are not in the table get an
    empty list.

    Args:
        path: A Parquet or CSV file.
        data: The data set, whose ids the table uses.
        split: Its split.
        catalog: Ids of a catalog. Items that are not in the data become rows from ``data.num_items`` on.

    Returns:
        Item rows [T, C] int64, best first and filled with -1, one list per user of ``split.users``; and notes
        on users without a list and on unknown users.

    Raises:
        UserError: The file cannot be read, a column is missing, an item is unknown, or a user has an item
            twice.
    """
    table = _long(_read(path), path)
    items = dict.fromkeys([*data.item_ids, *map(str, catalog)])  # those of the data come first
    row_of = {item: row for row, item in enumerate(items)}
    unknown = table.filter(~pl.col("item").is_in(list(row_of)))
    if unknown.height:
        raise UserError(
            f"{path}: item {unknown['item'][0]!r} is not among the {len(row_of)} of this run",
            fix=f"write item ids as in the data, for example {data.item_ids[0]!r}",
        )
    repeated = table.filter(table.select("user", "item").is_duplicated())
    if repeated.height:
        user, item = repeated.select("user", "item").row(0)
        raise UserError(f"{path}: user {user!r} has item {item!r} more than once")
    list_of = {data.user_ids[user]: row for row, user in enumerate(split.users)}
    known = table.filter(pl.col("user").is_in(list(list_of)))
    groups = {user: items for user, items in known.group_by("user").agg("item").iter_rows()}
    lists = np.full((len(list_of), max(map(len, groups.values()), default=1)), -1, dtype=np.int64)
    for user, items in groups.items():
        lists[list_of[user], : len(items)] = [row_of[item] for item in items]
    return torch.from_numpy(lists), _notes(
        len(list_of), len(list_of) - len(groups), table["user"].n_unique() - len(groups)
    )


def _read(path: Path) -> pl.DataFrame:
    try:
        if path.suffix == ".csv":
            return pl.read_csv(path, infer_schema=False, glob=False)
        return pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        cause = str(error).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as a table", cause=cause, fix="use a .parquet or .csv file"
        ) from None


def _long(table: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Convert to one row per user and item, as text, ordered by rank."""
    for name in ("user", "item"):
        if name not in table.columns:
            raise UserError(f"{path} has no column {name}", cause=f"it has {', '.join(table.columns)}")
    if isinstance(table["item"].dtype, pl.List | pl.Array):
        table = table.select("user", "item").explode("item")
    for name in ("user", "item", "rank"):
        kind = table[name].dtype if name in table.columns else pl.String()
        if kind.is_nested() or kind in (pl.Binary, pl.Object):
            raise UserError(f"{path}: column {name} has type {kind}; it must hold numbers or text")
    if "rank" in table.columns:
        table = table.with_columns(pl.col("rank").cast(pl.Float64, strict=False))
        if table["rank"].is_null().any():
            raise UserError(f"{path}: a rank is not a number")
        table = table.sort("rank", maintain_order=True)
    table = table.select(pl.col("user", "item").cast(pl.String))
    if table.null_count().sum_horizontal().item():
        raise UserError(f"{path} has rows without a user or without an item")
    return table


def _notes(users: int, missing: int, unknown: int) -> list[str]:
    without_list = f"{missing} of {users} users have no recommendations and count as misses"
    not_evaluated = f"{unknown} users of the file are not among the evaluated users"
    return [text for count, text in ((missing, without_list), (unknown, not_evaluated)) if count]
