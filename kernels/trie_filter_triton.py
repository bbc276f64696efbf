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
        left = left & ~_is_closed(closed_ptr, request * most_closed, child, most_closed, steps, left)
    return left


def filter_operands(
    filter: FilterTensors | None, trie: TrieArrays, rows: int
) -> tuple[Tensor, Tensor, Tensor, int, int, int, int]:
    """Pointers and sizes of the filter; what is not there is never read."""
    none = trie.first_child
    if filter is None:
        return none, none, none, 0, 0, 0, 1
    open_, filter_of, closed = (t if t.numel() else none for t in filter)
    most = filter.closed.shape[-1]
    per_request = max(1, rows // max(1, filter.num_requests))
    return open_, filter_of, closed, filter.open.shape[-1], most, most.bit_length(), per_request


def filter_kinds(filter: FilterTensors | None) -> dict[str, int]:
    """BITMAPS 0: none, 1: one for all, 2: one a request; CLOSED: lists a request."""
    if filter is None:
        return {"BITMAPS": 0, "CLOSED": False}
    bitmaps = (2 if filter.filter_of.numel() else 1) if filter.open.numel() else 0
    return {"BITMAPS": bitmaps, "CLOSED": filter.closed.numel() > 0}


def filter_types(bitmaps: int) -> dict[str, str]:
    return {
        "open_ptr": "*i64" if bitmaps else "*i32", "filter_of_ptr": "*i32", "closed_ptr": "*i32",
        "words": "i32", "most_closed": "i32", "steps": "i32", "rows_per_request": "i32",
    }  # fmt: skip
