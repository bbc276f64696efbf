"""Batches of training sequences, cut to the right size: users of like length together, padded on the right.

B users, L inputs of the longest sequence in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

POOL = 16  # batches sorted by length together; the order between users of like length stays random


@dataclass(frozen=True, slots=True)
class Batch:
    """``inputs`` and ``targets`` [B, L] int64 item rows (0 where padded), ``valid`` [B, L] bool."""

    inputs: Tensor
    targets: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.inputs.to(device), self.targets.to(device), self.valid.to(device))


def pad_histories(histories: Sequence[np.ndarray], max_length: int) -> tuple[Tensor, Tensor]:
    """The newest ``max_length`` items of each history, padded with 0: items [B, L] int64, lengths [B]."""
    recent = [torch.from_numpy(h[-max_length:].astype(np.int64)) for h in histories]
    lengths = torch.tensor([len(h) for h in recent])
    return torch.nn.utils.rnn.pad_sequence(recent, batch_first=True), lengths


def training_batches(
    sequences: Sequence[np.ndarray], batch_size: int, *, max_length: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """One epoch, every sequence of two items or more once: predict each item from those before it.

    Of a long sequence the newest ``max_length + 1`` items count. The order depends on ``rng`` alone.
    """
    rows = np.flatnonzero([len(s) >= 2 for s in sequences])
    for chosen in _like_lengths(rows, sequences, batch_size, rng):
        items, lengths = pad_histories([sequences[r] for r in chosen], max_length + 1)
        valid = torch.arange(items.shape[1] - 1) < lengths[:, None] - 1  # [B, L]
        yield Batch(items[:, :-1] * valid, items[:, 1:], valid)


def num_batches(sequences: Sequence[np.ndarray], batch_size: int) -> int:
    """How many batches an epoch has."""
    return -(-sum(len(s) >= 2 for s in sequences) // batch_size)


def _like_lengths(
    rows: np.ndarray, sequences: Sequence[np.ndarray], batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    shuffled = rng.permutation(rows)
    pools = [shuffled[i : i + POOL * batch_size] for i in range(0, len(shuffled), POOL * batch_size)]
    ordered = [pool[np.argsort([len(sequences[r]) for r in pool], kind="stable")] for pool in pools]
    batches = [pool[i : i + batch_size] for pool in ordered for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]
