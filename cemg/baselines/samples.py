"""Batches of training samples of similar length, padded on the right.

S samples, B samples per batch, L inputs of the longest sample in the batch, P targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

POOL = 4096  # samples that are sorted by length together; those of the same length stay in random order


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch.

    Attributes:
        inputs: [B, L] int64 item rows, 0 where padded.
        lengths: [B] int64, inputs of each sample.
        targets: [P] int64. With ``every_position`` the items that follow each input, row by row, otherwise
            the item that follows the newest input of each row.
        every_position: Whether each input has a target.
        samples: [B] int64, the number of each row in `Samples`.
    """

    inputs: Tensor
    lengths: Tensor
    targets: Tensor
    every_position: bool
    samples: Tensor

    @property
    def present(self) -> Tensor:
        """[B, L] bool, False where padded."""
        return torch.arange(self.inputs.shape[1], device=self.inputs.device) < self.lengths[:, None]

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device."""
        inputs, lengths, targets = (t.to(device) for t in (self.inputs, self.lengths, self.targets))
        return Batch(inputs, lengths, targets, self.every_position, self.samples.to(device))


@dataclass(frozen=True, slots=True)
class Samples:
    """Training samples, as ranges of the concatenated sequences.

    Attributes:
        items: [T] int64, the items of all sequences.
        starts: [S] int64, the first input of each sample.
        lengths: [S] int64, its number of inputs.
        every_position: Whether each input has a target.
    """

    items: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    every_position: bool

    @classmethod
    def positions(cls, sequences: Sequence[np.ndarray], max_length: int) -> Samples:
        """One sample per sequence, with a target at each of its newest ``max_length`` positions."""
        items, ends, lengths = _flatten(sequences)
        lengths = np.minimum(lengths - 1, max_length)
        some = lengths > 0
        return cls(items, (ends - 1 - lengths)[some], lengths[some], every_position=True)

    @classmethod
    def prefixes(cls, sequences: Sequence[np.ndarray], max_length: int) -> Samples:
        """One sample per item that has an item before it: the newest ``max_length`` items before it."""
        items, ends, lengths = _flatten(sequences)
        first = np.repeat(ends - lengths, lengths)  # [T] first item of the sequence of each item
        before = np.arange(len(items)) - first  # [T]
        targets = np.flatnonzero(before)
        lengths = np.minimum(before[targets], max_length)
        return cls(items, targets - lengths, lengths, every_position=False)

    def num_batches(self, batch_size: int) -> int:
        """Return the number of batches per epoch."""
        return -(-len(self.starts) // batch_size)

    def batches(self, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Iterate over one epoch, which has every sample once. The order depends on ``rng`` alone."""
        ordered = rng.permutation(len(self.starts))
        pool = max(POOL // batch_size, 1) * batch_size
        for start in range(0, len(ordered), pool):
            rows = ordered[start : start + pool]
            ordered[start : start + pool] = rows[np.argsort(self.lengths[rows], kind="stable")]
        for number in rng.permutation(self.num_batches(batch_size)):
            yield self._batch(ordered[number * batch_size : (number + 1) * batch_size])

    def _batch(self, rows: np.ndarray) -> Batch:
        lengths, starts = self.lengths[rows], self.starts[rows]
        columns = np.arange(lengths.max())
        present = columns < lengths[:, None]  # [B, L]
        at = np.where(present, starts[:, None] + columns, 0)
        targets = self.items[at[present] + 1 if self.every_position else starts + lengths]
        inputs = torch.from_numpy(np.where(present, self.items[at], 0))
        lengths, targets, samples = (torch.from_numpy(a) for a in (lengths, targets, rows))
        return Batch(inputs, lengths, targets, self.every_position, samples)


def _flatten(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Concatenate sequences; returns the items, and the end and length of each sequence, int64."""
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([empty, *sequences]).astype(np.int64), lengths.cumsum(), lengths
