"""Titles, texts and pictures of a run's items, and the search for items by id or title."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from cemg.artifacts import RunArtifacts
from cemg.features.vision import read_image_file
from cemg.serve.rows import DroppedError
from cemg.serve.store import Store

MAX_CHANGES = 1000  # read from the store at once


@dataclass(frozen=True, slots=True)
class RunItem:
    """What a run says about an item.

    Attributes:
        title: Its title, "" if it has none.
        text: Its text, "" if it has none.
        image: The file of its image.
    """

    title: str = ""
    text: str = ""
    image: Path | None = None


class RunItems:
    """The items of a run, read when the first one is needed.

    Args:
        run: The folder of the run.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock = threading.Lock()

    @cached_property
    def _added(self) -> dict[str, RunItem]:
        """Items that ``cemg-catalog add`` added."""
        artifacts = RunArtifacts.open(self._run)
        titles, texts = artifacts.added_titles(), artifacts.added_texts()
        return {item: RunItem(titles.get(item, ""), texts.get(item, "")) for item in {**titles, **texts}}

    @cached_property
    def table(self) -> pl.DataFrame:
        """The columns item_id, title, text and image of the data, verified when the run was opened."""
        return pl.read_parquet(self._run / "data" / "items.parquet", glob=False)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {item: row for row, item in enumerate(self.table["item_id"].to_list())}

    def titles(self) -> dict[str, str]:
        """Titles by item id."""
        with self._lock:
            known = dict(zip(self.table["item_id"].to_list(), self.table["title"].to_list(), strict=True))
            return known | {item: about.title for item, about in self._added.items()}

    def has(self, item: str) -> bool:
        """Whether the run describes an item."""
        with self._lock:
            return item in self._rows or item in self._added

    def get(self, item: str) -> RunItem:
        """What the run says about an item; nothing if the run does not describe it."""
        with self._lock:
            row = self._rows.get(item)
            if row is None:
                return self._added.get(item, RunItem())
            _, title, text, image = self.table.row(row)
        return RunItem(title, text or "", Path(image) if image else None)

    def picture(self, item: str) -> bytes | None:
        """The bytes of the image of an item; None if it has none, or if its file cannot be read."""
        path = self.get(item).image
        if path is None:
            return None
        try:
            return read_image_file(path)
        except Exception:  # the file may have moved, or may be a device
            return None


class ItemSearch:
    """Finds items by the beginning of their ids or by a part of their titles.

    Args:
        store: The store; its titles replace those of the run.
        run_items: The items of the run.
    """

    def __init__(self, store: Store, run_items: RunItems) -> None:
        self._store, self._run_items = store, run_items
        self._lock = threading.Lock()
        self._version = -1  # of the catalog whose titles `_stored` has
        self._stored: dict[str, str] = {}

    @cached_property
    def _table(self) -> pl.DataFrame:
        """Ids and titles of the run's items, in the order of the ids, with lower case titles."""
        titles = sorted(self._run_items.titles().items())
        return pl.DataFrame(
            {
                "id": [item for item, _ in titles],
                "folded": [item.casefold() for item, _ in titles],
                "title": [title.casefold() for _, title in titles],
            },
            schema={"id": pl.String, "folded": pl.String, "title": pl.String},
        )

    def find(self, query: str, after: str, limit: int) -> list[str]:
        """The ids that begin with ``query`` or whose titles contain it, regardless of case.

        They are in the order of the ids, those after ``after``. The item whose id equals the query comes
        first, on the first page only, and does not count for the limit.
        """
        folded = query.casefold()
        with self._lock:
            self._follow()
            stored = {
                item for item, title in self._stored.items()
                if item.casefold().startswith(folded) or folded in title
            }  # fmt: skip
            replaced, table = set(self._stored), self._table
            exact = query in replaced or self._run_items.has(query)
        kept = limit + len(replaced) + 1
        by_id = pl.col("folded").str.starts_with(folded)
        by_title = pl.col("title").str.contains(folded, literal=True)
        matches = (pl.col("id") > after) & (by_id | by_title)
        run = table.lazy().filter(matches).head(kept).collect()["id"].to_list()
        found = sorted({*(item for item in run if item not in replaced), *(i for i in stored if i > after)})
        first = [query] if exact and not after else []
        return [*first, *[item for item in found if not (exact and item == query)][:limit]]

    def _follow(self) -> None:
        """Read the titles that changed in the store since the last search."""
        if self._version < 0:
            self._read()
        try:
            while changes := self._store.changes_after(self._version, MAX_CHANGES):
                for change in changes:
                    self._version = change.version
                    if change.item_id and "title" in change.payload:
                        self._stored[change.item_id] = str(change.payload["title"]).casefold()
        except DroppedError:
            self._read()

    def _read(self) -> None:
        self._version = self._store.version
        self._stored = {one.item.item_id: one.item.title.casefold() for one in self._store.items()}
