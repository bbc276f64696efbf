"""Training samples of the generator and their batches. Each target item occurs once per epoch.

B samples, T items of the longest, S tokens of the longest, n target items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from cemg.data.sequences import Sequences
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
    """Parts of training sequences with target items.

    A decoder trains on windows whose positions are all targets, an encoder-decoder on one sample per prefix.

    Attributes:
        spans: User, first item, first target and end of each sample, [n, 4] int32.
    """

    def __init__(
        self, prompter: Prompter, train: Sequence[np.ndarray], *, crop: float = 0.0, first_item: bool = True,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """``crop`` and ``first_item``: see `GeneratorConfig`. Crops are drawn from (seed, epoch, sample)."""
        self.prompter, self.train = prompter, train
        self.crop, self.first_item, self.seed = crop, first_item, seed
        self.epoch = 0  # set by the trainer
        lengths = Sequences.of(train).lengths
        spans = _prefixes(lengths) if prompter.seq2seq else _windows(lengths, prompter.history_items)
        self.spans = spans if first_item else spans[spans[:, 3] - spans[:, 1] > 1]

    def __len__(self) -> int:
        return len(self.spans)

    def lengths(self) -> np.ndarray:
        """Number of items per sample, by which batches are bucketed, [n] int32."""
        lengths: np.ndarray = self.spans[:, 3] - self.spans[:, 1]
        return lengths

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
        user, first, target, end = self.spans[index].tolist()
        begin = self._cropped(index) if self.crop else first
        if begin > first or not self.first_item:
            target = max(target, begin + 1)
        return user, begin, target, end

    def _cropped(self, index: int) -> int:
        """The first item of a cropped sample, drawn per epoch; a target and an item before it remain."""
        _, first, target, end = self.spans[index].tolist()
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


def _windows(lengths: np.ndarray, history_items: int) -> np.ndarray:
    """Windows of history_items + 1 items. In later windows the first half is context, not a target."""
    size, step = history_items + 1, max(history_items // 2, 1)
    later = -(-np.maximum(lengths - size, 0) // step)
    users = np.repeat(np.arange(len(lengths)), (lengths > 0) + later)
    number = _numbers(users)
    targets = np.where(number > 0, size + (number - 1) * step, 0)
    ends = np.minimum(np.where(number > 0, targets + step, size), lengths[users])
    return _spans(users, np.maximum(ends - size, 0), targets, ends)


def _prefixes(lengths: np.ndarray) -> np.ndarray:
    users = np.repeat(np.arange(len(lengths)), np.maximum(lengths - 1, 0))
    targets = 1 + _numbers(users)
    return _spans(users, np.int64(0), targets, targets + 1)


def _spans(users: np.ndarray, *others: np.ndarray | np.int64) -> np.ndarray:
    spans = np.empty((len(users), 1 + len(others)), dtype=np.int32)
    for column, values in enumerate((users, *others)):
        spans[:, column] = values
    return spans


def _numbers(users: np.ndarray) -> np.ndarray:
    """The number of each entry among those of its user, from 0. ``users`` is sorted."""
    numbers: np.ndarray = np.arange(len(users)) - np.searchsorted(users, users)
    return numbers


class Buckets:
    """Batches of samples of similar length, shuffled per epoch from (seed, epoch)."""

    def __init__(self, lengths: Sequence[int] | np.ndarray, *, batch_size: int, seed: int) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size, self.seed = batch_size, seed

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def of_epoch(self, epoch: int, first: int = 0) -> Iterator[list[int]]:
        """The indices of the samples of each batch, from batch number ``first`` on."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        pools = shuffled.split(self.batch_size * 64)
        by_length = torch.cat([pool[self.lengths[pool].argsort(stable=True)] for pool in pools])
        batches = by_length.split(self.batch_size)
        order = torch.randperm(len(batches), generator=generator)[first:].tolist()
        return (batches[b].tolist() for b in order)
