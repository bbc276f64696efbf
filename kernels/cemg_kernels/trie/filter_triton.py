"""The trie and its filters in Triton: finds the children of a node and tests which of them a filter allows.

The rules are those of ``packed.py``, of ``FilterTensors`` (``filter_tensors.py``) and of
``csrc/include/cemg/trie_view.h``.
R rows per call.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .arrays import TrieArrays
from .filter_tensors import FilterTensors


@triton.jit
def _popcount(words):
    pairs = words - ((words >> 1) & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    in_bytes = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (((in_bytes * 0x0101010101010101) >> 56) & 0x7F).to(tl.int32)


@triton.jit
def child_range(packed_ptr, node, live):
    """Returns begin and end of the children of each ``live`` node; 0 and 0 for the others."""
    head = tl.load(packed_ptr + (node >> 6), mask=live, other=0)
    next_head = tl.load(packed_ptr + ((node + 1) >> 6), mask=live, other=0)  # both loads are issued at once
    return _unpacked(packed_ptr, head, node, live), _unpacked(packed_ptr, next_head, node + 1, live)


@triton.jit
def first_child(packed_ptr, node, live):
    """Returns the first child of each ``live`` node, or of the first node of the next level; 0 for others."""
    head = tl.load(packed_ptr + (node >> 6), mask=live, other=0)
    return _unpacked(packed_ptr, head, node, live)


@triton.jit
def _unpacked(packed_ptr, head, node, live):
    """Returns the first child of each ``live`` node in the block of ``head``; 0 for the others."""
    begin, offset, i = (head & 0xFFFFFFFF).to(tl.int32), (head >> 32).to(tl.int32), node & 63
    in_list = live & (offset < 0)
    pair = tl.load(packed_ptr + (~offset + (i >> 1)), mask=in_list, other=0)
    in_bits = live & (offset >= 0)
    word, before, passed = tl.zeros_like(head), i, tl.zeros_like(i)
    for w in tl.static_range(8):  # loads all words at once, then selects the one with the bit by the counts
        candidate = tl.load(packed_ptr + offset + w, mask=in_bits, other=0)
        count = _popcount(candidate)
        holds = (before >= 0) & (before < count)
        word = tl.where(holds, candidate, word)
        passed = tl.where(holds, w * 64 + before, passed)  # 64 per word, plus the set bits below in this word
        before = tl.where(before >= 0, before - count, before)
    left = passed & 63
    number = begin + (passed - left)
    for power in tl.static_range(6):  # binary search for the bit: skips halves of the word by their counts
        count = _popcount(word & ((1 << (32 >> power)) - 1))
        up = left >= count
        left = tl.where(up, left - count, left)
        word = tl.where(up, word >> (32 >> power), word)
        number = tl.where(up, number + (32 >> power), number)
    return tl.where(in_list, (pair >> ((i & 1) * 32).to(tl.int64)).to(tl.int32), tl.where(live, number, 0))


@triton.jit
def lower_bound(sorted_ptr, value, count, steps, live):
    """Returns how many of ``count`` sorted numbers are below each value; ``steps`` is count.bit_length()."""
    low, high = tl.zeros_like(value), tl.zeros_like(value) + count
    for _ in range(steps):
        middle = (low + high) // 2
        searching = live & (low < high)
        below = searching & (tl.load(sorted_ptr + middle, mask=searching, other=0) < value)
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    return low


@triton.jit
def _is_closed(closed_ptr, start, node, max_closed, steps, live):
    """Returns whether the sorted list at ``start`` contains each node."""
    low = lower_bound(closed_ptr + start, node, max_closed, steps, live)
    in_range = live & (low < max_closed)
    return tl.load(closed_ptr + start + low, mask=in_range, other=-1) == node


@triton.jit
def allowed(
    child, live, row, open_ptr, filter_of_ptr, closed_ptr, words, max_closed, steps, rows_per_request,
    BITMAPS: tl.constexpr, CLOSED: tl.constexpr,
):  # fmt: skip
    """Returns which of the ``live`` children have an item below that the filter of ``row`` allows."""
    request = row // rows_per_request
    result = live
    if BITMAPS == 1:
        word = tl.load(open_ptr + (child >> 6), mask=live, other=0)
        result = result & (((word >> (child & 63).to(tl.int64)) & 1) != 0)
    if BITMAPS == 2:
        chosen = tl.load(filter_of_ptr + request).to(tl.int64)
        word = tl.load(open_ptr + chosen * words + (child >> 6), mask=live & (chosen >= 0), other=-1)
        result = result & (((word >> (child & 63).to(tl.int64)) & 1) != 0)
    if CLOSED:
        start = request.to(tl.int64) * max_closed
        result = result & ~_is_closed(closed_ptr, start, child, max_closed, steps, result)
    return result


def filter_operands(
    filter: FilterTensors | None, trie: TrieArrays, rows: int
) -> tuple[Tensor, Tensor, Tensor, int, int, int, int]:
    """Returns the pointers and sizes of the filter, with placeholders for missing tensors."""
    unread = trie.first_child, trie.rows, trie.rows  # placeholders of the right dtypes
    if filter is None:
        return *unread, 0, 0, 0, 1
    open_, filter_of, closed = (t if t.numel() else other for t, other in zip(filter, unread, strict=True))
    max_closed = filter.closed.shape[-1]
    per_request = max(1, rows // max(1, filter.num_requests))
    return open_, filter_of, closed, filter.open.shape[-1], max_closed, max_closed.bit_length(), per_request


def filter_kinds(filter: FilterTensors | None) -> dict[str, int]:
    """Returns the constexprs BITMAPS (0: none, 1: one for all rows, 2: one per request) and CLOSED."""
    if filter is None:
        return {"BITMAPS": 0, "CLOSED": False}
    bitmaps = (2 if filter.filter_of.numel() else 1) if filter.open.numel() else 0
    return {"BITMAPS": bitmaps, "CLOSED": filter.closed.numel() > 0}


def filter_types() -> dict[str, str]:
    """Returns the types of ``filter_operands`` for ahead-of-time compilation."""
    return {
        "open_ptr": "*i64", "filter_of_ptr": "*i32", "closed_ptr": "*i32",
        "words": "i32", "max_closed": "i32", "steps": "i32", "rows_per_request": "i32",
    }  # fmt: skip
