"""Token sequences from histories (CEMG paper §3.4.1).

A history keeps its newest ``history_items`` items, oldest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cemg.generator.vocabulary import Vocabulary


class Prompter:
    """Builds prompts. ``item_tokens`` [N, levels] are the catalog's codes as tokens.

    In a vocabulary with tokens of items, each item of a prompt is its own token.
    """

    def __init__(self, vocabulary: Vocabulary, codes: Tensor, *, history_items: int, seq2seq: bool) -> None:
        self.vocabulary = vocabulary
        self.item_tokens = vocabulary.tokens(codes)
        self.read_tokens = self.item_tokens  # [N, tokens per item]
        if vocabulary.items:
            self.read_tokens = (torch.arange(len(codes)) + vocabulary.item_token_start)[:, None]
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
        parts = (torch.tensor(self.opening, dtype=torch.int64), self.read_tokens[newest].flatten())
        return torch.cat((*parts, torch.tensor(closing, dtype=torch.int64)))

    def batch(self, histories: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Prompts [B, S] int64 and their attention mask, padded left for a decoder, right for an encoder."""
        rows = [self.prompt(history) for history in histories]
        ids = pad(rows, self.vocabulary.pad, left=not self.seq2seq)
        mask = pad([torch.ones_like(row) for row in rows], 0, left=not self.seq2seq)
        return ids, mask

    def tokens(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of padded histories, for training.

        Args:
            items: [B, T] int64 catalog rows; -1 for padding, which must be on the right.

        Returns:
            The tokens [B, S] int64, padded on the right, and where they are [B, S] bool.
        """
        codes = self.item_tokens[items].masked_fill((items < 0)[:, :, None], self.vocabulary.pad).flatten(1)
        opening = torch.tensor(self.opening, dtype=torch.int64).expand(len(items), -1)
        closing = torch.full((len(items), int(self.seq2seq)), self.vocabulary.pad)
        ids = torch.cat((opening, codes, closing), 1)
        ends = (items >= 0).sum(1, keepdim=True) * self.vocabulary.levels + opening.shape[1]  # [B, 1]
        if self.seq2seq:
            ids.scatter_(1, ends, self.vocabulary.eos)
        return ids, torch.arange(ids.shape[1]) < ends + closing.shape[1]


def pad(rows: Sequence[Tensor], value: int, *, left: bool) -> Tensor:
    """Stack rows of different lengths to [B, S], padded with ``value``."""
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=value, padding_side=side
    )
