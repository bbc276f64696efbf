"""Filters on interactions: frames with the columns user, item, timestamp and, optionally, rating."""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl

from cemg.data.choices import DUPLICATES, TIES
from cemg.errors import UserError


def k_core(interactions: pl.DataFrame, min_count: int) -> pl.DataFrame:
    """Drop users and items with fewer than ``min_count`` interactions, repeatedly, until all have enough.

    A repeated (user, item) pair counts each time.

    Returns:
        The largest subset in which every user and item has ``min_count`` interactions, in the same order. It
        may be empty.
    """
    rows = -1
    while interactions.height != rows:
        rows = interactions.height
        for column in ("user", "item"):
            interactions = interactions.filter(pl.len().over(column) >= min_count)
    return interactions


def in_time_order(interactions: pl.DataFrame, *, ties: str = "source", seed: int = 0) -> pl.DataFrame:
    """Group rows by user, in order of first appearance, and sort the rows of each user by ``timestamp``.

    Args:
        interactions: The rows.
        ties: Order of a user's rows with equal times: "source" keeps that of the input, "shuffle" is random.
        seed: Seed of "shuffle".

    Raises:
        UserError: ``ties`` has another value.
    """
    if ties not in TIES:
        raise UserError(f"ties must be one of {', '.join(TIES)}, got {ties!r}")
    rows = interactions.with_row_index("first_row").with_columns(pl.col("first_row").min().over("user"))
    if ties == "shuffle":
        rows = rows[np.random.default_rng(seed).permutation(rows.height)]
    return rows.sort("first_row", "timestamp", maintain_order=True).drop("first_row")


def tie_rule(ties: str, seed: int) -> str:
    """Describe ``ties`` for the fingerprint of a split. Changing these texts changes every fingerprint."""
    if ties == "source":
        return "equal times in order of the source file"
    return f"equal times shuffled, seed {seed}"


def exact_duplicates(interactions: pl.DataFrame) -> pl.Series:
    """Return which rows equal an earlier row in every column, bool [rows]."""
    if interactions.is_empty():
        return pl.Series([], dtype=pl.Boolean)
    return ~interactions.select(pl.struct(pl.all()).is_first_distinct()).to_series()


def without_repeats(interactions: pl.DataFrame, duplicates: str) -> pl.DataFrame:
    """Keep all rows of a (user, item) pair, or only its first or last.

    The readers keep all by default, because buying an item or visiting a place again is a real event.

    Args:
        interactions: Rows in time order.
        duplicates: "keep", "first" or "last".

    Raises:
        UserError: ``duplicates`` has another value.
    """
    if duplicates not in DUPLICATES:
        raise UserError(f"duplicates must be one of {', '.join(DUPLICATES)}, got {duplicates!r}")
    if duplicates == "keep":
        return interactions
    keep: Literal["first", "last"] = "first" if duplicates == "first" else "last"
    return interactions.unique(["user", "item"], keep=keep, maintain_order=True)
