"""Transitions between the items of sequences, counted in bulk or event by event.

T[j, i] sums w(d) over all pairs of positions of a user in which j comes d positions before i, d up to the
window, and backward * w(d) over the pairs in which i comes before j. An item has no transition to itself.
w(d) is step_decay^(d-1), rounded to a multiple of 2^-12: sums up to 4096 are exact in float32, so their order
does not matter, and an event that is removed leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cemg.memory.config import Constants
from cemg.memory.rows import Row, Rows, best_positions, item_factors, largest, sum_by_key

UNIT = 2.0**-12


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
        self._added: dict[int, dict[int, float]] = {}  # row -> item -> what events added to T
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
        if item not in self._added and not self._reordered(item, top):
            return self.base.row(item, top)
        items, values = self.whole_row(item)
        if len(items) <= top:
            return items, values
        chosen = best_positions(values * self.factors[items], top)
        return items[chosen], values[chosen]

    def whole_row(self, item: int) -> Row:
        """Return all entries of a row. Rows that were not sorted again are sorted by item."""
        if item not in self._rows:
            items, values = self.base.row(item)
            added = self._added.get(item, {})
            items = np.concatenate((items, np.fromiter(added.keys(), np.int32, len(added))))
            values = np.concatenate((values, np.fromiter(added.values(), np.float64, len(added))))
            items, values = sum_by_key(items, values.astype(np.float64), len(self.counts))
            present = values > UNIT / 2
            row = items[present], values[present].astype(np.float32)
            if not added:
                return row
            self._rows[item] = row
        return self._rows[item]

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
        if not self._added and np.array_equal(self.factors, self._built):  # there are only new items
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
