"""Training samples of the generator and their batches. Each target item occurs once per epoch.

B samples, T items of the longest, S tokens of the longest, n target items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from cemg.generator.prompts import Prompter

Span = tuple[int, int, int, int]  # user, first item, first target, end


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples padded on the right.

    Attributes:
        items: [B, T] int64: rows of the items that the model reads; -1 for padding.
        input_ids: [B, S] int64: their tokens.
        attention_mask: [B, S] bool: False for padding.
        is_target: [B, T] bool: which of the items are targets; all False for an encoder, which reads none.
        targets: [n] int64: rows of the target items, sample by sample.
        target_tokens: [n, levels] int64: their tokens.
    """

    items: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    is_target: Tensor
    targets: Tensor
    target_tokens: Tensor

    def to(self, device: str) -> Batch:
        """The batch on a device."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class Samples:
    """Spans (user, first item, first target, end) of training sequences.

    A decoder trains on windows whose positions are all targets, an encoder-decoder on one sample per prefix.
    """

    def __init__(
        self, prompter: Prompter, train: Sequence[np.ndarray], *, crop: float = 0.0, first_item: bool = True,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """``crop`` and ``first_item``: see `GeneratorConfig`. Crops are drawn from (seed, epoch, sample)."""
        self.prompter, self.train = prompter, train
        self.crop, self.first_item, self.seed = crop, first_item, seed
        self.epoch = 0  # set by the trainer
        spans = _prefixes(train) if prompter.seq2seq else _windows(train, prompter.history_items)
        self.spans = [span for span in spans if first_item or span[3] - span[1] > 1]

    def __len__(self) -> int:
        return len(self.spans)

    def lengths(self) -> list[int]:
        """Number of items per sample, by which batches are bucketed."""
        return [end - first for _, first, _, end in self.spans]

    def targets(self, indices: Sequence[int]) -> int:
        """Number of target items of the samples with these indices."""
        spans = (self._span(index) for index in indices)
        return sum(end - target for _, _, target, end in spans)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples with these indices."""
        spans = [self._span(index) for index in indices]
        if self.prompter.seq2seq:
            newest = self.prompter.history_items
            read = [
                self.train[user][max(begin, target - newest) : target] for user, begin, target, _ in spans
            ]
            targets = [self.train[user][target : target + 1] for user, _, target, _ in spans]
        else:
            read = [self.train[user][begin:end] for user, begin, _, end in spans]
            targets = [self.train[user][target:end] for user, _, target, end in spans]
        lengths = torch.tensor([len(items) for items in read])
        position = torch.arange(int(lengths.max()))
        inside = position < lengths[:, None]  # [B, T]
        items = torch.full(inside.shape, -1)
        items[inside] = _joined(read)
        contexts = torch.tensor([target - begin for _, begin, target, _ in spans])
        is_target = inside & (position >= contexts[:, None]) & (not self.prompter.seq2seq)
        rows = _joined(targets)
        ids, mask = self.prompter.tokens(items)
        return Batch(items, ids, mask, is_target, rows, self.prompter.item_tokens[rows])

    def _span(self, index: int) -> Span:
        """The span of a sample in this epoch."""
        user, first, target, end = self.spans[index]
        begin = self._cropped(index) if self.crop else first
        if begin > first or not self.first_item:
            target = max(target, begin + 1)
        return user, begin, target, end

    def _cropped(self, index: int) -> int:
        """The first item of a cropped sample, drawn per epoch; a target and an item before it remain."""
        _, first, target, end = self.spans[index]
        last = target - 1 if target > first else end - 2
        visible = max(first, target - self.prompter.history_items) if self.prompter.seq2seq else first
        draw = np.random.default_rng((self.seed, self.epoch, index))
        return (
            int(draw.integers(visible + 1, last + 1))
            if last > visible and draw.random() < self.crop
            else first
        )


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _windows(train: Sequence[np.ndarray], history_items: int) -> Iterator[Span]:
    """Windows of history_items + 1 items. In later windows the first half is context, not a target."""
    size, step = history_items + 1, max(history_items // 2, 1)
    for user, items in enumerate(train):
        if len(items) > 0:
            yield user, 0, 0, min(size, len(items))
        for target in range(size, len(items), step):
            end = min(target + step, len(items))
            yield user, max(end - size, 0), target, end


def _prefixes(train: Sequence[np.ndarray]) -> Iterator[Span]:
    for user, items in enumerate(train):
        for target in range(1, len(items)):
            yield user, 0, target, target + 1


class Buckets:
    """Batches of samples of similar length, shuffled per epoch from (seed, epoch)."""

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size, self.seed = batch_size, seed

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def of_epoch(self, epoch: int) -> list[list[int]]:
        """The indices of the samples of each batch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        pools = shuffled.split(self.batch_size * 64)
        by_length = torch.cat([pool[self.lengths[pool].argsort(stable=True)] for pool in pools])
        batches = by_length.split(self.batch_size)
        return [batches[b].tolist() for b in torch.randperm(len(batches), generator=generator).tolist()]
