"""A run that serves: searches in batches, events that its memory learns, and a catalog that changes.

One thread calls an `Engine`, see `cemg.serve.batching`; only `Engine.encode` and `Engine.extended` may run
beside it.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cemg.errors import UserError
from cemg.recommender import Recommender
from cemg_kernels import ItemFilter

Compile = Callable[
    [Recommender], ItemFilter | None
]  # makes the filter of a query for the catalog that is searched
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
    """

    history: tuple[str, ...] = ()
    user: str = ""
    limit: int = 10
    beams: int = 50
    exclude_history: bool = True
    exact: bool = False
    filter: Compile | None = None

    @property
    def group(self) -> tuple[int, bool, bool]:
        """What the queries of one search have in common."""
        return self.beams, self.exclude_history, self.exact


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
        skipped: Items of the history that the catalog does not have.
        known_user: Whether the user of the query has a history.
    """

    items: list[str]
    scores: list[float]
    titles: list[str | None]
    certified: int
    strategy: str
    catalog_version: int
    skipped: list[str]
    known_user: bool = True


@dataclass(slots=True)
class _History:
    """The interactions of a user in order of time."""

    rows: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class Engine:
    """A run that serves.

    Attributes:
        recommender: The run with the catalog that is searched.
        version: The number of the catalog.
    """

    def __init__(self, recommender: Recommender, *, version: int = 0) -> None:
        self.recommender, self.version = recommender, version
        self._rows = {str(item): row for row, item in enumerate(recommender.catalog.item_ids)}
        self._histories: dict[str, _History] = {}
        self.learns = recommender.artifacts.has_memory()
        self._read_run()

    def _read_run(self) -> None:
        """Take the histories of the run's data, and let the memory learn the items that were held out."""
        data = self.recommender.artifacts.load_data()
        train = data.split().train
        for user, (items, known) in enumerate(zip(data.sequences, train, strict=True)):
            rows = items.tolist()
            self._histories[data.user_ids[user]] = _History(rows, [EARLIER] * len(rows))
            if self.learns:
                for place in range(len(known), len(rows)):
                    self.recommender.memory.observe(rows[:place], rows[place])

    # ---- searches

    def recommend(self, queries: Sequence[Query]) -> list[Answer]:
        """Answer queries of one `Query.group` by one search.

        Raises:
            UserError: A filter does not fit the catalog.
        """
        first, recommender = queries[0], self.recommender
        histories = [self.history(query.user) if query.user else query.history for query in queries]
        known = [[item for item in history if item in self._rows] for history in histories]
        filters = [None if query.filter is None else query.filter(recommender) for query in queries]
        top = max(query.limit for query in queries)
        found = recommender.recommend(
            [self._ids(items) for items in known], top=top, beams=max(first.beams, top),
            filter=filters if any(one is not None for one in filters) else None,
            exclude_history=first.exclude_history, exact=first.exact,
        )  # fmt: skip
        assert found.ids is not None and found.titles is not None and found.ranked_by is not None
        answers = []
        for number, query in enumerate(queries):
            ids = [str(item) for item in found.ids[number] if item is not None][: query.limit]
            skipped = [item for item in histories[number] if item not in self._rows]
            answers.append(
                Answer(
                    items=ids, scores=found.scores[number, : len(ids)].tolist(),
                    titles=found.titles[number][: len(ids)],
                    certified=min(int(found.certified[number]), len(ids)), strategy=found.ranked_by[number],
                    catalog_version=self.version, skipped=skipped,
                    known_user=not query.user or self.knows(query.user),
                )
            )  # fmt: skip
        return answers

    def _ids(self, items: Sequence[str]) -> list[str | int]:
        """Ids as the catalog has them: some catalogs number their items."""
        ids = self.recommender.catalog.item_ids
        return [ids[self._rows[item]] for item in items]

    # ---- users

    def history(self, user: str) -> list[str]:
        """The item ids of a user, oldest first; empty for an unknown user."""
        ids = self.recommender.catalog.item_ids
        return [str(ids[row]) for row in self._histories.get(user, _History()).rows]

    def knows(self, user: str) -> bool:
        """Whether the run or an event has this user."""
        return user in self._histories

    def learn(self, user: str, item: str, time: float) -> bool:
        """Add an event to a user's history and to the memory. Returns whether the catalog has the item.

        An event that is older than others of the user is placed before them.
        """
        row = self._rows.get(item)
        if row is None:
            return False
        history = self._histories.setdefault(user, _History())
        place = bisect.bisect_right(history.times, time)
        if self.learns:
            self.recommender.memory.observe(history.rows, row, position=place)
        history.rows.insert(place, row)
        history.times.insert(place, time)
        return True

    def forget(self, user: str) -> int:
        """Delete the history of a user, also from the memory. Returns the number of its interactions."""
        history = self._histories.pop(user, _History())
        if self.learns and history.rows:
            self.recommender.memory.forget(history.rows)
        return len(history.rows)

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
        known = [item for item in sorted(removed) if item in self._rows]
        self.recommender = self.recommender.without_items(self._ids(known))
        self.version = version

    def encode(self, texts: Sequence[str | None]) -> Tensor:
        """Compute semantic IDs of new items by their texts, [n, levels]: see `Recommender.encode_items`."""
        return self.recommender.encode_items(texts, [None] * len(texts))

    def extended(self, codes: Mapping[str, Sequence[int]], titles: Mapping[str, str]) -> Recommender:
        """Prepare a recommender with further items, for `add`. It may run beside the searches.

        Raises:
            UserError: An item is in the catalog already.
        """
        for item in codes:
            if item in self._rows:
                raise UserError(f"item {item} is already in the catalog")
        if not self.recommender.catalog.named:
            raise UserError("the items of this run are numbers: added items would need names")
        every = dict(self.recommender.titles()) | dict(titles)
        return self.recommender.with_items(torch.tensor([*codes.values()]), [*codes], titles=every)

    def add(self, recommender: Recommender, texts: Sequence[str | None], version: int) -> None:
        """Search the catalog of `extended` from now on; ``texts`` are those of the added items."""
        added = recommender.catalog.item_ids[len(self.recommender.catalog) :]
        if self.learns:
            recommender.memory.add_items(texts)
        self._rows |= {str(item): len(self._rows) + n for n, item in enumerate(added)}
        self.recommender = recommender.without_items(self.recommender.removed)
        self.version = version
