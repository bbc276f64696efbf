"""Filters as the kernels read them: a bit for each node of the trie, and short lists of closed nodes.

A node is open where an item is left below it. Both say so of nodes on every level, so that whoever walks the
trie asks one bit, and one short list. The same rules as ``FilterView`` in ``csrc/include/cemg/trie_view.h``.
F filters, B requests, H excluded items a request, X closed nodes a request, R rows, T nodes, N items.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.dispatch import pick
from ..runtime.ranges import ranged
from . import cuda_launch as trie_cuda
from . import reference as trie_walk
from .arrays import TrieArrays
from .packed import popcount

WORD_BITS = 64
NO_NODE = 2**31 - 1  # fills a list of closed nodes, and one of excluded ranks


class FilterTensors(NamedTuple):
    """``open`` [F, words] int64, a bit a node, empty where there are no bitmaps;
    ``filter_of`` [B] int32, the bitmap a request obeys, -1 for none; empty: all rows obey the first;
    ``closed`` [B, X] int32, ascending distinct nodes that the request closes besides, then ``NO_NODE``.
    Row r belongs to request r // (R // B).
    """

    open: Tensor
    filter_of: Tensor
    closed: Tensor

    @property
    def num_requests(self) -> int:
        """B; 0 where one filter serves all rows."""
        return max(self.filter_of.shape[0], self.closed.shape[0])

    def fields(self, rows: int) -> tuple[int, int, int, int, int, int]:
        """The fields of the C++ view for a call of ``rows`` rows: addresses, then sizes."""
        open_, filter_of, closed = (t.data_ptr() if t.numel() else 0 for t in self)
        per_request = max(1, rows // max(1, self.num_requests))
        return open_, filter_of, closed, self.open.shape[-1], self.closed.shape[-1], per_request

    def to(self, device: str | torch.device) -> FilterTensors:
        return FilterTensors(*(tensor.to(device) for tensor in self))

    def allows(self, nodes: Tensor) -> Tensor:
        """Which of ``nodes`` [R, ...] are open for their row, bool; not asked for what is no node."""
        flat = nodes.long().view(nodes.shape[0], nodes[:1].numel())  # [R, Y]
        rows = flat.shape[0]
        request = torch.arange(rows, device=flat.device) // max(1, rows // max(1, self.num_requests))
        left = torch.ones_like(flat, dtype=torch.bool)
        if self.open.numel():
            chosen = self.filter_of[request].long() if self.filter_of.numel() else torch.zeros_like(request)
            left = is_set(self.open, flat, chosen.clamp(min=0)[:, None]) | (chosen < 0)[:, None]
        if self.closed.numel():
            mine = self.closed.long()[request]  # [R, X]
            place = torch.searchsorted(mine, flat).clamp(max=mine.shape[1] - 1)
            left &= mine.gather(1, place) != flat
        return left.view(nodes.shape)


def open_nodes(trie: TrieArrays, by_rank: Tensor) -> Tensor:
    """The bitmap [words] int64 of the nodes above the items ``by_rank`` [N] bool, and of these."""
    above = torch.zeros(trie.num_inner, dtype=torch.bool, device=by_rank.device)
    return fill_inner(trie, pack_bits(torch.cat((above, by_rank))))


@ranged
def fill_inner(trie: TrieArrays, open: Tensor) -> Tensor:
    """``open`` [words] itself, whose leaves' bits are right, with those of all nodes above made right."""
    native = pick("trie", open.device) == "native"
    if native and open.device.type == "cpu":
        trie.view.open_inner(open.data_ptr())
        return open
    levels = list(pairwise(trie.level_begins))[::-1]
    if native:
        for begin, end in levels:
            words = (end - 1) // WORD_BITS - begin // WORD_BITS + 1
            trie_cuda.launch("open_level", trie, trie_cuda.NO_FILTER, (begin, end, open), words)
        return open
    bits = unpack_bits(open, trie.num_nodes)
    for begin, end in levels:
        first, last = trie_walk.child_range(trie, torch.arange(begin, end, device=open.device))
        below = bits.cumsum(0)  # of a node: how many are open up to itself
        bits[begin:end] = below[last - 1] > below[first - 1]
    return open.copy_(pack_bits(bits))


@ranged
def closed_nodes(trie: TrieArrays, open: Tensor, filter_of: Tensor, excluded: Tensor) -> Tensor:
    """What ``excluded`` [B, H] ranks (int32, ascending and distinct, then NO_NODE) close of what the bitmaps
    leave open: [B, X] int32, as in FilterTensors.
    """
    requests, most = excluded.shape
    if not excluded.numel():
        return excluded
    bitmaps = FilterTensors(open, filter_of, excluded.new_empty(0, 0))
    if pick("trie", excluded.device) == "native":
        excluded = excluded.contiguous()
        closed = excluded.new_empty(requests, most * trie.levels + 1)
        if closed.device.type == "cuda":
            arguments = excluded, most, trie.levels, closed
            trie_cuda.launch("close", trie, bitmaps.fields(requests), arguments, requests)
            return closed
        shape = (requests, most, trie.levels)
        fields = bitmaps.fields(requests)
        longest = trie.view.close_nodes(fields, excluded.data_ptr(), shape, closed.data_ptr())
        return closed[:, :longest].contiguous()
    leaves = torch.where(excluded == NO_NODE, NO_NODE, excluded + trie.num_inner)
    found = _closing(leaves, bitmaps.allows(leaves.clamp(max=trie.num_nodes - 1)))
    levels = [found]
    for _ in range(trie.levels):
        parents = trie_walk.parents(trie, found)  # [B, H]
        first, last = trie_walk.child_range(trie, parents)
        wide = found.long()
        here = torch.searchsorted(wide, last) - torch.searchsorted(wide, first)
        found = _closing(parents, (found != NO_NODE) & (here == _count_open(bitmaps, first, last)))
        levels.append(found)
    return distinct(torch.cat(levels, 1))


def _closing(nodes: Tensor, closes: Tensor) -> Tensor:
    return distinct(torch.where(closes, nodes, NO_NODE))


def _count_open(bitmaps: FilterTensors, first: Tensor, last: Tensor) -> Tensor:
    """How many nodes ``first`` [B, H] to ``last`` (half open) each row's bitmap leaves open."""
    if not bitmaps.open.numel():
        return last - first
    words = bitmaps.open.shape[1]
    counts = popcount(bitmaps.open).cumsum(1).flatten()
    chosen = bitmaps.filter_of.long()[:, None]

    def below(node: Tensor) -> Tensor:
        place = chosen.clamp(min=0) * words + node // WORD_BITS
        return counts[place] - popcount(bitmaps.open.flatten()[place] & (-1 << (node % WORD_BITS)))

    return torch.where(chosen < 0, last - first, below(last) - below(first))


def distinct(nodes: Tensor) -> Tensor:
    """Each row of [B, H] ascending, repeats replaced by ``NO_NODE`` at its end; int32."""
    nodes = nodes.to(torch.int32).sort(1).values
    again = torch.nn.functional.pad(nodes[:, 1:] == nodes[:, :-1], (1, 0)) if nodes.shape[1] else nodes > 0
    return nodes.masked_fill(again, NO_NODE).sort(1).values


def pack_bits(bits: Tensor) -> Tensor:
    """Bits [T] bool -> words [words] int64; zeros follow, and the last word's last bit is one of them."""
    padding = WORD_BITS - bits.numel() % WORD_BITS
    bytes_ = torch.nn.functional.pad(bits.view(torch.uint8), (0, padding)).view(-1, 8)
    weight = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bytes_ * weight).sum(1, dtype=torch.uint8).view(torch.int64)  # the lowest byte first


def unpack_bits(words: Tensor, count: int) -> Tensor:
    """The first ``count`` bits of words [words], bool."""
    place = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((words.view(torch.uint8)[:, None] >> place) & 1).view(torch.bool).flatten()[:count]


def is_set(words: Tensor, place: Tensor, filter: Tensor) -> Tensor:
    """The bit of ``place`` in each of the bitmaps ``filter`` of ``words`` [F, W], bool."""
    word = words.flatten()[filter * words.shape[1] + place // WORD_BITS]
    return (word >> (place % WORD_BITS)) & 1 == 1
