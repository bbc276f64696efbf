"""Transitions between the items of sequences, counted in bulk or event by event.

T[j, i] sums w(d) over all pairs of positions of a user in which j comes d positions before i, d up to the
window, and backward * w(d) over the pairs in which i comes before j. An item has no transition to itself.
w(d) is step_decay^(d-1), rounded to a multiple of 2^-12: sums up to 4096 are exact in float32, so their order
does not matter, and an event that is removed leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from cemg.memory.config import Constants
from cemg.memory.rows import Row, Rows, best_positions, item_factors, largest, sum_by_key

UNIT = 2.0**-12
EVENTS = 1 << 20  # whose pairs are listed at once, about 300 bytes each with the default window
NOTHING: Row = np.zeros(0, np.int32), np.zeros(0, np.float32)


def step_weights(window: int, constants: Constants) -> tuple[list[float], list[float]]:
    """Return the weights of a pair at the distances 1 … ``window``: with time, and against it."""
    forward = [round(constants.step_decay**d / UNIT) * UNIT for d in range(window)]
    return forward, [round(constants.backward * weight / UNIT) * UNIT for weight in forward]


class Transitions:
    """T as it was built, and the events since then.

    Args:
        base: T at the time of building, N rows; within a row by ``T[j, i] * max(n_i, 1) ** -exponent``,
            largest first.
        counts: n, the number of events per item when T was built, [N] int64.
        window: Largest distance of a pair.
        constants: Weights and exponent.
    """

    def __init__(self, base: Rows, counts: np.ndarray, *, window: int, constants: Constants) -> None:
        self.base, self.counts, self.window, self.exponent = base, counts, window, constants.exponent
        self.factors = item_factors(counts, constants.exponent)  # [N] float64
        self.forward, self.backward = step_weights(window, constants)
        self._built: np.ndarray | None = None  # factors when T was built; None before the first event
        self._raised: set[int] = set()  # items with fewer events than when T was built
        self._many: Rows | None = None  # what `append_many` added to T
        self._added: dict[int, dict[int, float]] = {}  # row -> item -> what single events added to T
        self._rows: dict[int, Row] = {}  # rows with what was added

    # ---- reading

    @property
    def changed(self) -> bool:
        """Whether events or items were added or removed since T was built."""
        return self._built is not None

    def row(self, item: int, top: int) -> Row:
        """Return the ``top`` entries of a row with the largest ``T[j, i] * factors[i]``, in any order."""
        if self._built is None:
            return self.base.row(item, top)
        is_changed = item in self._added or len(self._many_row(item)[0]) > 0
        if not is_changed and not self._reordered(item, top):
            return self.base.row(item, top)
        items, values = self.whole_row(item)
        if len(items) <= top:
            return items, values
        chosen = best_positions(values * self.factors[items], top)
        return items[chosen], values[chosen]

    def whole_row(self, item: int) -> Row:
        """Return all entries of a row. Rows that were not sorted again are sorted by item."""
        if item not in self._rows:
            (items, values), (many_items, many_values) = self.base.row(item), self._many_row(item)
            added = self._added.get(item, {})
            items = np.concatenate((items, many_items, np.fromiter(added.keys(), np.int32, len(added))))
            values = np.concatenate(
                (values, many_values, np.fromiter(added.values(), np.float64, len(added)))
            )
            items, values = sum_by_key(items, values.astype(np.float64), len(self.counts))
            present = values > UNIT / 2
            row = items[present], values[present].astype(np.float32)
            if not added and not len(many_items):
                return row
            self._rows[item] = row
        return self._rows[item]

    def _many_row(self, item: int) -> Row:
        return NOTHING if self._many is None else self._many.row(item)

    def _reordered(self, item: int, top: int) -> bool:
        """Whether changed counts may have changed the first ``top`` entries of a row of ``base``.

        The score of an item falls with its count. So if no item has fewer events than before, and none of the
        first ones has more, they are still the first.
        """
        if item >= len(self.base) or self.base.starts[item + 1] - self.base.starts[item] <= top:
            return False
        assert self._built is not None
        items, _ = self.base.row(item, top)
        return bool(self._raised) or not np.array_equal(self.factors[items], self._built[items])

    # ---- writing

    def extend(self, count: int) -> None:
        """Append ``count`` items without events."""
        self._start()
        assert self._built is not None
        self.counts = np.append(self.counts, np.zeros(count, np.int64))
        self.factors = np.append(self.factors, np.ones(count))
        self._built = np.append(self._built, np.ones(count))

    def append(self, history: Sequence[int], item: int) -> None:
        """Add the event ``item`` at the end of ``history``."""
        self._start()
        self._count(item, 1)
        for distance, earlier in enumerate(reversed(history[-self.window :])):
            self._add(earlier, item, distance, 1)

    def append_many(self, items: np.ndarray, starts: np.ndarray, known: np.ndarray) -> None:
        """Add events at the ends of U histories at once.

        Args:
            items: Histories with these events, one after the other, [n] integers.
            starts: Where each history begins in ``items``, and n, [U + 1] int64.
            known: Number of items of each history that were added before, [U] int64.
        """
        lengths, places = np.diff(starts), np.arange(len(items))
        places -= np.repeat(starts[:-1], lengths)  # within its history
        events = np.flatnonzero(places >= np.repeat(known, lengths))
        if not len(events):
            return
        self._start()
        size = len(self.counts)
        self.counts += np.bincount(items[events], minlength=size)
        self._recompute_factors(np.unique(items[events]))
        sums = None if self._many is None else self._many.matrix(size)
        for low in range(0, len(events), EVENTS):
            block = self._pairs(items, places, events[low : low + EVENTS])
            sums = block if sums is None else sums + block
        assert sums is not None
        self._many = Rows(sums.indptr.astype(np.int64), sums.indices, sums.data)
        self._rows.clear()

    def _pairs(self, items: np.ndarray, places: np.ndarray, events: np.ndarray) -> sparse.csr_matrix:
        """What events add to T, [N, N] float32. ``events`` are positions in ``items``, see `append_many`."""
        cells = list[tuple[np.ndarray, np.ndarray, np.ndarray]]()  # rows, items and weights
        for distance, weights in enumerate(zip(self.forward, self.backward, strict=True), start=1):
            later = events[places[events] >= distance]
            one, other = items[later - distance], items[later]
            one, other = one[one != other], other[one != other]
            for (row, item), weight in zip(((one, other), (other, one)), weights, strict=True):
                cells.append((row, item, np.full(len(row), weight, np.float32)))
        rows, columns, values = (np.concatenate(column) for column in zip(*cells, strict=True))
        size = len(self.counts)
        return sparse.csr_matrix(sparse.coo_matrix((values, (rows, columns)), shape=(size, size)))

    def change(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Replace the sequence ``before`` by ``after``."""
        self._start()
        for sequence, sign in ((before, -1), (after, 1)):
            for position, item in enumerate(sequence):
                self._count(item, sign)
                earlier = sequence[max(0, position - self.window) : position]
                for distance, other in enumerate(reversed(earlier)):
                    self._add(other, item, distance, sign)

    def _start(self) -> None:
        if self._built is None:  # the arrays of a file are not written to
            self.counts, self._built = self.counts.copy(), self.factors
            self.factors = self.factors.copy()

    def _count(self, item: int, sign: int) -> None:
        assert self._built is not None
        self.counts[item] += sign
        # the vector function of NumPy rounds differently than that of Python, and ties depend on it
        self.factors[item] = item_factors(self.counts[item : item + 1], self.exponent)[0]
        if self.factors[item] > self._built[item]:
            self._raised.add(item)
        else:
            self._raised.discard(item)

    def _recompute_factors(self, items: np.ndarray) -> None:
        """Compute the factors of items whose counts have grown."""
        assert self._built is not None
        self.factors[items] = item_factors(self.counts[items], self.exponent)
        if self._raised:
            lower = items[self.factors[items] <= self._built[items]]
            self._raised.difference_update(lower.tolist())

    def _add(self, earlier: int, later: int, distance: int, sign: int) -> None:
        if earlier == later:
            return
        for row, item, weight in (
            (earlier, later, self.forward[distance]),
            (later, earlier, self.backward[distance]),
        ):
            added = self._added.setdefault(row, {})
            added[item] = added.get(item, 0.0) + sign * weight
            self._rows.pop(row, None)

    def merged(self) -> Rows:
        """Return T with all events, sorted as ``base``."""
        if self._built is None:
            return self.base
        no_events = not self._added and self._many is None and np.array_equal(self.factors, self._built)
        if no_events:  # there are only new items
            starts = np.append(
                self.base.starts, np.full(len(self.counts) - len(self.base), self.base.starts[-1])
            )
            return Rows(starts, self.base.items, self.base.values)
        rows = []
        for item in range(len(self.counts)):
            items, values = self.whole_row(item)
            order = largest(values * self.factors[items], len(items))
            rows.append((items[order], values[order]))
        return Rows.stacked(rows)
