"""Filters on a frame of interactions: columns ``user``, ``item``, ``timestamp`` and maybe ``rating``."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import polars as pl

from cemg.errors import UserError

Ties = Literal["source", "shuffle"]
Duplicates = Literal["keep", "first", "last"]
TIES: tuple[str, ...] = get_args(Ties)
DUPLICATES: tuple[str, ...] = get_args(Duplicates)


def k_core(interactions: pl.DataFrame, min_count: int) -> pl.DataFrame:
    """Drop users and items with fewer than ``min_count`` interactions until none is left to drop.

    The result is the largest subset in which every user and every item has that many; it can be empty.
    A repeated (user, item) pair counts each time. The order of the rows is kept.
    """
    rows = -1
    while interactions.height != rows:
        rows = interactions.height
        for column in ("user", "item"):
            interactions = interactions.filter(pl.len().over(column) >= min_count)
    return interactions


def in_time_order(interactions: pl.DataFrame, *, ties: str = "source", seed: int = 0) -> pl.DataFrame:
    """Group by user, in order of first appearance, and sort each user's rows by ``timestamp``.

    Rows of one user and equal time keep the order of the source (``ties="source"``) or take a seeded random
    one (``ties="shuffle"``). Raises UserError for another ``ties``.
    """
    if ties not in TIES:
        raise UserError(f"ties must be one of {', '.join(TIES)}, got {ties!r}")
    rows = interactions.with_row_index("place").with_columns(pl.col("place").min().over("user"))
    if ties == "shuffle":
        rows = rows[np.random.default_rng(seed).permutation(rows.height)]
    return rows.sort("place", "timestamp", maintain_order=True).drop("place")


def tie_rule(ties: str, seed: int) -> str:
    """``ties`` in words, for the fingerprint of a split."""
    if ties == "source":
        return "equal times in order of the source file"
    return f"equal times shuffled, seed {seed}"


def exact_duplicates(interactions: pl.DataFrame) -> pl.Series:
    """True for each row that equals an earlier one in every column, bool [rows]."""
    if interactions.is_empty():
        return pl.Series([], dtype=pl.Boolean)
    return ~interactions.select(pl.struct(pl.all()).is_first_distinct()).to_series()


def without_repeats(interactions: pl.DataFrame, duplicates: str) -> pl.DataFrame:
    """Keep all rows of a (user, item) pair, or its ``first`` or ``last`` only; rows must be in time order.

    A shop that sells an item twice, or a restaurant visited again, is a true event: ``keep`` is the default
    of the readers. Raises UserError for another ``duplicates``.
    """
    if duplicates not in DUPLICATES:
        raise UserError(f"duplicates must be one of {', '.join(DUPLICATES)}, got {duplicates!r}")
    if duplicates == "keep":
        return interactions
    which: Literal["first", "last"] = "first" if duplicates == "first" else "last"
    return interactions.unique(["user", "item"], keep=which, maintain_order=True)
