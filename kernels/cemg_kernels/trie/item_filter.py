"""Any subset of the catalog as a constraint on the trie: a bit for each of its nodes.

N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime.operands import device_of, integers_on, tensor_of
from .arrays import TrieArrays
from .filter_tensors import (
    NO_NODE,
    WORD_BITS,
    FilterTensors,
    closed_nodes,
    distinct,
    fill_inner,
    is_set,
    open_nodes,
    unpack_bits,
)
from .packed import popcount

if TYPE_CHECKING:
    from ..runtime.operands import Numbers
    from .request_filter import RequestFilter
    from .trie import Trie


class ItemFilter:
    """The allowed items of one trie. Combine with ``&``, ``|`` and ``~``; pass as ``filter=``.

    One filter for all rows of a call; ``ItemFilter.stack`` makes of several what gives each request its
    own. A filter belongs to the trie it was made from (or its copy on another device): another trie
    refuses it with ValueError.
    """

    __slots__ = ("__weakref__", "fingerprint", "tensors", "trie")

    def __init__(self, trie: TrieArrays, open: Tensor, fingerprint: str) -> None:
        """Internal: ``open`` [words] int64 as ``open_nodes`` makes them; ValueError for another trie's."""
        if open.dtype != torch.int64 or open.shape != (trie.num_nodes // WORD_BITS + 1,):
            raise ValueError(
                f"a filter of {trie.num_nodes} nodes has int64 [{trie.num_nodes // WORD_BITS + 1}] words, "
                f"got {open.dtype} {list(open.shape)}; make it with ItemFilter.from_mask"
            )
        self.trie, self.fingerprint = trie, fingerprint
        none = torch.empty(0, 0, dtype=torch.int32, device=open.device)
        self.tensors = FilterTensors(open[None], none.flatten(), none)

    @classmethod
    def from_mask(cls, trie: Trie, allowed: Numbers) -> ItemFilter:
        """Allow the rows where ``allowed`` [N] bool is True, in the order ``Trie.from_codes`` was given.

        A numpy array or a list may be given, too. Raises ValueError where the shape or dtype is another.
        """
        allowed = tensor_of("allowed", allowed)
        if allowed.shape != (trie.num_items,) or allowed.dtype != torch.bool:
            raise ValueError(
                f"allowed must be bool [{trie.num_items}], got {allowed.dtype} {list(allowed.shape)}; "
                "one entry for each item of the trie"
            )
        by_rank = allowed.to(trie.device).index_select(0, trie.rows)  # [N]
        return cls(trie.arrays, open_nodes(trie.arrays, by_rank), trie.fingerprint)

    @classmethod
    def everything(cls, trie: Trie) -> ItemFilter:
        """Allow all items."""
        every = torch.ones(trie.num_items, dtype=torch.bool, device=trie.device)
        return cls(trie.arrays, open_nodes(trie.arrays, every), trie.fingerprint)

    @classmethod
    def from_items(cls, trie: Trie, allowed_ids: Numbers) -> ItemFilter:
        """Allow the items with these ids, and no others; ValueError names an id the trie does not have."""
        ids = integers_on("allowed_ids", allowed_ids, trie.device).flatten()
        rank = trie.ranks_of(ids)
        unknown = ids[rank < 0]
        if unknown.numel():
            raise ValueError(f"no item of this trie has the id {int(unknown[0])}; pass ids of its items")
        by_rank = torch.zeros(trie.num_items, dtype=torch.bool, device=trie.device)
        by_rank[rank] = True
        return cls(trie.arrays, open_nodes(trie.arrays, by_rank), trie.fingerprint)

    @staticmethod
    def stack(filters: Sequence[ItemFilter | None]) -> RequestFilter:
        """A filter for each request of a batch, None where all items are allowed."""
        from .request_filter import RequestFilter

        return RequestFilter.stack(filters)

    @property
    def device(self) -> torch.device:
        return self.tensors.open.device

    @property
    def open(self) -> Tensor:
        """A bit for each node, set where an allowed item is below: [words] int64."""
        return self.tensors.open[0]

    def __and__(self, other: ItemFilter) -> ItemFilter:
        """The items that both allow."""
        if not isinstance(other, ItemFilter):
            return NotImplemented
        return self._with(fill_inner(self.trie, self.open & self._matching(other).open))

    def __or__(self, other: ItemFilter) -> ItemFilter:
        """The items that either allows."""
        if not isinstance(other, ItemFilter):
            return NotImplemented
        return self._with(self.open | self._matching(other).open)

    def __invert__(self) -> ItemFilter:
        """The items that this one does not allow."""
        flipped = ~self.open
        flipped[-1] &= (1 << self.trie.num_nodes % WORD_BITS) - 1  # no bit beyond the last node
        return self._with(fill_inner(self.trie, flipped))

    def __len__(self) -> int:
        """How many items are allowed."""
        first, bit = divmod(self.trie.num_inner, WORD_BITS)  # of the leaves
        return int(popcount(self.open[first:]).sum() - popcount(self.open[first] & ((1 << bit) - 1)))

    def __bool__(self) -> bool:
        """True: a filter that allows nothing is still a filter."""
        return True

    def to(self, device: str | torch.device) -> ItemFilter:
        """The same filter on another device."""
        device = device_of(device)
        return ItemFilter(self.trie.to(device), self.open.to(device), self.fingerprint)

    def without_ranks(self, ranks: Numbers) -> ItemFilter:
        """This filter less the items of these ranks (any shape): a walk from each to the root.

        Raises ValueError for a rank that the trie does not have.
        """
        excluded = distinct(self._ranks(ranks).flatten()[None])
        first = torch.zeros(1, dtype=torch.int32, device=self.device)
        closed = closed_nodes(self.trie, self.tensors.open, first, excluded).flatten().long()
        closed = closed[closed != NO_NODE]
        bits = torch.zeros_like(self.open)
        bits.index_add_(0, closed // WORD_BITS, torch.ones_like(closed) << (closed % WORD_BITS))
        return self._with(self.open & ~bits)

    def by_rank(self) -> Tensor:
        """Whether each rank is allowed, bool [N]."""
        return unpack_bits(self.open, self.trie.num_nodes)[self.trie.num_inner :]

    def allows_ranks(self, ranks: Numbers) -> Tensor:
        """Whether each of ``ranks`` (any shape) is allowed, bool; ValueError for one that there is not."""
        ranks = self._ranks(ranks)
        return is_set(self.tensors.open, ranks + self.trie.num_inner, torch.zeros_like(ranks))

    def _ranks(self, ranks: Numbers) -> Tensor:
        """Checked ranks, int64, on the filter's device."""
        found, items = integers_on("ranks", ranks, self.device), self.trie.rows.numel()
        if found.numel():
            lowest, highest = map(int, found.aminmax())
            if lowest < 0 or highest >= items:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(f"ranks are 0 to {items - 1}, got {wrong}; Trie.ranks_of gives an id's")
        return found

    def _matching(self, other: ItemFilter) -> ItemFilter:
        if other.fingerprint != self.fingerprint:
            raise ValueError("these filters belong to different tries; make both from the same trie")
        if other.device != self.device:
            raise ValueError(f"these filters are on {self.device} and {other.device}; move one with .to()")
        return other

    def _with(self, open: Tensor) -> ItemFilter:
        return ItemFilter(self.trie, open, self.fingerprint)
