"""Counting the transitions of many sequences at once; see `cemg.memory.transitions`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse

from cemg.memory.config import Constants
from cemg.memory.rows import Rows, item_factors
from cemg.memory.transitions import step_weights

BLOCK_PAIRS = 4_000_000  # pairs per block of rows: bounds the scratch memory of a build to some 300 MB


def count_transitions(
    train: Sequence[np.ndarray], num_items: int, *, window: int, constants: Constants
) -> Rows:
    """Count the transitions T of training sequences.

    Args:
        train: Item rows of each user, oldest first.
        num_items: N.
        window: Largest distance.
        constants: Weights, and the exponent that orders the entries of a row.

    Returns:
        T with N rows.
    """
    items, users = flatten(train)
    window = min(window, max(map(len, train), default=1))
    factors = item_factors(np.bincount(items, minlength=num_items), constants.exponent)
    weights_of = step_weights(window, constants)
    blocks = list(_blocks(items, users, num_items, window))
    starts = np.zeros(num_items + 1, dtype=np.int64)
    size = sum(pairs for _, _, pairs in blocks)
    columns, weights = (
        np.empty(size, np.int32),
        np.empty(size, np.float32),
    )  # pages beyond the end stay unused
    end = 0
    for low, high, _ in blocks:
        block = _count_block(items, users, low, high, num_items, *weights_of)
        order = _best_first(block, factors)
        stop = end + block.nnz
        columns[end:stop], weights[end:stop] = block.indices[order], block.data[order]
        starts[low + 1 : high + 1] = end + block.indptr[1:]
        end = stop
    return Rows(starts, columns[:end], weights[:end])


def flatten(train: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return all items, int32, user after user, and the user of each."""
    if not len(train):
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    users = np.repeat(np.arange(len(train), dtype=np.int32), [len(sequence) for sequence in train])
    return np.concatenate(train).astype(np.int32, copy=False), users


def _blocks(
    items: np.ndarray, users: np.ndarray, num_items: int, window: int
) -> Iterator[tuple[int, int, int]]:
    """Split the rows into ranges (low, high) of about BLOCK_PAIRS pairs, and yield the pairs of each too."""
    per_item = np.zeros(num_items, dtype=np.int64)
    for distance in range(1, window + 1):
        same = users[distance:] == users[:-distance]
        per_item += np.bincount(items[:-distance][same], minlength=num_items)
        per_item += np.bincount(items[distance:][same], minlength=num_items)
    total = np.concatenate(([0], np.cumsum(per_item)))
    low = 0
    while low < num_items:
        high = int(np.searchsorted(total, total[low] + BLOCK_PAIRS, side="right")) - 1
        high = min(max(high, low + 1), num_items)
        yield low, high, int(total[high] - total[low])
        low = high


def _count_block(
    items: np.ndarray, users: np.ndarray, low: int, high: int, num_items: int, forward: list[float],
    backward: list[float],
) -> sparse.csr_matrix:  # fmt: skip
    """Rows ``low`` to ``high`` of T, float64."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    inside = (items >= low) & (items < high)
    for distance, (ahead, back) in enumerate(zip(forward, backward, strict=True), start=1):
        earlier, later = items[:-distance], items[distance:]
        other = (users[distance:] == users[:-distance]) & (earlier != later)
        for mask, source, target, value in (
            (inside[:-distance] & other, earlier, later, ahead),
            (inside[distance:] & other, later, earlier, back),
        ):
            chosen = source[mask]
            parts.append((chosen - np.int32(low), target[mask], np.full(len(chosen), value)))
    rows, columns, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    return sparse.coo_matrix((values, (rows, columns)), shape=(high - low, num_items)).tocsr()


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
