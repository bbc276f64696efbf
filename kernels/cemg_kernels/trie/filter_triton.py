# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels on the trie share: how a logit is read, where a node's children begin, and which of
them a filter leaves.

The same rules as ``packed_ascending.py``, ``FilterTensors`` (``filter_tensors.py``) and ``trie_view.h``.
R rows of a call.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .arrays import TrieArrays
from .filter_tensors import FilterTensors

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def tame(x):
    """float32, NaN as -inf and +inf as the largest number."""
    x = x.to(tl.float32)
    return tl.where(x == x, tl.minimum(x, LARGEST), float("-inf"))


@triton.jit
def finite(x):
    """0 in the place of -inf, for what is subtracted."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _popcount(words):
    pairs = words - ((words >> 1) & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    in_bytes = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (((in_bytes * 0x0101010101010101) >> 56) & 0x7F).to(tl.int32)


@triton.jit
def child_range(packed_ptr, node, live):
    """Where the children of each of the ``live`` nodes begin and end; 0 and 0 for the others."""
    head = tl.load(packed_ptr + (node >> 6), mask=live, other=0)
    next_head = tl.load(packed_ptr + ((node + 1) >> 6), mask=live, other=0)  # none waits for the other
    return _unpacked(packed_ptr, head, node, live), _unpacked(packed_ptr, next_head, node + 1, live)


@triton.jit
def _unpacked(packed_ptr, head, node, live):
    """The first child of each of the ``live`` nodes in the block of ``head``; 0 for the others."""
    begin, place, i = (head & 0xFFFFFFFF).to(tl.int32), (head >> 32).to(tl.int32), node & 63
    listed = live & (place < 0)
    pair = tl.load(packed_ptr + (~place + (i >> 1)), mask=listed, other=0)
    bits = live & (place >= 0)
    word, before, passed = tl.zeros_like(head), i, tl.zeros_like(i)
    for w in tl.static_range(8):  # all loads at once: the one that holds it is found by the counts
        here = tl.load(packed_ptr + place + w, mask=bits, other=0)
        count = _popcount(here)
        holds = (before >= 0) & (before < count)
        word = tl.where(holds, here, word)
        passed = tl.where(holds, w * 64 + before, passed)  # with the bit's place in the word still to come
        before = tl.where(before >= 0, before - count, before)
    left = passed & 63
    found = begin + (passed - left)
    for power in tl.static_range(6):  # halves of the word are passed by their counts
        count = _popcount(word & ((1 << (32 >> power)) - 1))
        up = left >= count
        left = tl.where(up, left - count, left)
        word = tl.where(up, word >> (32 >> power), word)
        found = tl.where(up, found + (32 >> power), found)
    return tl.where(listed, (pair >> ((i & 1) * 32).to(tl.int64)).to(tl.int32), tl.where(live, found, 0))


@triton.jit
def _is_closed(closed_ptr, start, node, most_closed, steps, live):
    """Whether the list at ``start`` holds each node."""
    low, high = tl.zeros_like(node), tl.zeros_like(node) + most_closed
    for _ in range(steps):
        middle = (low + high) // 2
        searching = live & (low < high)
        below = searching & (tl.load(closed_ptr + start + middle, mask=searching, other=0) < node)
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    found = live & (low < most_closed)
    return tl.load(closed_ptr + start + low, mask=found, other=-1) == node


@triton.jit
def allowed(
    child, live, row, open_ptr, filter_of_ptr, closed_ptr, words, most_closed, steps, rows_per_request,
    BITMAPS: tl.constexpr, CLOSED: tl.constexpr,
):  # fmt: skip
    """Which of the ``live`` children the filter of ``row`` leaves an item."""
    request = row // rows_per_request
    left = live
    if BITMAPS == 1:
        word = tl.load(open_ptr + (child >> 6), mask=live, other=0)
        left = left & (((word >> (child & 63).to(tl.int64)) & 1) != 0)
    if BITMAPS == 2:
        chosen = tl.load(filter_of_ptr + request).to(tl.int64)
        word = tl.load(open_ptr + chosen * words + (child >> 6), mask=live & (chosen >= 0), other=-1)
        left = left & (((word >> (child & 63).to(tl.int64)) & 1) != 0)
    if CLOSED:
        start = request.to(tl.int64) * most_closed
        left = left & ~_is_closed(closed_ptr, start, child, most_closed, steps, left)
    return left


def filter_operands(
    filter: FilterTensors | None, trie: TrieArrays, rows: int
) -> tuple[Tensor, Tensor, Tensor, int, int, int, int]:
    """Pointers and sizes of the filter; what is not there is never read."""
    nothing = trie.first_child, trie.rows, trie.rows  # of the same dtypes
    if filter is None:
        return *nothing, 0, 0, 0, 1
    open_, filter_of, closed = (t if t.numel() else none for t, none in zip(filter, nothing, strict=True))
    most = filter.closed.shape[-1]
    per_request = max(1, rows // max(1, filter.num_requests))
    return open_, filter_of, closed, filter.open.shape[-1], most, most.bit_length(), per_request


def filter_kinds(filter: FilterTensors | None) -> dict[str, int]:
    """BITMAPS 0: none, 1: one for all, 2: one a request; CLOSED: lists a request."""
    if filter is None:
        return {"BITMAPS": 0, "CLOSED": False}
    bitmaps = (2 if filter.filter_of.numel() else 1) if filter.open.numel() else 0
    return {"BITMAPS": bitmaps, "CLOSED": filter.closed.numel() > 0}


def filter_types() -> dict[str, str]:
    return {
        "open_ptr": "*i64", "filter_of_ptr": "*i32", "closed_ptr": "*i32",
        "words": "i32", "most_closed": "i32", "steps": "i32", "rows_per_request": "i32",
    }  # fmt: skip
