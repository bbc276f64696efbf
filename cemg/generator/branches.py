"""Training sequences of a decoder whose histories have one token per item.

A sample is read once: the opening and its items, then one branch per target with the target's codes. A branch
reads the items before its target and itself. So each target is predicted as in a search, whose prompt holds
items and whose decode steps add codes.

B samples, T items of the longest, O tokens of the opening, L levels, J branch tokens of the sample with most,
S = O + T - 1 + J, n target items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cemg.generator.item_tokens import ItemVectors
from cemg.generator.samples import Batch


@dataclass(frozen=True, slots=True)
class Branches:
    """Where the tokens of a batch are, and what they read.

    Attributes:
        tokens: [B, J] int64: tokens of codes; any token for padding.
        positions: [B, S] int64: positions for the position embedding.
        reads: [B, S, S] bool: whether the first of two positions reads the second.
        states: [n, L] int64: index into [B * S] of the state that predicts each code; 0 where none does.
    """

    tokens: Tensor
    positions: Tensor
    reads: Tensor
    states: Tensor

    @classmethod
    def of(cls, batch: Batch, depths: Tensor, opening: int) -> Branches:
        """Lay out a batch.

        Args:
            batch: The samples.
            depths: [n] number of codes of each target that are predicted, from the first on; at least 1.
            opening: O.
        """
        B, T = batch.items.shape
        levels, device = batch.target_tokens.shape[1], batch.items.device
        below = torch.zeros(B, T, levels, dtype=torch.bool, device=device)  # the last code is never read
        below[batch.is_target] = torch.arange(levels, device=device) < depths[:, None] - 1
        flat = below.flatten(1)  # [B, T * L]
        counts = flat.sum(1)
        order = (~flat).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(counts.max())]  # [B, J]
        target, level = order // levels, order % levels
        codes = torch.zeros(B, T, levels, dtype=torch.int64, device=device)
        codes[batch.is_target] = batch.target_tokens
        spine = torch.arange(opening + T - 1, device=device).expand(B, -1)
        last = torch.cat((spine, target + opening - 1), 1)  # [B, S] last position of the spine that it reads
        depth = F.pad(level + 1, (spine.shape[1], 0))  # [B, S] 0 in the spine
        real = torch.arange(order.shape[1], device=device) < counts[:, None]
        return cls(
            codes.flatten(1).gather(1, order), last + depth, _reads(last, depth, real),
            _states(flat, batch.is_target, spine.shape[1], last.shape[1], levels),
        )  # fmt: skip


class ItemInputs:
    """Embeddings of the inputs of a batch whose histories have one token per item."""

    def __init__(self, vectors: ItemVectors, depths: Tensor, opening: Sequence[int]) -> None:
        """``depths`` [N] is the number of codes of each item that are predicted; ``opening`` are tokens."""
        self.vectors, self.depths = vectors, depths
        self.opening = torch.tensor(opening, dtype=torch.int64, device=depths.device)

    def __call__(self, batch: Batch) -> tuple[Tensor, Branches]:
        """The inputs of a decoder [B, S, D], and their layout."""
        branches = Branches.of(batch, self.depths[batch.targets], len(self.opening))
        opening = F.embedding(self.opening, self._table).expand(len(batch.items), -1, -1)
        items = self.vectors(batch.items[:, :-1].clamp_min(0))
        return torch.cat((opening, items, F.embedding(branches.tokens, self._table)), 1), branches

    def of_encoder(self, batch: Batch, eos: int) -> tuple[Tensor, Tensor]:
        """The inputs of an encoder [B, T + 1, D]: items and an end; and where they are [B, T + 1]."""
        items = F.pad(batch.items, (0, 1), value=-1)
        counts = (items >= 0).sum(1, keepdim=True)
        position = torch.arange(items.shape[1], device=items.device)
        ends = (position == counts)[:, :, None]
        return torch.where(ends, self._table[eos], self.vectors(items.clamp_min(0))), position <= counts

    @property
    def _table(self) -> Tensor:
        return cast(Tensor, self.vectors.model.get_input_embeddings().weight)


def _reads(last: Tensor, depth: Tensor, real: Tensor) -> Tensor:
    """[B, S, S]: the spine up to ``last``, and the own branch up to ``depth``. Padding reads the spine."""
    query, key = last[:, :, None], last[:, None, :]
    branch = F.pad(real, (depth.shape[1] - real.shape[1], 0))
    own = branch[:, :, None] & branch[:, None, :] & (query == key)
    return (depth[:, None, :] == 0) & (key <= query) | own & (depth[:, None, :] <= depth[:, :, None])


def _states(flat: Tensor, is_target: Tensor, spine: int, length: int, levels: int) -> Tensor:
    """[n, L]: see ``Branches.states``."""
    sample, item = is_target.nonzero().unbind(1)  # [n]
    first = sample * length + spine - is_target.shape[1] + item
    rank = flat.cumsum(1).view(*is_target.shape, levels)[is_target] - 1 + spine + sample[:, None] * length
    within = flat.view(*is_target.shape, levels)[is_target]  # [n, L]
    return torch.cat((first[:, None], rank.where(within, 0)[:, : levels - 1]), 1)
