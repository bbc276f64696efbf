"""What every reader hands over, and how it becomes a `Dataset`: filter, order, number, describe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from cemg.data.dataset import Dataset
from cemg.data.filter import DUPLICATES, TIES, in_time_order, k_core, tie_rule, without_repeats
from cemg.errors import UserError

ITEM_SCHEMA = {"item": pl.String, "title": pl.String, "text": pl.String, "image": pl.String}


def no_items(wanted: pl.Series) -> pl.DataFrame:
    """The description of items that nothing describes."""
    return pl.DataFrame(schema=ITEM_SCHEMA)


@dataclass(frozen=True, slots=True)
class Raw:
    """A source as read, not yet filtered.

    ``interactions``: ``user``, ``item`` (String), ``timestamp`` (a number), maybe ``rating`` (Float64), as in
    the file. ``describe(wanted ids)`` gives a frame of ITEM_SCHEMA for the items it knows.
    ``order`` says in words how a source without timestamps is ordered. ``catalog`` lists the items that
    exist, bought or not, where the source says so. ``image_folder`` holds the images that items name.
    """

    name: str
    interactions: pl.DataFrame
    describe: Callable[[pl.Series], pl.DataFrame] = no_items
    order: str | None = None
    catalog: list[str] | None = None
    image_folder: Path | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What of the interactions stays and how equal times are ordered; see `read_dataset`."""

    min_count: int
    min_rating: float | None = None
    ties: str = "source"
    duplicates: str = "keep"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.min_count < 0:
            raise UserError(f"min_count must be 0 (off) or more, got {self.min_count}")
        if self.ties not in TIES:
            raise UserError(f"ties must be one of {', '.join(TIES)}, got {self.ties!r}")
        if self.duplicates not in DUPLICATES:
            raise UserError(f"duplicates must be one of {', '.join(DUPLICATES)}, got {self.duplicates!r}")


def assemble(raw: Raw, filters: Filters, *, images: Path | None = None) -> Dataset:
    """Filter and order the interactions, number users and items, join titles, texts and images."""
    rows = _filtered(raw, filters)
    users = rows["user"].unique(maintain_order=True)
    whole = raw.catalog is not None and filters.min_count == 0
    items = pl.Series("item", raw.catalog) if whole else _bought_items(rows, raw.catalog)
    about = items.to_frame().join(
        raw.describe(items).unique("item", keep="first", maintain_order=True),
        on="item",
        how="left",
        maintain_order="left",
    )
    paths, notes = _image_paths(about, raw.image_folder, images)
    return Dataset(
        name=raw.name,
        user_ids=users.to_list(),
        item_ids=items.to_list(),
        sequences=_sequences(rows, users, items),
        titles=about["title"].fill_null("").to_list(),
        texts=about["text"].to_list(),
        images=paths,
        tie_rule=raw.order or tie_rule(filters.ties, filters.seed),
        notes=[*raw.notes, *notes],
    )


def _filtered(raw: Raw, filters: Filters) -> pl.DataFrame:
    rows = raw.interactions
    if filters.min_rating is not None:
        if "rating" not in rows.columns:
            raise UserError(f"{raw.name} has no ratings to compare with {filters.min_rating}")
        rows = rows.filter(pl.col("rating") >= filters.min_rating)
    ordered = in_time_order(rows, ties="source" if raw.order else filters.ties, seed=filters.seed)
    rows = k_core(without_repeats(ordered, filters.duplicates), filters.min_count)
    if rows.is_empty():
        least = "any height" if filters.min_rating is None else f"{filters.min_rating:g} or more"
        raise UserError(
            f"{raw.name}: none of {raw.interactions.height:,} interactions is left",
            cause=f"ratings of {least}, {filters.min_count}-core",
            fix="lower min_count" if filters.min_rating is None else "lower min_count or min_rating",
        )
    return rows


def _bought_items(rows: pl.DataFrame, catalog: list[str] | None) -> pl.Series:
    """The items left, in the catalog's order or in that of their first appearance."""
    bought = rows["item"].unique(maintain_order=True)
    if catalog is None:
        return bought
    left = set(bought)
    return pl.Series("item", [item for item in catalog if item in left])


def _sequences(rows: pl.DataFrame, users: pl.Series, items: pl.Series) -> list[np.ndarray]:
    """Item rows per user, int32; ``rows`` are grouped by user already."""
    number = pl.DataFrame({"item": items, "row": np.arange(len(items), dtype=np.int32)})
    numbered = rows.join(number, on="item", how="left", maintain_order="left")["row"].to_numpy()
    lengths = rows.group_by("user", maintain_order=True).len()["len"].to_numpy()
    return [np.asarray(part, dtype=np.int32) for part in np.split(numbered, np.cumsum(lengths)[:-1])]


def _image_paths(
    about: pl.DataFrame, named_in: Path | None, images: Path | None
) -> tuple[list[Path | None], list[str]]:
    """The image file of each item, and a note where a named file is absent or a folder fits no item."""
    if images is not None and not images.is_dir():
        raise UserError(f"{images} is no folder of images")
    by_id = {file.stem: file for file in sorted(images.iterdir())} if images else {}
    folder = images or named_in or Path()
    paths: list[Path | None] = []
    absent = 0
    for item, name in about.select("item", "image").iter_rows():
        named = folder / name if name else None
        found = named if named and named.is_file() else by_id.get(item)
        absent += found is None and named is not None
        paths.append(found)
    notes = [f"{absent:,} named image files are absent from {folder}"] if absent else []
    if images and not any(paths):
        notes.append(f"no file of {images} is named by an item's id, such as {about['item'][0]}.jpg")
    return paths, notes
