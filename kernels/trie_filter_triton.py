# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels on the trie share: how a logit is read, and which children a filter leaves.

The same rules as ``FilterTensors`` (``filter_tensors.py``) and ``FilterView`` (``trie_view.h``).
R rows of a call.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .filter_tensors import FilterTensors
from .trie_arrays import TrieArrays

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
def _count_below(words_ptr, before_ptr, bitmap, rank, blocks, live):
    """How many ranks under ``rank`` the bitmap allows."""
    block = tl.minimum(rank // 512, blocks - 1)
    at = bitmap * blocks + block
    total = tl.load(before_ptr + at, mask=live, other=0)
    for word in range(8):
        bits = rank - block * 512 - word * 64  # of this word, how many lie below
        here = tl.load(words_ptr + at * 8 + word, mask=live & (bits > 0), other=0)
        low = (tl.full([], 1, tl.int64) << tl.minimum(tl.maximum(bits, 0), 63).to(tl.int64)) - 1
        total += _popcount(here & tl.where(bits >= 64, -1, low))
    return total


@triton.jit
def _excluded_below(excluded_ptr, start, rank, most_excluded, steps, live):
    """How many ranks of the list at ``start`` lie under ``rank``."""
    low, high = tl.zeros_like(rank), tl.zeros_like(rank) + most_excluded
    for _ in range(steps):
        middle = (low + high) // 2
        searching = live & (low < high)
        below = searching & (tl.load(excluded_ptr + start + middle, mask=searching, other=0) < rank)
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    return low


@triton.jit
def allowed(
    child, live, row, first_child_ptr, num_inner, levels,
    words_ptr, before_ptr, filter_of_ptr, excluded_ptr, blocks, most_excluded, steps, rows_per_request,
    BITMAPS: tl.constexpr, EXCLUDED: tl.constexpr,
):  # fmt: skip
    """Which of the ``live`` children the filter of ``row`` leaves an item."""
    begin, end = child, child + 1
    for _ in range(levels - 1):  # a child is at least one level down
        inner = live & (begin < num_inner)
        begin = tl.where(inner, tl.load(first_child_ptr + begin, mask=inner, other=0), begin)
        end = tl.where(inner, tl.load(first_child_ptr + end, mask=inner, other=0), end)
    begin, end = begin - num_inner, end - num_inner
    request = row // rows_per_request
    left = end - begin
    if BITMAPS == 1:
        first = tl.zeros_like(request)
        left = _count_below(words_ptr, before_ptr, first, end, blocks, live)
        left -= _count_below(words_ptr, before_ptr, first, begin, blocks, live)
    if BITMAPS == 2:
        chosen = tl.load(filter_of_ptr + request).to(tl.int64)
        counted = live & (chosen >= 0)
        inside = _count_below(words_ptr, before_ptr, chosen, end, blocks, counted)
        inside -= _count_below(words_ptr, before_ptr, chosen, begin, blocks, counted)
        left = tl.where(chosen >= 0, inside, left)
    if EXCLUDED:
        start = request * most_excluded
        left -= _excluded_below(excluded_ptr, start, end, most_excluded, steps, live)
        left += _excluded_below(excluded_ptr, start, begin, most_excluded, steps, live)
    return live & (left > 0)


def filter_operands(
    filter: FilterTensors | None, trie: TrieArrays, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int, int]:
    """Pointers and sizes of the filter; what is not there is never read."""
    none = trie.first_child
    if filter is None:
        return none, none, none, none, 0, 0, 0, 1
    words, before, filter_of, excluded = (t if t.numel() else none for t in filter)
    most = filter.excluded.shape[-1]
    per_request = max(1, rows // max(1, filter.num_requests))
    return (words, before, filter_of, excluded, filter.before.shape[-1], most, most.bit_length(), per_request)


def filter_kinds(filter: FilterTensors | None) -> dict[str, int]:
    """BITMAPS 0: none, 1: one for all, 2: one a request; EXCLUDED: lists a request."""
    if filter is None:
        return {"BITMAPS": 0, "EXCLUDED": False}
    bitmaps = (2 if filter.filter_of.numel() else 1) if filter.words.numel() else 0
    return {"BITMAPS": bitmaps, "EXCLUDED": filter.excluded.numel() > 0}


def filter_types(bitmaps: int, excluded: bool) -> dict[str, str]:
    return {
        "words_ptr": "*i64" if bitmaps else "*i32", "before_ptr": "*i32", "filter_of_ptr": "*i32",
        "excluded_ptr": "*i32", "blocks": "i32", "most_excluded": "i32", "steps": "i32",
        "rows_per_request": "i32",
    }  # fmt: skip
