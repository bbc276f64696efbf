"""Histories as one padded tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pad_histories(histories: Sequence[np.ndarray], max_length: int) -> tuple[Tensor, Tensor]:
    """Pad the newest ``max_length`` items of each history with 0 on the right.

    Returns:
        The items [B, L] int64, and the lengths [B] int64.
    """
    recent = [torch.from_numpy(h[-max_length:].astype(np.int64)) for h in histories]
    lengths = torch.tensor([len(h) for h in recent])
    return torch.nn.utils.rnn.pad_sequence(recent, batch_first=True), lengths
