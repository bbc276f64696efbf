"""The output of every reader, and the steps that turn it into a `Dataset`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from cemg.data.choices import DUPLICATES, SPLITS, TIES
from cemg.data.dataset import CUT_SHARES, Dataset
from cemg.data.filter import exact_duplicates, in_time_order, k_core, tie_rule, without_repeats
from cemg.data.readers.pictures import image_paths
from cemg.data.readers.values import canonical, other_forms
from cemg.errors import UserError

WITHOUT_TIMES = "use the split leave-one-out"
ITEM_SCHEMA = {"item": pl.String, "title": pl.String, "text": pl.String, "image": pl.String}
Describe = Callable[[pl.Series], pl.DataFrame]  # item ids -> ITEM_SCHEMA


def no_items(item_ids: pl.Series) -> pl.DataFrame:
    """Describe no item, for a source without an items file."""
    return pl.DataFrame(schema=ITEM_SCHEMA)


@dataclass(frozen=True, slots=True)
class Raw:
    """A source as it was read, before filtering.

    Attributes:
        name: Name of the dataset.
        interactions: Columns ``user`` and ``item`` (String), ``timestamp`` (a number) and optionally
            ``rating`` (Float64), in the order of the file.
        describe: Returns a frame with the columns of ITEM_SCHEMA for those of the given item ids that the
            source describes.
        items_file: The file that ``describe`` reads, for notes and errors.
        order: How the interactions are ordered, if the source has no timestamps.
        catalog: All item ids, including those without interactions, if the source lists them.
        image_folder: Folder that the image paths of the items are relative to.
        notes: Notes for the user.
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
    """Which interactions are kept, and how equal times are ordered; see `read_dataset`."""

    min_count: int
    min_rating: float | None = None
    ties: str = "source"
    duplicates: str = "keep"
    drop_duplicates: bool = False
    split: str = "leave-one-out"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.min_count < 0:
            raise UserError(f"min_count must be 0 (off) or more, got {self.min_count}")
        if self.ties not in TIES:
            raise UserError(f"ties must be one of {', '.join(TIES)}, got {self.ties!r}")
        if self.duplicates not in DUPLICATES:
            raise UserError(f"duplicates must be one of {', '.join(DUPLICATES)}, got {self.duplicates!r}")
        if self.split not in SPLITS:
            raise UserError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")


def assemble(raw: Raw, filters: Filters, *, images: Path | None = None) -> Dataset:
    """Filter and sort the interactions, number users and items, and add titles, texts and images.

    Args:
        raw: The source.
        filters: The filters.
        images: Folder of images named by item id.

    Returns:
        The dataset. Its ``notes`` say what was dropped, and which items have no description.
    """
    rows, filter_notes = _filtered(raw, filters)
    users = rows["user"].unique(maintain_order=True)
    keeps_catalog = raw.catalog is not None and filters.min_count == 0
    items = pl.Series("item", raw.catalog) if keeps_catalog else _remaining_items(rows, raw.catalog)
    about, item_notes = _described(raw, items)
    paths, image_notes = image_paths(about, raw.image_folder, images)
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
            *filter_notes,
            *_similar_ids(users, "user"),
            *_similar_ids(items, "item"),
            *item_notes,
            *image_notes,
        ],
        cuts=_cuts(raw, rows) if filters.split == "time" else None,
    )


def _filtered(raw: Raw, filters: Filters) -> tuple[pl.DataFrame, list[str]]:
    """Return the remaining interactions, grouped by user and sorted by time, and notes."""
    rows, notes = _without_duplicates(raw, filters)
    if filters.min_rating is not None:
        if "rating" not in rows.columns:
            raise UserError(
                f"{raw.name} has no ratings, so min_rating={filters.min_rating} cannot be applied",
                fix="leave out min_rating",
            )
        before, rows = rows.height, rows.filter(pl.col("rating") >= filters.min_rating)
        notes.append(
            f"ratings of {filters.min_rating:g} or more kept: interactions {before:,} → {rows.height:,}"
        )
    ordered = in_time_order(rows, ties="source" if raw.order else filters.ties, seed=filters.seed)
    deduplicated = without_repeats(ordered, filters.duplicates)
    if deduplicated.height < ordered.height:
        notes.append(
            f"{filters.duplicates} of repeated (user, item) pairs kept: "
            f"interactions {ordered.height:,} → {deduplicated.height:,}"
        )
    rows = k_core(deduplicated, filters.min_count)
    if rows.is_empty():
        setting = "min_count" if filters.min_rating is None else "min_count or min_rating"
        ratings = (
            "all ratings" if filters.min_rating is None else f"ratings of {filters.min_rating:g} or more"
        )
        raise UserError(
            f"{raw.name}: none of {raw.interactions.height:,} interactions is left after filtering",
            cause=f"the filters keep {ratings} and the {filters.min_count}-core",
            fix=f"lower {setting}: cemg-data prepare … --min-count N, or cemg-train --set data.min_count=N",
        )
    if filters.min_count > 1:
        notes.append(_core_note(deduplicated, rows, filters.min_count))
    return rows, notes


def _cuts(raw: Raw, rows: pl.DataFrame) -> np.ndarray:
    """Count the interactions of each user before the two cuts in time, [U, 2] int32.

    Args:
        raw: The source.
        rows: Its interactions after filtering, grouped by user.
    """
    if raw.order is not None:
        raise UserError(
            f"{raw.name} has no times, which a split in time needs",
            fix=f"name a file of times (--times FILE, or --set data.times=FILE), or {WITHOUT_TIMES}",
        )
    times = rows["timestamp"].sort()
    first, second = (times[int(share * len(times))] for share in CUT_SHARES)
    if not times[0] < first < second:
        raise UserError(
            f"{raw.name} cannot be split in time", fix=WITHOUT_TIMES,
            cause=f"its times are {times[0]} … {times[-1]}, and the cuts would be at {first} and {second}",
        )  # fmt: skip
    before = [(pl.col("timestamp") < cut).sum().cast(pl.Int32).alias(str(cut)) for cut in (first, second)]
    return rows.group_by("user", maintain_order=True).agg(before).drop("user").to_numpy()


def _without_duplicates(raw: Raw, filters: Filters) -> tuple[pl.DataFrame, list[str]]:
    """Drop exact duplicates if requested; a note says how many there are in any case."""
    rows = raw.interactions
    repeated = exact_duplicates(rows) if raw.order is None else None
    count = int(repeated.sum()) if repeated is not None else 0
    if repeated is None or not count:
        return rows, []
    note = f"{count:,} of {rows.height:,} interactions exactly repeat another one"
    if filters.drop_duplicates:
        return rows.filter(~repeated), [f"{note}: dropped"]
    return rows, [f"{note}: kept; --drop-duplicates drops them"]


def _core_note(before: pl.DataFrame, after: pl.DataFrame, min_count: int) -> str:
    if before.height == after.height:
        return f"{min_count}-core: nothing was dropped"
    users, items = (
        f"{before[name].n_unique():,} → {after[name].n_unique():,} {name}s" for name in ("user", "item")
    )
    return f"{min_count}-core: {users}, {items}, interactions {before.height:,} → {after.height:,}"


def _remaining_items(rows: pl.DataFrame, catalog: list[str] | None) -> pl.Series:
    """Return the items with interactions, in the order of the catalog or of their first interaction."""
    items = rows["item"].unique(maintain_order=True)
    if catalog is None:
        return items
    remaining = set(items)
    return pl.Series("item", [item for item in catalog if item in remaining])


def _similar_ids(ids: pl.Series, kind: str) -> list[str]:
    """Return a note if two ids differ only in how they are written, as 108 and 0108."""
    forms = ids.to_frame("id").with_columns(canonical(pl.col("id")).alias("plain"))
    similar = forms.filter(pl.len().over("plain") > 1)
    if similar.is_empty():
        return []
    example = similar.filter(pl.col("plain") == similar["plain"][0])["id"].to_list()
    return [
        f"{similar.height:,} {kind} ids differ from another one only in how they are written, such as "
        f"{example[0]!r} and {example[1]!r}: they stay different {kind}s"
    ]


def _described(raw: Raw, items: pl.Series) -> tuple[pl.DataFrame, list[str]]:
    """Return ITEM_SCHEMA for each item in order, null where nothing is known, and notes."""
    rows = raw.describe(items)
    described = rows.unique("item", keep="first", maintain_order=True)
    notes = []
    if raw.items_file is not None:
        name, forms = raw.items_file.name, other_forms(items, described["item"])
        if repeated := rows.height - described.height:
            notes.append(f"{name} has {repeated:,} further rows for items that it already describes: ignored")
        if forms.height:
            item, other = forms.row(0)
            notes.append(f"{name} has {forms.height:,} ids such as {other!r} for {item!r}: they are matched")
            described = described.with_columns(pl.col("item").replace(forms["other"], forms["id"]))
        notes += _coverage(name, items, described["item"])
    return items.to_frame("item").join(described, on="item", how="left", maintain_order="left"), notes


def _coverage(name: str, items: pl.Series, described: pl.Series) -> list[str]:
    """Return a note if the items file lacks items. Raises UserError if it describes none of them."""
    count = int(items.is_in(described.implode()).sum())
    if count == 0:
        ids = f"{name} has ids such as {described[0]!r}" if len(described) else f"{name} has none of these"
        raise UserError(
            f"{name} describes 0 of {len(items):,} items",
            cause=f"the interactions have item ids such as {items[0]!r}; {ids}",
            fix="name the id columns: --columns item=… for the interactions, id=… for the items",
        )
    return [f"{name} describes {count:,} of {len(items):,} items"] if count < len(items) else []


def _sequences(rows: pl.DataFrame, users: pl.Series, items: pl.Series) -> list[np.ndarray]:
    """Return the item rows of each user, int32. ``rows`` must be grouped by user."""
    row_of = pl.DataFrame({"item": items, "row": np.arange(len(items), dtype=np.int32)})
    numbered = rows.join(row_of, on="item", how="left", maintain_order="left")["row"].to_numpy()
    lengths = rows.group_by("user", maintain_order=True).len()["len"].to_numpy()
    return [np.asarray(part, dtype=np.int32) for part in np.split(numbered, np.cumsum(lengths)[:-1])]
