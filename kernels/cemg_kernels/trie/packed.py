"""Packs ascending numbers, such as the first children of a trie's nodes. The reference, in plain PyTorch.

The numbers are split into blocks of 64. The packed form starts with one head word per block, followed by the
data of the blocks. The lower half of a head is the first number of the block; the upper half is the offset of
its data.

- If the numbers of a block span at most 512 values, the data is a bitmap: bit i is set if first + i is one of
  them.
- Otherwise the offset is inverted, so it is negative, and the data lists the numbers, two per word.

Seven zero words follow at the end, so that eight words can be read wherever a bitmap starts. The format is
the one of ``csrc/include/cemg/packed_ascending.h``. C numbers, P blocks, W words.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
BITMAP_WORDS = 8
LOW_BITS = 0xFFFFFFFF
CHUNK = 1 << 18  # numbers unpacked per iteration


def pack(numbers: Tensor) -> Tensor:
    """Packs ``numbers`` [C], strictly ascending from 0 to 2**31 - 1, into int64 words [W]."""
    count, device = numbers.numel(), numbers.device
    blocks = -(-count // BLOCK)
    padded = torch.nn.functional.pad(numbers.long(), (0, blocks * BLOCK - count), value=-1).view(-1, BLOCK)
    first, sizes = padded[:, 0], (padded >= 0).sum(1)  # [P]
    span = padded.amax(1) - first + 1
    dense = span <= BITMAP_WORDS * 64
    lengths = torch.where(dense, (span + 63) // 64, (sizes + 1) // 2)  # words per block
    offsets = blocks + lengths.cumsum(0) - lengths
    words = torch.zeros(blocks + int(lengths.sum()) + BITMAP_WORDS - 1, dtype=torch.int64, device=device)
    words[:blocks] = (torch.where(dense, offsets, ~offsets) << 32) | first
    number = numbers.long()
    i = torch.arange(count, device=device)
    block, i = i // BLOCK, i % BLOCK
    distance = number - first[block]
    word = torch.where(dense[block], distance // 64, i // 2)
    shift = torch.where(dense[block], distance % 64, i % 2 * 32)
    bits = torch.where(dense[block], 1, number) << shift
    # the bits are disjoint, so adding them is a bitwise or
    return words.index_add_(0, offsets[block] + word, bits)


def unpack(words: Tensor, count: int) -> Tensor:
    """Unpacks ``count`` numbers from int64 words [W]: int64 [C]."""
    indices = torch.arange(count, device=words.device)
    return torch.cat([at(words, chunk) for chunk in indices.split(CHUNK)])


def unpack_any(words: Tensor, count: int) -> Tensor | None:
    """Unpacks words that may be corrupt; returns None if they are not ``count`` packed numbers."""
    blocks = -(-count // BLOCK)
    if count < 1 or blocks + BITMAP_WORDS - 1 > words.numel():
        return None
    heads = words[:blocks]
    offsets = heads >> 32
    sizes = (count - torch.arange(blocks, device=words.device) * BLOCK).clamp(max=BLOCK)
    end = torch.where(offsets < 0, ~offsets + (sizes + 1) // 2, offsets + BITMAP_WORDS)
    if int(end.max()) > words.numel() or int((heads & LOW_BITS).max()) >= 2**31:
        return None
    numbers = unpack(words, count)
    ascending = bool((numbers.diff() > 0).all()) and int(numbers[0]) >= 0 and int(numbers[-1]) < 2**31
    return numbers if ascending and torch.equal(pack(numbers), words) else None


def at(words: Tensor, n: Tensor) -> Tensor:
    """Returns the numbers at the indices ``n`` (any shape) of packed ``words`` [W]: int64."""
    n = n.long()
    head, i = words[n // BLOCK], n % BLOCK
    first, offset = head & LOW_BITS, head >> 32
    pair = words[torch.where(offset < 0, ~offset + i // 2, 0)]
    from_list = (pair >> (i % 2 * 32)) & LOW_BITS
    index = offset.clamp(min=0)[..., None] + torch.arange(BITMAP_WORDS, device=words.device)
    bitmap = words[index.clamp(max=words.numel() - 1)]  # [..., BITMAP_WORDS]
    counts = popcount(bitmap).cumsum(-1)
    skipped = (counts <= i[..., None]).sum(-1, keepdim=True).clamp(max=BITMAP_WORDS - 1)
    word = bitmap.gather(-1, skipped)[..., 0]
    before = i - (counts.gather(-1, skipped)[..., 0] - popcount(word))
    return torch.where(offset < 0, from_list, first + 64 * skipped[..., 0] + _nth_bit(word, before))


def popcount(words: Tensor) -> Tensor:
    """Counts the set bits of each int64 by adding pairs, nibbles and bytes in parallel: int64."""
    pairs = words - ((words >> 1) & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    in_bytes = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((in_bytes * 0x0101010101010101) >> 56) & 0x7F


def _nth_bit(word: Tensor, before: Tensor) -> Tensor:
    """Returns the index of the set bit that has ``before`` set bits below it, by binary search."""
    index = torch.zeros_like(word)
    for half in (32, 16, 8, 4, 2, 1):
        count = popcount(word & ((1 << half) - 1))
        up = before >= count
        before = torch.where(up, before - count, before)
        word = torch.where(up, word >> half, word)
        index = torch.where(up, index + half, index)
    return index
