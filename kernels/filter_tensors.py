"""Filters as the kernels read them: bitmaps over item ranks with counts, and short lists of excluded ranks.

A bitmap has one bit an item, in rank order, and the allowed items counted before each block of 512 bits. A
node is an interval of ranks, so "is anything allowed below it" is two counts, less the excluded ranks
between. The same rules as ``FilterView`` in ``csrc/include/cemg/trie_view.h``.
F filters, B requests, H excluded ranks a request, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORD_BITS = 64
BLOCK_WORDS = 8
BLOCK_BITS = WORD_BITS * BLOCK_WORDS
NO_RANK = 2**31 - 1  # fills a list of excluded ranks


class FilterTensors(NamedTuple):
    """``words`` [F, blocks * 8] int64 and ``before`` [F, blocks] int32, empty where there are no bitmaps;
    ``filter_of`` [B] int32, the bitmap a request obeys, -1 for none; empty: all rows obey the first;
    ``excluded`` [B, H] int32, ascending distinct ranks that the request's bitmap allows, then ``NO_RANK``.
    Row r belongs to request r // (R // B).
    """

    words: Tensor
    before: Tensor
    filter_of: Tensor
    excluded: Tensor

    @property
    def num_requests(self) -> int:
        """B; 0 where one filter serves all rows."""
        return max(self.filter_of.shape[0], self.excluded.shape[0])

    def fields(self, rows: int) -> tuple[int, int, int, int, int, int, int]:
        """The fields of the C++ view for a call of ``rows`` rows: addresses, then sizes."""
        words, before, filter_of, excluded = (t.data_ptr() if t.numel() else 0 for t in self)
        per_request = max(1, rows // max(1, self.num_requests))
        return words, before, filter_of, excluded, self.before.shape[-1], self.excluded.shape[-1], per_request

    def to(self, device: str | torch.device) -> FilterTensors:
        return FilterTensors(*(tensor.to(device) for tensor in self))

    def request_of(self, rows: int) -> Tensor:
        """The request of each row, [R] int64."""
        row = torch.arange(rows, device=self.excluded.device)
        return row // max(1, rows // max(1, self.num_requests))

    def allows(self, intervals: Tensor) -> Tensor:
        """Whether any rank of ``intervals`` [R, ..., 2] is left for its row, bool [R, ...]."""
        shape, rows = intervals.shape[:-1], intervals.shape[0]
        bounds = intervals.long()[..., None, :].flatten(1, -2)  # [R, X, 2]
        request = self.request_of(rows)
        open_ = bounds[..., 1] - bounds[..., 0]  # [R, X]
        if self.words.numel():
            chosen = self.filter_of[request].long() if self.filter_of.numel() else torch.zeros_like(request)
            safe = chosen.clamp(min=0)[:, None]
            counted = self.count_below(bounds[..., 1], safe) - self.count_below(bounds[..., 0], safe)
            open_ = torch.where(chosen[:, None] < 0, open_, counted)
        if self.excluded.numel():
            mine = self.excluded.long()[request]  # [R, H]
            ends = torch.searchsorted(mine, bounds.flatten(1)).view(bounds.shape)
            open_ = open_ - (ends[..., 1] - ends[..., 0])
        return (open_ > 0).view(shape)

    def count_below(self, rank: Tensor, filter: Tensor) -> Tensor:
        """How many ranks under ``rank`` the bitmaps ``filter`` (it broadcasts) allow, int64."""
        rank, blocks = rank.long(), self.before.shape[1]
        block = torch.clamp(rank // BLOCK_BITS, max=blocks - 1)
        place = filter * blocks + block
        total = self.before.flatten()[place].long()
        words = self.words.flatten()
        for word in range(BLOCK_WORDS):
            bits = (rank - (block * BLOCK_WORDS + word) * WORD_BITS).clamp(0, WORD_BITS)
            total = total + popcount(words[place * BLOCK_WORDS + word] & _low_bits(bits))
        return total


def with_counts(words: Tensor, filter_of: Tensor, excluded: Tensor) -> FilterTensors:
    """The filter of these bitmaps ``words`` [F, blocks * 8], with their counts."""
    blocks = words.shape[1] // BLOCK_WORDS
    counts = popcount(words).view(words.shape[0], blocks, BLOCK_WORDS).sum(2)  # [F, blocks]
    return FilterTensors(words, (counts.cumsum(1) - counts).to(torch.int32), filter_of, excluded)


def no_requests(device: torch.device) -> tuple[Tensor, Tensor]:
    """The empty ``filter_of`` and ``excluded`` of a filter that serves all rows alike."""
    none = torch.empty(0, 0, dtype=torch.int32, device=device)
    return none.flatten(), none


def popcount(words: Tensor) -> Tensor:
    """The set bits of each int64, counted in parallel: pairs, nibbles, bytes, then their sum. int64."""
    pairs = words - ((words >> 1) & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    in_bytes = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((in_bytes * 0x0101010101010101) >> 56) & 0x7F


def pack(by_rank: Tensor) -> Tensor:
    """Bits [N] bool -> words [blocks * 8] int64; the last block is filled with zeros."""
    padding = -by_rank.numel() % BLOCK_BITS
    bits = torch.nn.functional.pad(by_rank.view(torch.uint8), (0, padding)).view(-1, 8)
    weight = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=by_rank.device)
    return (bits * weight).sum(1, dtype=torch.uint8).view(torch.int64)  # the lowest byte first


def is_set(words: Tensor, rank: Tensor, filter: Tensor) -> Tensor:
    """The bit of ``rank`` in each of the bitmaps ``filter`` of ``words`` [F, W], bool."""
    word = words.flatten()[filter * words.shape[1] + rank // WORD_BITS]
    return (word >> (rank % WORD_BITS)) & 1 == 1


def _low_bits(count: Tensor) -> Tensor:
    """An int64 whose lowest ``count`` (0 to 64) bits are set."""
    partial = (torch.ones_like(count) << count.clamp(max=WORD_BITS - 1)) - 1
    return torch.where(count == WORD_BITS, -1, partial)
