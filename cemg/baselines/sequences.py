"""Batches of training sequences of similar length, padded on the right.

B users, L inputs of the longest sequence in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

POOL = 16  # batches that are sorted by length together; users of the same length stay in random order


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of training sequences.

    Attributes:
        inputs: [B, L] int64 item rows, 0 where padded.
        targets: [B, L] int64, the item that follows each input.
        valid: [B, L] bool, False where padded.
    """

    inputs: Tensor
    targets: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device."""
        return Batch(self.inputs.to(device), self.targets.to(device), self.valid.to(device))


def pad_histories(histories: Sequence[np.ndarray], max_length: int) -> tuple[Tensor, Tensor]:
    """Pad the newest ``max_length`` items of each history with 0 on the right.

    Returns:
        The items [B, L] int64, and the lengths [B] int64.
    """
    recent = [torch.from_numpy(h[-max_length:].astype(np.int64)) for h in histories]
    lengths = torch.tensor([len(h) for h in recent])
    return torch.nn.utils.rnn.pad_sequence(recent, batch_first=True), lengths


def training_batches(
    sequences: Sequence[np.ndarray], batch_size: int, *, max_length: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """Iterate over one epoch, which has every sequence of at least two items once.

    Each item is predicted from the items before it. Only the newest ``max_length + 1`` items of a sequence
    are used. The order of the batches depends on ``rng`` alone.
    """
    rows = np.flatnonzero([len(s) >= 2 for s in sequences])
    for chosen in _batches_of_similar_length(rows, sequences, batch_size, rng):
        items, lengths = pad_histories([sequences[r] for r in chosen], max_length + 1)
        valid = torch.arange(items.shape[1] - 1) < lengths[:, None] - 1  # [B, L]
        yield Batch(items[:, :-1] * valid, items[:, 1:], valid)


def num_batches(sequences: Sequence[np.ndarray], batch_size: int) -> int:
    """Return the number of batches per epoch."""
    return -(-sum(len(s) >= 2 for s in sequences) // batch_size)


def _batches_of_similar_length(
    rows: np.ndarray, sequences: Sequence[np.ndarray], batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    shuffled = rng.permutation(rows)
    pools = [shuffled[i : i + POOL * batch_size] for i in range(0, len(shuffled), POOL * batch_size)]
    ordered = [pool[np.argsort([len(sequences[r]) for r in pool], kind="stable")] for pool in pools]
    batches = [pool[i : i + batch_size] for pool in ordered for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]
