"""A filter for each request of a batch: its own subset of the catalog, and items of its own left out.

B requests, F distinct filters among them, H excluded items a request, R rows of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .filter_tensors import NO_NODE, FilterTensors, closed_nodes, distinct
from .item_filter import ItemFilter
from .trie_arrays import TrieArrays

if TYPE_CHECKING:
    from .trie import Trie


class RequestFilter:
    """Filters of ``num_requests`` requests; ``&`` combines with another or with an ItemFilter; pass as
    ``filter=``.

    In a call of R rows, row r belongs to request r // (R // B): the beams of a request stand together. R
    must be a multiple of B. A filter given to several requests is kept once.
    """

    __slots__ = ("excluded", "filter_of", "filters", "fingerprint", "num_requests", "tensors", "trie")

    def __init__(
        self, trie: TrieArrays, fingerprint: str, filters: Sequence[ItemFilter], filter_of: Sequence[int],
        excluded: Tensor, tensors: FilterTensors | None = None,
    ) -> None:  # fmt: skip
        """Internal: ``filter_of`` [B] the place of each request's filter in ``filters``, -1 for none;
        ``excluded`` [B, H] int32 ranks, ascending and distinct, then NO_NODE; ``tensors`` of all this.
        """
        self.trie, self.fingerprint, self.filters, self.excluded = trie, fingerprint, filters, excluded
        self.filter_of, self.num_requests = filter_of, len(filter_of)
        self.tensors: FilterTensors = tensors or _tensors_of(trie, filters, filter_of, excluded)

    @classmethod
    def stack(cls, filters: Sequence[ItemFilter | None]) -> RequestFilter:
        """One filter a request, None where all items are allowed; at least one must be a filter.

        Raises ValueError where they belong to different tries or devices.
        """
        distinct_filters = list({id(one): one for one in filters if one is not None}.values())
        if not distinct_filters:
            raise ValueError("a stack needs at least one ItemFilter; pass filter=None where all is allowed")
        first = distinct_filters[0]
        for one in distinct_filters:
            if one.fingerprint != first.fingerprint or one.device != first.device:
                raise ValueError("the filters of a stack belong to one trie on one device; these do not")
        place = {id(one): index for index, one in enumerate(distinct_filters)} | {id(None): -1}
        filter_of = [place[id(one)] for one in filters]
        none = torch.empty(len(filters), 0, dtype=torch.int32, device=first.device)
        return cls(first.trie, first.fingerprint, distinct_filters, filter_of, none)

    @classmethod
    def excluding(cls, trie: Trie, ids: Tensor | Sequence[Sequence[int]]) -> RequestFilter:
        """Everything but, for each request, the items of its row of ``ids`` [B, H], padded with -1.

        "Not what this user had already". Ids the trie does not have, and repeats, change nothing. H ranks
        are kept a request, so that short lists cost little. Rows of different lengths may be given as lists.
        """
        if not isinstance(ids, Tensor):
            most = max((len(row) for row in ids), default=0)
            ids = torch.tensor([[*row, *[-1] * (most - len(row))] for row in ids]).view(len(ids), most).long()
        if ids.dim() != 2 or ids.shape[0] < 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"excluded ids must be integers [B, H], a row a request, got {ids.dtype} {list(ids.shape)}"
            )
        rank = trie.ranks_of(ids.to(trie.device, torch.int64))
        excluded = distinct(torch.where(rank < 0, NO_NODE, rank))
        return cls(trie.arrays, trie.fingerprint, (), [-1] * ids.shape[0], excluded)

    @property
    def device(self) -> torch.device:
        return self.excluded.device

    def __and__(self, other: RequestFilter | ItemFilter) -> RequestFilter:
        """What both allow, request by request; an ItemFilter counts for every request."""
        if isinstance(other, ItemFilter):
            other = RequestFilter.stack([other] * self.num_requests)
        if not isinstance(other, RequestFilter):
            return NotImplemented
        if other.fingerprint != self.fingerprint or other.num_requests != self.num_requests:
            raise ValueError(
                f"filters of {self.num_requests} and {other.num_requests} requests do not combine, nor those "
                "of different tries; make both from the same trie, a row a request"
            )
        filters, filter_of = _both(self, other)
        excluded = distinct(torch.cat((self.excluded, other.excluded), 1))
        return RequestFilter(self.trie, self.fingerprint, filters, filter_of, excluded)

    __rand__ = __and__

    def of_requests(self) -> list[ItemFilter | None]:
        """The filter of each request, None where it has none; the exclusions apart."""
        return [self.filters[place] if place >= 0 else None for place in self.filter_of]

    def with_filters(self, filters: Sequence[ItemFilter]) -> RequestFilter:
        """The same exclusions under other filters, one a request."""
        other = RequestFilter.stack(filters)
        return RequestFilter(self.trie, self.fingerprint, other.filters, other.filter_of, self.excluded)

    def select(self, requests: Tensor) -> RequestFilter:
        """The filter of another batch: its request i is request ``requests[i]`` of this one."""
        chosen = requests.to(self.device, torch.int64)
        filter_of = [self.filter_of[request] for request in requests.tolist()]
        old = self.tensors
        places = old.filter_of[chosen] if old.filter_of.numel() else old.filter_of
        tensors = FilterTensors(old.open, places, old.closed[chosen])
        return RequestFilter(
            self.trie, self.fingerprint, self.filters, filter_of, self.excluded[chosen], tensors
        )

    def to(self, device: str | torch.device) -> RequestFilter:
        """The same filter on another device."""
        filters = [one.to(device) for one in self.filters]
        tensors = self.tensors.to(device)
        return RequestFilter(
            self.trie, self.fingerprint, filters, self.filter_of, self.excluded.to(device), tensors
        )


def _tensors_of(
    trie: TrieArrays, filters: Sequence[ItemFilter], filter_of: Sequence[int], excluded: Tensor
) -> FilterTensors:
    device = excluded.device
    places = torch.tensor(filter_of if filters else [], dtype=torch.int32, device=device)
    bitmaps = [one.tensors.open for one in filters]
    if not bitmaps:
        open_ = torch.empty(0, 0, dtype=torch.int64, device=device)
    else:
        open_ = bitmaps[0] if len(bitmaps) == 1 else torch.cat(bitmaps)
    here = trie if trie.code.device == device else trie.to(device)
    return FilterTensors(open_, places, closed_nodes(here, open_, places, excluded))


def _both(left: RequestFilter, right: RequestFilter) -> tuple[list[ItemFilter], list[int]]:
    """The filters of what both allow, each once, and which of them each request obeys."""
    pairs = list(zip(left.filter_of, right.filter_of, strict=True))
    filters: list[ItemFilter] = []
    place = {(-1, -1): -1}
    for i, j in pairs:
        if (i, j) in place:
            continue
        place[i, j] = len(filters)
        a, b = left.filters[i] if i >= 0 else None, right.filters[j] if j >= 0 else None
        filters.append(a & b if a and b else a or b)  # type: ignore[arg-type]
    return filters, [place[pair] for pair in pairs]
