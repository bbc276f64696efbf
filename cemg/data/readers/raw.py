"""What every reader hands over, and how it becomes a `Dataset`: filter, order, number, describe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from cemg.data.dataset import Dataset
from cemg.data.filter import (
    DUPLICATES,
    TIES,
    exact_duplicates,
    in_time_order,
    k_core,
    tie_rule,
    without_repeats,
)
from cemg.data.readers.pictures import image_paths
from cemg.data.readers.values import canonical, other_forms
from cemg.errors import UserError

ITEM_SCHEMA = {"item": pl.String, "title": pl.String, "text": pl.String, "image": pl.String}
Describe = Callable[[pl.Series], pl.DataFrame]


def no_items(wanted: pl.Series) -> pl.DataFrame:
    """The description of items that nothing describes."""
    return pl.DataFrame(schema=ITEM_SCHEMA)


@dataclass(frozen=True, slots=True)
class Raw:
    """A source as read, not yet filtered.

    ``interactions``: ``user``, ``item`` (String), ``timestamp`` (a number), maybe ``rating`` (Float64), as in
    the file. ``describe(wanted ids)`` gives a frame of ITEM_SCHEMA for the items it knows, read from
    ``items_file``. ``order`` says in words how a source without timestamps is ordered. ``catalog`` lists the
    items that exist, bought or not, where the source says so. ``image_folder`` holds the images that items
    name.
    """

    name: str
    interactions: pl.DataFrame
    describe: Describe = no_items
    items_file: Path | None = None
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
    drop_duplicates: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.min_count < 0:
            raise UserError(f"min_count must be 0 (off) or more, got {self.min_count}")
        if self.ties not in TIES:
            raise UserError(f"ties must be one of {', '.join(TIES)}, got {self.ties!r}")
        if self.duplicates not in DUPLICATES:
            raise UserError(f"duplicates must be one of {', '.join(DUPLICATES)}, got {self.duplicates!r}")


def assemble(raw: Raw, filters: Filters, *, images: Path | None = None) -> Dataset:
    """Filter and order the interactions, number users and items, join titles, texts and images.

    What was dropped, and what is not described, is said in the dataset's ``notes``.
    """
    rows, dropped = _filtered(raw, filters)
    users = rows["user"].unique(maintain_order=True)
    whole = raw.catalog is not None and filters.min_count == 0
    items = pl.Series("item", raw.catalog) if whole else _bought_items(rows, raw.catalog)
    about, described = _described(raw, items)
    paths, pictures = image_paths(about, raw.image_folder, images)
    return Dataset(
        name=raw.name,
        user_ids=users.to_list(),
        item_ids=items.to_list(),
        sequences=_sequences(rows, users, items),
        titles=about["title"].fill_null("").to_list(),
        texts=about["text"].to_list(),
        images=paths,
        tie_rule=raw.order or tie_rule(filters.ties, filters.seed),
        notes=[
            *raw.notes,
            *dropped,
            *_alike_ids(users, "user"),
            *_alike_ids(items, "item"),
            *described,
            *pictures,
        ],
    )


def _filtered(raw: Raw, filters: Filters) -> tuple[pl.DataFrame, list[str]]:
    """The interactions that stay, grouped by user and in time order, and what was dropped, in words."""
    rows, notes = _without_duplicates(raw, filters)
    if filters.min_rating is not None:
        if "rating" not in rows.columns:
            raise UserError(f"{raw.name} has no ratings to compare with {filters.min_rating}")
        before, rows = rows.height, rows.filter(pl.col("rating") >= filters.min_rating)
        notes.append(f"ratings of {filters.min_rating:g} or more: interactions {before:,} → {rows.height:,}")
    ordered = in_time_order(rows, ties="source" if raw.order else filters.ties, seed=filters.seed)
    once = without_repeats(ordered, filters.duplicates)
    if once.height < ordered.height:
        notes.append(
            f"{filters.duplicates} of repeated (user, item) pairs: "
            f"interactions {ordered.height:,} → {once.height:,}"
        )
    rows = k_core(once, filters.min_count)
    if rows.is_empty():
        which = "min_count" if filters.min_rating is None else "min_count or min_rating"
        least = "any height" if filters.min_rating is None else f"{filters.min_rating:g} or more"
        raise UserError(
            f"{raw.name}: none of {raw.interactions.height:,} interactions is left",
            cause=f"ratings of {least}, {filters.min_count}-core",
            fix=f"lower {which}: --min-count of cemg-data, --set data.min_count=… of cemg-train",
        )
    if filters.min_count > 1:
        notes.append(_core_note(once, rows, filters.min_count))
    return rows, notes


def _without_duplicates(raw: Raw, filters: Filters) -> tuple[pl.DataFrame, list[str]]:
    """The rows, without exact duplicates where asked for; their number is said in any case."""
    rows = raw.interactions
    repeated = exact_duplicates(rows) if raw.order is None else None
    count = int(repeated.sum()) if repeated is not None else 0
    if repeated is None or not count:
        return rows, []
    said = f"{count:,} of {rows.height:,} interactions repeat another one exactly"
    if filters.drop_duplicates:
        return rows.filter(~repeated), [f"{said}: dropped"]
    return rows, [f"{said}: kept; --drop-duplicates drops them"]


def _core_note(before: pl.DataFrame, after: pl.DataFrame, min_count: int) -> str:
    if before.height == after.height:
        return f"{min_count}-core: nothing is dropped"
    users, items = (
        f"{before[name].n_unique():,} → {after[name].n_unique():,} {name}s" for name in ("user", "item")
    )
    return f"{min_count}-core: {users}, {items}, interactions {before.height:,} → {after.height:,}"


def _bought_items(rows: pl.DataFrame, catalog: list[str] | None) -> pl.Series:
    """The items left, in the catalog's order or in that of their first appearance."""
    bought = rows["item"].unique(maintain_order=True)
    if catalog is None:
        return bought
    left = set(bought)
    return pl.Series("item", [item for item in catalog if item in left])


def _alike_ids(ids: pl.Series, what: str) -> list[str]:
    """A note where two ids differ only in form, as 108 and 0108."""
    forms = ids.to_frame("id").with_columns(canonical(pl.col("id")).alias("plain"))
    alike = forms.filter(pl.len().over("plain") > 1)
    if alike.is_empty():
        return []
    first = alike.filter(pl.col("plain") == alike["plain"][0])["id"].to_list()
    return [
        f"{alike.height:,} {what} ids differ from another one only in form, such as {first[0]!r} and "
        f"{first[1]!r}: they stay different {what}s"
    ]


def _described(raw: Raw, items: pl.Series) -> tuple[pl.DataFrame, list[str]]:
    """ITEM_SCHEMA for each item in order, null where nothing is known, and what the items file lacks."""
    known = raw.describe(items)
    once = known.unique("item", keep="first", maintain_order=True)
    notes = []
    if raw.items_file is not None:
        name, forms = raw.items_file.name, other_forms(items, once["item"])
        if known.height > once.height:
            notes.append(f"{name} describes {known.height - once.height:,} items again: the first row counts")
        if forms.height:
            wanted, own = forms.row(0)
            notes.append(f"{name} has {forms.height:,} ids such as {own!r} for {wanted!r}: they are matched")
            once = once.with_columns(pl.col("item").replace(forms["known"], forms["wanted"]))
        notes += _coverage(name, items, once["item"])
    return items.to_frame("item").join(once, on="item", how="left", maintain_order="left"), notes


def _coverage(name: str, items: pl.Series, known: pl.Series) -> list[str]:
    """A note where the items file lacks items; UserError where it describes none."""
    count = int(items.is_in(known.implode()).sum())
    if count == 0:
        shown = f"{name} has ids such as {known[0]!r}" if len(known) else f"{name} has none of these"
        raise UserError(
            f"{name} describes 0 of {len(items):,} items",
            cause=f"the interactions have item ids such as {items[0]!r}; {shown}",
            fix="name the columns of the ids: --columns item=… for the interactions, id=… for the items",
        )
    return [f"{name} describes {count:,} of {len(items):,} items"] if count < len(items) else []


def _sequences(rows: pl.DataFrame, users: pl.Series, items: pl.Series) -> list[np.ndarray]:
    """Item rows per user, int32; ``rows`` are grouped by user already."""
    number = pl.DataFrame({"item": items, "row": np.arange(len(items), dtype=np.int32)})
    numbered = rows.join(number, on="item", how="left", maintain_order="left")["row"].to_numpy()
    lengths = rows.group_by("user", maintain_order=True).len()["len"].to_numpy()
    return [np.asarray(part, dtype=np.int32) for part in np.split(numbered, np.cumsum(lengths)[:-1])]
