"""Numbers that ascend, packed, as the trie keeps its nodes' first children; in plain PyTorch: the definition.

Blocks of 64 numbers. There is a word for each block, then what these point to. A block's word holds its first
number, and in its upper half a place among all words. From there on, where the block spans no more than 512,
stands a bit for each number from the first on, set for those of the block. Otherwise the place is inverted,
so negative, and the block's numbers stand there, two in a word. Seven words of zeros end it all, so that
eight may be read wherever bits begin. The same as ``csrc/include/cemg/packed_ascending.h``.
C numbers, P blocks, W words.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
MOST_WORDS = 8  # of bits
LOW = 0xFFFFFFFF
CHUNK = 1 << 18  # numbers looked up at a time


def pack(numbers: Tensor) -> Tensor:
    """``numbers`` [C], from 0 to 2**31 - 1, each above the one before -> words [W] int64."""
    count, device = numbers.numel(), numbers.device
    blocks = -(-count // BLOCK)
    padded = torch.nn.functional.pad(numbers.long(), (0, blocks * BLOCK - count), value=-1).view(-1, BLOCK)
    first, sizes = padded[:, 0], (padded >= 0).sum(1)  # [P]
    span = padded.amax(1) - first + 1
    dense = span <= MOST_WORDS * 64
    taken = torch.where(dense, (span + 63) // 64, (sizes + 1) // 2)
    place = blocks + taken.cumsum(0) - taken
    words = torch.zeros(blocks + int(taken.sum()) + MOST_WORDS - 1, dtype=torch.int64, device=device)
    words[:blocks] = (torch.where(dense, place, ~place) << 32) | first
    number = numbers.long()
    i = torch.arange(count, device=device)
    block, i = i // BLOCK, i % BLOCK
    offset = number - first[block]
    own = torch.where(dense[block], offset // 64, i // 2)
    shift = torch.where(dense[block], offset % 64, i % 2 * 32)
    bits = torch.where(dense[block], 1, number) << shift
    return words.index_add_(0, place[block] + own, bits)  # no two have a bit in common


def unpack(words: Tensor, count: int) -> Tensor:
    """The ``count`` numbers that ``words`` [W] int64 pack, int64 [C]."""
    every = torch.arange(count, device=words.device)
    return torch.cat([at(words, part) for part in every.split(CHUNK)])


def unpack_any(words: Tensor, count: int) -> Tensor | None:
    """The same of words with any values; None where they pack no such numbers."""
    blocks = -(-count // BLOCK)
    if count < 1 or blocks + MOST_WORDS - 1 > words.numel():
        return None
    heads = words[:blocks]
    place = heads >> 32
    sizes = (count - torch.arange(blocks, device=words.device) * BLOCK).clamp(max=BLOCK)
    end = torch.where(place < 0, ~place + (sizes + 1) // 2, place + MOST_WORDS)
    if int(end.max()) > words.numel() or int((heads & LOW).max()) >= 2**31:
        return None
    numbers = unpack(words, count)
    rising = bool((numbers.diff() > 0).all()) and int(numbers[0]) >= 0 and int(numbers[-1]) < 2**31
    return numbers if rising and torch.equal(pack(numbers), words) else None


def at(words: Tensor, n: Tensor) -> Tensor:
    """Number ``n`` (any shape) of those that ``words`` [W] pack, int64."""
    n = n.long()
    head, i = words[n // BLOCK], n % BLOCK
    first, place = head & LOW, head >> 32
    pair = words[torch.where(place < 0, ~place + i // 2, 0)]
    listed = (pair >> (i % 2 * 32)) & LOW
    reach = place.clamp(min=0)[..., None] + torch.arange(MOST_WORDS, device=words.device)
    bits = words[reach.clamp(max=words.numel() - 1)]  # [..., MOST_WORDS]
    counts = popcount(bits).cumsum(-1)
    passed = (counts <= i[..., None]).sum(-1, keepdim=True).clamp(max=MOST_WORDS - 1)
    word = bits.gather(-1, passed)[..., 0]
    before = i - (counts.gather(-1, passed)[..., 0] - popcount(word))
    return torch.where(place < 0, listed, first + 64 * passed[..., 0] + _nth_bit(word, before))


def popcount(words: Tensor) -> Tensor:
    """The set bits of each int64, counted in parallel: pairs, nibbles, bytes, then their sum. int64."""
    pairs = words - ((words >> 1) & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    in_bytes = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((in_bytes * 0x0101010101010101) >> 56) & 0x7F


def _nth_bit(word: Tensor, before: Tensor) -> Tensor:
    """The place of the bit with ``before`` others of the word below it; halves are passed by their counts."""
    place = torch.zeros_like(word)
    for half in (32, 16, 8, 4, 2, 1):
        count = popcount(word & ((1 << half) - 1))
        up = before >= count
        before = torch.where(up, before - count, before)
        word = torch.where(up, word >> half, word)
        place = torch.where(up, place + half, place)
    return place
