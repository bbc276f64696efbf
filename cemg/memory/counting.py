"""Counting the transitions of many sequences at once; see `cemg.memory.transitions`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from cemg.data.sequences import Sequences
from cemg.memory.config import Constants
from cemg.memory.rows import Rows, RowsWriter, item_factors
from cemg.memory.transitions import step_weights

BLOCK_PAIRS = 4_000_000  # pairs per block of rows: bounds the scratch memory of a build to some 300 MB


def count_transitions(
    train: Sequence[np.ndarray], num_items: int, *, window: int, constants: Constants,
    scratch: Path | None = None,
) -> Rows:  # fmt: skip
    """Count the transitions T of training sequences.

    Args:
        train: Item rows of each user, oldest first.
        num_items: N.
        window: Largest distance.
        constants: Weights, and the exponent that orders the entries of a row.
        scratch: A folder for the entries, see `RowsWriter`. The memory that is used is then 24 bytes per
            event, 16 per item, and that of a block.

    Returns:
        T with N rows.

    Raises:
        StorageError: The disk of ``scratch`` is full.
    """
    items, users = flatten(train)
    window = max(1, min(window, max(map(len, train), default=1)))
    counts = np.bincount(items, minlength=num_items)
    factors = item_factors(counts, constants.exponent)
    forward, backward = step_weights(window, constants)
    events = _by_item(items, window)
    # the sequences between ``window`` positions of no user, so that an event has a position at each distance
    items, users = np.pad(items, window), np.pad(users, window, constant_values=-1)
    steps = [
        step
        for distance in range(1, window + 1)
        for step in ((distance, forward[distance - 1]), (-distance, backward[distance - 1]))
    ]
    starts = np.concatenate(([0], np.cumsum(counts)))
    rows = RowsWriter(num_items, scratch)
    for low, high in _blocks(starts, 2 * window):
        block = _count_block(items, users, events[starts[low] : starts[high]], (low, high, num_items), steps)
        order = _best_first(block, factors)
        rows.append(np.diff(block.indptr), block.indices[order], block.data[order])
    return rows.finish()


def flatten(train: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return all items, int32, user after user, and the user of each."""
    if not len(train):
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    sequences = Sequences.of(train)
    return sequences.flat(), np.repeat(np.arange(len(train), dtype=np.int32), sequences.lengths)


def _by_item(items: np.ndarray, window: int) -> np.ndarray:
    """The positions of the events of each item, item after item, [E], counted from ``window``."""
    positions = np.argsort(items)  # sums do not depend on the order of the events of an item
    positions += window
    return positions


def _blocks(starts: np.ndarray, pairs: int) -> Iterator[tuple[int, int]]:
    """Split the rows into ranges (low, high) of at most BLOCK_PAIRS pairs, or of one row.

    ``pairs``: of an event, at most.
    """
    low, num_items = 0, len(starts) - 1
    while low < num_items:
        high = int(np.searchsorted(starts, starts[low] + BLOCK_PAIRS // pairs, side="right")) - 1
        high = min(max(high, low + 1), num_items)
        yield low, high
        low = high


def _count_block(
    items: np.ndarray, users: np.ndarray, events: np.ndarray, rows: tuple[int, int, int],
    steps: list[tuple[int, float]],
) -> sparse.csr_matrix:  # fmt: skip
    """Rows ``low`` to ``high`` of T, float64.

    Args:
        items: [E] items of all events.
        users: [E] their users.
        events: Positions of the events of the items ``low`` to ``high``.
        rows: ``low``, ``high`` and N.
        steps: Position of another event, relative to the first, and the weight of the pair.
    """
    low, high, num_items = rows
    source, owner = items[events], users[events]
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for step, weight in steps:
        at = events + step
        target = items[at]
        paired = (users[at] == owner) & (target != source)
        chosen = source[paired]
        parts.append((chosen - np.int32(low), target[paired], np.full(len(chosen), weight)))
    sources, targets, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    return sparse.coo_matrix((weights, (sources, targets)), shape=(high - low, num_items)).tocsr()


def _best_first(block: sparse.csr_matrix, factors: np.ndarray) -> np.ndarray:
    """The order of the entries by row, and by value times factor within a row; the lower item wins ties."""
    rows = np.repeat(np.arange(block.shape[0], dtype=np.int32), np.diff(block.indptr))
    return np.lexsort((block.indices, -block.data * factors[block.indices], rows))


def transition_scale(transitions: Rows, counts: np.ndarray, exponent: float) -> float:
    """Return the median over items of the largest transition score from the item."""
    factors = item_factors(counts, exponent)
    best = np.zeros(len(transitions))
    filled = np.flatnonzero(np.diff(transitions.starts))
    first = transitions.starts[filled]  # rows are sorted by it
    best[filled] = factors[filled] * transitions.values[first] * factors[transitions.items[first]]
    return float(np.median(best))
