"""Sparse rows: for each of R rows, items and values. Rows of N items per row index, n entries in total."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DIGIT = 16  # bits per pass of the radix sort that NumPy uses for 16-bit keys


@dataclass(frozen=True, slots=True)
class Rows:
    """A sparse matrix in compressed rows. The order within a row is that of its meaning, best first.

    Attributes:
        starts: [R + 1] int64; row r has the entries ``starts[r] : starts[r + 1]``.
        items: [n] int32.
        values: [n] float32.
    """

    starts: np.ndarray
    items: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return items and values of one row."""
        part = slice(self.starts[index], self.starts[index + 1])
        return self.items[part], self.values[part]

    def entries(self, rows: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the first ``top`` entries of each of Q rows.

        Returns:
            Positions in ``items``, row after row, and the number of them per row, [Q].
        """
        first = self.starts[rows]
        counts = np.minimum(self.starts[rows + 1] - first, top)
        ends = np.cumsum(counts)
        offsets = np.repeat(first - (ends - counts), counts)
        return offsets + np.arange(len(offsets)), counts

    @classmethod
    def stacked(cls, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Rows:
        """Build the matrix from items and values per row."""
        starts = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(items) for items, _ in parts], out=starts[1:])
        items = np.concatenate([np.zeros(0, np.int32), *(items for items, _ in parts)])
        values = np.concatenate([np.zeros(0, np.float32), *(values for _, values in parts)])
        return cls(starts, items.astype(np.int32), values.astype(np.float32))


def item_factors(counts: np.ndarray, exponent: float) -> np.ndarray:
    """Return ``max(n_i, 1) ** -exponent``, [N] float64."""
    factors: np.ndarray = np.maximum(counts, 1).astype(np.float64) ** -exponent
    return factors


def best_positions(values: np.ndarray, top: int) -> np.ndarray:
    """Return the positions of the ``top`` largest values, ascending; the lower position wins ties."""
    if top >= len(values):
        return np.arange(len(values))
    threshold = np.partition(values, len(values) - top)[len(values) - top]
    chosen = np.flatnonzero(values >= threshold)
    surplus = len(chosen) - top
    return np.delete(chosen, np.flatnonzero(values[chosen] == threshold)[-surplus:]) if surplus else chosen


def largest(values: np.ndarray, top: int) -> np.ndarray:
    """Return the positions of the ``top`` largest values, largest first; the lower position wins ties."""
    chosen = best_positions(values, top)
    return chosen[np.argsort(-values[chosen], kind="stable")]


def sum_by_key(keys: np.ndarray, values: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum the values with equal keys.

    Args:
        keys: [n] int64, from 0 to ``limit - 1``.
        values: [n] float64.
        limit: Bound of the keys.

    Returns:
        The distinct keys, ascending, and the sum of each.
    """
    if not len(keys):
        return keys, values
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    for shift in range(DIGIT, max(int(limit - 1).bit_length(), 1), DIGIT):
        digit = (keys[order] >> shift).astype(np.uint16)
        order = order[np.argsort(digit, kind="stable")]
    keys = keys[order]
    first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    return keys[first], np.add.reduceat(values[order], first)
