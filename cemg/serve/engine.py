"""A run that serves: searches in batches, events that its memory learns, and a catalog that changes.

One thread calls an `Engine`, see `cemg.serve.batching`; only `Engine.encode`, `Engine.extended` and
`Engine.users` may run beside it.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cemg.data.sequences import Sequences
from cemg.decoding import Recommendations
from cemg.errors import UserError
from cemg.memory.rows import largest
from cemg.memory.similarity import AddedRows
from cemg.mixture.sources import MEMORY
from cemg.recommender import Recommender
from cemg.serve.expressions import Filter, NamedFilter
from cemg.serve.filters import Filters
from cemg.serve.rows import UnknownItemError
from cemg_kernels import ItemFilter

Value = TypeVar("Value")
EVENTS = 10  # that explain an item
EARLIER = float("-inf")  # time of the interactions that the run was trained on


@dataclass(frozen=True, slots=True)
class Query:
    """A request for recommendations.

    Attributes:
        history: Item ids, oldest first. Those that the catalog does not have are skipped.
        user: The user whose history is taken instead; empty for none.
        limit: Number of items.
        beams: Beams of the search, at least ``limit``.
        exclude_history: Whether the items of the history are left out.
        exact: Whether the list is proven to be the true top.
        filter: Admits only some of the items; None admits all.
        explain: Whether the answer says what each item rests on.
    """

    history: tuple[str, ...] = ()
    user: str = ""
    limit: int = 10
    beams: int = 50
    exclude_history: bool = True
    exact: bool = False
    filter: Filter | NamedFilter | None = None
    explain: bool = False

    @property
    def group(self) -> tuple[int, bool, bool]:
        """What the queries of one search have in common."""
        return self.beams, self.exclude_history, self.exact


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for: a known user or a history.

    Attributes:
        user: A user; empty for a history.
        history: Item ids, oldest first.
        limit: Number of items.
        beams: Beams of the search; None: those of the run, or ``limit`` if that is more.
        exclude_history: Whether items of the history are left out; None: unless users return to items.
        exact: Whether the list is proven to be the true top.
        filter: Admits only some of the items.
        explain: Whether the answer says what each item rests on.
    """

    user: str = ""
    history: tuple[str, ...] = ()
    limit: int = 10
    beams: int | None = None
    exclude_history: bool | None = None
    exact: bool = False
    filter: Filter | NamedFilter | None = None
    explain: bool = False


@dataclass(frozen=True, slots=True)
class EventShare:
    """How much of the probability of an item is from one event, by the memory.

    Attributes:
        position: The place of the event in the history; 0 is the oldest.
        item: The item of the event.
        share: The share, 0 to 1. All events together have the memory's share.
    """

    position: int
    item: str
    share: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Recommendations.

    Attributes:
        items: Item ids, best first; fewer than the limit if the catalog has no more.
        scores: Logarithms of their probabilities.
        titles: Their titles, None where there is none.
        certified: How many of them are proven to be the true top.
        strategy: What ranked them: "mixture", "generator" or "popularity".
        catalog_version: The catalog that was searched.
        model_version: The run that was searched.
        skipped: Items of the history that the catalog does not have.
        history: The history that was read, oldest first.
        known_user: Whether the user of the query has a history.
        codes: Their semantic IDs.
        shares: How much of the probability of each is from the generator and from each other source, by
            name, in sum 1; None unless the query asked for it, and for items that share semantic IDs.
        events: The events of the history that the memory's share of each rests on, the strongest first, at
            most `EVENTS`; None where ``shares`` is.
    """

    items: list[str]
    scores: list[float]
    titles: list[str | None]
    certified: int
    strategy: str
    catalog_version: int
    model_version: str
    skipped: list[str]
    history: Sequence[str] = ()
    known_user: bool = True
    codes: list[list[int]] = field(default_factory=list)
    shares: list[dict[str, float]] | None = None
    events: list[list[EventShare]] | None = None


@dataclass(slots=True)
class _History:
    """The interactions of a user in order of time."""

    rows: list[int] = field(default_factory=list)
    order: list[tuple[float, int]] = field(default_factory=list)  # time and number of each


class Engine:
    """A run that serves.

    Attributes:
        recommender: The run with the catalog that is searched.
        version: The number of the catalog.
        titles: Titles by item id, "" where there is none.
        model_version: Identifies the run in answers.
        filters: Compiles the filters of queries; None: queries have none.
        data_events: Which events of a service the data of the run have; None for none.
    """

    def __init__(self, recommender: Recommender, *, version: int = 0, model_version: str = "") -> None:
        self.recommender, self.version, self.model_version = recommender, version, model_version
        self.filters: Filters | None = None
        artifacts = recommender.artifacts
        self.learns = artifacts.has_memory()
        data = artifacts.load_data()
        recommender.take_titles_from(data)
        self.data_events = data.served
        self.titles = _by_text(recommender.titles())
        self._rows = _by_text(recommender.catalog.row_of)
        self._data_histories = Sequences.of(data.sequences)
        self._data_users = {user: row for row, user in enumerate(data.user_ids)}  # without events
        self._histories: dict[str, _History] = {}  # of the other users
        self._unplaced: dict[str, list[tuple[str, float, int]]] = {}  # events of unknown items, by user
        self._arrived = 0
        if self.learns:  # the items that were held out
            known = Sequences.of(data.split().train).lengths
            recommender.memory.observe_many(data.sequences, known)

    # ---- searches

    def recommend(self, queries: Sequence[Query]) -> list[Answer]:
        """Answer queries of one `Query.group` by one search.

        Raises:
            UserError: A filter does not fit the catalog.
        """
        first, recommender = queries[0], self.recommender
        histories = [self.history(query.user) if query.user else query.history for query in queries]
        known = [[item for item in history if item in self._rows] for history in histories]
        filters = [self._compiled(query.filter) for query in queries]
        top = max(query.limit for query in queries)
        found = recommender.recommend(
            [self._ids(items) for items in known], top=top, beams=max(first.beams, top),
            filter=filters if any(one is not None for one in filters) else None,
            exclude_history=first.exclude_history, exact=first.exact,
            shares=any(query.explain for query in queries),
        )  # fmt: skip
        assert found.ids is not None and found.ranked_by is not None
        answers = []
        for number, query in enumerate(queries):
            ids = [str(item) for item in found.ids[number] if item is not None][: query.limit]
            skipped = [item for item in histories[number] if item not in self._rows]
            answers.append(
                Answer(
                    items=ids, scores=found.scores[number, : len(ids)].tolist(),
                    titles=[self.titles.get(item) or None for item in ids],
                    certified=min(int(found.certified[number]), len(ids)), strategy=found.ranked_by[number],
                    catalog_version=self.version, model_version=self.model_version, skipped=skipped,
                    history=histories[number], known_user=not query.user or self.knows(query.user),
                    codes=found.codes[number, : len(ids)].tolist(),
                    shares=_shares(found, number, len(ids)) if query.explain else None,
                    events=self._events(histories[number], ids, found, number) if query.explain else None,
                )
            )  # fmt: skip
        return answers

    def _events(
        self, history: Sequence[str], items: Sequence[str], found: Recommendations, number: int
    ) -> list[list[EventShare]] | None:
        """The events that the items of one answer rest on; None if there are no shares."""
        if found.shares is None:
            return None
        if MEMORY not in found.shares:
            return [[] for _ in items]
        known = [place for place, item in enumerate(history) if item in self._rows]
        rows = np.array([self._rows[item] for item in items], dtype=np.int64)
        parts = self.recommender.memory.event_shares([self._rows[history[place]] for place in known], rows)
        parts = parts * found.shares[MEMORY][number, : len(items), None].numpy()  # [items, known]
        return [
            [
                EventShare(known[place], history[known[place]], float(own[place]))
                for place in largest(own, EVENTS)
                if own[place] > 0
            ]
            for own in parts
        ]

    def _compiled(self, filter: Filter | NamedFilter | None) -> ItemFilter | None:
        if filter is None or self.filters is None:
            return None
        return self.filters.compile(filter, self.recommender.catalog.trie, self.version)

    def _ids(self, items: Sequence[str]) -> list[str | int]:
        """Ids as the catalog has them: some catalogs number their items."""
        ids = self.recommender.catalog.item_ids
        return [ids[self._rows[item]] for item in items]

    def similar(self, item: str, limit: int) -> list[tuple[str, float]]:
        """The items that the memory connects most with an item, by transitions and by texts, best first.

        Returns:
            Item ids with their shares of all scores; nothing without a memory. Removed items are left out.

        Raises:
            UnknownItemError: The catalog does not have the item.
        """
        row = self._rows.get(item)
        if row is None:
            raise UnknownItemError(f"there is no item {item} with a semantic ID")
        if not self.learns:
            return []
        rows, scores = self.recommender.memory.scores([row])
        ids = self.recommender.catalog.item_ids
        gone, total = {row, *self._removed_rows()}, float(scores.sum())
        found = list[tuple[str, float]]()
        for place in np.argsort(-scores, kind="stable"):
            if len(found) < limit and int(rows[place]) not in gone:
                found.append((str(ids[rows[place]]), float(scores[place]) / total))
        return found

    def _removed_rows(self) -> list[int]:
        return [self._rows[str(item)] for item in self.recommender.removed]

    # ---- users

    def users(self, prefix: str, after: str, limit: int) -> list[str]:
        """The first ids of users that begin with ``prefix``, those after ``after``."""
        every = [*self._data_users, *self._histories]  # in this order: `_changed` may run beside it
        wanted = (user for user in every if user.startswith(prefix) and user > after)
        return list(dict.fromkeys(heapq.nsmallest(2 * limit, wanted)))[:limit]  # one may be in both

    def _rows_of(self, user: str) -> list[int]:
        """The history of a user as rows, oldest first; empty for an unknown user."""
        if user in self._data_users:
            rows: list[int] = self._data_histories[self._data_users[user]].tolist()
            return rows
        return self._histories[user].rows if user in self._histories else []

    def _changed(self, user: str) -> _History:
        """The history of a user, to be changed."""
        if user not in self._histories:
            rows = self._rows_of(user)
            self._histories[user] = _History(rows, [(EARLIER, 0)] * len(rows))
            self._data_users.pop(user, None)
        return self._histories[user]

    def history(self, user: str) -> list[str]:
        """The item ids of a user, oldest first; empty for an unknown user."""
        ids = self.recommender.catalog.item_ids
        return [str(ids[row]) for row in self._rows_of(user)]

    def knows(self, user: str) -> bool:
        """Whether the run or an event has this user."""
        return user in self._data_users or user in self._histories or user in self._unplaced

    def interactions(self, user: str) -> int:
        """The number of interactions that are known of a user."""
        return len(self._rows_of(user)) + len(self._unplaced.get(user, ()))

    def in_data(self, user: str, item: str) -> bool:
        """Whether the run's data have an interaction of a user with an item, and the user was not deleted."""
        rows, row = self._rows_of(user), self._rows.get(item)
        if user in self._histories:
            rows = rows[: bisect.bisect_right(self._histories[user].order, (EARLIER, 0))]
        return row in rows

    def learn(self, user: str, item: str, time: float, number: int | None = None) -> bool:
        """Add an event to a user's history and to the memory. Returns whether the catalog has the item.

        Events of a user are ordered by time, then by ``number``; None is the next number. One of an item that
        the catalog does not have is learned when the item is added.
        """
        number = self._arrived + 1 if number is None else number
        self._arrived = max(self._arrived, number)
        row = self._rows.get(item)
        if row is None:
            self._unplaced.setdefault(user, []).append((item, time, number))
            return False
        history = self._changed(user)
        place = bisect.bisect_right(history.order, (time, number))
        if self.learns:
            window = self.recommender.memory.config.window  # what is further away changes nothing
            low = max(0, place - window)
            near = history.rows[low : place + window]
            self.recommender.memory.observe(near, row, position=place - low)
        history.rows.insert(place, row)
        history.order.insert(place, (time, number))
        return True

    def forget(self, user: str) -> None:
        """Delete the history of a user, also from the memory."""
        rows = self._rows_of(user)
        for users in (self._data_users, self._histories, self._unplaced):
            users.pop(user, None)
        if self.learns and rows:
            self.recommender.memory.forget(rows)

    # ---- the catalog

    def codes(self, item: str) -> list[int] | None:
        """The semantic ID of an item; None if the catalog does not have it."""
        row = self._rows.get(item)
        return None if row is None else self.recommender.catalog.codes[row].tolist()

    def has(self, item: str) -> bool:
        """Whether the catalog has an item, removed or not."""
        return item in self._rows

    @property
    def removed(self) -> set[str]:
        """Ids of the removed items."""
        return {str(item) for item in self.recommender.removed}

    def remove(self, items: Sequence[str], version: int) -> None:
        """Never recommend these items again, from the next search on."""
        self._replace_removed(self.removed | {*items}, version)

    def restore(self, items: Sequence[str], version: int) -> None:
        """Recommend these items again."""
        self._replace_removed(self.removed - {*items}, version)

    def _replace_removed(self, removed: set[str], version: int) -> None:
        if removed == self.removed:
            self.version = version
            return
        known = [item for item in sorted(removed) if item in self._rows]
        self.recommender = self.recommender.without_items(self._ids(known))
        self.version = version

    def encode(self, texts: Sequence[str | None], images: Iterable[bytes | None]) -> Tensor:
        """Compute semantic IDs of new items, [n, levels]: see `Recommender.encode_items`.

        Args:
            texts: Text of each new item.
            images: The image file of each, read one after the other.
        """
        paths: list[Path | None] = []
        with TemporaryDirectory(prefix="cemg-images-") as folder:
            for number, content in enumerate(images):
                paths.append(None if content is None else Path(folder) / str(number))
                if content is not None:
                    (Path(folder) / str(number)).write_bytes(content)
            return self.recommender.encode_items(texts, paths)

    def extended(self, codes: Mapping[str, Sequence[int]]) -> Recommender:
        """Prepare a recommender with further items, for `add`. It may run beside the searches.

        Raises:
            UserError: An item is in the catalog already.
        """
        for item in codes:
            if item in self._rows:
                raise UserError(f"item {item} is already in the catalog")
        if not self.recommender.catalog.named:
            raise UserError("the items of this run are numbers: added items would need names")
        if self.learns and self.recommender.memory.similar is not None:
            self.recommender.memory.similar.prepare()  # now: `add` holds up the searches
        titles: dict[Any, str] = self.titles
        return self.recommender.with_items(torch.tensor([*codes.values()]), [*codes], titles=titles)

    def add(
        self, recommender: Recommender, texts: Sequence[str | None], version: int, *,
        rows: AddedRows | None = None,
    ) -> None:  # fmt: skip
        """Search the catalog of `extended` from now on.

        Args:
            recommender: What `extended` returned.
            texts: The texts of the added items, without those of ``rows``.
            version: The number of the catalog.
            rows: The text similarities of the first added items, if they are known.
        """
        added = recommender.catalog.item_ids[len(self.recommender.catalog) :]
        if self.learns:
            if rows is not None:
                recommender.memory.restore_items(rows)
            recommender.memory.add_items(texts)
        self.recommender = recommender.without_items(self.recommender.removed)
        new = {str(item): len(self._rows) + n for n, item in enumerate(added)}
        self._rows |= new  # after the catalog has the rows: other threads read both
        self.version = version
        for user, events in list(self._unplaced.items()):
            left = [event for event in events if event[0] not in new]
            if len(left) < len(events):
                self._unplaced[user] = left
                if not left:
                    del self._unplaced[user]
                for item, time, number in events:
                    if item in new:
                        self.learn(user, item, time, number)

    def change_text(self, item: str, text: str | None) -> None:
        """Compare an added item by another text from now on. Its semantic ID stays as it is."""
        if self.learns:
            self.recommender.memory.change_text(self._rows[item], text)


def _by_text(values: Mapping[Any, Value]) -> dict[str, Value]:
    """Values by item id, where some catalogs number their items. A copy is faster than a loop."""
    if {*map(type, values)} <= {str}:
        return dict(values)
    return {str(item): value for item, value in values.items()}


def _shares(found: Recommendations, number: int, count: int) -> list[dict[str, float]] | None:
    if found.shares is None:
        return None
    parts = {name: share[number, :count].tolist() for name, share in found.shares.items()}
    return [{name: part[place] for name, part in parts.items()} for place in range(count)]
