"""Any subset of the catalog as a constraint on the trie: a bitmap over item ranks, with counts.

One bit an item in rank order, and the allowed items counted before each block of 512 bits. A node is an
interval of ranks, so "is anything allowed below it" is two counts. 1.06 bits an item.
N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .trie import Trie

WORD_BITS = 64
BLOCK_WORDS = 8
BLOCK_BITS = WORD_BITS * BLOCK_WORDS


class ItemFilter:
    """The allowed items of one trie. Combine with ``&``, ``|`` and ``~``; pass as ``filter=``.

    ``words`` [blocks * 8] int64 holds the bits, ``before`` [blocks] int32 the counts. A filter belongs to
    the trie it was made from (or its copy on another device): another trie refuses it with ValueError.
    """

    __slots__ = ("before", "fingerprint", "num_items", "words")

    def __init__(self, words: Tensor, num_items: int, fingerprint: str) -> None:
        self.words, self.num_items, self.fingerprint = words, num_items, fingerprint
        counts = popcount(words).view(-1, BLOCK_WORDS).sum(1)  # [blocks]
        self.before = (counts.cumsum(0) - counts).to(torch.int32)

    @classmethod
    def from_mask(cls, trie: Trie, allowed: Tensor) -> ItemFilter:
        """Allow the rows where ``allowed`` [N] bool is True, in the order ``Trie.from_codes`` was given.

        Raises ValueError where the shape or dtype is another.
        """
        if allowed.shape != (trie.num_items,) or allowed.dtype != torch.bool:
            raise ValueError(
                f"allowed must be bool [{trie.num_items}], got {allowed.dtype} {list(allowed.shape)}; "
                "one entry for each item of the trie"
            )
        by_rank = allowed.to(trie.device)[trie.rows.long()]  # [N]
        return cls(_pack(by_rank), trie.num_items, trie.fingerprint)

    @classmethod
    def from_items(cls, trie: Trie, allowed_ids: Tensor | Sequence[int]) -> ItemFilter:
        """Allow the items with these ids, and no others; ValueError names an id the trie does not have."""
        ids = torch.as_tensor(allowed_ids, dtype=torch.int64, device=trie.device).flatten()
        known, rank = trie.ids_by_rank.sort()
        place = torch.searchsorted(known, ids).clamp(max=trie.num_items - 1)
        unknown = ids[known[place] != ids]
        if unknown.numel():
            raise ValueError(f"no item of this trie has the id {int(unknown[0])}; pass ids of its items")
        by_rank = torch.zeros(trie.num_items, dtype=torch.bool, device=trie.device)
        by_rank[rank[place]] = True
        return cls(_pack(by_rank), trie.num_items, trie.fingerprint)

    def __and__(self, other: ItemFilter) -> ItemFilter:
        """The items that both allow."""
        return self._with(self.words & self._matching(other).words)

    def __or__(self, other: ItemFilter) -> ItemFilter:
        """The items that either allows."""
        return self._with(self.words | self._matching(other).words)

    def __invert__(self) -> ItemFilter:
        """The items that this one does not allow."""
        full = _pack(torch.ones(self.num_items, dtype=torch.bool, device=self.words.device))
        return self._with(~self.words & full)

    def __len__(self) -> int:
        """How many items are allowed."""
        return int(popcount(self.words).sum())

    def __bool__(self) -> bool:
        """True: a filter that allows nothing is still a filter."""
        return True

    def to(self, device: str | torch.device) -> ItemFilter:
        """The same filter on another device."""
        return ItemFilter(self.words.to(device), self.num_items, self.fingerprint)

    def count(self, low: Tensor, high: Tensor) -> Tensor:
        """Allowed items of ranks ``low`` to ``high`` (half open; any shape), int64."""
        return self._below(high) - self._below(low)

    def allows(self, intervals: Tensor) -> Tensor:
        """Whether any rank of ``intervals`` [..., 2] is allowed, bool."""
        return self.count(intervals[..., 0], intervals[..., 1]) > 0

    def _below(self, rank: Tensor) -> Tensor:
        """How many ranks under ``rank`` are allowed."""
        rank = rank.long()
        block = torch.clamp(rank // BLOCK_BITS, max=self.before.numel() - 1)
        total = self.before[block].long()
        for word in range(BLOCK_WORDS):
            index = block * BLOCK_WORDS + word
            bits = (rank - index * WORD_BITS).clamp(0, WORD_BITS)  # of this word, how many lie below
            total = total + popcount(self.words[index] & _low_bits(bits))
        return total

    def _matching(self, other: ItemFilter) -> ItemFilter:
        if not isinstance(other, ItemFilter):
            raise TypeError(f"a filter combines with another ItemFilter, got {type(other).__name__}")
        if other.fingerprint != self.fingerprint:
            raise ValueError("these filters belong to different tries; make both from the same trie")
        return other

    def _with(self, words: Tensor) -> ItemFilter:
        return ItemFilter(words, self.num_items, self.fingerprint)


def popcount(words: Tensor) -> Tensor:
    """The set bits of each int64, counted in parallel: pairs, nibbles, bytes, then their sum. int64."""
    pairs = words - ((words >> 1) & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    in_bytes = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((in_bytes * 0x0101010101010101) >> 56) & 0x7F


def _low_bits(count: Tensor) -> Tensor:
    """An int64 whose lowest ``count`` (0 to 64) bits are set."""
    partial = (torch.ones_like(count) << count.clamp(max=WORD_BITS - 1)) - 1
    return torch.where(count == WORD_BITS, -1, partial)


def _pack(by_rank: Tensor) -> Tensor:
    """Bits [N] bool -> words [blocks * 8] int64; the last block is filled with zeros."""
    padding = -by_rank.numel() % BLOCK_BITS
    bits = torch.nn.functional.pad(by_rank.long(), (0, padding)).view(-1, WORD_BITS)
    place = torch.arange(WORD_BITS, device=by_rank.device)
    return (bits << place).sum(1)  # each bit once, so the sum is an or; bit 63 wraps to the sign
