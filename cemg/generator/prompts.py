"""Token sequences from histories: training samples and inference prompts (CEMG paper §3.4.1).

A history keeps its newest ``history_items`` items, oldest first. Each target item occurs once per epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cemg.generator.vocabulary import Vocabulary

IGNORED = -100  # the label that cross-entropy ignores


class Sample(TypedDict):
    input_ids: Tensor
    labels: Tensor


class Prompter:
    """Builds prompts. ``item_tokens`` [N, levels] are the catalog's codes as tokens."""

    def __init__(self, vocabulary: Vocabulary, codes: Tensor, *, history_items: int, seq2seq: bool) -> None:
        self.vocabulary = vocabulary
        self.item_tokens = vocabulary.tokens(codes)
        self.history_items = history_items
        self.seq2seq = seq2seq

    @property
    def opening(self) -> list[int]:
        """Tokens before the codes: BOS and the instruction for a decoder, none for an encoder."""
        return [] if self.seq2seq else [self.vocabulary.bos, *self.vocabulary.instruction]

    def prompt(self, history: np.ndarray) -> Tensor:
        """Tokens of one history of catalog rows, int64 [S]."""
        newest = torch.from_numpy(np.asarray(history[-self.history_items :], dtype=np.int64))
        closing = [self.vocabulary.eos] if self.seq2seq else []
        parts = (torch.tensor(self.opening, dtype=torch.int64), self.item_tokens[newest].flatten())
        return torch.cat((*parts, torch.tensor(closing, dtype=torch.int64)))

    def batch(self, histories: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Prompts [B, S] int64 and their attention mask, padded left for a decoder, right for an encoder."""
        rows = [self.prompt(history) for history in histories]
        ids = pad(rows, self.vocabulary.pad, left=not self.seq2seq)
        mask = pad([torch.ones_like(row) for row in rows], 0, left=not self.seq2seq)
        return ids, mask

    def samples(
        self, train: Sequence[np.ndarray], *, crop: float = 0.0, first_item: bool = True, seed: int = 0
    ) -> Samples:
        """Training samples: windows whose positions are all targets; one per prefix for seq2seq.

        ``crop`` and ``first_item``: see `GeneratorConfig`. Crops are drawn from (seed, epoch, sample).
        """
        spans = _prefixes(train) if self.seq2seq else _windows(train, self.history_items)
        with_target = [span for span in spans if first_item or span[3] - span[1] > 1]
        return Samples(self, train, with_target, crop=crop, first_item=first_item, seed=seed)


class Samples(Dataset[Sample]):
    """Spans (user, first item, first target, end) of training sequences, tokenized on access."""

    def __init__(
        self, prompter: Prompter, train: Sequence[np.ndarray], spans: list[tuple[int, int, int, int]], *,
        crop: float, first_item: bool, seed: int,
    ) -> None:  # fmt: skip
        self.prompter, self.train, self.spans = prompter, train, spans
        self.crop, self.first_item, self.seed = crop, first_item, seed
        self.epoch = 0  # set by the trainer

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Sample:
        user, first, target, end = self.spans[index]
        begin = self._cropped(index) if self.crop else first
        if begin > first or not self.first_item:
            target = max(target, begin + 1)
        items = self.train[user][begin:end]
        build = self._seq2seq if self.prompter.seq2seq else self._causal
        return build(items, target - begin)

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

    def lengths(self) -> list[int]:
        """Number of items per sample, by which batches are bucketed."""
        return [end - first for _, first, _, end in self.spans]

    def _causal(self, items: np.ndarray, target: int) -> Sample:
        opening = torch.tensor(self.prompter.opening, dtype=torch.int64)
        codes = self.prompter.item_tokens[torch.from_numpy(items.astype(np.int64))]  # [n, levels]
        labels = codes.clone()
        labels[:target] = IGNORED
        ignored = torch.full_like(opening, IGNORED)
        return {
            "input_ids": torch.cat((opening, codes.flatten())),
            "labels": torch.cat((ignored, labels.flatten())),
        }

    def _seq2seq(self, items: np.ndarray, target: int) -> Sample:
        label = self.prompter.item_tokens[int(items[target])]
        return {"input_ids": self.prompter.prompt(items[:target]), "labels": label}


def _windows(train: Sequence[np.ndarray], history_items: int) -> Iterator[tuple[int, int, int, int]]:
    """Windows of history_items + 1 items. In later windows the first half is context, not a target."""
    size, step = history_items + 1, max(history_items // 2, 1)
    for user, items in enumerate(train):
        if len(items) > 0:
            yield user, 0, 0, min(size, len(items))
        for target in range(size, len(items), step):
            end = min(target + step, len(items))
            yield user, max(end - size, 0), target, end


def _prefixes(train: Sequence[np.ndarray]) -> Iterator[tuple[int, int, int, int]]:
    for user, items in enumerate(train):
        for target in range(1, len(items)):
            yield user, 0, target, target + 1


class Collate:
    """Pads samples on the right to the longest of the batch. Labels are padded with IGNORED."""

    def __init__(self, vocabulary: Vocabulary, *, seq2seq: bool) -> None:
        self.vocabulary, self.seq2seq = vocabulary, seq2seq

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        rows = [s["input_ids"] for s in samples]
        batch = {
            "input_ids": pad(rows, self.vocabulary.pad, left=False),
            "labels": pad([s["labels"] for s in samples], IGNORED, left=False),
        }
        if self.seq2seq:
            batch["attention_mask"] = pad([torch.ones_like(row) for row in rows], 0, left=False)
        return batch


class Buckets(Sampler[list[int]]):
    """Batches of samples of similar length, shuffled per epoch from (seed, epoch); call ``set_epoch``."""

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        pools = shuffled.split(self.batch_size * 64)
        by_length = torch.cat([pool[self.lengths[pool].argsort(stable=True)] for pool in pools])
        batches = by_length.split(self.batch_size)
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index].tolist()


def pad(rows: Sequence[Tensor], value: int, *, left: bool) -> Tensor:
    """Stack rows of different lengths to [B, S], padded with ``value``."""
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=value, padding_side=side
    )
