"""Sparse rows that are read from a file by memory map, and their changes since then."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from scipy import sparse

from cemg.errors import DamagedError
from cemg.storage.files import storage_error

DIGIT = 16  # bits per pass of the radix sort that NumPy uses for 16-bit keys
Row = tuple[np.ndarray, np.ndarray]  # items, int32, and values, float32


@dataclass(frozen=True, slots=True)
class Rows:
    """A sparse matrix in compressed rows, n entries in R rows. The entries of a row are in order, best first.

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

    def row(self, index: int, top: int | None = None) -> Row:
        """Return the first ``top`` entries of a row, by default all. A row beyond the last one is empty."""
        if index >= len(self.starts) - 1:
            return self.items[:0], self.values[:0]
        first, last = int(self.starts[index]), int(self.starts[index + 1])
        if top is not None:
            last = min(last, first + top)
        return self.items[first:last], self.values[first:last]

    def first(self, count: int) -> Rows:
        """Return the first ``count`` rows, without entries of items from ``count`` on."""
        starts = self.starts[: count + 1]
        items, values = self.items[: starts[-1]], self.values[: starts[-1]]
        left_out = np.flatnonzero(items >= count)
        if not len(left_out):
            return Rows(starts, items, values)
        before = np.searchsorted(left_out, starts)
        return Rows(starts - before, np.delete(items, left_out), np.delete(values, left_out))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Return the arrays by the names that they have in a file, ``name`` first."""
        return {f"{name}.starts": self.starts, f"{name}.items": self.items, f"{name}.values": self.values}

    def matrix(self, num_items: int) -> sparse.csr_matrix:
        """Return the matrix [R, N] for a product or a sum."""
        return sparse.csr_matrix((self.values, self.items, self.starts), shape=(len(self), num_items))

    @classmethod
    def stacked(cls, rows: Sequence[Row]) -> Rows:
        """Build the matrix from its rows."""
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(items) for items, _ in rows], out=starts[1:])
        items = np.concatenate([np.zeros(0, np.int32), *(items for items, _ in rows)])
        values = np.concatenate([np.zeros(0, np.float32), *(values for _, values in rows)])
        return cls(starts, items.astype(np.int32, copy=False), values.astype(np.float32, copy=False))


class RowsWriter:
    """Builds `Rows` block by block.

    Args:
        num_rows: R.
        scratch: A folder. The entries are then in files without a name in it, which are read by memory map
            and which the system removes when they are not used any more, also if the process is killed. None
            keeps the entries in memory.
    """

    def __init__(self, num_rows: int, scratch: Path | None = None) -> None:
        self.starts = np.zeros(num_rows + 1, dtype=np.int64)
        self.scratch = scratch
        self.items, self.values = self._open(), self._open()
        self._rows = 0

    def append(self, lengths: np.ndarray, items: np.ndarray, values: np.ndarray) -> None:
        """Append rows with ``lengths`` entries each, row after row.

        Raises:
            StorageError: The disk of ``scratch`` is full.
        """
        end = self._rows + len(lengths)
        np.cumsum(lengths, out=self.starts[self._rows + 1 : end + 1])
        self.starts[self._rows + 1 : end + 1] += self.starts[self._rows]
        self._rows = end
        try:
            self.items.write(np.ascontiguousarray(items, dtype=np.int32).data)
            self.values.write(np.ascontiguousarray(values, dtype=np.float32).data)
        except OSError as error:
            raise storage_error(error, self.scratch) or error from error

    def finish(self) -> Rows:
        """Return the matrix. Nothing can be appended after that."""
        return Rows(self.starts, self._read(self.items, np.int32), self._read(self.values, np.float32))

    def _open(self) -> IO[bytes]:
        return io.BytesIO() if self.scratch is None else tempfile.TemporaryFile(dir=self.scratch)

    def _read(self, file: IO[bytes], dtype: type[np.generic]) -> np.ndarray:
        if isinstance(file, io.BytesIO):
            return np.frombuffer(file.getbuffer(), dtype)
        with file:
            file.flush()
            # copy on write: nothing is written to the file, but tensors of the array are not read-only
            return np.memmap(file, dtype, mode="c") if self.starts[-1] else np.zeros(0, dtype)


def check_rows(path: Path, name: str, rows: Rows, *, fix: str) -> None:
    """Raise DamagedError for rows that are not within the file, or name items that do not exist."""
    starts, items = rows.starts, rows.items
    problem = None
    if starts[0] != 0 or starts[-1] != len(items) or bool((np.diff(starts) < 0).any()):
        problem = f"the rows of {name} are not consecutive"
    elif len(items) and not (items.min() >= 0 and items.max() < len(rows)):
        problem = f"{name} refers to an item that does not exist (there are {len(rows)})"
    elif len(items) and not bool(np.isfinite(rows.values).all()):
        problem = f"{name} has values that are not finite"
    if problem is not None:
        raise DamagedError(f"{path} is damaged", cause=problem, fix=fix)


def joined(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return the items of several rows, row after row, their values, and the number of entries per row."""
    if not rows:
        return np.zeros(0, np.int32), np.zeros(0, np.float32), []
    items, values = zip(*rows, strict=True)
    return np.concatenate(items), np.concatenate(values), [len(row) for row in items]


def item_factors(counts: np.ndarray, exponent: float) -> np.ndarray:
    """Return ``max(n_i, 1) ** -exponent``, [N] float64."""
    factors: np.ndarray = np.maximum(counts, 1).astype(np.float64) ** -exponent
    return factors


def best_positions(values: np.ndarray, top: int) -> np.ndarray:
    """Return the positions of the ``top`` largest values, ascending; the lower position wins ties."""
    if not 0 < top < len(values):
        return np.arange(len(values) if top > 0 else 0)
    # NumPy partitions many equal values 20 times as fast at the front of an array as near its end
    threshold = -np.partition(-values, top - 1)[top - 1]
    chosen = np.flatnonzero(values >= threshold)
    surplus = len(chosen) - top
    return np.delete(chosen, np.flatnonzero(values[chosen] == threshold)[-surplus:]) if surplus else chosen


def largest(values: np.ndarray, top: int) -> np.ndarray:
    """Return the positions of the ``top`` largest values, largest first; the lower position wins ties."""
    chosen = best_positions(values, top)
    return chosen[np.argsort(-values[chosen], kind="stable")]


def sum_by_key(keys: np.ndarray, values: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum the values with equal keys, in their order.

    Args:
        keys: [n] integers, from 0 to ``limit - 1``.
        values: [n] float64.
        limit: Bound of the keys.

    Returns:
        The distinct keys, ascending, and the sum of each.
    """
    if not len(keys):
        return keys, values
    order = np.argsort(keys.astype(np.uint16), kind="stable")  # the lower 16 bits
    for shift in range(DIGIT, int(limit - 1).bit_length(), DIGIT):
        digit = (keys[order] >> shift).astype(np.uint16)
        order = order[np.argsort(digit, kind="stable")]
    keys = keys[order]
    is_first = np.empty(len(keys), dtype=bool)
    is_first[0] = True
    np.not_equal(keys[1:], keys[:-1], out=is_first[1:])
    # bincount adds one value after the other, as the C++ does; reduceat would add in pairs
    return keys[is_first], np.bincount(np.cumsum(is_first) - 1, weights=values[order])
