"""The item sequences of users in one array, so that ten million users need no ten million arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from cemg.errors import UserError

LARGEST = 2**31 - 1  # of an item row


class Sequences(Sequence[np.ndarray]):
    """Arrays of item rows, one per user, that are parts of one array.

    Args:
        items: All item rows, int32.
        starts: Where each sequence begins in ``items``, [U] int64.
        ends: Where each ends, [U] int64.
    """

    __slots__ = ("ends", "items", "starts")

    def __init__(self, items: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        self.items, self.starts, self.ends = items, starts, ends

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray]) -> Sequences:
        """Copy arrays of item rows into one array; `Sequences` are returned as they are.

        Raises:
            UserError: A sequence has values other than integers from 0 to 2^31 - 1.
        """
        if isinstance(sequences, Sequences):
            return sequences
        parts = [*map(np.asarray, sequences)]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        for user in np.flatnonzero(lengths).tolist():
            if parts[user].ndim != 1 or parts[user].dtype.kind not in "iu":
                raise UserError(
                    f"sequence {user} does not have item rows, which are integers: {parts[user]!r:.80}"
                )
        items = np.concatenate(
            [np.zeros(0, np.int32), *(part for part in parts if len(part))], dtype=np.int64, casting="unsafe"
        )
        if len(items) and not 0 <= items.min() <= items.max() <= LARGEST:
            wrong = int(np.flatnonzero((items < 0) | (items > LARGEST))[0])
            user = int(np.searchsorted(np.cumsum(lengths), wrong, side="right"))
            raise UserError(f"sequence {user} has item row {items[wrong]}; rows are from 0 to {LARGEST}")
        return cls.of_lengths(items.astype(np.int32), lengths)

    @classmethod
    def of_lengths(cls, items: np.ndarray, lengths: np.ndarray) -> Sequences:
        """Cut ``items`` into consecutive sequences of these lengths."""
        ends = np.cumsum(lengths, dtype=np.int64)
        return cls(items, ends - lengths, ends)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, user: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, user: slice) -> Sequences: ...
    def __getitem__(self, user: int | slice) -> np.ndarray | Sequences:
        if isinstance(user, slice):
            return Sequences(self.items, self.starts[user], self.ends[user])
        return self.items[self.starts[user] : self.ends[user]]

    def __iter__(self) -> Iterator[np.ndarray]:
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            yield self.items[start:end]

    @property
    def lengths(self) -> np.ndarray:
        """Number of items of each sequence, [U] int64."""
        lengths: np.ndarray = self.ends - self.starts
        return lengths

    def of_users(self, users: np.ndarray) -> Sequences:
        """The sequences of some users, in their order."""
        return Sequences(self.items, self.starts[users], self.ends[users])

    def part(self, first: np.ndarray | int, last: np.ndarray) -> Sequences:
        """The part of each sequence from position ``first`` to before ``last``, [U] int64."""
        return Sequences(self.items, self.starts + first, self.starts + last)

    def at(self, places: np.ndarray) -> np.ndarray:
        """The item of each sequence at a position within it, ``places`` [U]."""
        items: np.ndarray = self.items[self.starts + places]
        return items

    def followed_by(self, others: Sequences) -> Sequences:
        """Each sequence with the one of ``others`` after it, in one new array."""
        lengths = self.lengths + others.lengths
        both = Sequences.of_lengths(np.empty(int(lengths.sum()), np.int32), lengths)
        for part, starts in ((self, both.starts), (others, both.starts + self.lengths)):
            both.items[_positions(starts, part.lengths)] = part.flat()
        return both

    def flat(self) -> np.ndarray:
        """The items of all sequences, one after the other, int32."""
        if len(self) == 0:
            return self.items[:0]
        if (self.starts[1:] == self.ends[:-1]).all():
            return self.items[self.starts[0] : self.ends[-1]]
        items: np.ndarray = self.items[_positions(self.starts, self.lengths)]
        return items


def _positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The positions from each start on, as many as its length, one start after the other."""
    before = np.cumsum(lengths) - lengths
    positions: np.ndarray = np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
    return positions
