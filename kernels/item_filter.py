"""Any subset of the catalog as a constraint on the trie. 1.06 bits an item.

N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .filter_tensors import WORD_BITS, FilterTensors, no_requests, pack, popcount, with_counts

if TYPE_CHECKING:
    from .request_filter import RequestFilter
    from .trie import Trie


class ItemFilter:
    """The allowed items of one trie. Combine with ``&``, ``|`` and ``~``; pass as ``filter=``.

    One filter for all rows of a call; ``ItemFilter.stack`` makes of several what gives each request its
    own. A filter belongs to the trie it was made from (or its copy on another device): another trie
    refuses it with ValueError.
    """

    __slots__ = ("fingerprint", "num_items", "tensors")

    def __init__(self, words: Tensor, num_items: int, fingerprint: str) -> None:
        """Internal: ``words`` [blocks * 8] int64 as ``pack`` makes them."""
        self.num_items, self.fingerprint = num_items, fingerprint
        self.tensors: FilterTensors = with_counts(words[None], *no_requests(words.device))

    @classmethod
    def from_mask(cls, trie: Trie, allowed: Tensor) -> ItemFilter:
        """Allow the rows where ``allowed`` [N] bool is True, in the order ``Trie.from_codes`` was given.

        Raises ValueError where the shape or dtype is another.
        """
        if allowed.shape != (trie.num_items,) or allowed.dtype != torch.bool:
            raise ValueError(
                f"allowed must be bool [{trie.num_items}], got {allowed.dtype} {list(allowed.shape)}; "
                "one entry for each item of the trie"
            )
        by_rank = allowed.to(trie.device).index_select(0, trie.rows)  # [N]
        return cls(pack(by_rank), trie.num_items, trie.fingerprint)

    @classmethod
    def everything(cls, trie: Trie) -> ItemFilter:
        """Allow all items."""
        every = torch.ones(trie.num_items, dtype=torch.bool, device=trie.device)
        return cls(pack(every), trie.num_items, trie.fingerprint)

    @classmethod
    def from_items(cls, trie: Trie, allowed_ids: Tensor | Sequence[int]) -> ItemFilter:
        """Allow the items with these ids, and no others; ValueError names an id the trie does not have."""
        ids = torch.as_tensor(allowed_ids, dtype=torch.int64, device=trie.device).flatten()
        rank = trie.ranks_of(ids)
        unknown = ids[rank < 0]
        if unknown.numel():
            raise ValueError(f"no item of this trie has the id {int(unknown[0])}; pass ids of its items")
        by_rank = torch.zeros(trie.num_items, dtype=torch.bool, device=trie.device)
        by_rank[rank] = True
        return cls(pack(by_rank), trie.num_items, trie.fingerprint)

    @staticmethod
    def stack(filters: Sequence[ItemFilter | None]) -> RequestFilter:
        """A filter for each request of a batch, None where all items are allowed."""
        from .request_filter import RequestFilter

        return RequestFilter.stack(filters)

    @property
    def device(self) -> torch.device:
        return self.tensors.words.device

    @property
    def words(self) -> Tensor:
        """The bits, [blocks * 8] int64."""
        return self.tensors.words[0]

    @property
    def before(self) -> Tensor:
        """The allowed items before each block of 512 ranks, [blocks] int32."""
        return self.tensors.before[0]

    def __and__(self, other: ItemFilter) -> ItemFilter:
        """The items that both allow."""
        if not isinstance(other, ItemFilter):
            return NotImplemented
        return self._with(self.words & self._matching(other).words)

    def __or__(self, other: ItemFilter) -> ItemFilter:
        """The items that either allows."""
        if not isinstance(other, ItemFilter):
            return NotImplemented
        return self._with(self.words | self._matching(other).words)

    def __invert__(self) -> ItemFilter:
        """The items that this one does not allow."""
        every = pack(torch.ones(self.num_items, dtype=torch.bool, device=self.device))
        return self._with(~self.words & every)

    def __len__(self) -> int:
        """How many items are allowed."""
        return int(popcount(self.words).sum())

    def __bool__(self) -> bool:
        """True: a filter that allows nothing is still a filter."""
        return True

    def to(self, device: str | torch.device) -> ItemFilter:
        """The same filter on another device."""
        return ItemFilter(self.words.to(device), self.num_items, self.fingerprint)

    def without_ranks(self, ranks: Tensor) -> ItemFilter:
        """This filter less the items of these distinct ranks, [R] integers; touches only the bitmap."""
        ranks = ranks.long()
        bits = torch.zeros_like(self.words)
        bits.index_add_(0, ranks // WORD_BITS, torch.ones_like(ranks) << (ranks % WORD_BITS))
        return self._with(self.words & ~bits)

    def by_rank(self) -> Tensor:
        """Whether each rank is allowed, bool [N]."""
        place = torch.arange(WORD_BITS, device=self.device)
        return ((self.words[:, None] >> place) & 1 == 1).flatten()[: self.num_items]

    def count(self, low: Tensor, high: Tensor) -> Tensor:
        """Allowed items of ranks ``low`` to ``high`` (half open; any shape), int64."""
        first = torch.zeros((), dtype=torch.int64, device=self.device)
        return self.tensors.count_below(high, first) - self.tensors.count_below(low, first)

    def _matching(self, other: ItemFilter) -> ItemFilter:
        if other.fingerprint != self.fingerprint:
            raise ValueError("these filters belong to different tries; make both from the same trie")
        return other

    def _with(self, words: Tensor) -> ItemFilter:
        return ItemFilter(words, self.num_items, self.fingerprint)
