"""Filters as the kernels read them: one bit per node of the trie, and short lists of closed nodes.

A node is open if an allowed item is below it. The bits and the lists cover the nodes of every level, so a
kernel tests one bit and searches one short list per node, at any level. The rules are those of ``FilterView``
in ``csrc/include/cemg/trie_view.h``.
F filters, B requests, H excluded items and X closed nodes per request, R rows, T nodes, N items.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.dispatch import native, pick
from ..runtime.ranges import ranged
from . import cuda_launch as trie_cuda
from . import reference as trie_walk
from .arrays import TrieArrays
from .packed import popcount

WORD_BITS = 64
NO_NODE = 2**31 - 1  # pads lists of closed nodes and of excluded ranks


class FilterTensors(NamedTuple):
    """The tensors of a filter. Row r belongs to request r // (R // B).

    Args:
        open: int64 [F, words], one bit per node in each of F bitmaps; empty if there are no bitmaps.
        filter_of: int32 [B], the bitmap of each request, or -1 for none; empty if the first bitmap applies to
            all rows.
        closed: int32 [B, X], further closed nodes of each request, ascending and distinct, then ``NO_NODE``.
    """

    open: Tensor
    filter_of: Tensor
    closed: Tensor

    @property
    def num_requests(self) -> int:
        """B, or 0 if one filter applies to all rows."""
        return max(self.filter_of.shape[0], self.closed.shape[0])

    def fields(self, rows: int) -> tuple[int, int, int, int, int, int]:
        """Returns the fields of the C++ FilterView for ``rows`` rows, in order: addresses, then sizes."""
        open_, filter_of, closed = (t.data_ptr() if t.numel() else 0 for t in self)
        per_request = max(1, rows // max(1, self.num_requests))
        return open_, filter_of, closed, self.open.shape[-1], self.closed.shape[-1], per_request

    def view(self, rows: int) -> Any:
        """Returns the C++ FilterView for a call with ``rows`` rows."""
        return _view(*self.fields(rows))

    def to(self, device: str | torch.device) -> FilterTensors:
        """Returns the tensors on another device."""
        return FilterTensors(*(tensor.to(device) for tensor in self))

    def allows(self, nodes: Tensor) -> Tensor:
        """Returns which of ``nodes`` [R, ...] are open for their row: bool. All must be valid nodes."""
        flat = nodes.long().view(nodes.shape[0], nodes[:1].numel())  # [R, Y]
        rows = flat.shape[0]
        request = torch.arange(rows, device=flat.device) // max(1, rows // max(1, self.num_requests))
        allowed = torch.ones_like(flat, dtype=torch.bool)
        if self.open.numel():
            chosen = self.filter_of[request].long() if self.filter_of.numel() else torch.zeros_like(request)
            allowed = is_set(self.open, flat, chosen.clamp(min=0)[:, None]) | (chosen < 0)[:, None]
        if self.closed.numel():
            closed = self.closed.long()[request]  # [R, X]
            position = torch.searchsorted(closed, flat).clamp(max=closed.shape[1] - 1)
            allowed &= closed.gather(1, position) != flat
        return allowed.view(nodes.shape)


class Filter:
    """Base of ``ItemFilter`` and ``RequestFilter``: what a trie's methods read of a filter."""

    __slots__ = ("__weakref__", "fingerprint", "tensors", "trie")

    def __init__(self, trie: TrieArrays, fingerprint: str, tensors: FilterTensors) -> None:
        """``fingerprint`` is that of the trie whose items the filter allows."""
        self.trie, self.fingerprint, self.tensors = trie, fingerprint, tensors

    @property
    def device(self) -> torch.device:
        """The device of the filter's tensors."""
        return self.tensors.open.device


@lru_cache(maxsize=64)
def _view(open: int, filter_of: int, closed: int, words: int, max_closed: int, rows_per_request: int) -> Any:
    """Returns a C++ FilterView of these addresses and sizes. Building one takes 3 us, a small step 15."""
    return native().FilterView(
        open=open, filter_of=filter_of, closed=closed, words=words, max_closed=max_closed,
        rows_per_request=rows_per_request,
    )  # fmt: skip


def open_nodes(trie: TrieArrays, by_rank: Tensor) -> Tensor:
    """Returns the bitmap int64 [words] of the allowed items, ``by_rank`` bool [N], and the nodes above."""
    inner = torch.zeros(trie.num_inner, dtype=torch.bool, device=by_rank.device)
    return fill_inner(trie, pack_bits(torch.cat((inner, by_rank))))


@ranged
def fill_inner(trie: TrieArrays, open: Tensor) -> Tensor:
    """Computes the bits of all inner nodes from those of the leaves; changes and returns ``open`` [words]."""
    compiled = pick("trie", open.device) == "native"
    if compiled and open.device.type == "cpu":
        trie.view.open_inner(open.data_ptr())
        return open
    levels = list(pairwise(trie.level_begins))[::-1]
    if compiled:
        for begin, end in levels:
            words = (end - 1) // WORD_BITS - begin // WORD_BITS + 1
            trie_cuda.launch("open_level", trie, trie_cuda.NO_FILTER, (begin, end, open), words)
        return open
    bits = unpack_bits(open, trie.num_nodes)
    for begin, end in levels:
        first, last = trie_walk.child_range(trie, torch.arange(begin, end, device=open.device))
        open_up_to = bits.cumsum(0)  # for each node, the number of open nodes up to and including it
        bits[begin:end] = open_up_to[last - 1] > open_up_to[first - 1]
    return open.copy_(pack_bits(bits))


@ranged
def closed_nodes(trie: TrieArrays, open: Tensor, filter_of: Tensor, excluded: Tensor) -> Tensor:
    """Returns the nodes that excluded items close in addition to the bitmaps.

    Args:
        trie: The trie.
        open: int64 [F, words], as in ``FilterTensors``.
        filter_of: int32 [B], as in ``FilterTensors``.
        excluded: int32 [B, H], ranks, ascending and distinct, then ``NO_NODE``.

    Returns:
        int32 [B, X], as ``closed`` of ``FilterTensors``.
    """
    requests, max_excluded = excluded.shape
    if not excluded.numel():
        return excluded
    bitmaps = FilterTensors(open, filter_of, excluded.new_empty(0, 0))
    if pick("trie", excluded.device) == "native":
        excluded = excluded.contiguous()
        closed = excluded.new_empty(requests, max_excluded * trie.levels + 1)
        if closed.device.type == "cuda":
            arguments = excluded, max_excluded, trie.levels, closed
            trie_cuda.launch("close", trie, bitmaps.fields(requests), arguments, requests)
            return closed
        longest = trie.view.close_nodes(
            bitmaps.view(requests), excluded=excluded.data_ptr(), requests=requests,
            max_excluded=max_excluded, levels=trie.levels, closed=closed.data_ptr(),
        )  # fmt: skip
        return closed[:, :longest].contiguous()
    leaves = torch.where(excluded == NO_NODE, NO_NODE, excluded + trie.num_inner)
    closed = _where_closed(leaves, bitmaps.allows(leaves.clamp(max=trie.num_nodes - 1)))
    levels = [closed]
    for _ in range(trie.levels):  # a node closes when all its open children are closed
        parents = trie_walk.parents(trie, closed)  # [B, H]
        first, last = trie_walk.child_range(trie, parents)
        children = closed.long()
        num_closed = torch.searchsorted(children, last) - torch.searchsorted(children, first)
        all_closed = (closed != NO_NODE) & (num_closed == _count_open(bitmaps, first, last))
        closed = _where_closed(parents, all_closed)
        levels.append(closed)
    return distinct(torch.cat(levels, 1))


def _where_closed(nodes: Tensor, closed: Tensor) -> Tensor:
    return distinct(torch.where(closed, nodes, NO_NODE))


def _count_open(bitmaps: FilterTensors, first: Tensor, last: Tensor) -> Tensor:
    """Counts the nodes from ``first`` [B, H] to ``last`` (exclusive) that are open in each row's bitmap."""
    if not bitmaps.open.numel():
        return last - first
    words = bitmaps.open.shape[1]
    counts = popcount(bitmaps.open).cumsum(1).flatten()
    chosen = bitmaps.filter_of.long()[:, None]

    def open_before(node: Tensor) -> Tensor:
        word = chosen.clamp(min=0) * words + node // WORD_BITS
        return counts[word] - popcount(bitmaps.open.flatten()[word] & (-1 << (node % WORD_BITS)))

    return torch.where(chosen < 0, last - first, open_before(last) - open_before(first))


def distinct(nodes: Tensor) -> Tensor:
    """Sorts each row of [B, H] and moves ``NO_NODE`` for each repeated value to its end; int32."""
    nodes = nodes.to(torch.int32).sort(1).values
    repeated = torch.nn.functional.pad(nodes[:, 1:] == nodes[:, :-1], (1, 0)) if nodes.shape[1] else nodes > 0
    return nodes.masked_fill(repeated, NO_NODE).sort(1).values


def pack_bits(bits: Tensor) -> Tensor:
    """Packs bits bool [T] into int64 [words], padded with at least one zero bit."""
    padding = WORD_BITS - bits.numel() % WORD_BITS
    bytes_ = torch.nn.functional.pad(bits.view(torch.uint8), (0, padding)).view(-1, 8)
    weight = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bytes_ * weight).sum(1, dtype=torch.uint8).view(torch.int64)  # little-endian


def unpack_bits(words: Tensor, count: int) -> Tensor:
    """Returns the first ``count`` bits of ``words`` [words] as bool."""
    shift = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((words.view(torch.uint8)[:, None] >> shift) & 1).view(torch.bool).flatten()[:count]


def is_set(words: Tensor, index: Tensor, bitmap: Tensor) -> Tensor:
    """Returns bit ``index`` of bitmap ``bitmap`` in ``words`` [F, W]: bool."""
    word = words.flatten()[bitmap * words.shape[1] + index // WORD_BITS]
    return (word >> (index % WORD_BITS)) & 1 == 1
