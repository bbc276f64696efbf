"""The item memory: what the training sequences and the texts say about the next item, in closed form.

N items, B histories, Z items with a score. Rows h_0, h_1, … of a history are counted from its newest item:

    M[j, i] = T[j, i] * (max(n_j, 1) * max(n_i, 1)) ** -exponent
    score(i) = sum_r decay^r M[h_r, i]
             + scale * sum_r text_decay^r (text_weight C[h_r, i] + repeat_weight 1{h_r = i})

T are the transitions (`cemg.memory.transitions`), C the text similarity, n the training events of an item.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cemg.data.sequences import Sequences
from cemg.errors import UserError
from cemg.memory.checks import (
    check_count,
    check_histories,
    check_number,
    check_texts,
    integer,
    item_rows,
    newest_rows,
)
from cemg.memory.config import RANGES, Constants, MemoryConfig
from cemg.memory.memory_file import FORMAT, MEMORY_FILE, read_memory
from cemg.memory.native_scores import NativeScores
from cemg.memory.rows import Rows, best_positions, joined, largest, sum_by_key
from cemg.memory.similarity import AddedRows, Similarity, TextIndex
from cemg.memory.transitions import Transitions
from cemg.storage import files
from cemg.storage.manifest import MANIFEST
from cemg.storage.read import RESTORE
from cemg_kernels.runtime.dispatch import fast_kernels_enabled, native_available

MASSES = 1000  # items of a prior, by default


class Memory:
    """Scores items from a history. See the module for the formula.

    Args:
        config: Settings.
        constants: Decays, weights and exponents.
        counts: n when T was built, [N] int64.
        transitions: T when it was built, N rows; see `Transitions` for the order within a row.
        similar: C; None for a catalog without texts.
        catalog: Digest of the item ids that the first rows stand for (`ids_digest`).
        catalog_items: Number of these items.
        added: Digest of the ids of the items after them; None if it is not known, or there are none.
    """

    def __init__(
        self, config: MemoryConfig, constants: Constants, counts: np.ndarray, transitions: Rows,
        similar: Similarity | None, catalog: str, catalog_items: int, added: str | None = None,
    ) -> None:  # fmt: skip
        self.config, self.constants = config, constants
        self.catalog, self.catalog_items, self.added = catalog, catalog_items, added
        self.transitions = Transitions(transitions, counts, window=config.window, constants=constants)
        self.similar = similar
        self._native: NativeScores | None = None  # made by the first query

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None}  # it has addresses of this process

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.transitions.counts)

    @property
    def counts(self) -> np.ndarray:
        """n, the number of events per item, [N] int64."""
        return self.transitions.counts

    # ---- scores

    def scores(self, history: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score the items that the memory connects with a history.

        Args:
            history: Item rows, oldest first. Rows that the memory does not have are ignored.

        Returns:
            Item rows, [Z] ascending, and scores above zero, [Z] float64.

        Raises:
            UserError: The history is not a sequence of integers.
        """
        rows, recency = self._newest(history)
        fast = self._fast()
        if fast is not None:
            return fast.scores(rows, recency)
        keys, values = self._contributions(rows, recency)
        items, scores = sum_by_key(keys, values, self.num_items)
        positive = scores > 0  # a small factor may have rounded a score to 0
        return (items, scores) if positive.all() else (items[positive], scores[positive])

    def event_shares(self, history: Sequence[int] | np.ndarray, items: np.ndarray) -> np.ndarray:
        """Return how much of the score of each item is from each event of a history.

        Args:
            history: n item rows, oldest first.
            items: Item rows, [Z].

        Returns:
            Shares, [Z, n] float64. A row sums to 1, or is 0 for an item that the memory does not connect with
            the history.

        Raises:
            UserError: The history is not a sequence of integers.
        """
        rows, recency = self._newest(history)
        parts, order = np.zeros((len(items), len(history))), np.argsort(items)
        if not len(items):
            return parts
        for place, row in zip(recency.tolist(), rows, strict=True):
            keys, values = self._contributions(np.array([row]), np.array([place]))
            near = order[np.minimum(np.searchsorted(items, keys, sorter=order), len(items) - 1)]
            found = items[near] == keys
            parts[:, len(history) - 1 - place] = np.bincount(near[found], values[found], len(items))
        total = parts.sum(1, keepdims=True)
        shares: np.ndarray = parts / np.where(total > 0, total, 1.0)
        return shares

    def _fast(self) -> NativeScores | None:
        """The scores in C++; None if it is not built or switched off, or for a memory with live changes."""
        texts = self.similar
        if self.transitions.changed or (texts is not None and texts.changed):
            return None
        if not (native_available() and fast_kernels_enabled()):
            return None
        if self._native is None:
            self._native = NativeScores(
                self.transitions.base, None if texts is None else texts.base, self.transitions.factors,
                self.config, self.constants,
            )  # fmt: skip
        return self._native

    def _newest(self, history: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows that a query reads, newest first, and the recency of each (0 for the newest)."""
        rows = newest_rows(history, self.config.history_items)[::-1]
        recency = np.arange(len(rows))
        known = (rows >= 0) & (rows < self.num_items)
        return (rows, recency) if known.all() else (rows[known], recency[known])

    def _contributions(self, rows: np.ndarray, recency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items and values of all terms of the sums."""
        use, factors = self.constants, self.transitions.factors
        top = self.config.transition_items
        chosen = rows.tolist()
        items, values, lengths = joined([self.transitions.row(row, top) for row in chosen])
        terms = np.repeat(use.decay**recency * factors[rows], lengths)
        terms *= values
        terms *= factors[items]
        fading = use.scale * use.text_decay**recency
        all_items, all_terms = [items], [terms]
        if self.similar is not None and use.text_weight > 0:
            top = self.config.similar_items
            items, values, lengths = joined([self.similar.row(row, top) for row in chosen])
            all_items.append(items)
            all_terms.append(np.repeat(use.text_weight * fading, lengths) * values)
        if use.repeat_weight > 0:
            all_items.append(rows.astype(np.int32))
            all_terms.append(use.repeat_weight * fading)
        return np.concatenate(all_items), np.concatenate(all_terms)

    # ---- live changes

    def observe(self, history: Sequence[int] | np.ndarray, item: int, *, position: int | None = None) -> None:
        """Add an event. The result equals a memory that was built with it, under the same constants.

        Not safe while another thread reads or writes the memory.

        Args:
            history: All items of the user before this call, oldest first; at least the newest ``window`` of
                them for an event that comes last.
            item: The item of the event. A repeated item counts again.
            position: Number of items of ``history`` that are older than the event; None: all. For an event
                that arrives late, the transitions between older and newer items get longer.

        Raises:
            UserError: An item does not exist, the history is not a sequence of integers, or the position is
                outside of it.
        """
        known = self._checked(history)
        (new,) = self._checked([integer("the item of an event", item)])
        if position is not None:
            position = integer("position", position)
        if position is None or position == len(known):
            self.transitions.append(known, new)
            return
        if not 0 <= position < len(known):
            raise UserError(f"position must be within 0 … {len(known)}, got {position}")
        low, high = max(0, position - self.config.window), position + self.config.window
        older, newer = known[low:position], known[position:high]
        self.transitions.change([*older, *newer], [*older, new, *newer])

    def observe_many(self, histories: Sequence[np.ndarray], known: Sequence[int] | np.ndarray) -> None:
        """Add the newest events of many users. The result equals `observe` event by event, which is slower.

        Args:
            histories: Item rows of each user, oldest first, U arrays of integers.
            known: How many items of each history the memory has learned before, [U].

        Raises:
            UserError: An item does not exist, or ``known`` does not fit the histories.
        """
        check_histories(histories)
        sequences, before = Sequences.of(histories), np.asarray(known)
        lengths, items = sequences.lengths, sequences.flat()
        if len(before) and before.dtype.kind not in "iu":
            raise UserError("known must have integers")
        if before.shape != lengths.shape or not ((before >= 0) & (before <= lengths)).all():
            raise UserError("known must be a number per history, from 0 to its length")
        if len(items) and not 0 <= items.min() <= items.max() < self.num_items:
            self._checked(items)  # it names the item
        self.transitions.append_many(items, np.append(0, np.cumsum(lengths)), before.astype(np.int64))

    def forget(self, history: Sequence[int] | np.ndarray) -> None:
        """Remove a user's events. The result equals a memory that never had them.

        Args:
            history: All items of the user that the memory has learned, oldest first. Only the number of
                events of each item is checked.

        Raises:
            UserError: The memory has learned fewer events of an item; nothing is changed.
        """
        rows = self._checked(history)
        for item in set(rows):
            if rows.count(item) > self.counts[item]:
                raise UserError(
                    f"{rows.count(item)} events of item {item} cannot be forgotten",
                    cause=f"the memory has learned {self.counts[item]}",
                    fix="pass exactly the events that were observed, or those of the training sequences",
                )
        self.transitions.change(rows, [])

    def add_items(self, texts: Sequence[str | None]) -> range:
        """Append an item per text, with the words and weights of the index. Returns their rows.

        An item gets its own row of the text similarity and enters the rows of its neighbors. Without a text,
        it is known from its first event on.
        """
        check_texts(texts)
        rows = range(self.num_items, self.num_items + len(texts))
        if not len(texts):
            return rows
        self.transitions.extend(len(texts))
        if self.similar is not None:
            self.similar.extend(texts)
        self.added = None
        return rows

    def change_text(self, item: int, text: str | None) -> None:
        """Replace the text of an added item. The result equals a memory to which it was added with this text.

        Args:
            item: The row of the item, which must be one of `add_items`.
            text: The new text; None is an item without a text.

        Raises:
            UserError: The item was not added since the memory was loaded.
        """
        check_texts([text])
        if self.similar is None:
            return
        try:
            self.similar.change(integer("the row of an item", item), text)
        except IndexError as error:
            raise UserError(f"the text of item {item} cannot be changed", cause=str(error)) from error

    def restore_items(self, rows: AddedRows) -> None:
        """Append the items whose rows of the text similarity are known: see `Similarity.restore`."""
        if self.similar is None:
            raise ValueError("the memory has no texts")
        self.transitions.extend(rows.vectors.shape[0])
        self.similar.restore(rows)
        self.added = None

    def record_ids(self, item_ids: Sequence[str | int]) -> None:
        """Record the ids of the items that were added, for `check_catalog`.

        Args:
            item_ids: Ids of all items, in row order.
        """
        if len(item_ids) != self.num_items:
            raise UserError(f"there are {len(item_ids)} item ids, but the memory has {self.num_items} items")
        added = item_ids[self.catalog_items :]
        self.added = ids_digest(added) if len(added) else None

    def first(self, count: int) -> Memory:
        """Return a memory of the first ``count`` items: what it was before the others were added.

        Events of the others are left out, too.
        """
        if count >= self.num_items:
            return self
        return Memory(
            self.config, self.constants, self.counts[:count], self.transitions.merged().first(count),
            None if self.similar is None else self.similar.first(count), self.catalog, self.catalog_items,
        )  # fmt: skip

    def _checked(self, history: Sequence[int] | np.ndarray) -> list[int]:
        rows = item_rows(history)
        if rows and not (min(rows) >= 0 and max(rows) < self.num_items):
            wrong = next(row for row in rows if not 0 <= row < self.num_items)
            raise UserError(
                f"the memory has no item {wrong}", cause=f"it has the items 0 … {self.num_items - 1}",
                fix="add new items with Memory.add_items first",
            )  # fmt: skip
        return rows

    # ---- distributions and lists

    def knows(self, history: Sequence[int] | np.ndarray) -> bool:
        """Return whether the memory connects any item with a history; if not, `prior` is popularity."""
        return len(self.scores(history)[0]) > 0

    def prior(
        self,
        histories: Sequence[Sequence[int] | np.ndarray],
        *,
        exclude_history: bool = False,
        power: float | None = None,
        top: int = MASSES,
        popularity: bool = True,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return a distribution over items per history: scores to the power ``power``, normalized.

        A history that the memory connects with no item, such as an empty one, gets the distribution of the
        training events (popularity); see `knows`.

        Args:
            histories: B histories of item rows, oldest first.
            exclude_history: Whether the items of the history have no mass.
            power: Exponent of the scores, 0 or larger; None takes that of the constants.
            top: Number of items with mass, at most; 1 or larger.
            popularity: Whether such a history gets popularity; if not, it gets no item.

        Returns:
            Item rows, B arrays, ascending, and their masses, B arrays of float64.

        Raises:
            UserError: ``histories`` is one history, ``top`` is below 1, or ``power`` is out of range.
        """
        check_histories(histories)
        check_count("top", top)
        if power is not None:
            check_number("power", power, *RANGES["power"])
        exponent = self.constants.power if power is None else power
        items: list[np.ndarray] = []
        masses: list[np.ndarray] = []
        for history in histories:
            rows, scores = self.scores(history)
            is_known = len(rows) > 0
            if not is_known and popularity:
                rows = np.flatnonzero(self.counts)
                scores = self.counts[rows].astype(np.float64)
            if exclude_history:
                new = np.isin(rows, history, invert=True)
                rows, scores = rows[new], scores[new]
            if top < len(rows):
                chosen = best_positions(scores, top)
                rows, scores = rows[chosen], scores[chosen]
            mass = (scores / scores.max(initial=0.0)) ** (exponent if is_known else 1.0)
            items.append(rows)
            masses.append(mass / mass.sum() if len(mass) else mass)
        return items, masses

    def ranker(self) -> Callable[[list[np.ndarray], int], Tensor]:
        """Return a ranker for `cemg.evaluation.evaluate`: items by score, the lower row wins ties.

        A list ends where the scores do, and is filled with -1. A history that the memory connects with no
        item gets the items by number of training events.
        """

        def rank(histories: list[np.ndarray], top: int) -> Tensor:
            check_histories(histories)
            check_count("top", top)
            lists = np.full((len(histories), top), -1, dtype=np.int64)
            popular = largest(self.counts, top)
            for row, history in enumerate(histories):
                items, scores = self.scores(history)
                listed = items[largest(scores, top)] if len(items) else popular
                lists[row, : len(listed)] = listed
            return torch.from_numpy(lists)

        return rank

    # ---- files

    def save(self, folder: Path | str) -> None:
        """Write the memory to ``folder``, which is created if it does not exist.

        A killed process leaves the memory that was there before, or this one.

        Raises:
            UserError: ``folder`` is that of a run's own memory, whose files are recorded.
        """
        folder = Path(folder)
        if (folder / MANIFEST).exists() and not files.hidden(folder.parent):
            raise UserError(
                f"{folder} belongs to a run, whose memory is that of its training and its added items",
                fix=f"save it to another folder, such as {folder.parent / 'live-memory'}",
            )
        tensors = {"counts": self.counts, **self.transitions.merged().arrays("transitions")}
        if self.similar is not None:
            tensors |= self.similar.merged().arrays("similar")
            self.similar.index.save(folder)
        about: dict[str, Any] = {
            "format": FORMAT, "catalog": self.catalog, "catalog_items": self.catalog_items,
            "config": dataclasses.asdict(self.config), "constants": dataclasses.asdict(self.constants),
        }  # fmt: skip
        if self.added is not None:
            about["added"] = self.added
        files.save_tensors(
            {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()},
            folder / MEMORY_FILE, metadata={"memory": json.dumps(about)},
        )  # fmt: skip

    @classmethod
    def load(cls, folder: Path | str, *, fix: str = RESTORE) -> Memory:
        """Load a memory by memory map: pages are read when a query needs them.

        Args:
            folder: The folder that `save` wrote.
            fix: What an error suggests.

        Raises:
            DamagedError: The file is missing or damaged.
            UserError: The file has a format that this version does not read.
        """
        about, counts, rows = read_memory(Path(folder), fix=fix)
        similar = None
        if "similar" in rows:
            similar = Similarity(
                rows["similar"], top=about.config.similar_items,
                index=lambda: TextIndex.load(Path(folder), len(counts), fix=fix),
            )  # fmt: skip
        return cls(
            about.config, about.constants, counts, rows["transitions"], similar, about.catalog,
            about.catalog_items, about.added,
        )  # fmt: skip

    def check_catalog(self, item_ids: Sequence[str | int], *, run: Path | None = None) -> None:
        """Raise UserError if the memory was built for other items than the first N of a catalog.

        Items that were added to the memory after those of the catalog are not compared.
        """
        added = item_ids[self.catalog_items : self.num_items]
        is_compared = self.added is not None and len(item_ids) >= self.num_items
        if ids_digest(item_ids[: self.catalog_items]) != self.catalog or (
            is_compared and ids_digest(added) != self.added
        ):
            command = f"cemg-train --run {quote(str(run))}" if run is not None else "cemg-train --run RUN"
            raise UserError(
                "this memory does not belong to the catalog",
                cause=f"the first {self.num_items} items of the catalog have other ids",
                fix=f"build the memory of this catalog: {command} --rebuild",
            )


def ids_digest(item_ids: Sequence[str | int]) -> str:
    """sha256 of item ids in row order."""
    return hashlib.sha256("\n".join(map(str, item_ids)).encode()).hexdigest()
